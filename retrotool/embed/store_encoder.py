"""Loading the encoder that a store was embedded with, to embed a text that is to be held against it."""

from __future__ import annotations

from retrotool.encoder import Encoder
from retrotool.errors import UsageError
from retrotool.store.store import Store


def load_encoder(store: Store, name: str, device: str = "auto") -> Encoder:
    """The encoder whose embeddings a store has as ``name``; ``UsageError`` if it is not to be had, or not the same."""
    record = store.state.records[f"encoder:{name}"]
    # Of one text transformers is as fast as anything, and needs no proof.
    encoder = Encoder(
        str(record["origin"]), device, "float32", pooling=record["pooling"], name=name, forward="transformers"
    )
    if encoder.identity.sha256 != record["sha256"]:
        raise UsageError(f"the encoder at {record['origin']} is not the one the store was embedded with")
    return encoder
