r"""Megatron's indexed datasets: tokens in ``NAME.bin``, and in ``NAME.idx`` where sequences and documents are.

Two layouts are read, little-endian both. Documents are ranges of sequences, sequences ranges of the ``.bin``.

``MMIDIDX`` (Megatron-LM, megatron-core, Megatron-DeepSpeed, GPT-NeoX, NeMo; ``core/datasets/indexed_dataset.py``)::

    "MMIDIDX\0\0"  version u64 = 1  dtype u8  sequences n u64  boundaries d u64
    lengths i32[n]  pointers i64[n] (bytes)  boundaries i64[d]  and, if multimodal, modes i8[n]

d is one more than there are documents. fairseq's own (``fairseq/data/indexed_dataset.py``) has neither d nor
boundaries: there a sequence is a document. The size of the file tells the three apart.

``TNTIDX`` (Megatron-LM's ``lazy`` and ``cached`` implementations)::

    "TNTIDX\0\0"  version u64 = 1  dtype u64  bytes of it u64  sequences n u64  lengths s u64  boundaries d u64
    dimensions i64[n + 1]  pointers i64[n + 1] (tokens)  lengths i64[s]  boundaries i64[d]

fairseq's own has no d, and adds one to each id (for Lua): it is refused. Sequences of a mode other than 0 are not
text; their documents are set aside. So is a document whose sequences lie outside the ``.bin``, which is never read
there.

Cost: the index is read in windows of a million sequences.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from retrotool.errors import InputError
from retrotool.sources.files import InputFile, Slice
from retrotool.sources.records import Document, Fields, SetAside, excerpt
from retrotool.sources.token_ranges import OnDisk, Ranges, break_at, cut_documents, documents, documents_before, lost

WINDOW_DOCUMENTS = 1 << 16
WINDOW_SEQUENCES = 1 << 20
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2", 9: "<u4", 10: "<u8"}
"""By code; 6 and 7 are floats, 9 and 10 fairseq's and DeepSpeed's."""
_CHAR, _INT, _LONG = np.dtype("i1"), np.dtype("<i4"), np.dtype("<i8")
_MEMORY_MAPPED = b"MMIDIDX\0\0"
_TORCHNET = b"TNTIDX\0\0"


@dataclass(frozen=True, slots=True)
class Index:
    """Where things are: ``lengths`` of sequences in tokens, ``pointers`` in units of ``unit`` bytes.

    ``boundaries`` [documents + 1] are the sequences that documents begin with, None: each sequence is a document.
    ``modes`` None: all is text.
    """

    dtype: np.dtype[Any]
    unit: int
    sequences: int
    documents: int
    lengths: OnDisk
    pointers: OnDisk
    boundaries: OnDisk | None
    modes: OnDisk | None

    def edges(self, start: int, end: int) -> npt.NDArray[np.int64]:
        """The first sequence of documents ``start`` to ``end``, both included."""
        if self.boundaries is None:
            return np.arange(start, end + 1, dtype=np.int64)
        return np.array(self.boundaries[start : end + 1], dtype=np.int64)


def open_index(path: Path) -> Index:
    """Open an index; ``InputError`` if its header and its size do not agree."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(_MEMORY_MAPPED):
        return _memory_mapped(path, head, size)
    if head.startswith(_TORCHNET):
        return _torchnet(path, head, size)
    raise InputError(f"{path.name} is no index of Megatron's: it begins otherwise", excerpt=excerpt(head[:9]))


def _memory_mapped(path: Path, head: bytes, size: int) -> Index:
    version, code, sequences = _unpack(path, "<QBQ", head, len(_MEMORY_MAPPED))
    start = len(_MEMORY_MAPPED) + struct.calcsize("<QBQ")
    dtype = _dtype(path, version, code)
    boundaries: int | None = None
    if size != start + 12 * sequences:
        (boundaries,) = _unpack(path, "<Q", head, start)
        start += 8
    told = start + 12 * sequences + 8 * (boundaries or 0)
    modal = size == told + sequences and boundaries is not None
    if size != told and not modal:
        raise _wrong_size(path, sequences, boundaries, told, size)
    lengths = OnDisk(path, _INT, start, sequences)
    pointers = OnDisk(path, _LONG, start + 4 * sequences, sequences)
    if boundaries is None and sequences and pointers.at(0):
        # One with documents, cut off, can have the size of one without; then lengths are where places should be.
        raise InputError(f"{path.name} is damaged: its first sequence begins at byte {pointers.at(0):,}")
    edges = None if boundaries is None else OnDisk(path, _LONG, start + 12 * sequences, boundaries)
    modes = OnDisk(path, _CHAR, told, sequences) if modal and sequences else None
    count = sequences if boundaries is None else max(0, boundaries - 1)
    return Index(dtype, 1, sequences, count, lengths, pointers, edges, modes)


def _torchnet(path: Path, head: bytes, size: int) -> Index:
    version, code, width, sequences, lengths = _unpack(path, "<QQQQQ", head, len(_TORCHNET))
    start = len(_TORCHNET) + struct.calcsize("<QQQQQ")
    dtype = _dtype(path, version, code)
    if size == start + 8 * (2 * (sequences + 1) + lengths):
        raise InputError(
            f"{path.name} was written by fairseq, with ids one higher than the tokenizer's and no documents"
        )
    (boundaries,) = _unpack(path, "<Q", head, start)
    start += 8
    told = start + 8 * (2 * (sequences + 1) + lengths + boundaries)
    if size != told:
        raise _wrong_size(path, sequences, boundaries, told, size)
    if lengths != sequences or width != dtype.itemsize:
        raise InputError(
            f"{path.name} holds items that are no lists of tokens of {width} bytes: {sequences:,}, {lengths:,}"
        )
    places = start + 8 * (sequences + 1)
    return Index(
        dtype, width, sequences, max(0, boundaries - 1),
        OnDisk(path, _LONG, places + 8 * (sequences + 1), lengths), OnDisk(path, _LONG, places, sequences),
        OnDisk(path, _LONG, places + 8 * (sequences + 1 + lengths), boundaries), None,
    )  # fmt: skip


def _unpack(path: Path, layout: str, head: bytes, start: int) -> tuple[int, ...]:
    if len(head) < start + struct.calcsize(layout):
        raise InputError(f"{path.name} ends inside its header, at {len(head)} bytes")
    return struct.unpack_from(layout, head, start)


def _dtype(path: Path, version: int, code: int) -> np.dtype[Any]:
    if version != 1:
        raise InputError(f"{path.name} has version {version}, of which nothing is known")
    if code not in _DTYPES:
        raise InputError(f"{path.name} holds no token ids: its type code is {code}")
    return np.dtype(_DTYPES[code])


def _wrong_size(path: Path, sequences: int, boundaries: int | None, told: int, size: int) -> InputError:
    counts = f"{sequences:,} sequences and {boundaries or 0:,} boundaries of documents"
    return InputError(f"{path.name} is damaged: {counts} take {told:,} bytes, it has {size:,}")


def read_megatron(file: InputFile, fields: Fields, where: Slice) -> Iterator[Document | SetAside]:
    """Documents of a range of documents; positions are their numbers in the file, from 1."""
    index = open_index(Path(file.path).with_suffix(".idx"))
    whole = break_at(index.documents, lambda start, stop: _outside(index, start, stop, file.size), WINDOW_DOCUMENTS)
    end, broken = documents_before(where.end, index.documents, whole)
    if where.start > whole:
        return
    if where.start == 0:
        first = int(index.edges(0, 0)[0]) if index.documents else index.sequences
        if first > 0:
            yield SetAside(0, f"the first {first:,} of {index.sequences:,} sequences belong to no document")
    start = where.start
    while start < end:
        stop = min(start + WINDOW_DOCUMENTS, end)
        while stop - start > 1 and _spread(index, start, stop) > WINDOW_SEQUENCES:
            stop = start + (stop - start) // 2
        line = start - where.start + 1
        ranges, _ = _ranges(index, start, stop, file.size)
        yield from documents(Path(file.path), index.dtype, ranges, fields, file.name, line, start + 1)
        start = stop
    if broken:
        raise lost(whole - where.start + 1, whole + 1, index.documents, file.size)
    if end == index.documents:
        yield from _rest(index, file)


def _rest(index: Index, file: InputFile) -> Iterator[SetAside]:
    """What is left behind the last document."""
    last = int(index.edges(index.documents, index.documents)[0]) if index.documents else index.sequences
    if 0 <= last < index.sequences:
        count = index.sequences - last
        yield SetAside(0, f"the last {count:,} of {index.sequences:,} sequences belong to no document")
    reach = index.pointers.at(-1) * index.unit + index.lengths.at(-1) * index.dtype.itemsize if index.sequences else 0
    if 0 <= reach < file.size:
        yield SetAside(0, f"{file.size - reach:,} bytes after the last sequence belong to no document")


def _spread(index: Index, start: int, stop: int) -> int:
    edges = index.edges(start, stop).clip(0, index.sequences)
    return int(edges.max() - edges.min())


def _outside(index: Index, start: int, stop: int, size: int) -> npt.NDArray[np.bool_]:
    """Which documents end outside the file, as many sequences at a time as are held in memory."""
    if stop - start > 1 and _spread(index, start, stop) > WINDOW_SEQUENCES:
        middle = start + (stop - start) // 2
        return np.concatenate([_outside(index, start, middle, size), _outside(index, middle, stop, size)])
    return _ranges(index, start, stop, size)[1]


def _ranges(index: Index, start: int, stop: int, size: int) -> tuple[Ranges, npt.NDArray[np.bool_]]:
    """Where documents ``start`` to ``stop`` lie, and which of them end outside the file."""
    edges = index.edges(start, stop)
    first, last = edges[:-1], edges[1:]
    wrong = (first < 0) | (last > index.sequences) | (last < first)
    known = edges.clip(0, index.sequences)
    low, high = int(known.min()), int(known.max())
    width = index.dtype.itemsize
    lengths = np.array(index.lengths[low:high], dtype=np.int64)
    begins = np.array(index.pointers[low:high], dtype=np.int64)
    # Whatever the index says, no product or sum below can overflow.
    limit = size // index.unit + 1
    negative = (lengths < 0) | (begins < 0)
    begins = begins.clip(0, limit) * index.unit
    ends = begins + lengths.clip(0, size // width + 1) * width
    beyond = ends > size
    modal = np.zeros(high - low, bool) if index.modes is None else np.asarray(index.modes[low:high]) != 0
    gaps = np.zeros(high - low, bool)
    gaps[1:] = begins[1:] != ends[:-1]

    def within(flags: npt.NDArray[np.bool_], skip: int = 0) -> npt.NDArray[np.bool_]:
        """Which documents have a flagged sequence, their first ``skip`` left out."""
        counted = np.concatenate([[0], np.cumsum(flags)])
        a = np.minimum(first.clip(low, high) + skip, last.clip(low, high)) - low
        return np.asarray((counted[last.clip(low, high) - low] > counted[a]) & ~wrong)

    found = Ranges([], [])
    for i in np.flatnonzero(wrong).tolist():
        found.reasons[i] = f"it spans sequences {first[i]:,} to {last[i]:,} of {index.sequences:,}"
    told = ((modal, "is no text: its mode is not 0"), (beyond, f"lies beyond the end of the file, {size:,} bytes"),
            (negative, "has a negative length or place"))  # fmt: skip
    for flags, why in told:
        for i in np.flatnonzero(within(flags)).tolist():
            place = int(first[i]) + int(np.argmax(flags[first[i] - low : last[i] - low]))
            found.reasons[i] = f"its sequence {place:,} {why}"
    for i in np.flatnonzero(within(gaps, 1)).tolist():
        if i not in found.reasons:
            where = slice(first[i] - low, last[i] - low)
            found.pieces[i] = list(zip(begins[where].tolist(), ends[where].tolist(), strict=True))
    full = (last > first) & ~wrong
    at = np.where(full, first - low, 0)
    to = np.where(full, last - low - 1, 0)
    if high > low:
        found.begins.extend(np.where(full, begins[at], 0).tolist())
        found.ends.extend(np.where(full, ends[to], 0).tolist())
    else:
        found.begins.extend([0] * len(first))
        found.ends.extend([0] * len(first))
    return found, within(beyond)


def cut_megatron(file: InputFile, target: int) -> list[Slice]:
    """Runs of documents of about ``target`` bytes."""
    index = open_index(Path(file.path).with_suffix(".idx"))

    def begin(number: int) -> int:
        sequence = int(index.edges(number, number)[0])
        return index.pointers.at(sequence) * index.unit if 0 <= sequence < index.sequences else file.size

    return cut_documents(index.documents, begin, file.size, target)
