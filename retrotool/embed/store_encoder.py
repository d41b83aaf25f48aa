"""The encoder that a store was embedded with: tokens of its chunks for it, and how far stored vectors are from its own.

``load_encoder`` is for a text that is compared with stored vectors. The packed forward is used if it gives, here and
now, the vectors that the store has of a few of its chunks. ``embed`` compared those with ``transformers``, so that is
enough, and importing ``transformers`` takes longer than all the rest of a search. Otherwise ``transformers`` is used.

``draw_sample`` and ``compare`` are for ``embed --check``. Chunks are drawn at random over all parts that have vectors,
and these compared with those of ``transformers`` in float32: by cosine, and by the recall@10 among the sample, own
documents left out. Cost: embedding the sample in the slowest way, and reading 4 row groups of each of up to 64 parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retrotool.embed.search_scope import embedded_parts, read_part_vectors
from retrotool.encoder import Encoder, Rows, cosines
from retrotool.encoder.encoder import LEAST_COSINE
from retrotool.errors import NotFiniteError, UsageError
from retrotool.store import parts
from retrotool.store.parts import ROW_GROUP
from retrotool.store.store import Store
from retrotool.tokenizers import stored_tokenizer

SAMPLE = 2000
_K = 10
_PARTS = 64
_GROUPS = 4
_COMPARED = 8
"""Chunks whose stored vectors are compared when an encoder is loaded."""


class EncoderRows:
    """A store's chunks as the encoder's own token ids."""

    def __init__(self, store: Store, encoder: Encoder) -> None:
        own, identity = store.identity.tokenizer, encoder.identity
        self._encoder = encoder
        self.straight = own.sha256 == identity.tokenizer and not identity.prompt and not identity.lower
        """Whether the store's tokens are the encoder's, so that nothing is tokenised."""
        self._tokenizer = stored_tokenizer(store)

    def rows(self, tokens: npt.NDArray[Any], n_tokens: npt.NDArray[Any]) -> Rows:
        """The encoder's token ids, without special ones, of chunks given as the store's tokens [n, chunk_length]."""
        if self.straight:
            return Rows.of_matrix(tokens, n_tokens)
        return self._encoder.tokenize(self._tokenizer.decode_text(tokens, n_tokens))


def load_encoder(store: Store, name: str, device: str = "auto") -> Encoder:
    """Return the encoder whose embeddings a store has as ``name``.

    ``UsageError`` if it is not found, or is not the same any more; ``ErasedError`` if chunks that it is compared on are
    erased meanwhile.
    """
    encoder = _load(store, name, device, "auto")
    if encoder.forward == "packed" and not _gives_stored_vectors(store, encoder):
        encoder.close()
        encoder = _load(store, name, device, "transformers")
    return encoder


def _load(store: Store, name: str, device: str, forward: str) -> Encoder:
    record = store.state.records[f"encoder:{name}"]
    if record.get("foreign"):
        raise UsageError(f"the vectors of {name!r} were made elsewhere, by {record['origin']}: no text can be embedded")
    encoder = Encoder(str(record["origin"]), device, "float32", pooling=record["pooling"], name=name, forward=forward)
    if encoder.identity.sha256 != record["sha256"]:
        raise UsageError(f"the encoder at {record['origin']} is not the one the store was embedded with")
    return encoder


def _gives_stored_vectors(store: Store, encoder: Encoder) -> bool:
    """Compare an encoder's vectors of a few chunks with those stored; False if there are none to compare."""
    name = encoder.identity.name
    for part in embedded_parts(store, name):
        chunks = parts.read_chunks(store, part, [0])
        rows = np.flatnonzero(chunks.embedded)
        if not len(rows):
            continue
        rows = rows[:: -(-len(rows) // _COMPARED)]
        stored = read_part_vectors(store, name, part)[rows]
        about = parts.part_entry(store, "embeddings", part, name).about or {}
        # Vectors that were computed in bfloat16 are that far from those of float32.
        half = float(about.get("cosine") or 0) >= LEAST_COSINE["float16"]
        least = LEAST_COSINE["float16" if half else "bfloat16"]
        try:
            found = encoder.embed(EncoderRows(store, encoder).rows(chunks.tokens[rows], chunks.n_tokens[rows]))
        except NotFiniteError:
            return False
        return bool(cosines(found, stored).min() >= least)
    return False


@dataclass(frozen=True, slots=True)
class VectorSample:
    """Some embedded chunks: ``rows`` of the encoder's tokens, ``vectors`` float16 [n, d], ``ids`` and ``document`` [n].

    Chunks of one document have the same number in ``document``.
    """

    rows: Rows
    vectors: npt.NDArray[np.float16]
    ids: npt.NDArray[np.int64]
    document: npt.NDArray[np.int64]


def draw_sample(store: Store, encoder: Encoder, size: int = SAMPLE, seed: int = 0) -> VectorSample | None:
    """Draw up to ``size`` chunks that have vectors of an encoder; None if there are none."""
    rng = np.random.default_rng(seed)
    numbers = embedded_parts(store, encoder.identity.name)
    some = sorted(rng.permutation(numbers)[:_PARTS].tolist())
    found: list[tuple[npt.NDArray[Any], ...]] = []
    left = size
    for place, part in enumerate(some):
        rows = parts.part_entry(store, "chunks", part).rows
        groups = sorted(rng.permutation(-(-rows // ROW_GROUP))[:_GROUPS].tolist())
        chunks = parts.read_chunks(store, part, groups)
        places = np.concatenate([np.arange(g * ROW_GROUP, min(rows, (g + 1) * ROW_GROUP)) for g in groups])
        which = np.sort(rng.permutation(np.flatnonzero(chunks.embedded))[: -(-left // (len(some) - place))])
        left -= len(which)
        vectors = np.array(read_part_vectors(store, encoder.identity.name, part)[places[which]])
        ids, document = parts.chunk_ids(part, places[which]), parts.chunk_ids(part, chunks.doc[which])
        found.append((chunks.tokens[which], chunks.n_tokens[which], vectors, ids, document))
    if left == size:
        return None
    tokens, n_tokens, vectors, ids, document = (np.concatenate(column) for column in zip(*found, strict=True))
    return VectorSample(EncoderRows(store, encoder).rows(tokens, n_tokens), vectors, ids, document)


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Of ``sample`` vectors: cosine with the true ones, the least and the mean, and recall@10.

    The recall is the share of each vector's true 10 nearest, among the sample and by squared L2, that are among its 10
    nearest here too; ``worst`` is the place of the least cosine.
    """

    sample: int
    cosine_min: float
    cosine_mean: float
    recall_at_10: float
    worst: int


def compare(found: npt.NDArray[Any], true: npt.NDArray[Any], document: npt.NDArray[Any] | None = None) -> Fidelity:
    """Compare vectors [n, d] with the true ones. ``document`` [n]: neighbours are of other documents than the own."""
    cosine = cosines(found, true)
    same = np.eye(len(true), dtype=np.bool_) if document is None else document[:, None] == document[None, :]
    k = min(_K, len(true) - int(same.sum(1).max()))
    recall = 1.0
    if k > 0:
        nearest = [_nearest(vectors, same, k) for vectors in (found, true)]
        hits = [len(np.intersect1d(a, b)) for a, b in zip(*nearest, strict=True)]
        recall = float(np.mean(hits)) / k
    return Fidelity(len(true), float(cosine.min()), float(cosine.mean()), recall, int(cosine.argmin()))


def _nearest(vectors: npt.NDArray[Any], same: npt.NDArray[np.bool_], k: int) -> npt.NDArray[np.int64]:
    """Places of the k nearest of each vector, [n, k], without those that are ``same`` [n, n]."""
    wide = vectors.astype(np.float64)
    squares = (wide * wide).sum(1)
    distances = squares[:, None] + squares[None, :] - 2 * (wide @ wide.T)
    distances[same] = np.inf
    return np.argpartition(distances, k - 1, axis=1)[:, :k]
