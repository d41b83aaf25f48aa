"""From documents to chunks: tokenising a batch, and cutting the tokens, without a loop over tokens.

A document has one piece, its text; a key-value record has two, its key, of which the first ``chunk_length`` tokens
become one chunk, and its value. Every piece begins a new chunk. Cost beyond the tokenizer's: about 5 ns a token.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retrotool.ranges import positions_within
from retrotool.sources import Document, Rejected, excerpt
from retrotool.store import parts
from retrotool.store.blocked import Hashes, keyed_tokens
from retrotool.tokenizers import FastTokenizer


@dataclass(frozen=True, slots=True)
class Tokens:
    """Documents that have tokens: ``ids`` is flat, ``lengths`` [d × pieces] cuts it into pieces.

    ``kept`` tells which of the documents given these are, and ``cut`` [d] whose keys were cut; None: all, and none.
    """

    documents: list[Document]
    ids: npt.NDArray[Any]
    lengths: npt.NDArray[np.int64]
    pieces: int = 1
    cut: npt.NDArray[np.bool_] | None = None
    kept: npt.NDArray[np.bool_] | None = None

    def hashed(self, secret: str, dtype: np.dtype[Any]) -> Hashes:
        """Hashes of the tokens of each document, as they are on the block list, S16 [d]; ``dtype``: the store's."""
        begin = np.cumsum(self.lengths) - self.lengths
        shape = (-1, self.pieces)
        return keyed_tokens(secret, self.ids.astype(dtype), begin.reshape(shape), self.lengths.reshape(shape))

    def without(self, left_out: npt.NDArray[np.bool_]) -> Tokens:
        """Those of the documents that are not ``left_out``, bool [d]."""
        stays = ~left_out
        pieces = np.repeat(stays, self.pieces)
        kept = np.ones(len(stays), np.bool_) if self.kept is None else self.kept.copy()
        kept[kept] = stays
        documents = [document for document, stay in zip(self.documents, stays, strict=True) if stay]
        cut = None if self.cut is None else self.cut[stays]
        return Tokens(
            documents, self.ids[np.repeat(pieces, self.lengths)], self.lengths[pieces], self.pieces, cut, kept
        )


@dataclass(frozen=True, slots=True)
class Cut:
    """Chunks of d documents: ``n_chunks`` [d]; of all n chunks in order ``doc``, ``index``, ``n_tokens`` [n].

    ``tokens`` is [n, chunk_length], zero-padded; ``key`` [n], of key-value records, tells which chunks are keys.
    """

    n_chunks: npt.NDArray[np.int64]
    doc: npt.NDArray[np.int64]
    index: npt.NDArray[np.int64]
    n_tokens: npt.NDArray[np.int64]
    tokens: npt.NDArray[Any]
    key: npt.NDArray[np.bool_] | None = None


def tokenise(
    documents: list[Document],
    encoder: FastTokenizer,
    vocabulary: int,
    chunk_length: int,
    bad: Callable[[Rejected], object],
) -> Tokens:
    """Tokens of a batch of documents of one kind; those without a token, or with one that is none, go to ``bad``."""
    if documents[0].tokens is not None:
        return _taken_over(documents, vocabulary, bad)
    records = documents[0].value is not None
    pieces = 2 if records else 1
    texts = [text for d in documents for text in (d.text, d.value or "")] if records else [d.text for d in documents]
    ids, lengths = encoder.encode_flat(texts)
    empty: npt.NDArray[np.bool_] = np.asarray((lengths == 0).reshape(-1, pieces).any(axis=1))
    for number in np.flatnonzero(empty):
        bad(Rejected(documents[number].line, "text without a token", excerpt=excerpt(documents[number].text)))
    cut = None
    if records:
        limit = lengths.copy()
        limit[::2] = np.minimum(limit[::2], chunk_length)
        cut = (limit < lengths)[::2]
        if cut.any():
            ids, lengths = ids[positions_within(lengths) < np.repeat(limit, lengths)], limit
    found = Tokens(documents, ids, lengths, pieces, cut)
    return found.without(empty) if empty.any() else found


def _taken_over(documents: list[Document], vocabulary: int, bad: Callable[[Rejected], object]) -> Tokens:
    arrays = [document.tokens for document in documents if document.tokens is not None]
    lengths = np.fromiter(map(len, arrays), np.int64, len(arrays))
    ids = np.concatenate(arrays) if arrays else np.zeros(0, np.uint32)
    found = Tokens(documents, ids, lengths)
    if not ids.size or int(ids.max()) < vocabulary:
        return found
    over = np.array([len(tokens) > 0 and int(tokens.max()) >= vocabulary for tokens in arrays])
    for document in itertools.compress(documents, over):
        bad(Rejected(document.line, f"a token id is not below the vocabulary's size {vocabulary:,}"))
    return found.without(over)


def cut_chunks(
    ids: npt.NDArray[Any], lengths: npt.NDArray[np.int64], chunk_length: int, dtype: np.dtype[Any], pieces: int = 1
) -> Cut:
    """Cut documents of ``pieces`` pieces each into chunks.

    Args:
        ids: token ids of all pieces, flat.
        lengths: tokens of each piece, [d × pieces]; with two pieces the first has ``chunk_length`` at most.
        chunk_length: tokens a chunk.
        dtype: of the tokens in the result.
        pieces: 1 for documents, 2 for key-value records.

    """
    n_chunks = -(-lengths // chunk_length)
    index = positions_within(n_chunks)
    n_tokens = np.minimum(np.repeat(lengths, n_chunks) - index * chunk_length, chunk_length)
    tokens = np.zeros((len(index), chunk_length), dtype)
    # Chunks and ids are in the same order, so the used places, row by row, take the ids as they come.
    tokens[np.arange(chunk_length) < n_tokens[:, None]] = ids
    piece = np.repeat(np.arange(len(lengths)), n_chunks)
    if pieces == 1:
        return Cut(n_chunks, piece, index, n_tokens, tokens)
    key = piece % 2 == 0
    index[~key] += 1
    return Cut(n_chunks.reshape(-1, 2).sum(axis=1), piece // 2, index, n_tokens, tokens, key)


def id_hash(identifier: str) -> bytes:
    """The key of a document: BLAKE2b-128 of its id in UTF-8."""
    return hashlib.blake2b(identifier.encode("utf-8", "surrogatepass"), digest_size=parts.HASH_BYTES).digest()
