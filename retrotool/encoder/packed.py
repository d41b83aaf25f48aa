"""The forward of the BERT family without padding: one long axis of tokens, whatever rows they belong to.

Everything but attention works on single tokens, so rows need not be of one length there. Attention is told where rows
begin: ``varlen`` hands the whole axis to ``torch.nn.attention.varlen`` (FlashAttention, Dao 2023; half precision on
CUDA), ``grouped`` runs ``scaled_dot_product_attention`` on rows of equal length together (any device, any type, and
MPNet's bias). Query, key and value are one product. On a CPU products run in oneDNN with weights laid out for it once
(1.1 to 1.2 times as fast as MKL on AMD), with bias and activation in the same pass; in half precision there, what lies
between the products stays float32, which costs little and keeps recall. Of a model that pools the first token, the
last layer is computed for that token alone.

Cost of a token: 24·d² multiply-adds a layer for d dimensions, and 4·d a layer for every token of its row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from retrotool.encoder.architecture import Architecture, Weights
from retrotool.machine import has_onednn

Spans = torch.Tensor | list[tuple[int, int]]
"""Where rows lie: int32 [n + 1] places where they begin and end, or runs of equal rows as (rows, length)."""


class Dense(torch.nn.Module):
    """``x @ weight.T + bias``, then an activation ("": none); computed in the weight's own type."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype, activation: str = "") -> None:
        super().__init__()
        self.register_buffer("weight", weight.to(dtype).contiguous())
        self.register_buffer("bias", bias.to(dtype))
        self.dtype, self.activation = dtype, activation
        self.weight: torch.Tensor
        self.bias: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, in] to [tokens, out]."""
        y = F.linear(x.to(self.dtype), self.weight, self.bias)
        if self.activation == "relu":
            return F.relu(y)
        if self.activation:
            return F.gelu(y, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return y


_ONEDNN = {"": ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", "")}
"""What oneDNN calls the activations."""


class OneDnnDense(torch.nn.Module):
    """As ``Dense`` on a CPU, by oneDNN: the kernels that ``torch.compile`` uses there, without compiling."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype, activation: str = "") -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype).contiguous(), None)
        self.bias = bias.to(dtype)
        self.dtype = dtype
        self.post, self.algorithm = _ONEDNN[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, in] to [tokens, out]."""
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x.to(self.dtype), self.weight, self.bias, self.post, [], self.algorithm
        )
        return y


class Norm(torch.nn.Module):
    """Layer norm, in the type of what it is given."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, epsilon: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", weight.to(dtype))
        self.register_buffer("bias", bias.to(dtype))
        self.epsilon = epsilon
        self.weight: torch.Tensor
        self.bias: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, d] to the same."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)


def varlen(qkv: torch.Tensor, spans: torch.Tensor, longest: int) -> torch.Tensor:
    """Attention of ``qkv`` [tokens, 3, heads, d] within rows, [tokens, heads · d]; no row is over ``longest``."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = qkv.unbind(1)
    found = varlen_attn(query, key, value, spans, spans, longest, longest)
    assert isinstance(found, torch.Tensor)
    return found.flatten(1)


def grouped(qkv: torch.Tensor, spans: list[tuple[int, int]], bias: torch.Tensor | None) -> torch.Tensor:
    """As ``varlen``, for rows of equal length at a time; ``bias`` [heads, length, length] is added to the products."""
    found = []
    start = 0
    for rows, length in spans:
        stop = start + rows * length
        query, key, value = qkv[start:stop].view(rows, length, *qkv.shape[1:]).permute(2, 0, 3, 1, 4)
        added = None if bias is None else bias[:, :length, :length].to(query.dtype)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=added)
        found.append(mixed.transpose(1, 2).reshape(stop - start, -1))
        start = stop
    return found[0] if len(found) == 1 else torch.cat(found)


class Layer(torch.nn.Module):
    """One layer: attention, and a feed-forward network of each token."""

    def __init__(self, weights: Weights, i: int, shape: Architecture, kind: type[Any], dtypes: Dtypes) -> None:
        super().__init__()

        def dense(name: str, activation: str = "") -> torch.nn.Module:
            weight, bias = weights[f"{i}.{name}.weight"], weights[f"{i}.{name}.bias"]
            made: torch.nn.Module = kind(weight, bias, dtypes[0], activation)
            return made

        def norm(name: str) -> Norm:
            return Norm(weights[f"{i}.{name}.weight"], weights[f"{i}.{name}.bias"], shape.epsilon, dtypes[1])

        names = ("query", "key", "value")
        self.qkv = kind(*(torch.cat([weights[f"{i}.{n}.{w}"] for n in names]) for w in ("weight", "bias")), dtypes[0])
        self.out, self.up, self.down = dense("out"), dense("up", shape.activation), dense("down")
        self.norm1, self.norm2 = norm("norm1"), norm("norm2")
        self.heads = shape.heads

    def forward(
        self, x: torch.Tensor, spans: Any, longest: int, bias: torch.Tensor | None, first: torch.Tensor | None
    ) -> torch.Tensor:
        """[tokens, d] to the same; ``first`` int64 [n]: to [n, d], for these tokens only."""
        qkv = self.qkv(x).view(len(x), 3, self.heads, -1)
        mixed = varlen(qkv, spans, longest) if isinstance(spans, torch.Tensor) else grouped(qkv, spans, bias)
        if first is not None:
            mixed, x = mixed[first], x[first]
        x = self.norm1(x + self.out(mixed))
        y: torch.Tensor = self.norm2(x + self.down(self.up(x)))
        return y


Dtypes = tuple[torch.dtype, torch.dtype]
"""Of the products, and of what lies between them."""


class PackedBert(torch.nn.Module):
    """A model of the family, on a device. ``pooling`` is "mean" or "cls"; vectors come in float32, not normalised."""

    def __init__(self, weights: Weights, shape: Architecture, pooling: str, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        cpu = device == "cpu"
        dtypes = (dtype, torch.float32 if cpu else dtype)
        kind = OneDnnDense if cpu and has_onednn(dtype) else Dense
        place = weights["place"]
        if "segment" in weights:
            place = place + weights["segment"][0]  # texts have one segment
        self.register_buffer("word", weights["word"].to(dtypes[1]))
        self.register_buffer("place", place.to(dtypes[1]))
        self.norm = Norm(weights["norm.weight"], weights["norm.bias"], shape.epsilon, dtypes[1])
        self.layers = torch.nn.ModuleList(Layer(weights, i, shape, kind, dtypes) for i in range(shape.layers))
        self.distance = weights["distance"].to(device) if shape.buckets else None
        self.shape, self.pooling = shape, pooling
        self.word: torch.Tensor
        self.place: torch.Tensor
        self.to(device).eval()

    def forward(
        self, ids: torch.Tensor, places: torch.Tensor, spans: Spans, longest: int, run: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        """Vectors, float32 [n, d], of ``ids`` [tokens] at ``places`` [tokens] of rows that ``spans`` describe.

        ``run`` computes a layer: ``Layer.forward``, or that compiled.
        """
        x = self.norm(F.embedding(ids, self.word) + F.embedding(places, self.place))
        bias = None if self.distance is None else relative_bias(self.distance, longest, self.shape.buckets)
        first = _first(spans, ids) if self.pooling == "cls" else None
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            if first is not None and i == last:  # another shape: not worth a program of its own
                x = layer(x, spans, longest, bias, first)
            else:
                x = run(layer, x, spans, longest, bias, None)
        if first is not None:
            pooled: torch.Tensor = x.float()
            return pooled
        return mean_of_rows(x, spans)


def _first(spans: Spans, ids: torch.Tensor) -> torch.Tensor:
    """Where rows begin, int64 [n]; of rows without tokens, of which a batch of constant shape has some, anywhere."""
    if isinstance(spans, torch.Tensor):
        return spans[:-1].long().clamp(max=len(ids) - 1)
    lengths = torch.tensor([length for rows, length in spans for _ in range(rows)], device=ids.device)
    return torch.cumsum(lengths, 0) - lengths


def mean_of_rows(x: torch.Tensor, spans: Spans) -> torch.Tensor:
    """Mean over the tokens of each row, float32 [n, d]; in a fixed order, so the same every time."""
    if isinstance(spans, torch.Tensor):
        return torch.segment_reduce(x.float(), "mean", offsets=spans.long(), axis=0, unsafe=True)
    means = []
    start = 0
    for rows, length in spans:
        stop = start + rows * length
        means.append(x[start:stop].view(rows, length, -1).float().mean(1))
        start = stop
    return torch.cat(means)


def relative_bias(table: torch.Tensor, length: int, buckets: int) -> torch.Tensor:
    """What attention adds for the distance of two tokens, [heads, length, length], of ``table`` [buckets, heads].

    Near distances have a bucket each, farther ones share them on a logarithmic scale up to 128 (Raffel et al. 2020,
    section 2.1), half of the buckets for each direction.
    """
    places = torch.arange(length, device=table.device)
    distance = places[:, None] - places[None, :]
    half = buckets // 2
    exact = half // 2
    far = (
        exact + (torch.log(distance.abs().clamp(min=1).float() / exact) / math.log(128 / exact) * (half - exact)).long()
    )
    bucket = torch.where(distance.abs() < exact, distance.abs(), far.clamp(max=half - 1))
    return table[bucket + (distance < 0) * half].permute(2, 0, 1)
