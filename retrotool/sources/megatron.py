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
text; their documents are rejected, as are those whose sequences do not follow one another. A document whose sequences
are outside the ``.bin`` rejects the rest of the file.

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
from retrotool.sources.token_ranges import OnDisk, Places, Ranges, cut_documents, documents, leading

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
    """Return documents of a range of documents; positions are their numbers in the file, from 1."""
    index = open_index(Path(file.path).with_suffix(".idx"))
    if where.start == 0:
        first = int(index.edges(0, 0)[0]) if index.documents else index.sequences
        if first > 0:
            yield SetAside(0, f"the first {first:,} of {index.sequences:,} sequences belong to no document")
    yield from documents(
        file, index.dtype, index.documents, lambda start, stop: _ranges(index, start, stop, file.size), fields, where
    )
    if where.end in (None, index.documents):
        yield from _rest(index, file)


def _rest(index: Index, file: InputFile) -> Iterator[SetAside]:
    """Return what is left after the last document."""
    last = int(index.edges(index.documents, index.documents)[0]) if index.documents else index.sequences
    if 0 <= last < index.sequences:
        count = index.sequences - last
        yield SetAside(0, f"the last {count:,} of {index.sequences:,} sequences belong to no document")
    reach = index.pointers.at(-1) * index.unit + index.lengths.at(-1) * index.dtype.itemsize if index.sequences else 0
    if 0 <= reach < file.size:
        yield SetAside(0, f"{file.size - reach:,} bytes after the last sequence belong to no document")


def _ranges(index: Index, start: int, stop: int, size: int) -> Ranges:
    """Return where documents ``start`` to ``stop`` are; fewer where they have many sequences."""
    edges = index.edges(start, stop)
    first, last = edges[:-1], edges[1:]
    good = leading((first >= 0) & (last >= first) & (last <= index.sequences))
    broken = ""
    if good < len(first):
        broken = f"spans sequences {first[good]:,} to {last[good]:,} of {index.sequences:,}"
    first, last = first[:good], last[:good]
    low, high = (int(first[0]), int(last[-1])) if good else (0, 0)
    if high - low > WINDOW_SEQUENCES and good > 1:
        return _ranges(index, start, start + good // 2, size)
    width = index.dtype.itemsize
    lengths = np.array(index.lengths[low:high], dtype=np.int64)
    begins = np.array(index.pointers[low:high], dtype=np.int64)
    # Whatever the index says, no product or sum below can overflow.
    negative = (lengths < 0) | (begins < 0)
    begins = begins.clip(0, size // index.unit + 1) * index.unit
    ends = begins + lengths.clip(0, size // width + 1) * width
    outside = negative | (ends > size)
    if outside.any():
        place = int(np.argmax(outside))
        why = "has a negative length or place" if negative[place] else f"is beyond the end of the file, {size:,} bytes"
        broken = f"has sequence {low + place:,}, which {why}"
        good = int(np.searchsorted(last, low + place, side="right"))
        first, last = first[:good], last[:good]
    return Ranges(*_spans(first - low, last - low, begins, ends), _unusable(index, first, last, begins, ends), broken)


def _spans(first: Places, last: Places, begins: Places, ends: Places) -> tuple[Places, Places]:
    """Return the bytes from each document's first sequence to its last; (0, 0) for one without."""
    begins, ends = np.append(begins, 0), np.append(ends, 0)
    full = last > first
    return np.where(full, begins[np.where(full, first, -1)], 0), np.where(full, ends[np.where(full, last - 1, -1)], 0)


def _unusable(index: Index, first: Places, last: Places, begins: Places, ends: Places) -> dict[int, str]:
    """Return why documents, by place, can't be read although all of their sequences are in the file."""
    if not len(first):
        return {}
    low = int(first[0])
    count = int(last[-1]) - low
    modal = np.zeros(count, bool) if index.modes is None else np.asarray(index.modes[low : low + count]) != 0
    apart = np.zeros(count, bool)
    apart[1:] = begins[1:count] != ends[: count - 1]
    reasons = {}
    for flags, skip, why in (
        (apart, 1, "does not follow the one before it"), (modal, 0, "is no text: its mode is not 0"),
    ):  # fmt: skip
        counted = np.concatenate([[0], np.cumsum(flags)])
        begin = np.minimum(first + skip, last) - low
        for i in np.flatnonzero(counted[last - low] > counted[begin]).tolist():
            place = int(begin[i]) + int(np.argmax(flags[begin[i] : last[i] - low]))
            reasons[i] = f"its sequence {low + place:,} {why}"
    return reasons


def cut_megatron(file: InputFile, target: int) -> list[Slice]:
    """Runs of documents of about ``target`` bytes."""
    index = open_index(Path(file.path).with_suffix(".idx"))

    def begin(number: int) -> int:
        sequence = int(index.edges(number, number)[0])
        return index.pointers.at(sequence) * index.unit if 0 <= sequence < index.sequences else file.size

    return cut_documents(index.documents, begin, file.size, target)
