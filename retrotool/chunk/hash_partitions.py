"""Find hashes that several documents share, in bounded memory, partition by partition.

Records of a hash and a place are collected in memory. When there are ``rows``, one per hash is written to an
unnamed scratch file, by the first bits of the hash; at the end each partition is compared separately. Old
documents take part only if a table of the new hashes' first bits (at most 128 MiB) has their hash.

Cost: reads 16 bytes per document of the store; writes and reads 24 bytes per compared document. Memory: about
80 bytes × ``rows``, the hashes of one part, the table, and 8 bytes per duplicate.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import IO, Any, Literal, Self

import numpy as np
import numpy.typing as npt

from retrotool.errors import StorageError
from retrotool.scratch import more_scratch, scratch_file, scratch_folder
from retrotool.store import parts
from retrotool.store.parts import PART_SHIFT
from retrotool.store.store import Store

ROWS = 4 << 20
RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("place", "<i8")])
_LEAST_TABLE_BITS, _MOST_TABLE_BITS = 16, 27
_TABLE_ENTRIES_A_HASH = 16

Records = npt.NDArray[Any]
Places = npt.NDArray[np.int64]  # documents as ``part << 32 | doc``, in the order of chunk ids


def find_repeats(
    store: Store,
    column: Literal["key", "text_hash"],
    new_parts: range,
    leave_out: Callable[[int], npt.NDArray[np.int64]] | None = None,
) -> Places:
    """Return documents of ``new_parts`` with the hash of an earlier one, not those of ``leave_out(part)``."""
    numbers = (part for part in store.state.all_parts() if part < new_parts.stop)
    sizes = {part: parts.part_entry(store, "documents", part).rows for part in numbers}
    new, old = [part for part in sizes if part >= new_parts.start], [part for part in sizes if part < new_parts.start]
    expected = _TABLE_ENTRIES_A_HASH * sum(sizes[part] for part in new) if old else 0
    shift = np.uint64(64 - min(max(expected.bit_length(), _LEAST_TABLE_BITS), _MOST_TABLE_BITS))
    maybe_new = np.zeros(1 << (64 - int(shift)), np.bool_)
    with HashPartitions(sum(sizes.values()), ROWS) as partitions:
        for part in new:
            hashes, places = _read_hashes(store, part, column, leave_out)
            maybe_new[hashes[:, 0].astype(np.uint64) >> shift] = True
            partitions.add(records_of(hashes, places))
        for part in old if new else ():
            hashes, places = _read_hashes(store, part, column, leave_out)
            some = np.flatnonzero(maybe_new[hashes[:, 0].astype(np.uint64) >> shift])
            partitions.add(records_of(hashes[some], places[some]))
        first = new_parts.start << PART_SHIFT
        found = [again[again >= first] for again in partitions.repeats()]
    return np.sort(np.concatenate(found)) if found else np.zeros(0, np.int64)


def _read_hashes(
    store: Store, part: int, column: str, leave_out: Callable[[int], npt.NDArray[np.int64]] | None
) -> tuple[npt.NDArray[Any], Places]:
    values = parts.read_documents(store, part, [column])[column]
    hashes = parts.from_fixed_binary(values, np.dtype(">u8"))
    wanted = np.array(values.is_valid())
    if leave_out is not None:
        wanted[leave_out(part)] = False
    doc = np.flatnonzero(wanted)
    return (hashes if len(doc) == len(hashes) else hashes[doc]), parts.chunk_ids(part, doc)


def records_of(hashes: npt.NDArray[Any], places: Places) -> Records:
    """Join hashes [n, 2], as two big-endian numbers, and their places [n]."""
    records = np.empty(len(places), RECORD)
    records["high"], records["low"], records["place"] = hashes[:, 0], hashes[:, 1], places
    return records


def split(records: Records) -> tuple[npt.NDArray[np.int64], Places]:
    """Return the indices of each hash's record with the lowest place, by hash, and the places of the rest."""
    high = np.ascontiguousarray(records["high"])
    order = np.argsort(high)
    high = high[order]
    equal = np.flatnonzero(high[1:] == high[:-1])
    # Only records with equal first halves, which are rare, need the full order.
    tied = np.union1d(equal, equal + 1)
    ties = records[order[tied]]
    order[tied] = order[tied][np.lexsort((ties["place"], ties["low"], ties["high"]))]
    again = np.zeros(len(records), np.bool_)
    again[equal + 1] = records["low"][order[equal + 1]] == records["low"][order[equal]]
    return order[~again], records["place"][order[again]]


class HashPartitions:
    """Finds repeats among at most ``expected`` records, of which ``rows`` are held in memory."""

    def __init__(self, expected: int, rows: int) -> None:
        bits = max(1, (2 * expected // rows).bit_length())  # about rows / 2 records a partition
        self._shift = np.uint64(64 - bits)
        self._edges = np.arange((1 << bits) + 1, dtype=np.uint64)
        self._rows = rows
        self._waiting: list[Records] = []
        self._gathered = 0
        self._written: list[npt.NDArray[np.int64]] = []  # for each write, where partitions begin in the file
        self._again: list[Places] = []
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, records: Records) -> None:
        """Add records; the same record must not be added twice."""
        for start in range(0, len(records), self._rows):
            some = records[start : start + self._rows]
            if self._gathered + len(some) > self._rows:
                self._write()
            self._waiting.append(some)
            self._gathered += len(some)

    def _take_waiting(self) -> Records:
        gathered = np.concatenate([np.zeros(0, RECORD), *self._waiting])
        self._waiting, self._gathered = [], 0
        first, again = split(gathered)
        self._again.append(again)
        return gathered[first]

    def _write(self) -> None:
        records = self._take_waiting()
        bounds = np.searchsorted(records["high"] >> self._shift, self._edges)
        try:
            if self._file is None:
                self._file = scratch_file()
            self._written.append(bounds + self._file.seek(0, os.SEEK_END) // RECORD.itemsize)
            self._file.write(np.ascontiguousarray(records).view(np.uint8).data)
            self._file.flush()
        except OSError as error:
            raise StorageError(
                f"{scratch_folder()}: {error.strerror} (scratch file to compare hashes)",
                more_scratch("24 bytes for each document"),
            ) from error

    def repeats(self) -> Iterator[Places]:
        """Yield the places of all records but the lowest of each hash. Call it once, after all were added."""
        if not self._written:
            self._take_waiting()
            yield from self._again
            return
        self._write()
        yield from self._again
        for number in range(len(self._edges) - 1):
            yield split(np.concatenate([self._read(*bounds[number : number + 2]) for bounds in self._written]))[1]

    def _read(self, start: int, end: int) -> Records:
        assert self._file is not None
        self._file.seek(int(start) * RECORD.itemsize)
        return np.fromfile(self._file, RECORD, count=int(end - start))
