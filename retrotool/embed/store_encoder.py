"""Load the encoder that a store was embedded with, for a text that is compared with its vectors.

The packed forward is used if it gives, here and now, the vectors that the store has of a few of its chunks. ``embed``
compared those with ``transformers``, so that is enough, and importing ``transformers`` takes longer than all the rest
of a search. Otherwise, and for other models, ``transformers`` is used.
"""

from __future__ import annotations

import numpy as np

from retrotool.embed.search_scope import embedded_parts, read_part_vectors
from retrotool.encoder import Encoder, cosines
from retrotool.encoder.encoder import LEAST_COSINE
from retrotool.errors import NotFiniteError, UsageError
from retrotool.store import parts
from retrotool.store.store import Store

_COMPARED = 8
"""Chunks whose stored vectors are compared."""


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
    encoder = Encoder(str(record["origin"]), device, "float32", pooling=record["pooling"], name=name, forward=forward)
    if encoder.identity.sha256 != record["sha256"]:
        raise UsageError(f"the encoder at {record['origin']} is not the one the store was embedded with")
    return encoder


def _gives_stored_vectors(store: Store, encoder: Encoder) -> bool:
    """Compare an encoder's vectors of a few chunks with those stored; False if there are none to compare."""
    from retrotool.embed.stage import EncoderRows  # not needed to open a store

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
        half = float(about.get("cosine", 0)) >= LEAST_COSINE["float16"]
        least = LEAST_COSINE["float16" if half else "bfloat16"]
        try:
            found = encoder.embed(EncoderRows(store, encoder).rows(chunks.tokens[rows], chunks.n_tokens[rows]))
        except NotFiniteError:
            return False
        return bool(cosines(found, stored).min() >= least)
    return False
