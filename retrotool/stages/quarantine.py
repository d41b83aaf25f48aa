"""Rows that a unit sets aside, held in 16 bytes each: a wrong ``--text-field`` can set aside every row of a corpus."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from retrotool.sources import SetAside
from retrotool.store import parts
from retrotool.store.atomic import FileEntry
from retrotool.store.paths import FileName

_BATCH_ROWS = 1 << 16


class Quarantine:
    """Gathers rows set aside, input by input, and writes them as a quarantine file."""

    def __init__(self) -> None:
        self._inputs: list[str] = []
        self._reasons: dict[str, int] = {}
        self._input, self._reason, self._line = array("i"), array("i"), array("q")
        self._first = 0

    def __len__(self) -> int:
        """Rows gathered."""
        return len(self._line)

    def open(self, path: str) -> None:
        """From now on rows are of the input at ``path``."""
        self._inputs.append(path)
        self._first = len(self)

    def append(self, row: SetAside) -> None:
        """Gather a row of the open input."""
        self._input.append(len(self._inputs) - 1)
        self._reason.append(self._reasons.setdefault(row.reason, len(self._reasons)))
        self._line.append(row.line)

    def needs_lines(self) -> bool:
        """Whether any row of the open input has a line number, relative to the range that was read."""
        return any(self._line[i] for i in range(self._first, len(self)))

    def shift_lines(self, before: int) -> None:
        """Add the number of lines before the range that was read to the line numbers of the open input."""
        for i in range(self._first, len(self)):
            if self._line[i]:
                self._line[i] += before

    def write(self, root: Path, name: FileName) -> FileEntry | None:
        """Write what was gathered; None if that is nothing."""
        return parts.write_batches(root, name, parts.QUARANTINE_SCHEMA, self._batches()) if len(self) else None

    def _batches(self) -> Iterator[pa.Table]:
        inputs, reasons = pa.array(self._inputs, pa.string()), pa.array(list(self._reasons), pa.string())
        for start in range(0, len(self), _BATCH_ROWS):
            rows = slice(start, start + _BATCH_ROWS)
            columns = [
                inputs.take(pa.array(np.array(self._input[rows]))),
                pa.array(np.array(self._line[rows]), pa.int64()),
                reasons.take(pa.array(np.array(self._reason[rows]))),
            ]
            yield pa.table(columns, schema=parts.QUARANTINE_SCHEMA)
