"""Find hashes that several documents share, in bounded memory, partition by partition.

Records of a hash and a place are collected in memory. When there are ``rows``, one per hash is written to an
unnamed scratch file, by the first bits of the hash; at the end each partition is compared separately. Old
documents take part only if a table of the new hashes' first bits (at most 128 MiB) has their hash.

Cost: reads 16 bytes per document of the store; writes and reads 24 bytes per compared document. Memory: about
80 bytes × ``rows``, the hashes of one part, the table, and 8 bytes per duplicate.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt

from retrotool.errors import StorageError
from retrotool.scratch import more_scratch, scratch_file, scratch_folder
from retrotool.store import parts
from retrotool.store.parts import PART_SHIFT, Ids
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
    leave_out: Callable[[int], Ids],
) -> Places:
    """Return documents of ``new_parts`` with the hash of an earlier one, not those of ``leave_out(part)``."""
    numbers = (part for part in store.state.all_parts() if part < new_parts.stop)
    sizes = {part: parts.part_entry(store, "documents", part).rows for part in numbers}
    new, old = [part for part in sizes if part >= new_parts.start], [part for part in sizes if part < new_parts.start]
    expected = _TABLE_ENTRIES_A_HASH * sum(sizes[part] for part in new) if old else 0
    shift = np.uint64(64 - min(max(expected.bit_length(), _LEAST_TABLE_BITS), _MOST_TABLE_BITS))
    maybe_new = np.zeros(1 << (64 - int(shift)), np.bool_)

    def records() -> Iterator[Records]:
        for part in new:
            hashes, places = _read_hashes(store, part, column, leave_out)
            maybe_new[hashes[:, 0].astype(np.uint64) >> shift] = True
            yield records_of(hashes, places)
        for part in old if new else ():
            hashes, places = _read_hashes(store, part, column, leave_out)
            some = np.flatnonzero(maybe_new[hashes[:, 0].astype(np.uint64) >> shift])
            yield records_of(hashes[some], places[some])

    first = new_parts.start << PART_SHIFT
    found = repeats_among(records(), sum(sizes.values()), ROWS)
    return np.sort(np.concatenate([again[again >= first] for again in found]))


def _read_hashes(
    store: Store, part: int, column: str, leave_out: Callable[[int], Ids]
) -> tuple[npt.NDArray[Any], Places]:
    values = parts.read_documents(store, part, [column])[column]
    hashes = parts.from_fixed_binary(values, np.dtype(">u8"))
    wanted = np.array(values.is_valid())
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


def repeats_among(given: Iterable[Records], expected: int, rows: int) -> Iterator[Places]:
    """Yield the places of all records but the lowest of each hash, and at least one array.

    There are about ``expected`` records, all different, of which ``rows`` are held in memory.
    """
    bits = max(1, (2 * expected // rows).bit_length())  # about rows / 2 records a partition
    shift, edges = np.uint64(64 - bits), np.arange((1 << bits) + 1, dtype=np.uint64)
    written: list[npt.NDArray[np.int64]] = []  # for each write, where partitions begin in the file
    file: IO[bytes] | None = None
    with contextlib.ExitStack() as stack:
        for records, again, is_last in _gathered(given, rows):
            yield again
            if file is None and is_last:
                return
            bounds = np.searchsorted(records["high"] >> shift, edges)
            try:
                file = file or stack.enter_context(scratch_file())
                written.append(bounds + file.seek(0, os.SEEK_END) // RECORD.itemsize)
                file.write(np.ascontiguousarray(records).view(np.uint8).data)
                file.flush()
            except OSError as error:
                raise StorageError(
                    f"{scratch_folder()}: {error.strerror} (scratch file to compare hashes)",
                    more_scratch("24 bytes for each document"),
                ) from error
            del records, again  # before the next ones are gathered
        assert file is not None
        for number in range(len(edges) - 1):
            yield split(np.concatenate([_read(file, *bounds[number : number + 2]) for bounds in written]))[1]


def _gathered(given: Iterable[Records], rows: int) -> Iterator[tuple[Records, Places, bool]]:
    """Yield records, one for each hash of ``rows``, the places of the rest, and whether they are the last."""
    waiting: list[Records] = []
    count = 0
    for records in given:
        for start in range(0, len(records), rows):
            some = records[start : start + rows]
            if count + len(some) > rows:
                yield *_distinct(waiting), False
                count = 0
            waiting.append(some)
            count += len(some)
    yield *_distinct(waiting), True


def _distinct(waiting: list[Records]) -> tuple[Records, Places]:
    gathered = np.concatenate([np.zeros(0, RECORD), *waiting])
    waiting.clear()
    first, again = split(gathered)
    return gathered[first], again


def _read(file: IO[bytes], start: int, end: int) -> Records:
    file.seek(int(start) * RECORD.itemsize)
    return np.fromfile(file, RECORD, count=int(end - start))
