"""``embed``: every key to a vector of the encoder, one float16 ``.npy`` a part.

A task is a part. If the store's tokenizer is the encoder's, tokens go straight in; otherwise they are decoded to
text and tokenised again. Erased chunks and values of key-value records get zeros, and cost nothing but their bytes;
tombstoned chunks are embedded, as long as they are not erased, and so are chunks that the encoder's tokenizer sees no
token in. The task reads the part's chunks file: if that is erased meanwhile, the commit is refused and the part is done
again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from retrotool.encoder import Encoder, EncoderIdentity
from retrotool.errors import UsageError
from retrotool.stages.base import Report, Task, task_key
from retrotool.store import parts, staging, vectors
from retrotool.store.paths import FileName, part_slot
from retrotool.store.staging import Staged
from retrotool.store.store import Store
from retrotool.tokenizers import Tokenizer, TokenizerFile

_BLOCK_ROWS = 1 << 15
"""Rows that are held as Python integers at a time."""


@dataclass(frozen=True, slots=True)
class EmbedStage:
    """All parts without embeddings of one encoder; ``spec`` is the path or name to load it by."""

    spec: str
    identity: EncoderIdentity
    device: str = "auto"
    dtype: str = "auto"
    name: str = field(default="embed", init=False)
    unit: str = field(default="chunk", init=False)

    def plan(self, store: Store) -> list[Task]:
        """One task a part; ``UsageError`` if the name is taken by another encoder."""
        record = store.state.records.get(f"encoder:{self.identity.name}")
        if record is not None:
            check_identity(record, self.identity)
        tasks = []
        done = store.state.group("embeddings", self.identity.name)
        for part in store.state.parts():
            entry = parts.part_entry(store, "chunks", part)
            key = task_key("embed", {"encoder": self.identity.sha256}, [entry.path])
            if done.get(part_slot(part)) is None and not staging.is_staged(store.root, key):
                inputs = {"part": part, "path": entry.path}
                tasks.append(Task(key, f"part {part}", parts.n_keys(entry), inputs))
        return tasks

    def open(self, store: Store) -> EmbedWorker:
        """Load the encoder."""
        return EmbedWorker(store, self)


def check_identity(record: Mapping[str, Any], identity: EncoderIdentity) -> None:
    """``UsageError`` if the store's encoder of a name is not the one that is to be used under it."""
    if record["sha256"] != identity.sha256:
        raise UsageError(
            f"the store has embeddings of another encoder under the name {identity.name!r}",
            "Rename the directory of the new one: an encoder is named by its directory.",
        )


class EmbedWorker:
    """Embeds parts with a loaded encoder."""

    def __init__(self, store: Store, stage: EmbedStage) -> None:
        self._store = store
        self.encoder = Encoder(stage.spec, stage.device, stage.dtype)
        own = store.identity.tokenizer
        self._straight = own.sha256 == self.encoder.identity.tokenizer
        self._tokenizer = Tokenizer(TokenizerFile(own.name, store.tokenizer_json()))

    def __call__(self, task: Task, run: str, report: Report) -> Staged:
        """Embed one part."""
        self._store.refresh()
        part = int(task.inputs["part"])
        chunks = parts.read_chunks(self._store, part)
        identity = self.encoder.identity
        matrix = np.zeros((len(chunks), identity.dimension), np.float16)
        embedded = np.flatnonzero(chunks.embedded)
        for start in range(0, len(embedded), _BLOCK_ROWS):
            block = embedded[start : start + _BLOCK_ROWS]
            matrix[block] = self.encoder.embed(self.rows(chunks.tokens[block], chunks.n_tokens[block]), report)
        report(task.weight - len(embedded))
        name = FileName.new(run, "embeddings", part_slot(part), "npy", identity.name)
        entry = vectors.write_vectors(self._store.root, name, matrix)
        key = f"encoder:{identity.name}"
        # The same model from another place is the same encoder: the record that was first stays.
        record = self._store.state.records.get(key) or identity.as_json()
        check_identity(record, identity)
        settings = {"encoder": identity.name, "device": self.encoder.device, "dtype": self.encoder.dtype}
        return Staged(
            task.key, "embed", run, settings, (str(task.inputs["path"]),), (entry,),
            records={key: record},
        )  # fmt: skip

    def rows(self, tokens: np.ndarray[Any, Any], n_tokens: np.ndarray[Any, Any]) -> Sequence[Sequence[int]]:
        """The encoder's own token ids of chunks given as the store's tokens [n, chunk_length]."""
        if self._straight:
            return [row[:n].tolist() for row, n in zip(tokens, n_tokens, strict=True)]
        return self.encoder.tokenizer.encode_batch(self._tokenizer.decode_text(tokens, n_tokens))
