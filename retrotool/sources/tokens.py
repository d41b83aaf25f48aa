r"""Files of token ids: Megatron's ``.bin``, and plain ``.bin``, ``.u16``, ``.u32`` and ``.npy``.

A plain file has only little-endian ids: uint16 in ``.u16``, uint32 in ``.u32``, ``Fields.token_dtype`` in
``.bin``; an ``.npy`` file is a one-dimensional array of integers. Documents are delimited by one of:

* ``NAME.idx``, the index of Megatron-LM, -core and -DeepSpeed, GPT-NeoX and NeMo, little-endian::

      "MMIDIDX\0\0"  version u64 = 1  dtype u8  sequences n u64  boundaries d u64
      lengths i32[n]  pointers i64[n] (bytes)  boundaries i64[d]  and, if multimodal, modes i8[n]

  There are d - 1 documents, each a range of sequences. Rejected are documents with sequences of a mode other
  than 0, which are not text, and those whose sequences are not adjacent.
* ``Fields.end_of_document``: the id after each document, which is not part of it.

Slices are runs of documents, or byte ranges with end marks. The first document outside the file rejects the
rest. Cost: the disk's rate, about 4 µs per document, and BLAKE2b of four bytes per token. Memory: a block, a
document, and about 100 bytes per document of a slice with an index.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import struct
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from retrotool.errors import InputError, UsageError
from retrotool.sources.inputs import WHOLE, InputFile, Slice
from retrotool.sources.records import Document, Fields, Rejected, content_hash, excerpt, reason_of, too_many_tokens

BLOCK_BYTES = 1 << 20
_NUMPY = b"\x93NUMPY"
_DESCRIPTION = b"'descr'"
_NUMPY_HEAD_BYTES = 64  # enough to recognise a header with a damaged beginning
_ENDS_LOOKED_AT = 1000  # documents
_BEYOND_BYTES = 64 << 10  # read at a time to find the end of a slice's last document
_ALIGNED = 8  # the widest type, as the type is not known when a file is cut
_SUFFIX_DTYPES = {".u16": "<u2", ".u32": "<u4"}
_MEGATRON = b"MMIDIDX\0\0"
_MEGATRON_HEADER = "<QBQQ"
_MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2", 9: "<u4", 10: "<u8"}

Tokens = npt.NDArray[np.integer[Any]]
Places = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class FileArray:
    """An array of integers in a file, read in parts: truncating a mapped file would crash the process."""

    file: InputFile
    dtype: np.dtype[Any]
    offset: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> Tokens:
        start, stop, _ = part.indices(self.count)
        count = max(0, stop - start)
        width = self.dtype.itemsize
        found = self.file.read_range(self.offset + start * width, count * width)
        if len(found) < count * width:
            raise InputError(f"{Path(self.file.path).name} was truncated while it was read")
        return np.frombuffer(found, self.dtype)

    def at(self, place: int) -> int:
        """Return one number; negative places count from the end."""
        place = place if place >= 0 else self.count + place
        return int(self[place : place + 1][0])


@dataclass(frozen=True, slots=True)
class MegatronIndex:
    """Sequences, and the documents that they belong to."""

    dtype: np.dtype[Any]
    lengths: FileArray  # in tokens
    pointers: FileArray  # in bytes
    boundaries: FileArray  # [documents + 1]: the first sequence of each document
    modes: FileArray | None  # 0 is text; None: all is text


@dataclass(frozen=True, slots=True)
class TokenArray:
    """Where a file's tokens are."""

    dtype: np.dtype[Any] | None
    begin: int
    by: str  # what specifies ``dtype``
    expected: int | None = None  # tokens, if the file says so
    index: MegatronIndex | None = None


class Ranges(NamedTuple):
    """Byte ranges of consecutive documents, inside the file."""

    begins: Places
    ends: Places
    reasons: dict[int, str]  # why some of them, by number, are rejected


def check_tokens(file: InputFile, fields: Fields) -> None:
    """Raise ``UsageError`` if type or documents of a token file are unspecified or contradictory."""
    if file.path.endswith(".idx"):
        return  # its token file is missing
    array = _open_array(file)
    if array.dtype is None or array.expected in (None, (file.size - array.begin) / array.dtype.itemsize):
        _agreed_dtype(file, fields, array)  # else its header is damaged


def check_ends(file: InputFile, fields: Fields) -> None:
    """Raise ``UsageError`` if the first documents all end with one token that is nowhere else in them."""
    found, size = [], 0
    for row in itertools.islice(read_tokens(file, fields, WHOLE), _ENDS_LOOKED_AT):
        if isinstance(row, Document) and row.tokens is not None:
            found.append(row.tokens)
            size += len(row.tokens)
        if size > BLOCK_BYTES:
            break
    end = int(found[0][-1]) if len(found) > 1 else None
    if end is not None and all(ids[-1] == end and end not in ids[:-1] for ids in found):
        advice = f"Give --end-of-document {end} to leave it out, or --end-of-document none to keep it in their text."
        raise UsageError(f"all documents of {file.name} end with token {end}, as if it marks their ends", advice)


def read_tokens(file: InputFile, fields: Fields, where: Slice) -> Iterator[Document | Rejected]:
    """Yield documents; positions are byte offsets if marks end them, otherwise numbers from 1."""
    if file.path.endswith(".idx"):
        raise InputError(f"{Path(file.path).with_suffix('.bin').name} is missing: an index has no tokens")
    array = _open_array(file)
    try:
        dtype = _agreed_dtype(file, fields, array)
    except UsageError as error:
        # Checked before the work, unless the file was damaged then.
        raise InputError(str(error)) from error
    end = where.last if array.index is None else None if where.end is None else _begin_of(where.end, array.index, file)
    with file.open(end, BLOCK_BYTES) as stream:
        found: Iterator[Ranges | Rejected]
        if array.index is None:
            found, before = _by_marks(stream, file, fields, array, dtype, where), None
        else:
            found, before = _by_index(file, array.index, where), where.start
        yield from _documents(stream, found, file, fields, dtype, before)


def cut_tokens(file: InputFile, target: int) -> list[Slice]:
    """Return runs of documents, or byte ranges, of about ``target`` bytes."""
    if file.path.endswith(".idx") or file.size <= target:
        return [WHOLE]
    array = _open_array(file)
    count = -(-file.size // target)
    if array.index is None:
        steps = (file.size - array.begin) // _ALIGNED
        edges = sorted({array.begin + _ALIGNED * (steps * i // count) for i in range(count)})
        return [Slice(a, b, 0 if a == array.begin else a, b) for a, b in itertools.pairwise([*edges, file.size])]
    total = len(array.index.boundaries) - 1
    if total < 2:
        return [WHOLE]
    if file.is_remote:  # searching takes many small requests
        places = {total * i // count for i in range(1, count)}
    else:
        begin = functools.partial(_begin_of, index=array.index, file=file)
        places = {bisect.bisect_left(range(total), file.size * i // count, key=begin) for i in range(1, count)}
    return [Slice(a, b, a, b) for a, b in itertools.pairwise(sorted(places | {0, total}))]


def _begin_of(document: int, index: MegatronIndex, file: InputFile) -> int:
    """Return where a document begins in the file; for the number of documents, where the last one ends."""
    sequence = index.boundaries.at(document) if document < len(index.boundaries) else -1
    return index.pointers.at(sequence) if 0 <= sequence < len(index.pointers) else file.size


def _documents(
    stream: BinaryIO, found: Iterable[Ranges | Rejected], file: InputFile, fields: Fields, dtype: np.dtype[Any],
    before: int | None,
) -> Iterator[Document | Rejected]:  # fmt: skip
    """Read documents. ``before``: their number before the slice; None if positions are byte offsets."""
    line = 0
    try:
        for ranges in found:
            if isinstance(ranges, Rejected):
                yield ranges
                continue
            places = zip(ranges.begins.tolist(), ranges.ends.tolist(), strict=True)
            for i, (begin, end) in enumerate(places):
                line += 1
                position, offset, marks = (begin, begin, 0) if before is None else (before + line, -1, 1)
                # A mark at the end does not count.
                count = (end - begin) // dtype.itemsize - marks
                if reason := ranges.reasons.get(i) or too_many_tokens(count, fields.max_document):
                    yield Rejected(line, reason, offset)
                    continue
                stream.seek(begin)
                tokens = _native(stream.read(end - begin), dtype, end - begin)
                yield _document(tokens, fields, file.name, line, position, offset)
    except InputError as error:
        raise InputError(str(error), line + 1) from error


def _document(tokens: Tokens, fields: Fields, name: str, line: int, position: int, offset: int) -> Document | Rejected:
    if fields.end_of_document is not None and len(tokens) and tokens[-1] == fields.end_of_document:
        tokens = tokens[:-1]
        if not len(tokens):
            return Rejected(line, f"no tokens before its end mark {fields.end_of_document}", offset)
    if not len(tokens):
        return Rejected(line, "no tokens", offset)
    if too_many := too_many_tokens(len(tokens), fields.max_document):
        return Rejected(line, too_many, offset)
    if tokens.dtype.kind == "i" and int(tokens.min()) < 0:
        return Rejected(line, f"a negative token id at token {int(np.argmax(tokens < 0)):,}", offset)
    identifier, kept = content_hash("", None, tokens).hex(), (None,) * len(fields.keep)
    return Document(identifier, "", name, position, line, kept, None, tokens)


def _native(data: bytes, dtype: np.dtype[Any], size: int) -> Tokens:
    """Return ids in native byte order; raise ``InputError`` if ``data`` has fewer than ``size`` bytes."""
    if len(data) < size:
        raise InputError("the file was truncated while it was read")
    tokens: Tokens = np.frombuffer(data, dtype, len(data) // dtype.itemsize)
    return tokens if dtype.isnative else tokens.astype(dtype.newbyteorder("="))


def _by_marks(
    stream: BinaryIO, file: InputFile, fields: Fields, array: TokenArray, dtype: np.dtype[Any], where: Slice
) -> Iterator[Ranges]:
    last = file.size if where.last is None else where.last
    width = dtype.itemsize
    size = array.begin + (file.size - array.begin) // width * width
    # A document begins after a mark, so a range starts with the token before it.
    place = array.begin if where.first == 0 else where.first - width
    mark = np.array([place - width] if where.first == 0 else [], np.int64)
    while place < size and (mark[0] + width if len(mark) else place) < last:
        stream.seek(place)
        most = min(BLOCK_BYTES, last - place) if place < last else _BEYOND_BYTES
        block = stream.read(min(most // width * width, size - place))
        tokens = _native(block, dtype, width)
        found = place + width * np.flatnonzero(tokens == fields.end_of_document)
        edges = np.concatenate([mark, found])
        begins, ends = edges[:-1] + width, edges[1:]
        # A mark at the start of the file does not end a document.
        own = (begins < last) & ((begins > array.begin) | (ends > begins))
        yield Ranges(begins[own], ends[own], {})
        mark = edges[-1:]
        place += len(tokens) * width
    if len(mark) and mark[0] + width < min(last, size):
        yield Ranges(mark + width, np.array([size]), {})
    if last >= file.size:
        have, left = divmod(file.size - array.begin, width)
        if array.expected is not None and (have, left) != (array.expected, 0):
            raise InputError(f"its header says {array.expected:,} tokens, it has {have:,} and {left} bytes")
        if left:
            raise InputError(f"broken off inside a token: {left} bytes after token {have:,}")


def _by_index(file: InputFile, index: MegatronIndex, where: Slice) -> Iterator[Ranges | Rejected]:
    sequences, documents = len(index.lengths), max(0, len(index.boundaries) - 1)
    first, last = (index.boundaries.at(0), index.boundaries.at(-1)) if documents else (sequences, sequences)
    if where.start == 0 and first > 0:
        yield Rejected(0, f"the first {first:,} of {sequences:,} sequences belong to no document")
    end = documents if where.end is None else where.end
    if end > documents:
        raise InputError(f"{documents:,} documents are listed, {end:,} were when it was planned")
    edges = index.boundaries[where.start : end + 1].astype(np.int64)
    in_order = (edges[:-1] >= 0) & (edges[1:] >= edges[:-1]) & (edges[1:] <= sequences)
    good = int(np.argmin(np.append(in_order, False)))
    broken = "" if good == len(in_order) else f"spans sequences {edges[good]:,} to {edges[good + 1]:,} of {sequences:,}"
    low, high = (int(edges[0]), int(edges[good])) if good else (0, 0)
    width, size = index.dtype.itemsize, file.size
    lengths, begins = index.lengths[low:high].astype(np.int64), index.pointers[low:high].astype(np.int64)
    negative = (lengths < 0) | (begins < 0)
    # Clip, so that no product or sum below can overflow.
    begins = begins.clip(0, size + 1)
    ends = begins + lengths.clip(0, size // width + 1) * width
    outside = np.flatnonzero(negative | (ends > size))
    if len(outside):
        place = int(outside[0])
        why = "has a negative length or place" if negative[place] else f"is beyond the end of the file, {size:,} bytes"
        broken = f"has sequence {low + place:,}, which {why}"
        good = int(np.searchsorted(edges[1 : good + 1] - low, place, side="right"))
    from_, to = edges[:good] - low, edges[1 : good + 1] - low
    begin = np.append(begins, 0)[from_]
    yield Ranges(
        begin, np.where(to > from_, np.append(0, ends)[to], begin), _unusable(index, low, from_, to, begins, ends)
    )
    if broken:
        left = f"the rest of {documents:,} documents is lost"
        raise InputError(f"broken off after document {where.start + good:,}: the next {broken}; {left}")
    if end < documents:
        return
    if 0 <= last < sequences:
        yield Rejected(0, f"the last {sequences - last:,} of {sequences:,} sequences belong to no document")
    reach = index.pointers.at(-1) + index.lengths.at(-1) * index.dtype.itemsize if sequences else 0
    if 0 <= reach < file.size:
        yield Rejected(0, f"{file.size - reach:,} bytes after the last sequence belong to no document")


def _unusable(
    index: MegatronIndex, low: int, first: Places, last: Places, begins: Places, ends: Places
) -> dict[int, str]:
    count = int(last[-1]) if len(last) else 0
    apart = np.append(False, begins[1:count] != ends[: max(count - 1, 0)])[:count]
    apart[first[first < count]] = False
    modal = np.zeros(count, bool) if index.modes is None else index.modes[low : low + count] != 0
    reasons: dict[int, str] = {}
    for wrong, why in ((apart, "does not follow the one before it"), (modal, "is not text: its mode is not 0")):
        for sequence in np.flatnonzero(wrong).tolist():
            document = int(np.searchsorted(last, sequence, side="right"))
            reasons.setdefault(document, f"its sequence {low + sequence:,} {why}")
    return reasons


def _open_array(file: InputFile) -> TokenArray:
    path = Path(file.path)
    if path.suffix == ".bin" and (beside := file.index()):
        index = open_megatron_index(beside)
        return TokenArray(index.dtype, 0, "index", index=index)
    with file.open(_NUMPY_HEAD_BYTES) as stream:
        head = stream.read(_NUMPY_HEAD_BYTES)
        if not head.startswith(_NUMPY):
            if _DESCRIPTION in head:
                raise InputError(f"the numpy header of {path.name} has a damaged beginning", excerpt=excerpt(head[:6]))
            suffix = _SUFFIX_DTYPES.get(path.suffix.lower())
            return TokenArray(np.dtype(suffix) if suffix else None, 0, "suffix")
        stream.seek(0)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        try:
            numbers = np.lib.format.read_magic(stream)
            if numbers not in readers:
                raise InputError(f"{path.name} is in numpy format {numbers[0]}.{numbers[1]}, which is not supported")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about files of Python 2
                shape, _, dtype = readers[numbers](stream)
        except Exception as error:  # a header is parsed as Python code, so anything may be raised
            if isinstance(error, OSError | InputError):
                raise
            problem = reason_of(error) or type(error).__name__
            raise InputError(f"the numpy header of {path.name} is damaged: {problem}") from error
        begin = stream.tell()
    if len(shape) != 1 or dtype.kind not in "iu":
        raise InputError(f"an array of {dtype.name} of shape {list(shape)}, not token ids in one dimension")
    return TokenArray(dtype, begin, "header", shape[0])


def open_megatron_index(file: InputFile) -> MegatronIndex:
    """Open an index; raise ``InputError`` if its header and its size do not match."""
    path, size = Path(file.path), file.size
    head = file.read_range(0, len(_MEGATRON) + struct.calcsize(_MEGATRON_HEADER))
    if not head.startswith(_MEGATRON):
        raise InputError(f"{path.name} is not a Megatron index", excerpt=excerpt(head[:9]))
    try:
        version, code, sequences, boundaries = struct.unpack_from(_MEGATRON_HEADER, head, len(_MEGATRON))
    except struct.error:
        raise InputError(f"{path.name} ends inside its header, at {len(head)} bytes") from None
    if version != 1:
        raise InputError(f"{path.name} has the unknown version {version}")
    if code not in _MEGATRON_DTYPES:
        raise InputError(f"{path.name} does not hold token ids: its type code is {code}")
    pointers = len(head) + 4 * sequences
    edges = pointers + 8 * sequences
    modes = edges + 8 * boundaries
    if size not in (modes, modes + sequences):
        counts = f"{sequences:,} sequences and {boundaries:,} boundaries of documents"
        raise InputError(f"{path.name} is damaged: {counts} take {modes:,} bytes, it has {size:,}")
    return MegatronIndex(
        np.dtype(_MEGATRON_DTYPES[code]),
        FileArray(file, np.dtype("<i4"), len(head), sequences),
        FileArray(file, np.dtype("<i8"), pointers, sequences),
        FileArray(file, np.dtype("<i8"), edges, boundaries),
        FileArray(file, np.dtype("i1"), modes, sequences) if size > modes else None,
    )


def _agreed_dtype(file: InputFile, fields: Fields, array: TokenArray) -> np.dtype[Any]:
    """Return the type of the tokens; raise ``UsageError`` if it or the documents are not specified."""
    given: np.dtype[Any] | None = None
    if fields.token_dtype is not None:
        if fields.token_dtype not in np.sctypeDict or np.dtype(fields.token_dtype).kind not in "iu":
            raise UsageError(f"{fields.token_dtype!r} is not a type of token ids", "Give --format u16 or --format u32.")
        given = np.dtype(fields.token_dtype).newbyteorder("<")
    dtype = array.dtype or given
    if dtype is None:
        advice = "Give --format u16 or --format u32, or put Megatron's index, NAME.idx, beside it."
        raise UsageError(f"the type of the tokens in {file.name} is not specified", advice)
    # Ids are never negative, so the sign of the type does not matter.
    if given is not None and given.itemsize != dtype.itemsize:
        advice = "Leave --format out for this file, or rename the file if its suffix is wrong."
        raise UsageError(f"{file.name} holds {dtype.name} by its {array.by}, not {given.name} as given", advice)
    mark = fields.end_of_document
    if mark is None and array.index is None:
        advice = "Give --end-of-document with the id after each document, or put Megatron's index, NAME.idx, beside it."
        raise UsageError(f"the ends of documents in {file.name} are not specified", advice)
    if mark is not None and not np.iinfo(dtype).min <= mark <= np.iinfo(dtype).max:
        raise UsageError(
            f"--end-of-document {mark} is not in the range of {dtype.name}, the type of {file.name}",
            "Give the id after each document, or the file's type with --format u16 or u32.",
        )
    return dtype
