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
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retrotool.errors import InputError, UsageError
from retrotool.sources.files import OFFSETS, WHOLE, InputFile, Slice
from retrotool.sources.megatron import cut_megatron, open_index, read_megatron
from retrotool.sources.records import Document, Fields, SetAside, excerpt, told
from retrotool.sources.token_ranges import (
    BLOCK_BYTES,
    OnDisk,
    Ranges,
    Tokens,
    cut_documents,
    document,
    documents,
    leading,
    load,
    over,
)

_NUMPY = b"\x93NUMPY"
_DESCRIPTION = b"'descr'"
_NUMPY_HEAD_BYTES = 64
"""Within which a header that has lost its beginning still shows."""
_ALIGNED = 8
"""Byte ranges begin at multiples of the widest type: which it is, is not known when they are cut."""
_SUFFIX_DTYPES = {".u16": "<u2", ".u32": "<u4"}


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a plain file's tokens are: ``count`` of ``dtype`` from byte ``begin``; ``dtype`` None: it does not say.

    ``told`` is how many there should be; ``by`` what says the type.
    """

    dtype: np.dtype[Any] | None
    begin: int
    told: int | None = None
    by: str = ""


def check_tokens(file: InputFile, fields: Fields) -> None:
    """Raise ``UsageError`` if neither a token file nor ``fields`` say how it is to be read, or they contradict it."""
    if file.path.endswith(".idx"):
        return  # without its tokens there is nothing to be read
    layout = _layout(file)
    if layout.dtype is None or layout.told in (None, (file.size - layout.begin) / layout.dtype.itemsize):
        _settled(file, fields, layout)  # else it is damaged, and what its header says means nothing


def read_tokens(file: InputFile, fields: Fields, where: Slice) -> Iterator[Document | SetAside]:
    """Documents of a file of token ids, or of a range of it."""
    if file.path.endswith(".idx"):
        raise InputError(f"{Path(file.path).with_suffix('.bin').name} is missing: an index has no tokens")
    layout = _layout(file)
    try:
        dtype = _settled(file, fields, layout)
    except UsageError as error:
        # Such a file is refused before the work, unless it was damaged then.
        raise InputError(str(error)) from error
    if _is_megatron(file):
        return read_megatron(file, fields, where)
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
    layout = _layout(file)
    if _offsets(file).is_file():
        offsets = _open_offsets(file)
        width = 1 if layout.dtype is None else layout.dtype.itemsize
        scale = (file.size - layout.begin) / max(offsets.at(-1) * width, 1)
        return cut_documents(len(offsets) - 1, lambda i: int(offsets.at(i) * width * scale), file.size, target)
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
    if _is_megatron(file):
        return Layout(open_index(path.with_suffix(".idx")).dtype, 0, by="index")
    with path.open("rb") as stream:
        head = stream.read(_NUMPY_HEAD_BYTES)
        if not head.startswith(_NUMPY):
            if _DESCRIPTION in head:
                raise InputError(
                    f"the numpy header of {path.name} is damaged: it begins otherwise", excerpt=excerpt(head[:6])
                )
            suffix = _SUFFIX_DTYPES.get(path.suffix.lower())
            return Layout(np.dtype(suffix) if suffix else None, 0, by="suffix")
    shape, dtype, begin = _numpy_header(path)
    if len(shape) != 1 or dtype.kind not in "iu":
        raise InputError(f"an array of {dtype.name} of shape {list(shape)}, not token ids in one dimension")
    return Layout(dtype, begin, shape[0], by="header")


def _numpy_header(path: Path) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape and type of numpy's array, and the byte where its numbers begin."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with path.open("rb") as stream:
        try:
            version = np.lib.format.read_magic(stream)
            if version in readers:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that Python 2 wrote it
                    shape, _, dtype = readers[version](stream)
                return shape, dtype, stream.tell()
        except Exception as error:  # a header is parsed as Python, and damaged ones fail in as many ways
            if isinstance(error, OSError):
                raise
            problem = told(error) or type(error).__name__
            raise InputError(f"the numpy header of {path.name} is damaged: {problem}") from error
    raise InputError(f"{path.name} is of numpy's format version {version[0]}.{version[1]}, which is not known")


def _settled(file: InputFile, fields: Fields, layout: Layout) -> np.dtype[Any]:
    """The type of the tokens.

    ``UsageError`` if nobody says it, or where documents end, or if one contradicts another.
    """
    given = _given_dtype(fields)
    dtype = layout.dtype or given
    if dtype is None:
        raise UsageError(
            f"{file.name} does not say how its tokens are stored",
            "Give --token-dtype (uint16 or uint32), or put the index that Megatron wrote, NAME.idx, beside it.",
        )
    # Ids are never negative, so whether the type has a sign makes no difference.
    if given is not None and given.itemsize != dtype.itemsize:
        raise UsageError(
            f"{file.name} holds {dtype.name} by its {layout.by}, not the {given.name} of --token-dtype",
            "Leave --token-dtype out for this file, or give it another name if its suffix is wrong.",
        )
    if fields.end_of_document is None and not (_is_megatron(file) or _offsets(file).is_file()):
        raise UsageError(
            f"{file.name} does not say where its documents end",
            f"Give --end-of-document with the id that stands after each, or put {_offsets(file).name} beside it.",
        )
    mark = fields.end_of_document
    if mark is not None and not np.iinfo(dtype).min <= mark <= np.iinfo(dtype).max:
        raise UsageError(
            f"{file.name} holds {dtype.name}, which --end-of-document {mark} does not fit",
            "Give the id that stands after each document, or the type that the file has.",
        )
    return dtype


def _given_dtype(fields: Fields) -> np.dtype[Any] | None:
    if fields.token_dtype is None:
        return None
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


def _open_offsets(file: InputFile) -> OnDisk:
    path = _offsets(file)
    shape, dtype, begin = _numpy_header(path)
    if len(shape) != 1 or dtype.kind not in "iu" or shape[0] < 1:
        raise InputError(f"{path.name} is no list of places: {dtype.name} of shape {list(shape)}")
    size = path.stat().st_size
    if size != begin + shape[0] * dtype.itemsize:
        raise InputError(f"{path.name} is damaged: {shape[0]:,} places do not make its {size:,} bytes")
    return OnDisk(path, dtype, begin, shape[0])


def _read_offsets(
    file: InputFile, fields: Fields, where: Slice, layout: Layout, dtype: np.dtype[Any]
) -> Iterator[Document | SetAside]:
    """Documents of a range of documents; positions are their numbers in the file, from 1."""
    offsets = _open_offsets(file)
    have = (file.size - layout.begin) // dtype.itemsize
    total = len(offsets) - 1

    def ranges(start: int, stop: int) -> Ranges:
        places = offsets[start : stop + 1]
        places = places if places.itemsize == 8 else places.astype(np.int64)
        # One more than there are tokens stands for all places outside; no product below can overflow.
        edges = places.clip(-1 if places.dtype.kind == "i" else 0, have + 1).astype(np.int64)
        good = leading((edges[:-1] >= 0) & (edges[1:] >= edges[:-1]) & (edges[1:] <= have))
        bounds = layout.begin + edges[: good + 1] * dtype.itemsize
        broken = f"spans tokens {places[good]:,} to {places[good + 1]:,} of {have:,}" if good < stop - start else ""
        return Ranges(bounds[:-1], bounds[1:], broken=broken)

    if where.start == 0 and 0 < offsets.at(0) <= have:
        yield SetAside(0, f"the first {offsets.at(0):,} of {have:,} tokens belong to no document")
    yield from documents(file, dtype, total, ranges, fields, where)
    if where.end in (None, total):
        if 0 <= offsets.at(-1) < have:
            yield SetAside(0, f"the last {have - offsets.at(-1):,} of {have:,} tokens belong to no document")
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
