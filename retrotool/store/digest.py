"""Digests that do not depend on how a store is cut into files; defined in ``docs/format.md``.

``content`` and ``ids`` are sums of one BLAKE2b-256 a document, so that they can be computed part by part in any order.
Cost: about 1.5 µs a document and 1 GB/s of tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retrotool.store.parts import Chunks, chunk_ids

_MODULUS = 1 << 256


@dataclass(frozen=True, slots=True)
class PartDigest:
    """Sums over the living documents of a part, and how many documents, chunks and tokens live."""

    content: int = 0
    ids: int = 0
    documents: int = 0
    chunks: int = 0
    tokens: int = 0

    def __add__(self, other: PartDigest) -> PartDigest:
        """The digest of both; the sums wrap."""
        return PartDigest(
            (self.content + other.content) % _MODULUS,
            (self.ids + other.ids) % _MODULUS,
            self.documents + other.documents,
            self.chunks + other.chunks,
            self.tokens + other.tokens,
        )


def hexadecimal(number: int) -> str:
    """A 256-bit number as 64 digits."""
    return f"{number:064x}"


def part_digest(chunks: Chunks, keys: list[bytes | None], living: npt.NDArray[np.bool_]) -> PartDigest:
    """Digest of the ``living`` (bool [n]) chunks of a part, whose documents have ``keys``."""
    rows = np.flatnonzero(living)
    if not len(rows):
        return PartDigest()
    length = chunks.tokens.shape[1]
    # One structured record a chunk, so that a document's bytes are one slice.
    record = np.dtype([("index", "<i4"), ("n_tokens", "<i4"), ("tokens", chunks.tokens.dtype, (length,))])
    named = np.dtype([("id", "<i8"), ("index", "<i4")])
    contents = np.empty(len(rows), record)
    contents["index"], contents["n_tokens"], contents["tokens"] = (
        chunks.index[rows],
        chunks.n_tokens[rows],
        chunks.tokens[rows],
    )
    names = np.empty(len(rows), named)
    names["id"], names["index"] = chunk_ids(chunks.part, rows), chunks.index[rows]
    doc = chunks.doc[rows]
    starts = np.flatnonzero(np.diff(doc, prepend=doc[0] - 1))
    ends = np.append(starts[1:], len(rows))
    content_bytes, name_bytes = contents.view(np.uint8), names.view(np.uint8)
    content = ids = 0
    for start, end, document in zip(starts.tolist(), ends.tolist(), doc[starts].tolist(), strict=True):
        key = keys[document] or b""
        content += _hash(key, content_bytes[start * record.itemsize : end * record.itemsize])
        ids += _hash(key, name_bytes[start * named.itemsize : end * named.itemsize])
    tokens = int(chunks.n_tokens[rows].sum())
    return PartDigest(content % _MODULUS, ids % _MODULUS, len(starts), len(rows), tokens)


def _hash(key: bytes, data: Any) -> int:
    state = hashlib.blake2b(key, digest_size=32)
    state.update(data)
    return int.from_bytes(state.digest(), "little")


def lines_digest(lines: Iterable[str]) -> str:
    """BLAKE2b-256 of sorted lines."""
    return hashlib.blake2b("".join(f"{line}\n" for line in sorted(lines)).encode(), digest_size=32).hexdigest()
