"""Rejected rows of a unit, 24 bytes each in memory, as a wrong ``--text-field`` can reject every row.

Only the first rows keep an excerpt, and only the first ten thousand reasons keep their numbers.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa

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
_NUMBER = re.compile(r"(?<!UTF-)\d[\d,.]*")


def without_numbers(reason: str) -> str:
    """Replace the numbers in a reason, which differ from row to row."""
    return _NUMBER.sub("…", reason)


class Quarantine:
    """Collects rejected rows, input by input, and writes a quarantine file."""

    def __init__(self) -> None:
        self._inputs: list[str] = []
        self._reasons: dict[str, int] = {}
        self._input, self._reason = array("i"), array("i")
        self._line, self._offset = array("q"), array("q")
        self._excerpts: list[str] = []
        self.damage: set[int] = set()  # rows that stand for the rest of a damaged file
        self._lines_before: Callable[[], int] = int
        self._before: int | None = None

    def __len__(self) -> int:
        return len(self._line)

    def open(self, path: str, lines_before: Callable[[], int] = int) -> None:
        """Start with the input at ``path`` or a range of it, which ``lines_before()`` lines precede."""
        self._inputs.append(path)
        self._lines_before, self._before = lines_before, None

    def append(self, row: Rejected) -> None:
        """Add a row of the open input."""
        if row.damage:
            self.damage.add(len(self))
        if len(self) < EXCERPTS:
            self._excerpts.append(row.excerpt)
        self._input.append(len(self._inputs) - 1)
        reason = row.reason
        if len(self._reasons) >= REASONS and reason not in self._reasons:
            reason = without_numbers(reason)
        self._reason.append(self._reasons.setdefault(reason, len(self._reasons)))
        if row.line and self._before is None:
            try:
                self._before = self._lines_before()
            except InputError:
                self._before = -1  # damaged before the range; offsets are still known
        self._line.append(0 if not row.line or self._before == -1 else row.line + (self._before or 0))
        self._offset.append(row.offset)

    def write(self, store: Store, name: FileName) -> FileEntry | None:
        """Write the quarantine file; None if no row was rejected."""
        return parts.write_batches(store, name, parts.QUARANTINE_SCHEMA, self._batches()) if len(self) else None

    def _batches(self) -> Iterator[pa.Table]:
        inputs, reasons = pa.array(self._inputs, pa.string()), pa.array(list(self._reasons), pa.string())
        for start in range(0, len(self), _BATCH_ROWS):
            stop = min(start + _BATCH_ROWS, len(self))
            rows = slice(start, stop)
            excerpts = self._excerpts[rows]
            offset = np.array(self._offset[rows])
            columns = [
                inputs.take(pa.array(np.array(self._input[rows]))),
                pa.array(np.array(self._line[rows]), pa.int64()),
                pa.array(offset, pa.int64(), mask=offset < 0),
                reasons.take(pa.array(np.array(self._reason[rows]))),
                pa.array(excerpts + [""] * (stop - start - len(excerpts)), pa.string()),
                pa.array([i in self.damage for i in range(start, stop)]),
            ]
            yield pa.table(columns, schema=parts.QUARANTINE_SCHEMA)


def quarantine_files(state: State, plan_id: str) -> list[FileEntry]:
    """Return the quarantine files of a plan, or of its units, without the one for duplicates."""
    files = state.group("quarantine").items()
    return [file for slot, file in files if slot.partition(".")[0] == plan_id and slot != f"{plan_id}.duplicates"]


def join_quarantines(store: Store, run: Run, plan_id: str) -> tuple[list[FileEntry], list[str]]:
    """Join the quarantine files of a plan's units; return the files to add and the paths to remove."""
    entries = quarantine_files(store.state, plan_id)
    if len(entries) < 2:
        return [], []
    name = FileName.new(run.id, "quarantine", plan_id, "parquet")
    tables = (table for entry in entries for table in parts.read_tables(store, entry))
    whole = parts.write_batches(store, name, parts.QUARANTINE_SCHEMA, tables)
    return [whole], [entry.path for entry in entries]
