"""Erasing in materialised neighbours: slots of what is erased are zeroed, rows stay.

A file holds chunks of the databases that its entry in the log names. Where one of them is the store that is erased in,
the tokens of victims go, as neighbours (their id becomes −2: the reader takes the row from the table) and as
continuations; where the file's own rows are victims, all of the row. In other stores that have this one as their
database, ``EraseConsumedStage`` does the same; which stores these are is for the caller to know.

A database is known by its uuid, and by a commit of its log: a copy that went its own way has other chunks of the same
ids. Cost: reading the ids of every file, and writing those that hold a victim. Memory: one row group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from retrotool.embed.search_scope import has_commit
from retrotool.engine.stage import Report, Task, task_key
from retrotool.errors import CorruptError, ErasedError
from retrotool.store import materialised, staging
from retrotool.store.atomic import FileEntry
from retrotool.store.materialised import ERASED, Materialised
from retrotool.store.parts import ROW_GROUP
from retrotool.store.paths import FileName
from retrotool.store.staging import Staged
from retrotool.store.store import Store
from retrotool.store.tables import NO_NEIGHBOUR
from retrotool.store.tombstones import Tombstones

Rows = npt.NDArray[np.int64]


def databases_within(entry: FileEntry) -> list[int]:
    """Numbers of a file's databases that are the store which it lies in."""
    return [number for number, told in enumerate(_databases(entry)) if told["within"]]


def databases_at(entry: FileEntry, database: Store) -> list[int]:
    """Numbers of a file's databases that are ``database``, another store."""
    return [
        number
        for number, told in enumerate(_databases(entry))
        if not told["within"]
        and told["uuid"] == database.identity.uuid
        and has_commit(database, int(told["commit"]), str(told["head"]))
    ]


def _databases(entry: FileEntry) -> list[dict[str, Any]]:
    return list((entry.about or {}).get("databases", ()))


def holds(store: Store, entry: FileEntry, victims: Tombstones, databases: list[int], rows: Rows) -> bool:
    """Whether a file holds any of ``victims``, chunks of ``databases``, or anything in ``rows`` of its own."""
    if not (databases or len(rows)):
        return False
    for group in range(-(-entry.rows // ROW_GROUP)):
        stored = materialised.read_materialised(store, entry, [group], tokens=False)
        whole, following = _hits(stored, victims, databases)
        mine = _of_group(rows, group)
        if whole.any() or following.any() or (stored.ids[mine] != NO_NEIGHBOUR).any():
            return True
    return False


def rewrite(
    store: Store, entry: FileEntry, name: FileName, victims: Tombstones, databases: list[int], rows: Rows
) -> FileEntry:
    """Write a file again without what ``holds`` looks for."""
    own = store.identity

    def groups() -> Iterator[Materialised]:
        for group in range(-(-entry.rows // ROW_GROUP)):
            stored = materialised.read_materialised(store, entry, [group])
            whole, following = _hits(stored, victims, databases)
            ids, which, n_tokens, tokens = (
                np.array(values) for values in (stored.ids, stored.databases, stored.n_tokens, stored.tokens)
            )
            mine = _of_group(rows, group)
            ids[whole], which[whole] = ERASED, 0
            ids[mine], which[mine] = NO_NEIGHBOUR, 0
            whole[mine] = True
            n_tokens[whole], tokens[whole] = 0, 0
            n_tokens[:, :, 1][following], tokens[:, :, 1][following] = 0, 0
            yield Materialised(ids, which, n_tokens, tokens)

    about = entry.about or {}
    return materialised.write_materialised(
        store.root, name, int(about["k"]), own.chunk_length * own.tokenizer.token_bytes, groups(), about=about
    )


def _hits(
    stored: Materialised, victims: Tombstones, databases: list[int]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which slots have a victim for a neighbour, and which have one for a continuation, bool [n, k] each."""
    of = np.isin(stored.databases, databases) & (stored.ids > NO_NEIGHBOUR)
    return of & victims.contains(stored.ids), of & victims.contains(stored.ids + 1) & (stored.n_tokens[:, :, 1] > 0)


def _of_group(rows: Rows, group: int) -> Rows:
    low, high = np.searchsorted(rows, [group * ROW_GROUP, (group + 1) * ROW_GROUP])
    return rows[low:high] - group * ROW_GROUP


def digest(ids: Rows) -> str:
    """Stands for ids in the name of a task."""
    return hashlib.blake2b(ids.tobytes(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class EraseConsumedStage:
    """Materialised files, in another store, that still hold any of ``victims`` of the store ``database`` (a path)."""

    victims: Tombstones
    database: str
    name: str = field(default="erase", init=False)
    unit: str = field(default="file", init=False)

    def plan(self, store: Store) -> list[Task]:
        """One task a file that holds something of a victim; ``store`` is the other store, the consumer."""
        database, victims = Store.open(self.database), self.victims
        nothing = np.zeros(0, np.int64)
        tasks = []
        for name in store.state.names("materialised"):
            for slot in store.state.group("materialised", name):
                entry = store.state.file("materialised", slot, name)
                if entry is None or not holds(store, entry, victims, databases_at(entry, database), nothing):
                    continue
                settings = {"victims": digest(victims.ids), "database": database.identity.uuid}
                key = task_key("erase", settings, [entry.path])
                if not staging.is_staged(store.root, key):
                    tasks.append(Task(key, f"materialised {name} {slot}", 1, {"path": entry.path}))
        return tasks

    def open(self, store: Store) -> EraseConsumedWorker:
        """Open the database."""
        return EraseConsumedWorker(store, Store.open(self.database), self.victims)


class EraseConsumedWorker:
    """Rewrites materialised files of a store without victims that are chunks of another."""

    def __init__(self, store: Store, database: Store, victims: Tombstones) -> None:
        self._store, self._database, self._victims = store, database, victims

    def __call__(self, task: Task, run: str, report: Report) -> Staged:
        """Rewrite one file; ``ErasedError`` if it was replaced meanwhile."""
        path = str(task.inputs["path"])
        name = FileName.parse(path)
        entry = self._entry(name, path)
        new = FileName.new(run, name.kind, name.slot, name.extension, name.name)
        databases = databases_at(entry, self._database)
        try:
            written = rewrite(self._store, entry, new, self._victims, databases, np.zeros(0, np.int64))
        except CorruptError:
            self._entry(name, path)
            raise
        report(task.weight)
        return Staged(task.key, "erase", run, reads=(path,), add=(written,), remove=(path,))

    def _entry(self, name: FileName, path: str) -> FileEntry:
        entry = self._store.refresh().file(name.kind, name.slot, name.name)
        if entry is None or entry.path != path:
            raise ErasedError(f"{path} was replaced meanwhile")
        return entry
