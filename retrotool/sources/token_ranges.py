"""Documents that are ranges of a file of token ids: reading them in blocks, and what makes a document of an array.

``Ranges`` is where a window of documents lies; ``documents`` reads neighbouring ranges in one go, of a few MiB, and
gives views of them. Positions come from files that may be damaged: nothing is read that was not found inside the file
before.

Cost: reading at the disk's rate, about 4 µs a document, and BLAKE2b over four bytes a token for the id, which is most
of it.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from retrotool.errors import InputError
from retrotool.sources.files import WHOLE, Slice
from retrotool.sources.records import TOKEN_BYTES, Document, Fields, SetAside, tokens_id

BLOCK_BYTES = 8 << 20

Tokens = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class OnDisk:
    """An array of integers in a file, of which a part is read where it is asked for.

    Mapped into memory, a file that becomes shorter meanwhile would end the process.
    """

    path: Path
    dtype: np.dtype[Any]
    offset: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> Tokens:
        start, stop, _ = part.indices(self.count)
        count = max(0, stop - start)
        found: Tokens = np.fromfile(self.path, self.dtype, count, offset=self.offset + start * self.dtype.itemsize)
        if len(found) < count:
            raise InputError(f"{self.path.name} became shorter while it was read")
        return found

    def at(self, place: int) -> int:
        """One of the numbers; negative places count from the end."""
        place = place if place >= 0 else self.count + place
        return int(self[place : place + 1][0])


@dataclass(frozen=True, slots=True)
class Ranges:
    """Where consecutive documents lie: ``begins`` and ``ends`` in bytes of the file.

    ``reasons`` has what is wrong with some of them, by place, whose range means nothing; ``pieces`` the ranges of those
    that do not lie in one.
    """

    begins: list[int]
    ends: list[int]
    reasons: dict[int, str] = field(default_factory=dict)
    pieces: dict[int, list[tuple[int, int]]] = field(default_factory=dict)


def document(
    tokens: Tokens, fields: Fields, source: str, line: int, position: int, *, strip: bool = True
) -> Document | SetAside:
    """A document of its tokens, without the one end mark that it may have (``strip``), or why it is none."""
    if strip and fields.end_of_document is not None and len(tokens) and tokens[-1] == fields.end_of_document:
        tokens = tokens[:-1]
        if not len(tokens):
            return SetAside(line, f"no tokens before its end mark {fields.end_of_document}")
    if not len(tokens):
        return SetAside(line, "no tokens")
    if too_long := over(len(tokens), fields):
        return SetAside(line, too_long)
    if tokens.dtype.kind == "i" and int(tokens.min()) < 0:
        place = int(np.argmax(tokens < 0))
        return SetAside(line, f"a negative token id at token {place:,}")
    kept = (None,) * len(fields.keep)
    return Document(tokens_id(tokens), "", source, position, line, kept, None, tokens)


def over(count: int, fields: Fields) -> str | None:
    """Why a document of so many tokens is over the limit, or None."""
    if count * TOKEN_BYTES <= fields.max_document:
        return None
    return f"{count:,} tokens, {TOKEN_BYTES} bytes each, are more than --max-document {fields.max_document:,}"


def documents(
    path: Path, dtype: np.dtype[Any], ranges: Ranges, fields: Fields, source: str, line: int, position: int
) -> Iterator[Document | SetAside]:
    """The documents of a window; the first has ``line`` in what is read and ``position`` in the file, both from 1."""
    block, origin, reach = np.empty(0, dtype), 0, -1
    with path.open("rb", buffering=0) as file:
        for i, (begin, end) in enumerate(zip(ranges.begins, ranges.ends, strict=True)):
            where = line + i
            pieces = ranges.pieces.get(i)
            count = (end - begin if pieces is None else sum(b - a for a, b in pieces)) // dtype.itemsize
            if reason := ranges.reasons.get(i) or over(count - 1, fields):
                yield SetAside(where, reason)
                continue
            if pieces is not None:
                tokens = np.concatenate([load(file, dtype, a, b) for a, b in pieces])
            else:
                if not (origin <= begin and end <= reach and (begin - origin) % dtype.itemsize == 0):
                    origin, reach = begin, _reach(ranges, i)
                    block = load(file, dtype, origin, reach)
                at = (begin - origin) // dtype.itemsize
                tokens = block[at : at + count]
            yield document(tokens, fields, source, where, position + i)


def _reach(ranges: Ranges, i: int) -> int:
    """The end of the documents that follow document i without a gap, as far as a block goes."""
    begin, reach = ranges.begins[i], ranges.ends[i]
    for j in itertools.count(i + 1):
        if j in ranges.reasons or j in ranges.pieces or j == len(ranges.begins) or ranges.begins[j] != reach:
            return reach
        if ranges.ends[j] - begin > BLOCK_BYTES:
            return reach
        reach = ranges.ends[j]
    raise AssertionError


def load(file: IO[bytes], dtype: np.dtype[Any], begin: int, end: int) -> Tokens:
    """The token ids in a range of bytes, in the machine's byte order; ``InputError`` if the file has become shorter."""
    file.seek(begin)
    count = (end - begin) // dtype.itemsize
    tokens: Tokens = np.fromfile(file, dtype, count)
    if len(tokens) < count:
        raise InputError(f"the file became shorter than {end:,} bytes while it was read")
    return tokens if dtype.isnative else tokens.astype(dtype.newbyteorder("="))


def break_at(total: int, outside: Callable[[int, int], npt.NDArray[np.bool_]], window: int) -> int:
    """The document from which on all lie outside the file; ``total`` if the file was not cut short.

    ``outside`` tells of a range of documents which do. Looked for from the end, so that every slice of a file finds the
    same, at the cost of what is lost.
    """
    stop, step = total, 1
    while stop:
        start = max(0, stop - step)
        inside = np.flatnonzero(~outside(start, stop))
        if len(inside):
            return start + int(inside[-1]) + 1
        stop, step = start, min(2 * step, window)
    return 0


def documents_before(end: int | None, total: int, whole: int) -> tuple[int, bool]:
    """Where reading a slice up to ``end`` stops, and whether that is where the file breaks off, before ``whole``."""
    if end is not None and end > total:
        raise InputError(f"{total:,} documents are told of, {end:,} were when it was planned")
    end = total if end is None else end
    return min(end, whole), whole < end


def lost(line: int, position: int, total: int, size: int) -> InputError:
    """The error for a file of ``size`` bytes that ends before the document at ``line`` and ``position``."""
    return InputError(
        f"broken off after document {position - 1:,}: {total - position + 1:,} documents lie beyond the "
        f"file's end at {size:,} bytes, and are lost",
        line,
    )


def cut_documents(total: int, begin: Callable[[int], int], size: int, target: int) -> list[Slice]:
    """Ranges of documents of about ``target`` bytes of the file; ``begin`` tells where a document begins."""
    count = -(-size // target)
    if count < 2 or total < 2:
        return [WHOLE]
    places = {bisect.bisect_left(range(total), size * i // count, key=begin) for i in range(1, count)}
    edges = sorted(places | {0, total})
    return [Slice(a, b, a, b) for a, b in itertools.pairwise(edges)]
