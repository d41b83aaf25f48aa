"""Tokenise a batch of documents and cut the tokens into chunks, without a Python loop over tokens.

A document is one piece of text; a key-value record is two, and its key is cut to one chunk. Every piece
begins a new chunk. Cost besides the tokenizer: about 5 ns per token.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retrotool.ranges import Int64s, positions_within
from retrotool.sources import Document, Rejected, excerpt
from retrotool.store import parts
from retrotool.store.blocked import Hashes, keyed_tokens
from retrotool.tokenizers import FastTokenizer

HashPair = tuple[bytes, bytes]  # of a document's id and of its content


@dataclass(frozen=True, slots=True)
class Tokens:
    """d documents with their tokens."""

    documents: list[Document]
    ids: npt.NDArray[Any]  # flat
    lengths: Int64s  # [d × pieces]
    pieces: int
    cut: npt.NDArray[np.bool_]  # [d]: whose key was cut
    hashes: Sequence[HashPair]  # [d], or empty if none were given

    def hashed(self, secret: str, dtype: np.dtype[Any]) -> Hashes:
        """Hash the tokens of each document as on the block list, S16 [d]; ``dtype`` is the store's."""
        begin = np.cumsum(self.lengths) - self.lengths
        shape = (-1, self.pieces)
        return keyed_tokens(secret, self.ids.astype(dtype), begin.reshape(shape), self.lengths.reshape(shape))

    def without(self, left_out: npt.NDArray[np.bool_]) -> Tokens:
        """Return the documents that are not in ``left_out``, bool [d]."""
        if not left_out.any():
            return self
        stays = ~left_out
        pieces = np.repeat(stays, self.pieces)
        ids, documents = self.ids[np.repeat(pieces, self.lengths)], list(itertools.compress(self.documents, stays))
        hashes = list(itertools.compress(self.hashes, stays))
        return Tokens(documents, ids, self.lengths[pieces], self.pieces, self.cut[stays], hashes)


@dataclass(frozen=True, slots=True)
class Cut:
    """n chunks of d documents."""

    n_chunks: Int64s  # [d]
    doc: Int64s  # [n]
    index: Int64s  # [n]
    n_tokens: Int64s  # [n]
    tokens: npt.NDArray[Any]  # [n, chunk_length], zero-padded
    key: npt.NDArray[np.bool_] | None = None  # [n], of key-value records


def tokenise(
    documents: list[Document],
    encoder: FastTokenizer,
    vocabulary: int,
    chunk_length: int,
    bad: Callable[[Rejected], object],
    hashes: Sequence[HashPair] = (),
) -> Tokens:
    """Tokenise documents of one kind; pass those without tokens, or with an invalid token id, to ``bad``."""
    if documents[0].tokens is not None:
        return _given_tokens(documents, hashes, vocabulary, bad)
    records = documents[0].value is not None
    pieces = 2 if records else 1
    texts = [text for d in documents for text in (d.text, d.value or "")] if records else [d.text for d in documents]
    ids, lengths = encoder.encode_flat(texts)
    empty: npt.NDArray[np.bool_] = np.asarray((lengths == 0).reshape(-1, pieces).any(axis=1))
    for number in np.flatnonzero(empty):
        bad(Rejected(documents[number].line, "the text has no tokens", excerpt=excerpt(documents[number].text)))
    cut = np.zeros(len(documents), np.bool_)
    if records:
        limit = lengths.copy()
        limit[::2] = np.minimum(limit[::2], chunk_length)
        cut = (limit < lengths)[::2]
        if cut.any():
            ids, lengths = ids[positions_within(lengths) < np.repeat(limit, lengths)], limit
    return Tokens(documents, ids, lengths, pieces, cut, hashes).without(empty)


def _given_tokens(
    documents: list[Document], hashes: Sequence[HashPair], vocabulary: int, bad: Callable[[Rejected], object]
) -> Tokens:
    arrays = [document.tokens for document in documents if document.tokens is not None]
    lengths, ids = np.fromiter(map(len, arrays), np.int64, len(arrays)), np.concatenate(arrays)
    over = np.maximum.reduceat(ids, np.cumsum(lengths) - lengths) >= vocabulary
    for document in itertools.compress(documents, over):
        bad(Rejected(document.line, f"a token id is outside the vocabulary of {vocabulary:,}"))
    none = np.zeros(len(documents), np.bool_)
    return Tokens(documents, ids, lengths, 1, none, hashes).without(over)


def cut_chunks(ids: npt.NDArray[Any], lengths: Int64s, chunk_length: int, dtype: np.dtype[Any], pieces: int = 1) -> Cut:
    """Cut documents with flat tokens ``ids`` and ``lengths`` [d × pieces] into chunks."""
    n_chunks = -(-lengths // chunk_length)
    index = positions_within(n_chunks)
    n_tokens = np.minimum(np.repeat(lengths, n_chunks) - index * chunk_length, chunk_length)
    tokens = np.zeros((len(index), chunk_length), dtype)
    # Chunks and ids are in the same order, so the used cells take the ids row by row.
    tokens[np.arange(chunk_length) < n_tokens[:, None]] = ids
    piece = np.repeat(np.arange(len(lengths)), n_chunks)
    if pieces == 1:
        return Cut(n_chunks, piece, index, n_tokens, tokens)
    key = piece % 2 == 0
    index[~key] += 1
    return Cut(n_chunks.reshape(-1, 2).sum(axis=1), piece // 2, index, n_tokens, tokens, key)


def id_hash(identifier: str) -> bytes:
    """Return the key of a document: BLAKE2b-128 of its id in UTF-8."""
    return hashlib.blake2b(identifier.encode("utf-8", "surrogatepass"), digest_size=parts.HASH_BYTES).digest()
