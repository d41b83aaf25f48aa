"""The two ways to compute a batch: the packed forward, and ``transformers`` for models it does not know.

Both take a batch of framed rows to float32 vectors, pooled and normalised. ``arrays`` runs ahead on the host and gives
what is copied to the device; ``__call__`` runs on the device. On CUDA, in half precision, the packed forward has
constant shapes: a batch is filled up to ``batch_tokens`` with rows that nobody asked for, and its layers are compiled
once; smaller batches at the end of a block run as they are, uncompiled.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from retrotool.encoder.architecture import architecture_of, read_weights
from retrotool.encoder.identity import EncoderIdentity
from retrotool.encoder.packed import Layer, PackedBert
from retrotool.encoder.rows import Rows
from retrotool.errors import UsageError

Arrays = tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]
"""What goes to the device, and what stays on the host."""

_SHORTEST = 16
"""Mean length of rows that a batch of constant shape has room for; of shorter ones fewer tokens go into it."""
_LONGEST_STEP = 128
"""Attention kernels are told the longest row in steps of this, so that they are compiled for few."""


class Forward(Protocol):
    """A loaded model on a device."""

    padded: bool
    """Whether a batch's rows are padded to its longest."""

    def most_rows(self, batch_tokens: int) -> int:
        """Rows a batch may have."""

    def arrays(self, rows: Rows, batch_tokens: int) -> Arrays:
        """A batch of framed rows, longest first, ready for the device."""

    def __call__(self, tensors: Mapping[str, torch.Tensor], more: Mapping[str, Any]) -> torch.Tensor:
        """Vectors, float32 [at least n, d]."""


class PackedForward:
    """``PackedBert`` with its batches. ``constant``: attention by ``varlen``, in constant shapes, compiled."""

    padded = False

    def __init__(
        self,
        path: Path,
        identity: EncoderIdentity,
        config: Mapping[str, Any],
        device: str,
        dtype: str,
        say: Callable[[str], object],
    ) -> None:
        shape = architecture_of(config)
        kind: torch.dtype = getattr(torch, dtype)
        self._model = PackedBert(read_weights(path, shape), shape, identity.pooling, device, kind)
        self._padding = shape.padding
        self._normalize = identity.normalize
        self.constant = device != "cpu" and kind != torch.float32 and not shape.buckets and _has_varlen(device)
        self._compiled: Callable[..., torch.Tensor] | None = None
        self.why_eager = ""
        self._say = say

    def arrays(self, rows: Rows, batch_tokens: int) -> Arrays:
        """Ids, places and spans; see ``Forward``."""
        ids, places = rows.ids, _places(rows, self._padding)
        if not self.constant:
            lengths, counts = np.unique(-rows.lengths, return_counts=True)
            groups = [(int(n), int(-length)) for length, n in zip(lengths, counts, strict=True)]
            return {"ids": ids, "places": places}, {"spans": groups, "longest": int(rows.lengths[0])}
        longest = -int(-rows.lengths[0] // _LONGEST_STEP) * _LONGEST_STEP
        ends = np.cumsum(rows.lengths)
        whole = len(ids) > batch_tokens // 2
        if not whole:
            spans = np.concatenate([[0], ends]).astype(np.int32)
            return {"ids": ids, "places": places, "spans": spans}, {"longest": longest, "whole": False}
        total, room = len(ids), max(batch_tokens, len(ids))
        filled = np.zeros((2, room), np.int32)
        filled[0, :total], filled[1, :total] = ids, places
        filler = np.arange(total + longest, room, longest)
        spans = np.full(max(rows_of(room), len(rows)) + room // _LONGEST_STEP + 2, room, np.int32)
        spans[0] = 0
        spans[1 : len(ends) + 1] = ends
        spans[len(ends) + 1 : len(ends) + 1 + len(filler)] = filler
        return {"ids": filled[0], "places": filled[1], "spans": spans}, {"longest": longest, "whole": True}

    def __call__(self, tensors: Mapping[str, torch.Tensor], more: Mapping[str, Any]) -> torch.Tensor:
        """Vectors of a batch; see ``Forward``."""
        spans: Any = tensors["spans"] if self.constant else more["spans"]
        self._model.run = self._layer(more)
        try:
            pooled = self._model(tensors["ids"], tensors["places"], spans, more["longest"])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if self._model.run is Layer.forward:
                raise
            # A compiler can lack a tool (a C compiler, a header) that the model can do without.
            self.why_eager = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            self._say(f"the forward can't be compiled ({self.why_eager}), and is slower without")
            self._model.run = Layer.forward
            pooled = self._model(tensors["ids"], tensors["places"], spans, more["longest"])
        return torch.nn.functional.normalize(pooled) if self._normalize else pooled

    def _layer(self, more: Mapping[str, Any]) -> Callable[..., torch.Tensor]:
        """What computes a layer: compiled for whole batches of constant shape, for all layers at once."""
        if not (self.constant and more["whole"]) or self.why_eager:
            return Layer.forward
        if self._compiled is None:
            self._compiled = compile_layer()
        return self._compiled

    def most_rows(self, batch_tokens: int) -> int:
        """As many as its constant shape has room for."""
        return rows_of(batch_tokens) if self.constant else sys.maxsize


def compile_layer(**options: Any) -> Callable[..., torch.Tensor]:
    """``Layer.forward``, compiled: layers share one program, for their weights are arguments to it."""
    compiled: Callable[..., torch.Tensor] = torch.compile(Layer.forward, dynamic=False, fullgraph=True, **options)
    return compiled


def rows_of(batch_tokens: int) -> int:
    """Rows that a batch of constant shape has room for."""
    return max(1, batch_tokens // _SHORTEST)


def _has_varlen(device: str) -> bool:
    """Whether FlashAttention runs on a GPU: from compute capability 8.0 (Ampere) on."""
    try:
        import torch.nn.attention.varlen
    except ImportError:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _places(rows: Rows, padding: int | None) -> npt.NDArray[np.int32]:
    """The place of every token; behind ``padding``, and as RoBERTa counts them, padding tokens have none."""
    if padding is None:
        return rows.positions()
    counted = np.cumsum(rows.ids != padding)
    before = np.where(rows.starts > 0, counted[np.maximum(rows.starts - 1, 0)], 0)
    within = counted - np.repeat(before, rows.lengths)
    places: npt.NDArray[np.int32] = (within * (rows.ids != padding) + padding).astype(np.int32)
    return places


class PaddedForward:
    """``transformers.AutoModel``, with rows padded to the longest of their batch."""

    padded = True

    def __init__(self, spec: str, path: Path, identity: EncoderIdentity, device: str, dtype: str) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            model = transformers.AutoModel.from_pretrained(
                path, dtype=getattr(torch, dtype), use_safetensors=True, local_files_only=True, trust_remote_code=False
            )
            self._model = model.to(device).eval()
        except Exception as error:  # the library raises whatever its parts do
            reason = " ".join(str(error).split())[:300]
            raise UsageError(f"encoder {spec!r} can't be loaded: {type(error).__name__}: {reason}") from error
        self._pooling, self._normalize = identity.pooling, identity.normalize

    def most_rows(self, batch_tokens: int) -> int:  # noqa: ARG002
        """Any number."""
        return sys.maxsize

    def arrays(self, rows: Rows, batch_tokens: int) -> Arrays:  # noqa: ARG002
        """Padded ids and their mask; see ``Forward``."""
        used = np.arange(rows.lengths[0]) < rows.lengths[:, None]
        ids = np.zeros(used.shape, np.int64)
        ids[used] = rows.ids
        return {"ids": ids, "mask": used.astype(np.int64)}, {}

    def __call__(self, tensors: Mapping[str, torch.Tensor], more: Mapping[str, Any]) -> torch.Tensor:  # noqa: ARG002
        """Vectors of a batch; see ``Forward``."""
        mask = tensors["mask"]
        hidden = self._model(input_ids=tensors["ids"], attention_mask=mask).last_hidden_state.float()
        if self._pooling == "cls":
            pooled = hidden[:, 0]
        else:
            weight = mask.unsqueeze(-1).float()
            pooled = (hidden * weight).sum(1) / weight.sum(1)
        return torch.nn.functional.normalize(pooled) if self._normalize else pooled
