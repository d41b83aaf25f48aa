"""Compute batches on a device, by the packed forward, or by ``transformers`` for models it does not support.

Forwards turn framed rows into float32 vectors: ``arrays`` prepares inputs on the host, ``__call__`` runs on
the device. On CUDA in half precision the packed forward is compiled for constant shapes: batches are filled
up with unused rows; a block's small last batches run uncompiled. Runners keep several batches in flight. On a
CPU each core has its own, so vectors do not depend on the number of cores; on a GPU copies overlap.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file

from retrotool.encoder.devices import is_lost, is_out_of_memory
from retrotool.encoder.encoder import Rows, Vectors
from retrotool.encoder.encoder_identity import EncoderIdentity, json_object, read_modules
from retrotool.encoder.packed import Architecture, Layer, NotPackedError, PackedBert, architecture_of, read_weights
from retrotool.errors import UsageError
from retrotool.machine import cores
from retrotool.ranges import positions_within

Arrays = tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]  # for the device, and kept on the host
Computed = tuple[Vectors, bool, float]  # float16 [n, d], whether all are finite, and seconds of the device
Handle = Callable[[], Computed]  # returns what became of a batch, or raises its error

_LONGEST = 128  # maximum row lengths are rounded up to this times a power of two, to compile few programs
_LEAST_STEP = 16
_PROGRAMS = 32  # compiled programs: one per batch size (halved if out of memory) and maximum row length


class Head:
    """What follows pooling, in float32: projections, truncation, and normalisation of what is left."""

    def __init__(self, path: Path, identity: EncoderIdentity, device: str) -> None:
        self._normalize, self._dimension = identity.normalize, identity.dimension
        self._layers: list[tuple[torch.Tensor, torch.Tensor | None, Callable[[torch.Tensor], torch.Tensor]]] = []
        try:
            for folder, activation in read_modules(path, refuse=False).projections:
                stored = load_file(folder / "model.safetensors", device)
                weights = {key: weight.float() for key, weight in stored.items()}
                act = getattr(torch.nn, activation)()
                self._layers.append((weights["linear.weight"], weights.get("linear.bias"), act))
            config = json_object(path / "config.json")
            found = self(torch.zeros(1, config.get("hidden_size") or config["dim"], device=device))
            if found.shape[1] != identity.dimension:
                raise ValueError(f"they return {found.shape[1]} numbers, not {identity.dimension}")
        except Exception as error:  # the libraries raise errors of their parts
            raise UsageError(f"encoder {path}: its projections can't be used: {error}") from error

    def __call__(self, pooled: torch.Tensor) -> torch.Tensor:
        """Map pooled outputs [n, hidden] to vectors [n, d]."""
        for weight, bias, activation in self._layers:
            pooled = activation(torch.nn.functional.linear(pooled, weight, bias))
        pooled = pooled[:, : self._dimension]
        return torch.nn.functional.normalize(pooled) if self._normalize else pooled


class PackedForward:
    """``PackedBert`` and its batches; ``constant``: ``varlen`` attention in constant shapes, compiled.

    ``gelu``: "tanh" if that is computed in place of the model's exact GELU, else "".
    """

    padded = False

    def __init__(
        self, path: Path, identity: EncoderIdentity, device: str, dtype: str, say: Callable[[str], object]
    ) -> None:
        shape = architecture_of(json_object(path / "config.json"))
        if identity.pooling == "lasttoken":
            raise NotPackedError("it pools the last token")
        kind: torch.dtype = getattr(torch, dtype)
        self._model = PackedBert(read_weights(path, shape), shape, identity.pooling, device, kind)
        self._padding, self._head, self._say = shape.padding, Head(path, identity, device), say
        self.constant = kind != torch.float32 and _has_varlen(device) and _fits_flash(shape)
        self.gelu = self._model.fuse_gelu(kind != torch.float32 and device != "cpu")
        self._compiled: Callable[..., torch.Tensor] | None = None
        self.why_eager = ""

    def use_exact_gelu(self) -> None:
        """Compute the model's own GELU from now on, apart from its product."""
        self.gelu = self._model.fuse_gelu(False)

    def arrays(self, rows: Rows, batch_tokens: int) -> Arrays:
        """Return ids, places and spans of a batch of framed rows, longest first."""
        ids, places = rows.ids, _places(rows, self._padding)
        if not self.constant:
            lengths, counts = np.unique(-rows.lengths, return_counts=True)
            groups = [(int(n), int(-length)) for length, n in zip(lengths, counts, strict=True)]
            # oneDNN caches kernels, some megabytes, for every shape it meets: few sizes, up to a 16th larger.
            step = max(_LEAST_STEP, 1 << max(len(ids).bit_length() - 5, 0))
            if extra := -len(ids) % step:
                groups.append((extra, 1))
                ids, places = np.pad(ids, (0, extra)), np.pad(places, (0, extra))
            return {"ids": ids, "places": places}, {"spans": groups, "longest": int(rows.lengths[0])}
        longest = max(_LONGEST, 1 << (int(rows.lengths[0]) - 1).bit_length())
        total, whole = len(ids), batch_tokens // 2 < len(ids) <= batch_tokens
        room = batch_tokens if whole else total
        ids, places = (np.pad(some, (0, room - total)) for some in (ids, places))
        spans = np.concatenate([[0], np.cumsum(rows.lengths), np.arange(total + longest, room, longest)])
        spans = np.append(spans[spans < room], room).astype(np.int32)  # the filling is rows, too
        return {"ids": ids, "places": places, "spans": spans}, {"longest": longest, "whole": whole}

    def __call__(self, tensors: Mapping[str, torch.Tensor], more: Mapping[str, Any]) -> torch.Tensor:
        """Return the vectors of a batch, float32 [at least n, d]."""
        spans = tensors["spans"] if self.constant else more["spans"]
        run = partial(self._model, tensors["ids"], tensors["places"], spans, more["longest"])
        pooled = None
        if self.constant and more["whole"] and not self.why_eager:
            try:
                self._compiled = self._compiled or compile_layer()
                config = torch._dynamo.config  # since torch 2.12 each thread has its own limit
                config.recompile_limit = max(config.recompile_limit, _PROGRAMS)
                torch._dynamo.mark_dynamic(spans, 0)  # as many as there are rows: empty ones would take time
                pooled = run(self._compiled)
            except Exception as error:
                if is_out_of_memory(error) or is_lost(error):
                    raise
                # Compilation may lack a C compiler or a header; the model runs without.
                self.why_eager = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                self._say(f"the forward can't be compiled ({self.why_eager}) and is slower")
        return self._head(run(Layer.forward) if pooled is None else pooled)


def compile_layer(**options: Any) -> Callable[..., torch.Tensor]:
    """Return ``Layer.forward``, compiled once for all layers: weights are arguments."""
    compiled: Callable[..., torch.Tensor] = torch.compile(Layer.forward, dynamic=False, fullgraph=True, **options)
    return compiled


def _has_varlen(device: str) -> bool:
    """Check whether the device supports FlashAttention: compute capability 8.0 (Ampere) or later."""
    return device != "cpu" and torch.cuda.get_device_capability(device) >= (8, 0)


def _fits_flash(shape: Architecture) -> bool:
    """Check whether FlashAttention supports a model: no bias, and certain head sizes."""
    size = shape.hidden // shape.heads
    return not shape.buckets and size % 8 == 0 and size <= 256


def _places(rows: Rows, padding: int | None) -> npt.NDArray[np.int32]:
    """Return each token's position; with ``padding`` as RoBERTa counts, skipping padding tokens."""
    if padding is None:
        return positions_within(rows.lengths).astype(np.int32)
    counted = np.cumsum(rows.ids != padding)
    before = np.where(rows.starts > 0, counted[np.maximum(rows.starts - 1, 0)], 0)
    within = counted - np.repeat(before, rows.lengths)
    return np.asarray(within * (rows.ids != padding) + padding, np.int32)


class PaddedForward:
    """``transformers.AutoModel``, with rows ``padded`` to the longest of their batch."""

    constant, padded, gelu = False, True, ""

    def __init__(self, spec: str, path: Path, identity: EncoderIdentity, device: str, dtype: str) -> None:
        self._model = load_pretrained("AutoModel", f"encoder {spec!r}", path, device, dtype, unused="pooler")
        self._model.config.use_cache = False
        self._pooling, self._head = identity.pooling, Head(path, identity, device)

    def use_exact_gelu(self) -> None:
        """Do nothing: ``transformers`` computes the model's own."""

    def arrays(self, rows: Rows, batch_tokens: int) -> Arrays:  # noqa: ARG002
        """Return padded ids and their mask for a batch of framed rows, longest first."""
        used = np.arange(rows.lengths[0]) < rows.lengths[:, None]
        ids = np.zeros(used.shape, np.int64)
        ids[used] = rows.ids
        return {"ids": ids, "mask": used.astype(np.int64)}, {}

    def __call__(self, tensors: Mapping[str, torch.Tensor], more: Mapping[str, Any]) -> torch.Tensor:  # noqa: ARG002
        """Return the vectors of a batch, float32 [n, d]."""
        mask = tensors["mask"]
        hidden = self._model(input_ids=tensors["ids"], attention_mask=mask).last_hidden_state.float()
        if self._pooling == "cls":
            pooled = hidden[:, 0]
        elif self._pooling == "lasttoken":
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
        else:
            weight = mask.unsqueeze(-1).float()
            pooled = (hidden * weight).sum(1) / weight.sum(1)
        return self._head(pooled)


Forward = PackedForward | PaddedForward


def load_pretrained(
    saved_by: str, what: str, path: Path, device: str, dtype: str, *, unused: str = "", **more: Any
) -> Any:
    """Load a model by a class of ``transformers`` from safetensors, without any code of its own.

    ``more``: arguments of ``from_pretrained``.

    Raises ``UsageError`` naming ``what`` if that fails, or for missing weights except ``unused``.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, info = getattr(transformers, saved_by).from_pretrained(
            path, dtype=getattr(torch, dtype), use_safetensors=True, local_files_only=True, trust_remote_code=False,
            output_loading_info=True, **more,
        )  # fmt: skip
        model = model.to(device).eval()
        if device == "cpu":  # mapped weights would change with the file
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data = tensor.data.clone()
    except Exception as error:  # the library raises errors of its parts
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if "ignore_mismatched_sizes" in reason:
            reason = f"its weights have other shapes than {path / 'config.json'} says"
        raise UsageError(f"{what} can't be loaded: {reason}") from error
    missing = sorted(key for key in info["missing_keys"] if not unused or unused not in key)
    if missing:
        raise UsageError(
            f"{what}: {len(missing):,} of the weights in its config.json are missing, such as {missing[0]}",
            "The model is incomplete, or its config.json belongs to another model.",
        )
    return model


_START_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Ready:
    """A batch's tensors on the host, and ``more`` data that stays there; the first ``rows`` vectors count."""

    tensors: dict[str, torch.Tensor]
    more: dict[str, Any]
    rows: int


class CpuRunner:
    """One thread per core with its own batches; ``depth``: batches to keep in flight."""

    def __init__(self, forward: Forward) -> None:
        self._forward, self._lanes = forward, cores()
        self.depth = 2 * self._lanes
        before, started = torch.get_num_threads(), threading.Barrier(self._lanes)
        self._pool = ThreadPoolExecutor(self._lanes, "retrotool-forward", torch.set_num_threads, (1,))
        list(self._pool.map(lambda _: started.wait(_START_SECONDS), range(self._lanes)))
        # Setting it in one thread also changes the default of threads started later.
        torch.set_num_threads(before)

    def ready(self, rows: Rows, batch_tokens: int) -> Ready:
        """Prepare a batch for ``submit``; may run in another thread."""
        arrays, more = self._forward.arrays(rows, batch_tokens)
        return Ready({name: torch.from_numpy(array) for name, array in arrays.items()}, more, len(rows))

    def submit(self, ready: Ready) -> Handle:
        """Start computing a batch."""
        future: Future[Computed] = self._pool.submit(self._compute, ready)
        return future.result

    def _compute(self, ready: Ready) -> Computed:
        start = time.perf_counter()
        with torch.inference_mode():
            vectors = self._forward(ready.tensors, ready.more)[: ready.rows].half()
            finite = bool(vectors.isfinite().all())
        return vectors.numpy(), finite, (time.perf_counter() - start) / self._lanes

    def close(self) -> None:
        """Release threads and memory."""
        self._pool.shutdown()


class CudaRunner:
    """One GPU: copies use a separate stream and pinned memory; see ``CpuRunner``."""

    depth = 3

    def __init__(self, forward: Forward, device: str) -> None:
        self._forward, self._device = forward, torch.device(device)
        self._copies = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def ready(self, rows: Rows, batch_tokens: int) -> Ready:
        """Prepare a batch for ``submit``; may run in another thread."""
        arrays, more = self._forward.arrays(rows, batch_tokens)
        return Ready({name: torch.from_numpy(array).pin_memory() for name, array in arrays.items()}, more, len(rows))

    def submit(self, ready: Ready) -> Handle:
        """Start computing a batch."""
        try:
            return self._submit(ready)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # release the failed batch's memory
            error.__context__ = error.__cause__ = None
            errors = [error.with_traceback(None)]

        def handle() -> Computed:
            raise errors.pop()  # not kept alive by its own traceback

        return handle

    def _submit(self, ready: Ready) -> Handle:
        work = torch.cuda.current_stream(self._device)
        with torch.inference_mode(), torch.cuda.device(self._device):
            with torch.cuda.stream(self._copies):
                tensors = {n: t.to(self._device, non_blocking=True) for n, t in ready.tensors.items()}
            work.wait_stream(self._copies)
            for tensor in tensors.values():
                tensor.record_stream(work)
            event: Any = torch.cuda.Event
            begun, ended, arrived = (event(enable_timing=True) for _ in range(3))
            begun.record(work)
            vectors = self._forward(tensors, ready.more)[: ready.rows].half()
            finite = vectors.isfinite().all()  # on the host it would take a millisecond between batches
            ended.record(work)
            host, all_finite = (torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in (vectors, finite))
            host.copy_(vectors, non_blocking=True)
            all_finite.copy_(finite, non_blocking=True)
            arrived.record(work)

        def handle() -> Computed:
            arrived.synchronize()
            assert ready.tensors is not None  # keep pinned memory alive until it is copied
            return host.numpy(), bool(all_finite), begun.elapsed_time(ended) / 1000

        return handle

    def close(self) -> None:
        """Wait until the device is idle."""
        torch.cuda.synchronize(self._device)


Runner = CpuRunner | CudaRunner
