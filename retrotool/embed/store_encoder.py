"""Use the encoder of a store: tokenise its chunks, load it for queries, and check stored vectors.

``load_encoder`` uses the packed forward if that reproduces the stored vectors of a few chunks; otherwise
``transformers``, whose import takes longer than the rest of a search. ``draw_sample`` and ``compare`` serve
``embed --check``: random chunks are compared with ``transformers`` in float32, by cosine
and by recall@10 within the sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retrotool.embed.search_scope import SearchableRows, embedded_parts, read_part_vectors
from retrotool.encoder import Encoder, Rows, cosines
from retrotool.encoder.encoder import LEAST_COSINE
from retrotool.errors import NotFiniteError, UsageError
from retrotool.store import parts
from retrotool.store.parts import ROW_GROUP
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones
from retrotool.store.vectors import check_finite
from retrotool.tokenizers import stored_tokenizer

SAMPLE = 2000
_K = 10
_COMPARED = 8  # chunks to compare when an encoder is loaded


class EncoderRows:
    """A store's chunks as token ids of the encoder."""

    def __init__(self, store: Store, encoder: Encoder) -> None:
        own, identity = store.identity.tokenizer, encoder.identity
        self._encoder = encoder
        # Whether the store's tokens are the encoder's, so that nothing is tokenised.
        self.straight = own.sha256 == identity.tokenizer and not identity.prompt and not identity.lower
        self._tokenizer = stored_tokenizer(store)

    def rows(self, tokens: npt.NDArray[Any], n_tokens: npt.NDArray[Any]) -> Rows:
        """Return the encoder's token ids, without special ones, of store tokens [n, chunk_length]."""
        if self.straight:
            return Rows.of_matrix(tokens, n_tokens)
        # Some encoders would see parts of characters at a chunk's borders as unknown characters.
        return self._encoder.tokenize(self._tokenizer.decode_text(tokens, n_tokens, "ignore"))


def load_encoder(store: Store, name: str, device: str = "auto") -> Encoder:
    """Return the encoder that a store calls ``name``; raise ``UsageError`` if it is missing or changed."""
    encoder = _load(store, name, device, "auto")
    if encoder.forward == "packed" and not _gives_stored_vectors(store, encoder):
        encoder.close()
        encoder = _load(store, name, device, "transformers")
    return encoder


def _load(store: Store, name: str, device: str, forward: str) -> Encoder:
    record = store.state.records[f"encoder:{name}"]
    origin = record["origin"]
    if record.get("foreign"):
        raise UsageError(
            f"the vectors of {name!r} were computed elsewhere, by {origin}: no text can be embedded",
            "Embed the text there, and search by its vector in Python: retrotool.open(STORE).search(vector).",
        )
    made = {"pooling": record["pooling"], "dimension": record["dimension"], "name": name}
    encoder = Encoder(origin, device, "float32", forward=forward, **made)
    if encoder.identity.sha256 != record["sha256"]:
        raise UsageError(f"the encoder at {origin} is not the one that embedded the store")
    return encoder


def _gives_stored_vectors(store: Store, encoder: Encoder) -> bool:
    """Compare an encoder's vectors of a few chunks with those stored; False without any."""
    name = encoder.identity.name
    for part in embedded_parts(store, name):
        chunks = parts.read_chunks(store, part, [0])
        rows = np.flatnonzero(chunks.embedded)
        if not len(rows):
            continue
        rows = rows[:: -(-len(rows) // _COMPARED)]
        stored = read_part_vectors(store, name, part)[rows]
        about = parts.part_entry(store, "embeddings", part, name).about or {}
        # Stored vectors may have been computed in bfloat16.
        least = LEAST_COSINE["float16" if about.get("cosine", 0) >= LEAST_COSINE["float16"] else "bfloat16"]
        try:
            found = encoder.embed(EncoderRows(store, encoder).rows(chunks.tokens[rows], chunks.n_tokens[rows]))
        except NotFiniteError:
            return False
        return bool(cosines(found, stored).min() >= least)
    return False


@dataclass(frozen=True, slots=True)
class VectorSample:
    """Embedded chunks: encoder ``rows``, ``vectors`` float16 [n, d], ``ids`` and ``document`` numbers [n]."""

    rows: Rows
    vectors: npt.NDArray[np.float16]
    ids: npt.NDArray[np.int64]
    document: npt.NDArray[np.int64]


def draw_sample(store: Store, encoder: Encoder, size: int = SAMPLE, seed: int = 0) -> VectorSample | None:
    """Draw up to ``size`` embedded chunks; None without any, ``CorruptError`` if a vector is not finite."""
    name, found = encoder.identity.name, list[tuple[npt.NDArray[Any], ...]]()
    searchable = SearchableRows(store, embedded_parts(store, name), read_tombstones(store))
    for part, rows in searchable.draw(min(size, sum(searchable.counts.values())), seed):
        groups, place = np.unique(rows // ROW_GROUP, return_inverse=True)
        chunks, place = parts.read_chunks(store, part, groups.tolist()), place * ROW_GROUP + rows % ROW_GROUP
        vectors = np.array(read_part_vectors(store, name, part)[rows])
        check_finite(store, vectors, part, rows)
        ids, document = parts.chunk_ids(part, rows), parts.chunk_ids(part, chunks.doc[place])
        found.append((chunks.tokens[place], chunks.n_tokens[place], vectors, ids, document))
    if not found:
        return None
    tokens, n_tokens, vectors, ids, document = (np.concatenate(column) for column in zip(*found, strict=True))
    return VectorSample(EncoderRows(store, encoder).rows(tokens, n_tokens), vectors, ids, document)


def compare(
    found: npt.NDArray[Any], true: npt.NDArray[Any], document: npt.NDArray[Any] | None = None
) -> tuple[npt.NDArray[np.float64], float]:
    """Return the cosines of vectors [n, d] with the true ones, float64 [n], and recall@10 among them.

    Neighbours must differ in ``document`` [n].
    """
    same = np.eye(len(true), dtype=np.bool_) if document is None else document[:, None] == document[None, :]
    k = min(_K, len(true) - int(same.sum(1).max()))
    recall = 1.0
    if k > 0:
        nearest = [_nearest(vectors, same, k) for vectors in (found, true)]
        hits = [len(np.intersect1d(a, b)) for a, b in zip(*nearest, strict=True)]
        recall = float(np.mean(hits)) / k
    return cosines(found, true), recall


def _nearest(vectors: npt.NDArray[Any], same: npt.NDArray[np.bool_], k: int) -> npt.NDArray[np.int64]:
    wide = vectors.astype(np.float64)
    squares = (wide * wide).sum(1)
    distances = squares[:, None] + squares[None, :] - 2 * (wide @ wide.T)
    distances[same] = np.inf
    return np.argpartition(distances, k - 1, axis=1)[:, :k]
