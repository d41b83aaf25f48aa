"""A problem that ``verify`` found, and what repairs it.

``retrotool repair`` rebuilds what was derived from chunks: embeddings, indexes, neighbour tables, scans,
checkpoints, staged tasks. Everything else has to come from a backup.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from retrotool.cli.command_lines import command_line
from retrotool.cli.output import count, one_line
from retrotool.errors import CorruptError, ErasedError
from retrotool.store import parts
from retrotool.store.paths import FOLDERS, NAMED_KINDS, UNNUMBERED_KINDS
from retrotool.store.store import Store

DERIVED = (*(kind for kind in NAMED_KINDS if kind != "edits"), "staging", "checkpoints")
_NAMED = 5
_LINK = "Replace the link with the file or folder that it points to, or remove it."


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong: in words, and in which file; ``path`` is empty for a wrong record of the log.

    ``kind`` is the folder of the file, ``link``, or ``store`` for everything else. ``repairable``: the
    ``remedy`` is the command ``retrotool repair``; otherwise it is a sentence.
    """

    kind: str
    path: str
    text: str
    remedy: str
    repairable: bool = False

    def __str__(self) -> str:
        return self.text

    def doubtful(self) -> Problem:
        """Return the problem as one that may follow from damage which ``repair`` can't undo."""
        wait = "It may follow from the other problems: verify again when these are solved."
        return replace(self, remedy=wait, repairable=False) if self.repairable and self.kind in NAMED_KINDS else self


def problem_with(store: Store, path: str, text: str, *, is_link: bool = False) -> Problem:
    """Return a problem with a file, or with ``path`` "" if it is not in one file, and its remedy."""
    folder, _, rest = path.partition("/")
    kind = "link" if is_link else folder if folder in FOLDERS else "store"
    origin = store.state.records.get(f"encoder:{rest.partition('/')[0]}", {})
    if kind in DERIVED and not (kind == "embeddings" and origin.get("foreign")):
        return Problem(kind, path, text, command_line("repair", store), repairable=True)
    lost = _lost(store, path) if kind in UNNUMBERED_KINDS else ""
    return Problem(kind, path, text, _LINK if is_link else f"Restore {path or 'the store'} from a backup.{lost}")


def _lost(store: Store, path: str) -> str:
    """Return what is lost with a file of documents or chunks."""
    part = int(store.state.slot_of(path) or 0)
    entries = [store.state.part_file(kind, part) for kind in UNNUMBERED_KINDS]
    documents, chunks = (0 if entry is None else entry.rows for entry in entries)
    inputs, beside = _inputs_of(store, part), {**_inputs_of(store, part - 1), **_inputs_of(store, part + 1)}
    some = list(map(one_line, inputs or beside))
    more = f" and {count(len(some) - _NAMED, 'other input')}" if len(some) > _NAMED else ""
    names = ", ".join(some[:_NAMED]) + more or "unknown inputs"
    source = names if inputs else f"the inputs of the parts beside it: {names}"
    return (
        f" Without one, part {part} is lost: {count(documents, 'document')}, {count(chunks, 'chunk')}, from {source}. "
        "Then chunk all inputs into a new store."
    )


def _inputs_of(store: Store, part: int) -> dict[str, None]:
    """Return the inputs of a part's documents, none if that column can't be read."""
    with suppress(CorruptError, ErasedError):
        return dict.fromkeys(filter(None, parts.read_documents(store, part, ["input"])["input"].unique().to_pylist()))
    return {}


def problem_lines(problems: Sequence[Problem]) -> list[str]:
    """Return the lines that show problems: those with the same remedy together, before it."""
    lines = []
    for remedy in dict.fromkeys(problem.remedy for problem in problems):
        lines += [f"  problem: {problem.text}" for problem in problems if problem.remedy == remedy]
        lines.append(f"    remedy: {remedy}")
    return lines
