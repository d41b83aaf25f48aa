"""What ``evaluate`` asks of a language model, and models of ``retrotool train``.

A model gets chunks of documents with the neighbours of each, and returns the nats of every token. To predict
chunk u it may use the chunks of the document before u, and the neighbours of chunk u − 1: a chunk's own
neighbours are not known before the chunk is.

``RetroWindows`` gives a RETRO model as much of the document as others get from ``causal_model``. The first
window of a passage is scored as a whole; each further chunk has a window that ends with it. Cost: a forward
of ``context`` tokens for each chunk, but for a document's first ones, which share a window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from retrotool import interrupts
from retrotool.errors import UsageError
from retrotool.evaluate.bits_per_byte import Floats, Ints
from retrotool.lazy import torch
from retrotool.neighbours.table_reader import NeighbourTokens
from retrotool.ranges import in_steps
from retrotool.store.store import Store
from retrotool.train.retro_model import RetroModel, load_checkpoint


@dataclass(frozen=True, slots=True)
class DocumentChunks:
    """n chunks of passages, in order: zero-padded ``tokens`` [n, m], of which ``n_tokens`` [n] count.

    A passage begins with a document, or at least the model's context before the first chunk to score.
    ``first`` [n]: index of the first chunk of each chunk's passage. ``scored`` bool [n]: chunks to score.
    """

    tokens: npt.NDArray[Any]
    n_tokens: Ints
    first: Ints
    scored: npt.NDArray[np.bool_]


class LanguageModel(Protocol):
    """A model to evaluate. ``method`` and ``context``, the most tokens before a chunk, are reported.

    ``reach``: of how many chunks before a chunk the model reads the neighbours to score it, at least 1.
    """

    method: str
    context: int
    reach: int

    def nats(self, chunks: DocumentChunks, near: NeighbourTokens | None) -> Floats:
        """Return −ln p of each token of chunks to score, float64 [n, m], 0 for padding.

        ``near`` has the neighbours of each chunk itself within ``reach``, [n, k]; None: retrieval is off.
        """
        ...


class RetroWindows:
    """Scores chunks by a RETRO model on ``device``, ``batch_size`` windows at a time.

    The model does not predict the first token that it reads: that of a document counts as ln ``vocabulary``.
    """

    method = "RETRO"

    def __init__(self, retro_model: RetroModel, context: int, device: str, batch_size: int) -> None:
        config = retro_model.config
        self._model, self._vocabulary, self._device = retro_model, config.vocabulary, device
        self._slots, self._batch_size = context // config.chunk_length + 1, batch_size
        self.context, self.reach = (self._slots - 1) * config.chunk_length, max(self._slots - 1, 1)

    def nats(self, chunks: DocumentChunks, near: NeighbourTokens | None) -> Floats:
        """Return the nats of each token, as ``LanguageModel`` says."""
        n, found = len(chunks.tokens), np.zeros(chunks.tokens.shape)
        columns = [chunks.tokens, chunks.n_tokens] + ([] if near is None else [near.tokens, near.n_tokens])
        columns = [np.concatenate([column, np.zeros_like(column[:1])]) for column in columns]  # n: an empty slot
        place = np.arange(n) - chunks.first
        begin = np.arange(n) - np.minimum(place, self._slots - 1)
        ends = np.flatnonzero(np.append(place[1:] == 0, True) | (place >= self._slots - 1))
        windows = begin[ends][:, None] + np.arange(self._slots)
        windows = np.where(windows <= ends[:, None], windows, n)
        is_scored = (windows == ends[:, None]) | ((place[ends] < self._slots)[:, None] & (windows < n))
        is_scored &= np.append(chunks.scored, False)[windows]
        for some in in_steps(np.flatnonzero(is_scored.any(axis=1)), self._batch_size):
            interrupts.check()
            window, scored = windows[some], is_scored[some]
            found[window[scored]] = self._forward([column[window] for column in columns], scored)[scored]
        return found

    def _forward(self, columns: Sequence[npt.NDArray[Any]], is_scored: npt.NDArray[np.bool_]) -> Floats:
        """Return the nats of tokens [b, slots, m], which may have neighbours [b, slots, k, 2, m].

        They are 0 in slots that are not scored, bool [b, slots].
        """
        inputs = list[Any]()
        for tokens, counts in zip(columns[::2], columns[1::2], strict=True):
            mask = np.arange(tokens.shape[-1]) < counts[..., None]
            shape = (len(tokens), -1) if tokens.ndim == 3 else (*tokens.shape[:3], -1)
            inputs += [array.reshape(shape) for array in (tokens.astype(np.int64), mask)]
        with torch.inference_mode():
            given = [torch.from_numpy(array).to(self._device) for array in inputs]
            scored = torch.from_numpy(is_scored.repeat(columns[0].shape[-1], axis=1)).to(self._device)
            nats = self._model.loss_of(*given, scored=scored)
        found: Floats = nats.double().cpu().numpy().reshape(columns[0].shape)
        found[:, 0, 0] = math.log(self._vocabulary)
        return found


def load_retro_model(
    path: str | Path, store: Store, _: int, context: int | None, device: str, dtype: str, batch_size: int
) -> RetroWindows:
    """Load a model of ``retrotool train`` to evaluate on stores like ``store``, with any neighbours.

    ``context``: most tokens of the document (default: those before the last chunk of a training sequence).
    ``dtype`` auto: float32. Raises ``UsageError`` if it was trained on other tokens or chunks.
    """
    (model, facts), own = load_checkpoint(path), store.identity
    if (facts["tokenizer"], model.config.chunk_length) != (own.tokenizer.sha256, own.chunk_length):
        trained = f"another tokenizer than {store.place} has"
        if model.config.chunk_length != own.chunk_length:
            trained = f"chunks of {model.config.chunk_length} tokens, and {store.place} has {own.chunk_length}"
        advice = "Evaluate it on stores with the tokenizer and the chunk length of its training store."
        raise UsageError(f"the model in {path} was trained with {trained}", advice)
    context = facts["dataset"]["sequence_length"] - own.chunk_length if context is None else context
    if context < own.chunk_length:
        what = f"--context {context} leaves out the chunk whose neighbours the model gets, of {own.chunk_length} tokens"
        raise UsageError(what, "Give a larger one, and a model that was trained on sequences of several chunks.")
    model.to(device, getattr(torch, "float32" if dtype == "auto" else dtype))
    return RetroWindows(model, context, device, batch_size)
