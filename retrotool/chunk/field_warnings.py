"""What ``chunk`` says of fields that were asked for and are not there: it may be a slip of the pen."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence

import pyarrow.parquet as pq

from retrotool import sources
from retrotool.chunk.chunk_result import ChunkResult
from retrotool.errors import ErasedError
from retrotool.sources import InputFile
from retrotool.store import parts
from retrotool.store.store import Store

_LOOKED_AT = 64
"""Parts whose columns are looked at."""
_NAMED = 12

Note = Callable[[str], object]


def tell_names(result: ChunkResult, files: Sequence[InputFile], note: Note) -> None:
    """Say which fields rows have that were set aside for the one they lack."""
    by_path = {file.path: file for file in files}
    for reason in result.reasons:
        lacking = re.fullmatch("no field '(.+)'", reason.reason)
        if lacking is None or reason.input not in by_path:
            continue
        names = sources.names_without(by_path[reason.input], lacking[1])
        if names:
            more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
            listed = ", ".join(map(repr, names[:_NAMED]))
            note(f"{reason.input}: the first row without {lacking[1]!r} has {listed}{more}.")


def tell_kept(store: Store, new: Sequence[int], keep: Sequence[str], known: int, note: Note) -> None:
    """Say which fields that are to be kept no row of the ``new`` parts has, and which inputs read before lack."""
    with contextlib.suppress(ErasedError):  # by another process, just now
        _tell_kept(store, new, keep, known, note)


def _tell_kept(store: Store, new: Sequence[int], keep: Sequence[str], known: int, note: Note) -> None:
    for name in keep:
        if new and not any(_has_values(store, part, name) for part in new):
            note(f"--keep {name}: no row has this field, so its column is empty.")
    some = [part for part in store.state.parts() if part not in new][:_LOOKED_AT]
    if known and some:
        lost = [name for name in keep if not any(_has_column(store, part, name) for part in some)]
        if lost:
            what = (
                "1 input is in the store already, and stays"
                if known == 1
                else (f"{known:,} inputs are in the store already, and stay")
            )
            note(f"--keep {', '.join(lost)}: {what} without it.")


def _has_column(store: Store, part: int, name: str) -> bool:
    entry = parts.part_entry(store, "documents", part)
    return name in pq.read_schema(store.path(entry)).names


def _has_values(store: Store, part: int, name: str) -> bool:
    if not _has_column(store, part, name):
        return False
    column = parts.read_documents(store, part, [name])[name]
    return bool(column.null_count < len(column))
