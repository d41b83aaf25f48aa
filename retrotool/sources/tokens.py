"""Files of token ids: Megatron's (see ``megatron``), and plain ones: ``.bin``, ``.u16``, ``.u32`` and ``.npy``.

A plain file is nothing but ids, little-endian: uint16 in ``.u16``, uint32 in ``.u32``, of ``Fields.token_dtype`` in
``.bin``; an ``.npy`` file (numpy's format, versions 1 and 2) is a one-dimensional array of integers, and one without
numpy's header is read as ``.bin``. Where documents are, one of two things says:

* ``NAME.offsets.npy`` beside the file (``NAME`` without its suffix): integers [documents + 1], the token with which
  each document begins, and at last the number of tokens. Slices are runs of documents.
* ``Fields.end_of_document``: the id that stands after each document, and belongs to none. A file may also begin with
  it. Slices are byte ranges; a document belongs to the range that it begins in.

Cost: the file is read in blocks of 8 MiB and searched by numpy, never token by token; see ``token_ranges`` for
documents.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from retrotool.errors import InputError, UsageError
from retrotool.sources.files import OFFSETS, WHOLE, InputFile, Slice
from retrotool.sources.megatron import cut_megatron, read_megatron
from retrotool.sources.records import Document, Fields, SetAside
from retrotool.sources.token_ranges import (
    BLOCK_BYTES,
    Ranges,
    Tokens,
    broken_off,
    cut_documents,
    document,
    documents,
    load,
    lost,
    over,
)

_NUMPY = b"\x93NUMPY"
_ALIGNED = 8
"""Byte ranges begin at multiples of the widest type: which it is, is not known when they are cut."""
_SUFFIX_DTYPES = {".u16": "<u2", ".u32": "<u4"}
WINDOW_DOCUMENTS = 1 << 16


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a plain file's tokens are: ``count`` of ``dtype`` from byte ``begin``; ``dtype`` None: it does not say.

    ``told`` is how many there should be.
    """

    dtype: np.dtype[Any] | None
    begin: int
    told: int | None = None


def check_tokens(file: InputFile, fields: Fields) -> None:
    """Raise ``UsageError`` if neither a token file nor ``fields`` say how it is to be read; for before the work."""
    if file.base == "tokens" and not _is_megatron(file) and not file.path.endswith(".idx"):
        _dtype(file, fields, _layout(file))


def read_tokens(file: InputFile, fields: Fields, where: Slice) -> Iterator[Document | SetAside]:
    """Documents of a file of token ids, or of a range of it."""
    if file.path.endswith(".idx"):
        raise InputError(f"{Path(file.path).with_suffix('.bin').name} is missing: an index has no tokens")
    if _is_megatron(file):
        return read_megatron(file, fields, where)
    layout = _layout(file)
    dtype = _dtype(file, fields, layout)
    if _offsets(file).is_file():
        return _read_offsets(file, fields, where, layout, dtype)
    return _read_marked(file, fields, where, layout, dtype)


def cut_tokens(file: InputFile, fields: Fields, target: int) -> list[Slice]:
    """Runs of documents, or byte ranges, of about ``target`` bytes."""
    del fields
    if file.path.endswith(".idx") or file.size <= target:
        return [WHOLE]
    if _is_megatron(file):
        return cut_megatron(file, target)
    try:
        layout = _layout(file)
        offsets = _load_offsets(file) if _offsets(file).is_file() else None
    except InputError:
        return [WHOLE]  # reading it will say what is wrong
    if offsets is not None:
        width = 1 if layout.dtype is None else layout.dtype.itemsize
        scale = (file.size - layout.begin) / max(int(offsets[-1]) * width, 1)
        return cut_documents(len(offsets) - 1, lambda i: int(offsets[i] * width * scale), file.size, target)
    steps = (file.size - layout.begin) // _ALIGNED
    count = -(-file.size // target)
    edges = sorted({layout.begin + _ALIGNED * (steps * i // count) for i in range(count)})
    return [Slice(a, b, 0 if a == layout.begin else a, b) for a, b in itertools.pairwise([*edges, file.size])]


def _is_megatron(file: InputFile) -> bool:
    return file.path.endswith(".bin") and Path(file.path).with_suffix(".idx").is_file()


def _offsets(file: InputFile) -> Path:
    return Path(file.path).with_suffix(OFFSETS)


def _layout(file: InputFile) -> Layout:
    path = Path(file.path)
    with path.open("rb") as stream:
        if stream.read(len(_NUMPY)) != _NUMPY:
            suffix = _SUFFIX_DTYPES.get(path.suffix.lower())
            return Layout(np.dtype(suffix) if suffix else None, 0)
        stream.seek(0)
        shape, dtype = _numpy_header(stream)
        if len(shape) != 1 or dtype.kind not in "iu":
            raise InputError(f"an array of {dtype} of shape {list(shape)}, not token ids in one dimension")
        return Layout(dtype, stream.tell(), shape[0])


def _numpy_header(stream: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(stream)
        if version not in readers:
            raise InputError(f"numpy's format version {version[0]}.{version[1]} is not known")
        shape, _, dtype = readers[version](stream)
    except ValueError as error:
        raise InputError(f"its numpy header is damaged: {str(error).splitlines()[0]}") from error
    return shape, dtype


def _dtype(file: InputFile, fields: Fields, layout: Layout) -> np.dtype[Any]:
    """The type of the tokens; ``UsageError`` if nobody says, or if nobody says where documents end."""
    if layout.dtype is None and fields.token_dtype is None:
        raise UsageError(
            f"{file.name} does not say how its tokens are stored",
            "Give --token-dtype (uint16 or uint32), or put the index that Megatron wrote, NAME.idx, beside it.",
        )
    if fields.end_of_document is None and not _offsets(file).is_file():
        raise UsageError(
            f"{file.name} does not say where its documents end",
            f"Give --end-of-document with the id that stands after each, or put {_offsets(file).name} beside it.",
        )
    if layout.dtype is not None:
        return layout.dtype
    try:
        dtype = np.dtype(fields.token_dtype).newbyteorder("<")
    except TypeError:
        dtype = np.dtype(float)
    if dtype.kind not in "iu":
        raise UsageError(f"{fields.token_dtype!r} is no type of token ids", "Give --token-dtype uint16 or uint32.")
    return dtype


def _tail(file: InputFile, layout: Layout, dtype: np.dtype[Any], line: int) -> None:
    """Raise ``InputError`` if the file ends inside a token, or has not the tokens that its header tells."""
    have, left = divmod(file.size - layout.begin, dtype.itemsize)
    if layout.told is not None and (have, left) != (layout.told, 0):
        raise InputError(f"its header tells {layout.told:,} tokens, it has {have:,} and {left} bytes", line)
    if left:
        raise InputError(f"broken off inside a token: {left} bytes after token {have:,}", line)


def _load_offsets(file: InputFile) -> npt.NDArray[Any]:
    path = _offsets(file)
    try:
        offsets: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"{path.name} is damaged: {str(error).splitlines()[0]}") from error
    if offsets.ndim != 1 or offsets.dtype.kind not in "iu" or not len(offsets):
        raise InputError(f"{path.name} is no list of places: {offsets.dtype} of shape {list(offsets.shape)}")
    return offsets


def _read_offsets(
    file: InputFile, fields: Fields, where: Slice, layout: Layout, dtype: np.dtype[Any]
) -> Iterator[Document | SetAside]:
    """Documents of a range of documents; positions are their numbers in the file, from 1."""
    offsets = _load_offsets(file)
    have = (file.size - layout.begin) // dtype.itemsize
    total = len(offsets) - 1
    end = total if where.end is None else where.end
    if where.start == 0 and 0 < offsets[0] <= have:
        yield SetAside(0, f"the first {int(offsets[0]):,} of {have:,} tokens belong to no document")
    for start in range(where.start, end, WINDOW_DOCUMENTS):
        stop = min(start + WINDOW_DOCUMENTS, end)
        # One more than there are tokens stands for all places outside; no product below can overflow.
        edges = offsets[start : stop + 1].clip(-1 if offsets.dtype.kind == "i" else 0, have + 1).astype(np.int64)
        wrong = (edges[:-1] < 0) | (edges[1:] < edges[:-1]) | (edges[1:] > have)
        outside = (edges[1:] > have) & (edges[:-1] >= 0)
        line = start - where.start + 1
        ranges = Ranges(
            *((layout.begin + edges[part] * dtype.itemsize).tolist() for part in (slice(-1), slice(1, None)))
        )
        for i in np.flatnonzero(wrong).tolist():
            a, b = int(offsets[start + i]), int(offsets[start + i + 1])
            ranges.reasons[i] = f"it spans tokens {a:,} to {b:,} of {have:,}"
        broken = broken_off(outside, last=stop == total)
        if broken is not None:
            del ranges.begins[broken:], ranges.ends[broken:]
        yield from documents(Path(file.path), dtype, ranges, fields, file.name, line, start + 1)
        if broken is not None:
            raise lost(line + broken, start + 1 + broken, total, file.size)
    if end == total:
        if 0 <= offsets[-1] < have:
            yield SetAside(0, f"the last {have - int(offsets[-1]):,} of {have:,} tokens belong to no document")
        _tail(file, layout, dtype, total - where.start + 1)


def _read_marked(
    file: InputFile, fields: Fields, where: Slice, layout: Layout, dtype: np.dtype[Any]
) -> Iterator[Document | SetAside]:
    """Documents that begin in a range of bytes; positions are byte offsets in the file."""
    last = file.size if where.last is None else where.last
    line = 1
    for begin, tokens in _marked(file, fields, where, layout, dtype):
        if begin >= last:
            return
        if isinstance(tokens, str):
            yield SetAside(line, tokens, begin)
        elif not len(tokens) and begin == layout.begin:
            continue  # the mark stands before documents, too
        else:
            found = document(tokens, fields, file.name, line, begin, strip=False)
            yield found._replace(offset=begin) if isinstance(found, SetAside) else found
        line += 1
    if last >= file.size:
        _tail(file, layout, dtype, line)


def _marked(
    file: InputFile, fields: Fields, where: Slice, layout: Layout, dtype: np.dtype[Any]
) -> Iterator[tuple[int, Tokens | str]]:
    """What lies between marks, with its place, from the first that may begin in a range; or why it is too long."""
    last = file.size if where.last is None else where.last
    width = dtype.itemsize
    # Whether a document begins at the range's first byte, the token before tells.
    place = layout.begin if where.first == 0 else where.first - width
    inside = where.first != 0
    begin, held, pieces = place, 0, list[Tokens]()
    size = layout.begin + (file.size - layout.begin) // width * width
    with Path(file.path).open("rb", buffering=0) as stream:
        while place < size and begin < last and not (inside and place >= last):
            block = load(stream, dtype, place, min(place + BLOCK_BYTES // width * width, size))
            at = 0
            for mark in np.flatnonzero(block == fields.end_of_document).tolist():
                held += mark - at
                if inside:
                    inside = False
                elif too_long := over(held, fields):
                    yield begin, too_long
                else:
                    yield begin, np.concatenate([*pieces, block[at:mark]]) if pieces else block[at:mark]
                begin, held, pieces, at = place + (mark + 1) * width, 0, [], mark + 1
            held += len(block) - at
            if inside or over(held, fields):
                pieces = []
            elif at < len(block):
                pieces.append(block[at:])
            place += len(block) * width
    if held and not inside and place >= size:
        yield begin, over(held, fields) or np.concatenate(pieces)
