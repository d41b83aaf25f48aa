"""The forward of the BERT family without padding: one long axis of tokens, whatever rows they belong to.

BERT (also MiniLM, BGE, E5, GTE), RoBERTa, XLM-RoBERTa, CamemBERT, DistilBERT and MPNet are the same computation. They
differ in the names of their weights, in where places are numbered from, and MPNet in a bias that attention gets from
the distance of two tokens. What is any different is found by its configuration, and runs through ``transformers``.

Everything but attention works on single tokens, so rows need not be of one length there. Attention is told where rows
begin: ``varlen`` hands the whole axis to ``torch.nn.attention.varlen`` (FlashAttention, Dao 2023; half precision on
CUDA), ``grouped`` runs ``scaled_dot_product_attention`` on rows of equal length together (any device, any type, and
MPNet's bias). Query, key and value are one product. On a CPU products run in oneDNN with weights laid out for it once
(1.1 to 1.2 times as fast as MKL on AMD), with bias and activation in the same pass; in half precision there, what is
between the products stays float32, which costs little and keeps recall. Of a model that pools the first token, the
last layer is computed for that token alone.

Cost of a token: 24·d² multiply-adds a layer for d dimensions, and 4·d a layer for every token of its row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors import safe_open
from torch.nn import functional as F

from retrotool.encoder.encoder_identity import OFFSET_POSITIONS
from retrotool.machine import has_onednn

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
"""Names in ``config.json`` of the activations that the packed forward has."""

_EMBEDDINGS = {
    "word": "embeddings.word_embeddings.weight",
    "place": "embeddings.position_embeddings.weight",
    "segment": "embeddings.token_type_embeddings.weight",
    "distance": "encoder.relative_attention_bias.weight",
}
_BERT = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm2": "output.LayerNorm",
}
_DISTILBERT = {
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "out": "attention.out_lin",
    "norm1": "sa_layer_norm",
    "up": "ffn.lin1",
    "down": "ffn.lin2",
    "norm2": "output_layer_norm",
}
_MPNET = {
    **_BERT,
    "query": "attention.attn.q",
    "key": "attention.attn.k",
    "value": "attention.attn.v",
    "out": "attention.attn.o",
    "norm1": "attention.LayerNorm",
}
_LAYERS = {"distilbert": ("transformer.layer", _DISTILBERT), "mpnet": ("encoder.layer", _MPNET)}
_FAMILY = ("bert", *OFFSET_POSITIONS, "distilbert")


@dataclass(frozen=True, slots=True)
class Architecture:
    """The shape of a model of the family. ``padding``: the token that has no place (None: all have, from 0 on)."""

    family: str
    layers: int
    heads: int
    hidden: int
    activation: str
    epsilon: float
    padding: int | None
    buckets: int
    """Kinds of distance between tokens that attention has a bias for; 0: none."""


class NotPackedError(Exception):
    """Why a model does not run through the packed forward."""


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The shape that a ``config.json`` describes; ``NotPackedError`` if it is not of the family."""
    family = str(config.get("model_type"))
    if family not in _FAMILY:
        raise NotPackedError(f"models of type {family} are not of the BERT family")
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise NotPackedError(f"its positions are {config['position_embedding_type']}")
    if config.get("is_decoder") or config.get("add_cross_attention"):
        raise NotPackedError("it is a decoder")
    distil = family == "distilbert"

    def field(name: str, otherwise: Any = None) -> Any:
        value = config.get(name)
        value = otherwise if value is None else value
        if value is None:
            raise NotPackedError(f"its config.json has no {name}")
        return value

    activation = str(field("activation" if distil else "hidden_act", "gelu"))
    if activation not in ACTIVATIONS:
        raise NotPackedError(f"its activation {activation} is not known")
    heads = int(field("n_heads" if distil else "num_attention_heads"))
    hidden = int(field("dim" if distil else "hidden_size"))
    if heads < 1 or hidden % heads:
        raise NotPackedError(f"{hidden} dimensions are not to be shared by {heads} heads")
    return Architecture(
        family=family,
        layers=int(field("n_layers" if distil else "num_hidden_layers")),
        heads=heads,
        hidden=hidden,
        activation=ACTIVATIONS[activation],
        epsilon=1e-12 if distil else float(field("layer_norm_eps", 1e-12)),
        padding=int(field("pad_token_id", 1)) if family in OFFSET_POSITIONS else None,
        buckets=int(field("relative_attention_num_buckets", 32)) if family == "mpnet" else 0,
    )


Weights = Mapping[str, torch.Tensor]
"""A model's weights in float32 by our own names: ``word``, ``place``, ``norm.weight``, ``3.query.bias``..."""


def read_weights(path: Path, shape: Architecture) -> Weights:
    """Read a model directory's safetensors; ``NotPackedError`` names a weight that is missing."""
    wanted = {theirs: own for own, theirs in _names(shape).items()}
    tensors: dict[str, torch.Tensor] = {}
    for file in _weight_files(path):
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - it is no dict
                own = wanted.get(_plain(key))
                if own is not None and own not in tensors:
                    # A copy: what is mapped changes with the file, or is gone with it.
                    tensors[own] = opened.get_tensor(key).to(torch.float32, copy=True)
    optional = ("segment",) if shape.buckets else ("segment", "distance")
    missing = next((theirs for theirs, own in wanted.items() if own not in tensors and own not in optional), None)
    if missing is not None:
        raise NotPackedError(f"it has no weight {missing}")
    return tensors


def _weight_files(path: Path) -> list[Path]:
    """The files that ``transformers`` would read, and no variant beside them; without these, all."""
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        return sorted({path / name for name in orjson.loads(index.read_bytes())["weight_map"].values()})
    return sorted(path.glob("*.safetensors"))


def _plain(key: str) -> str:
    """A weight's name without what models with a head put before it, and in today's spelling."""
    for prefix in ("bert.", "roberta.", "distilbert.", "mpnet.", "camembert."):
        key = key.removeprefix(prefix)
    return key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _names(shape: Architecture) -> dict[str, str]:
    stem, within = _LAYERS.get(shape.family, ("encoder.layer", _BERT))
    modules = {"norm": "embeddings.LayerNorm"}
    for i in range(shape.layers):
        modules |= {f"{i}.{own}": f"{stem}.{i}.{theirs}" for own, theirs in within.items()}
    names = {f"{own}.{kind}": f"{theirs}.{kind}" for own, theirs in modules.items() for kind in ("weight", "bias")}
    return {**_EMBEDDINGS, **names}


Spans = torch.Tensor | list[tuple[int, int]]
"""Where rows lie: int32 [n + 1] places where they begin and end, or runs of equal rows as (rows, length)."""


class Dense(torch.nn.Module):
    """``x @ weight.T + bias``, then an activation ("": none); computed in the weight's own type."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype, activation: str = "") -> None:
        super().__init__()
        self.weight = torch.nn.Buffer(weight.to(dtype).contiguous())
        self.bias = torch.nn.Buffer(bias.to(dtype))
        self.dtype, self.activation = dtype, activation

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
        self.weight = torch.nn.Buffer(weight.to(dtype))
        self.bias = torch.nn.Buffer(bias.to(dtype))
        self.epsilon = epsilon

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
        self.word = torch.nn.Buffer(weights["word"].to(dtypes[1]))
        self.place = torch.nn.Buffer(place.to(dtypes[1]))
        self.norm = Norm(weights["norm.weight"], weights["norm.bias"], shape.epsilon, dtypes[1])
        self.layers = torch.nn.ModuleList(Layer(weights, i, shape, kind, dtypes) for i in range(shape.layers))
        self.distance = weights["distance"].to(device) if shape.buckets else None
        self.shape, self.pooling = shape, pooling
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
