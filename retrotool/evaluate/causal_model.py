"""Causal models of ``transformers``, with retrieval in context (arXiv 2302.00083).

The model is used as it is. It reads one window for each chunk, whose tokens alone are scored::

    [begin] [farthest neighbour] … [nearest neighbour] [chunks of the document before it] [chunk]

* ``begin``: the model's bos token, else its eos token, so that the first token of a text is predicted, too.
* The neighbours are those of the chunk before, each with its continuation and a blank line. The first chunk
  of a document has none.
* Of the document, as many whole chunks as ``context`` tokens hold. With retrieval off, the window is the same
  without the neighbours, so both have equally much of the document.

Cost: a forward over each window, with retrieval on and off. Memory: logits of the chunks' positions, if the
model has ``logits_to_keep``, else of all. Padding is on the right, where a causal model does not see it, so
the batch size changes results by rounding only. Weights are read from safetensors, or from a GGUF file with
the extra ``eval``; code of a model is never run.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np

from retrotool import interrupts
from retrotool.encoder.devices import is_out_of_memory
from retrotool.encoder.encoder_identity import check_model
from retrotool.encoder.forwards import load_pretrained
from retrotool.errors import RetrotoolError, UsageError
from retrotool.evaluate.bits_per_byte import Floats, Ints
from retrotool.evaluate.language_models import DocumentChunks
from retrotool.lazy import torch
from retrotool.neighbours.table_reader import NeighbourTokens
from retrotool.ranges import in_steps
from retrotool.store.store import Store
from retrotool.tokenizers import Tokenizer, find_tokenizer, stored_tokenizer

_CLASS = "AutoModelForCausalLM"
_LONGEST = 2048  # most tokens of the document by default
_AFTER_NEIGHBOUR = "\n\n"


class InContextModel:
    """A causal ``network`` that reads ``begin`` before everything, and ``separator`` after each neighbour."""

    method, reach = "in context", 1

    def __init__(self, network: Any, begin: int, separator: list[int], context: int, batch_size: int) -> None:
        self._network, self._begin, self._separator = network, begin, np.array(separator, np.int64)
        self.context, self._batch_size = context, batch_size
        self._keeps = "logits_to_keep" in inspect.signature(network.forward).parameters

    def window(self, chunks: DocumentChunks, near: NeighbourTokens | None, chunk: int) -> Ints:
        """Return the tokens that are read for a chunk, with its own at the end."""
        first, pieces = int(chunks.first[chunk]), [np.array([self._begin])]
        if near is not None and chunk > first:
            for tokens, counts in zip(near.tokens[chunk - 1, ::-1], near.n_tokens[chunk - 1, ::-1], strict=True):
                if counts.any():
                    pieces += [tokens[0, : counts[0]], tokens[1, : counts[1]], self._separator]
        for row in range(max(first, chunk - self.context // chunks.tokens.shape[1]), chunk + 1):
            pieces.append(chunks.tokens[row, : chunks.n_tokens[row]])
        return np.concatenate([piece.astype(np.int64) for piece in pieces])

    def nats(self, chunks: DocumentChunks, near: NeighbourTokens | None) -> Floats:
        """Return the nats of each token, as ``LanguageModel`` says."""
        scored, found = np.flatnonzero(chunks.scored), np.zeros(chunks.tokens.shape)
        windows = [self.window(chunks, near, int(chunk)) for chunk in scored]
        for some in in_steps(np.argsort([-len(window) for window in windows], kind="stable"), self._batch_size):
            interrupts.check()
            self._score([windows[i] for i in some], chunks.n_tokens[scored[some]], found, scored[some])
        return found

    def _score(self, windows: list[Ints], counts: Ints, into: Floats, rows: Ints) -> None:
        """Put the nats of the last ``counts`` [b] tokens of each window into ``rows`` [b]."""
        width = max(map(len, windows))
        ids = torch.from_numpy(np.stack([np.pad(window, (0, width - len(window))) for window in windows]))
        starts = [len(window) - int(n) - 1 for window, n in zip(windows, counts, strict=True)]
        first, ids = min(starts), ids.to(self._network.device)
        keep = {"logits_to_keep": width - first} if self._keeps else {}
        try:
            with torch.inference_mode():
                output = self._network(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **keep)
                logits = output.logits[:, first - width : -1]
                logits = logits if logits.dtype == torch.float64 else logits.float()
                following = ids[:, first + 1 :].flatten()
                nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), following, reduction="none")
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            what = f"too little memory for {len(windows)} windows of {width:,} tokens"
            raise RetrotoolError(what, "Give a smaller --batch-size or --context.") from error
        scores = nats.double().cpu().numpy().reshape(len(windows), -1)
        for row, score, start, n in zip(rows, scores, starts, counts, strict=True):
            into[row, :n] = score[start - first :][:n]


def load_causal_model(
    path: str | Path, store: Store, k: int, context: int | None, device: str, dtype: str, batch_size: int
) -> InContextModel:
    """Load a model to evaluate on stores like ``store``, with k neighbours.

    ``context``: most tokens of the document (default: what the model has room for, at most 2,048). ``dtype``
    auto: float32 on a CPU, else as the model was saved (a GGUF file: float32). Raises ``UsageError`` if the
    tokenizers differ, or the model reads too few tokens.
    """
    path = Path(path)
    network, vocabulary = _load_gguf(path, dtype) if path.suffix == ".gguf" else _load_folder(path, device, dtype)
    network, ours = network.to(device), stored_tokenizer(store)
    if not ours.backend.get_vocab(with_added_tokens=True).items() <= vocabulary.items():
        of_model = "FOLDER, where its AutoTokenizer was saved" if path.suffix == ".gguf" else str(path)
        raise UsageError(
            f"{store.place} has the tokenizer {store.identity.tokenizer.name!r}, whose ids are not those of {path}",
            f"Chunk both stores with the model's: retrotool chunk STORE INPUT... --tokenizer {of_model}",
        )
    config, length = network.config.get_text_config(), store.identity.chunk_length
    begin = config.eos_token_id if config.bos_token_id is None else config.bos_token_id
    begin = begin[0] if isinstance(begin, list) else begin
    if begin is None:
        advice = "Set bos_token_id in its config.json to a token that begins texts."
        raise UsageError(f"{path} has no bos or eos token to predict the first token of a text from", advice)
    separator = ours.encode_batch([_AFTER_NEIGHBOUR])[0]
    reads = getattr(config, "max_position_embeddings", None) or 2 * _LONGEST + k * 2 * length
    room = reads - 1 - k * (2 * length + len(separator)) - length
    if room < (context or length):
        raise UsageError(
            f"{path} reads {reads:,} tokens, of which {k} neighbours and the chunk leave {room:,} for the document",
            "Give a smaller -k or --context, or a model with longer windows.",
        )
    context = min(room, _LONGEST) if context is None else context
    return InContextModel(network, int(begin), separator, context // length * length, batch_size)


def _load_folder(path: Path, device: str, dtype: str) -> tuple[Any, dict[str, int]]:
    config, what = check_model(path, f"model {str(path)!r}", _CLASS), f"model {str(path)!r}"
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if dtype == "auto":
        dtype = stored if device != "cpu" or stored == "float64" else "float32"
    vocabulary = Tokenizer(find_tokenizer(str(path))).backend.get_vocab(with_added_tokens=True)
    return load_pretrained(_CLASS, what, path, device, dtype), vocabulary


def _load_gguf(file: Path, dtype: str) -> tuple[Any, dict[str, int]]:
    from importlib.util import find_spec

    from transformers import AutoTokenizer

    if not all(map(find_spec, ("gguf", "accelerate"))):
        raise UsageError(f"{file} can't be read without gguf and accelerate", "Run: pip install gguf accelerate")
    dtype = "float32" if dtype == "auto" else dtype
    network = load_pretrained(_CLASS, f"model {str(file)!r}", file.parent, "cpu", dtype, gguf_file=file.name)
    return network, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True).get_vocab()
