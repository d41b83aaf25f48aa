"""``embed --check``: how far a store's vectors are from those of ``transformers`` in float32.

Chunks are drawn at random over all parts that have embeddings of the encoder, embedded by ``transformers`` in float32,
and held against what is stored: by the cosine of the two vectors, and by the recall@10 among the sample, own documents
left out. So it covers all that lies between a chunk and its stored vector, whoever embedded it and with which settings.

Cost: that of embedding the sample in the slowest way, and of reading at most 4 row groups of each of up to 64 parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from retrotool.embed.search_scope import embedded_parts, read_part_vectors
from retrotool.embed.stage import EncoderRows
from retrotool.encoder import Encoder, Fidelity, Rows, compare
from retrotool.encoder.batches import concatenate
from retrotool.store import parts
from retrotool.store.parts import ROW_GROUP
from retrotool.store.store import Store

SAMPLE = 2000
_PARTS = 64
_GROUPS = 4


@dataclass(frozen=True, slots=True)
class Sample:
    """Some embedded chunks: ``rows`` of the encoder's tokens, ``vectors`` float16 [n, d], ``ids`` and ``document`` [n].

    Chunks of one document have the same number in ``document``.
    """

    rows: Rows
    vectors: npt.NDArray[np.float16]
    ids: npt.NDArray[np.int64]
    document: npt.NDArray[np.int64]


def draw(store: Store, encoder: Encoder, size: int = SAMPLE, seed: int = 0) -> Sample:
    """Draw up to ``size`` chunks that have vectors of an encoder."""
    rng = np.random.default_rng(seed)
    numbers = embedded_parts(store, encoder.identity.name)
    some = sorted(rng.permutation(numbers)[:_PARTS].tolist())
    texts = EncoderRows(store, encoder)
    found: list[Sample] = []
    for place, part in enumerate(some):
        wanted = -(-(size - sum(len(sample.ids) for sample in found)) // (len(some) - place))
        if wanted:
            found.append(_draw(store, encoder, texts, part, wanted, rng))
    dimension = encoder.identity.dimension
    return Sample(
        concatenate(sample.rows for sample in found),
        np.concatenate([np.empty((0, dimension), np.float16), *(sample.vectors for sample in found)]),
        np.concatenate([np.empty(0, np.int64), *(sample.ids for sample in found)]),
        np.concatenate([np.empty(0, np.int64), *(sample.document for sample in found)]),
    )


def _draw(
    store: Store, encoder: Encoder, texts: EncoderRows, part: int, wanted: int, rng: np.random.Generator
) -> Sample:
    rows = parts.part_entry(store, "chunks", part).rows
    groups = sorted(rng.permutation(-(-rows // ROW_GROUP))[:_GROUPS].tolist())
    chunks = parts.read_chunks(store, part, groups)
    places = np.concatenate([np.arange(g * ROW_GROUP, min(rows, (g + 1) * ROW_GROUP)) for g in groups])
    which = np.sort(rng.permutation(np.flatnonzero(chunks.embedded))[:wanted])
    vectors = read_part_vectors(store, encoder.identity.name, part)
    return Sample(
        texts.rows(chunks.tokens[which], chunks.n_tokens[which]),
        np.array(vectors[places[which]]),
        parts.chunk_ids(part, places[which]),
        parts.chunk_ids(part, chunks.doc[which]),
    )


def measure_fidelity(sample: Sample, reference: Encoder, report: Callable[[int], object] = lambda _: None) -> Fidelity:
    """Hold a sample's stored vectors against those of ``reference``, which is ``transformers`` in float32."""
    true = reference.embed(sample.rows, report)
    return compare(sample.vectors, true, sample.document)
