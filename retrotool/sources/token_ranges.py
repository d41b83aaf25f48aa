"""Documents that are ranges of a file of token ids: reading them in blocks, and what makes a document of an array.

A reader of an index gives ``Ranges`` of a window of documents; ``documents`` reads neighbouring ranges in one go, of a
few MiB, and gives views of them. Positions come from files that may be damaged: nothing is read outside the file, and
the first document that leads there rejects the rest.

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
from retrotool.sources.files import WHOLE, InputFile, Slice
from retrotool.sources.records import TOKEN_BYTES, Document, Fields, SetAside, tokens_id

BLOCK_BYTES = 8 << 20
WINDOW_DOCUMENTS = 1 << 14

Tokens = npt.NDArray[np.integer[Any]]
Places = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class OnDisk:
    """An array of integers in a file, of which a part is read where it is asked for.

    Mapped into memory, a file that becomes shorter while it is read would end the process.
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
        """Return one of the numbers; negative places count from the end."""
        place = place if place >= 0 else self.count + place
        return int(self[place : place + 1][0])


@dataclass(frozen=True, slots=True)
class Ranges:
    """Where consecutive documents are: ``begins`` and ``ends`` int64 [documents], bytes of the file, inside of it.

    ``reasons``: why some of them, by place, are not documents. ``broken``: what is wrong with the document after the
    last; "" if nothing.
    """

    begins: Places
    ends: Places
    reasons: dict[int, str] = field(default_factory=dict)
    broken: str = ""


def document(
    tokens: Tokens, fields: Fields, source: str, line: int, position: int, *, strip: bool = True
) -> Document | SetAside:
    """Return a document of its tokens, without the one end mark that it may have (``strip``), or why it is none."""
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
    """Return why a document of so many tokens is over the limit, or None."""
    if count * TOKEN_BYTES <= fields.max_document:
        return None
    return f"{count:,} tokens, {TOKEN_BYTES} bytes each, are more than --max-document {fields.max_document:,}"


def documents(
    file: InputFile,
    dtype: np.dtype[Any],
    total: int,
    ranges: Callable[[int, int], Ranges],
    fields: Fields,
    where: Slice,
) -> Iterator[Document | SetAside]:
    """Return the documents of a slice of ``total``; positions are their numbers in the file, from 1.

    ``ranges`` gives documents from the first to before the second number, or fewer. Raises ``InputError`` at the first
    that leads outside the file.
    """
    end = total if where.end is None else where.end
    if end > total:
        raise InputError(f"{total:,} documents are listed, {end:,} were when it was planned")
    start = where.start
    while start < end:
        found = ranges(start, min(start + WINDOW_DOCUMENTS, end))
        yield from _window(Path(file.path), dtype, found, fields, file.name, start - where.start + 1, start + 1)
        start += len(found.begins)
        if found.broken:
            left = f"the rest of {total:,} documents is lost"
            reason = f"broken off after document {start:,}: the next {found.broken}; {left}"
            raise InputError(reason, start - where.start + 1)


def _window(
    path: Path, dtype: np.dtype[Any], ranges: Ranges, fields: Fields, source: str, line: int, position: int
) -> Iterator[Document | SetAside]:
    block, origin, reach = np.empty(0, dtype), 0, -1
    begins, ends = ranges.begins.tolist(), ranges.ends.tolist()
    with path.open("rb", buffering=0) as file:
        for i, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            count = (end - begin) // dtype.itemsize
            if reason := ranges.reasons.get(i) or over(count - 1, fields):
                yield SetAside(line + i, reason)
                continue
            if not (origin <= begin and end <= reach and (begin - origin) % dtype.itemsize == 0):
                origin, reach = begin, end
                for after in range(i + 1, len(begins)):
                    if begins[after] != reach or ends[after] - origin > BLOCK_BYTES:
                        break
                    reach = ends[after]
                block = load(file, dtype, origin, reach)
            at = (begin - origin) // dtype.itemsize
            yield document(block[at : at + count], fields, source, line + i, position + i)


def load(file: IO[bytes], dtype: np.dtype[Any], begin: int, end: int) -> Tokens:
    """Return the token ids in a range of bytes, in the machine's byte order; ``InputError`` if the file is shorter."""
    file.seek(begin)
    count = (end - begin) // dtype.itemsize
    tokens: Tokens = np.fromfile(file, dtype, count)
    if len(tokens) < count:
        raise InputError(f"the file became shorter than {end:,} bytes while it was read")
    return tokens if dtype.isnative else tokens.astype(dtype.newbyteorder("="))


def leading(good: npt.NDArray[np.bool_]) -> int:
    """Return how many are true before the first that is not."""
    return len(good) if good.all() else int(np.argmin(good))


def cut_documents(total: int, begin: Callable[[int], int], size: int, target: int) -> list[Slice]:
    """Return ranges of documents of about ``target`` bytes of the file; ``begin`` says where a document begins."""
    count = -(-size // target)
    if count < 2 or total < 2:
        return [WHOLE]
    places = {bisect.bisect_left(range(total), size * i // count, key=begin) for i in range(1, count)}
    edges = sorted(places | {0, total})
    return [Slice(a, b, a, b) for a, b in itertools.pairwise(edges)]
