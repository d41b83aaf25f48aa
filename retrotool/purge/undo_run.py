"""``purge --restore``: take a purge back, and say what was made while its chunks were purged.

Tables that lack the chunks are not brought up to date here: that takes what they took. The result names each with the
command that does it. An index has the chunks all the time, until they are erased.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from retrotool.cli.command_lines import neighbours_command
from retrotool.errors import RetrotoolError
from retrotool.neighbours.dependents import dependents
from retrotool.neighbours.stage import members_of
from retrotool.neighbours.weighted import mixtures_with
from retrotool.purge import undo as restoring
from retrotool.purge.erase_run import until_not_overtaken
from retrotool.purge.select import signed
from retrotool.store.session import writing
from retrotool.store.store import Store


@dataclass(frozen=True, slots=True)
class TablesLack:
    """Neighbours that were found while chunks were purged: in how many ``parts``, and what brings them up to date.

    ``path`` is the store that they lie in; ``there``: whether it could be looked at.
    """

    path: str
    table: str
    parts: int
    command: str
    there: bool = True


@dataclass(frozen=True, slots=True)
class RestoreResult:
    """What ``restore`` did: the chunks that are living again, whole ``documents`` and ``tokens`` among them.

    ``still_purged`` chunks of the purge are not, as the purges ``named_by`` name them, or they repeat others.
    ``repeats`` are documents whose id another living document has, since it was let in meanwhile. ``tables`` lack
    what is living again until their commands are run.
    """

    purge: str
    chunks: int
    documents: int
    tokens: int
    still_purged: int
    commit: int
    named_by: tuple[str, ...] = ()
    repeats: int = 0
    tables: tuple[TablesLack, ...] = field(default=())


def restore(root: str | Path, purge: str, *, reason: str, who: str | None = None) -> RestoreResult:
    """Take the purge ``purge`` back; ``UsageError`` if there is none, it was before, or an erase of it was begun.

    ``reason`` and ``who`` (None: the user of this process) stay in the log.
    """
    who = signed(reason, who)
    store = Store.open(root)
    with writing(store) as run:  # which takes away what one that was killed left of the files

        def attempt() -> RestoreResult:
            found = restoring.weigh(store, purge)
            state = restoring.commit_restore(store, run, found, reason, who)
            return RestoreResult(
                purge, len(found.living), found.documents, found.tokens, len(found.chunks) - len(found.living),
                int(state.records[f"purge:{purge}"]["restored"]), found.named_by, found.repeats,
            )  # fmt: skip

        done = until_not_overtaken(store, attempt)
    store.refresh()
    return replace(done, tables=tuple(lacking_tables(store, root)))


def lacking_tables(store: Store, root: str | Path) -> list[TablesLack]:
    """Neighbours, in a store and in others that are known to use it, that lack chunks which were taken back."""
    names = store.state.names("neighbours")
    own = (_lacking(store, str(root), name, tables_command(store, root, name)) for name in names)
    found = [one for one in own if one is not None]
    others = (TablesLack(one.path, one.table, 0, one.command, there=False) for one in dependents(store))
    return [*found, *others]


def _lacking(store: Store, path: str, name: str, command: str) -> TablesLack | None:
    """What the neighbours ``name`` of a store lack; None: nothing. Of a mixture its tables tell."""
    parts = count_behind(store, name)
    if parts is None:
        return TablesLack(path, name, 0, command, there=False)
    return TablesLack(path, name, parts, command) if parts else None


def count_behind(store: Store, name: str) -> int | None:
    """In how many parts the table ``name`` lacks what was taken back; None if its database is not where it was."""
    if "mix" in store.state.records.get(f"neighbours:{name}", {}):
        return 0  # counted with its tables
    try:
        return len(restoring.behind(store, name))
    except (RetrotoolError, OSError):
        return None


def tables_command(store: Store, root: str | Path, name: str) -> str:
    """The command that brings the neighbours ``name`` of a store up to date; of a mixture all of its tables."""
    name = next(iter(mixtures_with(store.state, name)), name)
    first = members_of(store, name)[0][0]
    record = store.state.records[f"neighbours:{first}"]
    own = record.get("within", record["database"] == store.identity.uuid)
    return neighbours_command(root if own else record["path"], None if own and first == name else root, name, record)
