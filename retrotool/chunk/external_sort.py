"""Finding the hashes that several documents share, in an external sort of their hashes.

Of every part one column of hashes is read once. Its rows gather as records of 24 bytes; each time
there are ``rows`` of them they are sorted, repeats are told at once, and one record of each hash goes to a scratch
file. Then the scratch files are merged, one range of hashes after another. So a hash that half the corpus shares
takes one record a scratch file, however often it occurs, and what comes out does not depend on the order of anything.

``new`` documents (those of the plan that is being finished) are compared with each other and with all before them.
Of documents before them only those go into the sort whose hash may be a new one: a bitmap of the new hashes, at most
128 MiB, tells (16 bits a new document; above 67 million new documents more and more pass that need not).

Cost: reads 16 bytes a document of the store (hashes do not compress), writes and reads 24 bytes a
document that goes into the sort. Memory: about 80 bytes times ``rows``, the hashes of a part, the bitmap, and 8 bytes a
repeat found. Scratch: 24 bytes a document that goes into the sort, as temporary files in ``staging/``, removed at the end
or, after a kill, by the next writing command; none while fewer than ``rows`` documents are compared. ``rows`` holds up to
4,096 × ``rows`` documents (17 billion by default); beyond that memory grows.
"""

from __future__ import annotations

import contextlib
import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from retrotool.errors import StorageError
from retrotool.store import atomic, disk, parts, paths
from retrotool.store.parts import PART_SHIFT
from retrotool.store.store import Store

ROWS = 4 << 20
RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("place", "<i8")])
_BUCKET_BITS = 12
_FILTER_BITS = (16, 30)
_FILTER_BITS_A_HASH = 16

Records = npt.NDArray[Any]
Places = npt.NDArray[np.int64]
"""Documents as ``part << 32 | doc``: ascending as their chunk ids are."""


@dataclass(frozen=True, slots=True)
class Span:
    """Parts that are compared: numbers below ``end``; those from ``start`` on are new."""

    start: int
    end: int


def find_repeats(
    store: Store,
    run: str,
    column: Literal["key", "text_hash"],
    span: Span,
    leave_out: Callable[[int], npt.NDArray[np.int64]] | None = None,
    rows: int = ROWS,
) -> Places:
    """The new documents whose hash a document before them has, ascending.

    ``leave_out(part)`` gives the docs of a part that take no part in this, neither as a repeat nor as the first.
    Documents without a hash take none either. ``StorageError`` if the scratch files do not fit on the disk.
    """
    numbers = [part for part in store.state.parts() if part < span.end]
    new = [part for part in numbers if part >= span.start]
    old = [part for part in numbers if part < span.start]
    sizes = {part: parts.part_entry(store, "documents", part).rows for part in new}
    known = Bitmap(sum(sizes.values()) if old else 0)
    with Sorter(store.root, run, rows) as sorter:
        for part in new:
            records = _read_records(store, part, column, leave_out)
            if old:
                known.add(records["high"])
            sorter.add(records)
        for part in old if new else ():
            records = _read_records(store, part, column, leave_out)
            sorter.add(records[known.may_hold(records["high"])])
        first = span.start << PART_SHIFT
        found = [places[places >= first] for places in sorter.repeats()]
    return np.sort(np.concatenate(found)) if found else np.zeros(0, np.int64)


def _read_records(
    store: Store, part: int, column: str, leave_out: Callable[[int], npt.NDArray[np.int64]] | None
) -> Records:
    values = parts.read_documents(store, part, [column])[column]
    doc = np.flatnonzero(values.is_valid().to_numpy())
    if leave_out is not None:
        doc = np.setdiff1d(doc, leave_out(part), assume_unique=True)
    records = np.empty(len(doc), RECORD)
    hashes = parts.from_fixed_binary(values, np.dtype(">u8"))
    records["high"], records["low"] = hashes[doc, 0], hashes[doc, 1]
    records["place"] = parts.chunk_ids(part, doc)
    return records


def split(records: Records) -> tuple[npt.NDArray[np.int64], Places]:
    """Where the first record of each hash is (of the lowest place), in order of the hashes; and the others' places."""
    high = np.ascontiguousarray(records["high"])
    order = np.argsort(high)
    high = high[order]
    equal = np.flatnonzero(high[1:] == high[:-1])
    # Equal halves are rare but for repeats, so only these need the full order.
    tied = np.union1d(equal, equal + 1)
    ties = records[order[tied]]
    order[tied] = order[tied][np.lexsort((ties["place"], ties["low"], ties["high"]))]
    again = np.zeros(len(records), np.bool_)
    again[equal + 1] = records["low"][order[equal + 1]] == records["low"][order[equal]]
    return order[~again], records["place"][order[again]]


class Bitmap:
    """Which hashes may have been added: false positives, no false negatives. At most 128 MiB."""

    def __init__(self, expected: int) -> None:
        low, high = _FILTER_BITS
        bits = min(max((expected * _FILTER_BITS_A_HASH).bit_length(), low), high)
        self._shift = np.uint64(64 - bits)
        self._bytes = np.zeros(1 << (bits - 3), np.uint8)

    def add(self, high: npt.NDArray[np.uint64]) -> None:
        """Add hashes by their first 64 bits."""
        place = high >> self._shift
        byte, bit = place >> np.uint64(3), place & np.uint64(7)
        for number in range(8):  # places of one byte that differ in their bits would overwrite each other
            self._bytes[byte[bit == number]] |= np.uint8(1 << number)

    def may_hold(self, high: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Which hashes may have been added."""
        place = high >> self._shift
        bits: npt.NDArray[np.uint8] = self._bytes[place >> np.uint64(3)] >> (place & np.uint64(7)).astype(np.uint8)
        return (bits & 1).astype(np.bool_)


@dataclass(frozen=True, slots=True)
class _Scratch:
    """A file of sorted records; bucket b (by the first 12 bits) is records ``bounds[b]`` to ``bounds[b + 1]``."""

    path: Path
    bounds: npt.NDArray[np.int64]
    sums: tuple[int, ...]

    @classmethod
    def write(cls, path: Path, records: Records) -> Self:
        edges = np.arange((1 << _BUCKET_BITS) + 1, dtype=np.uint64)
        bounds = np.searchsorted(records["high"] >> np.uint64(64 - _BUCKET_BITS), edges)
        data = np.ascontiguousarray(records).view(np.uint8).data
        size = RECORD.itemsize
        sums = [zlib.crc32(data[a * size : b * size]) for a, b in itertools.pairwise(bounds)]
        disk.announce("write", path)
        with path.open("xb") as file:
            file.write(data)
        return cls(path, bounds, tuple(sums))

    def read(self, first: int, end: int) -> Records:
        """Records of the buckets [first, end)."""
        base = self.bounds[first]
        records = np.fromfile(self.path, RECORD, count=int(self.bounds[end] - base), offset=int(base) * RECORD.itemsize)
        for bucket in range(first, end):
            data = records[self.bounds[bucket] - base : self.bounds[bucket + 1] - base]
            if zlib.crc32(data.view(np.uint8).data) != self.sums[bucket]:
                raise StorageError(f"{self.path} does not hold what was written to it", "Check the disk.")
        return records


class Sorter:
    """Takes records in any order and tells which repeat a hash; see the module. A context manager."""

    def __init__(self, root: Path, run: str, rows: int) -> None:
        self._folder = root / "staging"
        self._run, self._rows = run, rows
        self._waiting: list[Records] = []
        self._gathered = 0
        self._scratch: list[_Scratch] = []
        self._again: list[Places] = []
        self._files = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Nothing is on the disk yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        """Remove the scratch files."""
        return self._files.__exit__(kind, error, trace)

    def add(self, records: Records) -> None:
        """Take records, of which none was given before."""
        for start in range(0, len(records), self._rows):
            some = records[start : start + self._rows]
            if self._gathered + len(some) > self._rows:
                self._spill()
            self._waiting.append(some)
            self._gathered += len(some)

    def _take_waiting(self) -> Records:
        """The first record of each hash that waits; repeats are noted."""
        gathered = np.concatenate(self._waiting) if self._waiting else np.zeros(0, RECORD)
        self._waiting, self._gathered = [], 0
        first, again = split(gathered)
        self._again.append(again)
        return gathered[first]

    def _spill(self) -> None:
        records = self._take_waiting()
        # A temporary file of this run: clean-up knows it for what it is, should this process be killed.
        temporary = atomic.temporary_file(self._folder / "duplicates", paths.new_token(self._run))
        self._scratch.append(_Scratch.write(self._files.enter_context(temporary), records))

    def repeats(self) -> Iterator[Places]:
        """Places of all records but the lowest of each hash. To be called once, when all were added."""
        if self._scratch and self._waiting:
            self._spill()
        elif self._waiting:
            self._take_waiting()
        yield from self._again
        for first, end in _ranges(self._scratch, self._rows):
            yield split(np.concatenate([scratch.read(first, end) for scratch in self._scratch]))[1]


def _ranges(scratch: Sequence[_Scratch], rows: int) -> Iterator[tuple[int, int]]:
    """Runs of buckets [first, end), of as many as have ``rows`` records or fewer (or of one bucket)."""
    if not scratch:
        return
    totals = np.sum([file.bounds for file in scratch], axis=0)
    first, last = 0, len(totals) - 1
    while first < last:
        end = max(first + 1, int(np.searchsorted(totals, totals[first] + rows, side="right")) - 1)
        yield first, end
        first = end
