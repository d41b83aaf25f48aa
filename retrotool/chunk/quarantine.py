"""Rejected rows of a unit, about 30 bytes each in memory, as a wrong ``--text-field`` can reject every row.

Only the first rows keep an excerpt, and only the first ten thousand reasons keep their numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pyarrow as pa

from retrotool.chunk.chunk_plan import files_of_plan
from retrotool.errors import InputError
from retrotool.sources import Rejected
from retrotool.store import parts
from retrotool.store.leases import Run
from retrotool.store.log import FileEntry
from retrotool.store.paths import FileName
from retrotool.store.state import State
from retrotool.store.store import Store

_BATCH_ROWS = 1 << 16
EXCERPTS = 1000
REASONS = 10_000
_PACKED = pa.schema([
    field.with_type(pa.dictionary(pa.int32(), pa.string())) if field.name in ("input", "reason") else field
    for field in parts.QUARANTINE_SCHEMA
])  # fmt: skip
_NUMBER = re.compile(r"(?<!UTF-)\d[\d,.]*")


def without_numbers(reason: str) -> str:
    """Replace the numbers in a reason, which differ from row to row."""
    return _NUMBER.sub("…", reason)


class Quarantine:
    """Collects rejected rows, input by input, and writes a quarantine file."""

    def __init__(self) -> None:
        self._input = ""
        self._rows: list[tuple[str, int, int | None, str, str, bool]] = []
        self._packed: list[pa.Table] = []
        self._reasons: set[str] = set()
        self._count = 0
        self.damaged = 0  # rows that stand for the rest of a damaged file
        self._lines_before: Callable[[], int] = int
        self._before: int | None = None

    def __len__(self) -> int:
        return self._count

    def open(self, path: str, lines_before: Callable[[], int] = int) -> None:
        """Start with the input at ``path`` or a range of it, which ``lines_before()`` lines precede."""
        self._input, self._lines_before, self._before = path, lines_before, None

    def append(self, row: Rejected) -> None:
        """Add a row of the open input."""
        reason = row.reason
        if len(self._reasons) >= REASONS and reason not in self._reasons:
            reason = without_numbers(reason)
        self._reasons.add(reason)
        if row.line and self._before is None:
            try:
                self._before = self._lines_before()
            except InputError:
                self._before = -1  # damaged before the range; offsets are still known
        line = 0 if not row.line or self._before == -1 else row.line + (self._before or 0)
        offset = row.offset if row.offset >= 0 else None
        excerpt = row.excerpt if self._count < EXCERPTS else ""
        self._rows.append((self._input, line, offset, reason, excerpt, row.damage))
        self._count += 1
        self.damaged += row.damage
        if len(self._rows) == _BATCH_ROWS:
            self._pack()

    def _pack(self) -> None:
        columns = zip(*self._rows, strict=True)
        arrays = [pa.array(column, kind) for column, kind in zip(columns, _PACKED.types, strict=True)]
        self._packed.append(pa.Table.from_arrays(arrays, schema=_PACKED))
        self._rows = []

    def write(self, store: Store, name: FileName) -> FileEntry | None:
        """Write the quarantine file; None if no row was rejected."""
        if self._rows:
            self._pack()
        tables = (table.cast(parts.QUARANTINE_SCHEMA) for table in self._packed)
        return parts.write_batches(store, name, parts.QUARANTINE_SCHEMA, tables) if self._count else None


def quarantine_files(state: State, plan_id: str) -> list[FileEntry]:
    """Return the quarantine files of a plan, or of its units, without the one for duplicates."""
    return [file for file in files_of_plan(state, "quarantine", plan_id) if file.slot != f"{plan_id}.duplicates"]


def join_quarantines(store: Store, run: Run, plan_id: str) -> tuple[list[FileEntry], list[str]]:
    """Join the quarantine files of a plan's units; return the files to add and the paths to remove."""
    entries = quarantine_files(store.state, plan_id)
    if len(entries) < 2:
        return [], []
    name = FileName.new(run.id, "quarantine", plan_id, "parquet")
    tables = (table for entry in entries for table in parts.read_tables(store, entry))
    whole = parts.write_batches(store, name, parts.QUARANTINE_SCHEMA, tables)
    return [whole], [entry.path for entry in entries]
