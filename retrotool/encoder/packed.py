"""The BERT family's forward without padding: one axis of tokens for all rows.

BERT (also MiniLM, BGE, E5, GTE), RoBERTa, XLM-RoBERTa, CamemBERT, DistilBERT and MPNet differ in weight
names, the first position, and MPNet's attention bias. Other models run through ``transformers``.

Only attention sees rows: ``varlen`` (FlashAttention, Dao 2023; half precision on CUDA), or ``grouped`` for
rows of equal length (any device and type, and MPNet's bias). On a CPU products run in oneDNN with prepacked
weights (1.1 to 1.2 times as fast as MKL on AMD), fused with bias and activation; in half precision the rest
stays float32, which costs little and keeps recall. On a GPU in half precision GELU is computed in the
product's epilogue, which saves reading and writing its outputs once; CUDA has only the tanh form there.
For cls pooling, the last layer computes the first token only. Cost per token and layer: 24·d² multiply-adds,
and 4·d for every token of its row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.nn import functional as F

from retrotool.encoder.encoder_identity import OFFSET_POSITIONS, weight_files
from retrotool.machine import has_onednn

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}

_EMBEDDINGS = {
    "word": "embeddings.word_embeddings.weight",
    "place": "embeddings.position_embeddings.weight",
    "segment": "embeddings.token_type_embeddings.weight",
    "distance": "encoder.relative_attention_bias.weight",
}
_BERT = {
    "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
    "out": "attention.output.dense", "norm1": "attention.output.LayerNorm",
    "up": "intermediate.dense", "down": "output.dense", "norm2": "output.LayerNorm",
}  # fmt: skip
_DISTILBERT = {
    "query": "attention.q_lin", "key": "attention.k_lin", "value": "attention.v_lin",
    "out": "attention.out_lin", "norm1": "sa_layer_norm",
    "up": "ffn.lin1", "down": "ffn.lin2", "norm2": "output_layer_norm",
}  # fmt: skip
_MPNET = {
    **_BERT,
    "query": "attention.attn.q", "key": "attention.attn.k", "value": "attention.attn.v",
    "out": "attention.attn.o", "norm1": "attention.LayerNorm",
}  # fmt: skip
_LAYERS = {"distilbert": ("transformer.layer", _DISTILBERT), "mpnet": ("encoder.layer", _MPNET)}
_FAMILY = ("bert", *OFFSET_POSITIONS, "distilbert")


@dataclass(frozen=True, slots=True)
class Architecture:
    """The shape of a model. ``padding``: the token without a position; None: all have one, from 0."""

    family: str
    layers: int
    heads: int
    hidden: int
    activation: str
    epsilon: float
    padding: int | None
    buckets: int  # distances between tokens with their own attention bias; 0: none


class NotPackedError(Exception):
    """A model does not run through the packed forward."""


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Return the shape described by a ``config.json``; raise ``NotPackedError`` for other families."""
    family = str(config.get("model_type"))
    if family not in _FAMILY:
        raise NotPackedError(f"models of type {family} are not of the BERT family")
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise NotPackedError(f"its positions are {config['position_embedding_type']}")
    if config.get("is_decoder") or config.get("add_cross_attention"):
        raise NotPackedError("it is a decoder")
    distil = family == "distilbert"

    def field(name: str, otherwise: Any = None) -> Any:
        value = otherwise if config.get(name) is None else config[name]
        if value is None:
            raise NotPackedError(f"its config.json has no {name}")
        return value

    activation = str(field("activation" if distil else "hidden_act", "gelu"))
    if activation not in ACTIVATIONS:
        raise NotPackedError(f"its activation {activation} is not supported")
    layers = int(field("n_layers" if distil else "num_hidden_layers"))
    heads = int(field("n_heads" if distil else "num_attention_heads"))
    hidden = int(field("dim" if distil else "hidden_size"))
    if layers < 1:
        raise NotPackedError("it has no layers")
    if heads < 1 or hidden % heads:
        raise NotPackedError(f"{hidden} dimensions can't be divided by {heads} heads")
    return Architecture(
        family=family,
        layers=layers,
        heads=heads,
        hidden=hidden,
        activation=ACTIVATIONS[activation],
        epsilon=1e-12 if distil else float(field("layer_norm_eps", 1e-12)),
        padding=int(field("pad_token_id", 1)) if family in OFFSET_POSITIONS else None,
        buckets=int(field("relative_attention_num_buckets", 32)) if family == "mpnet" else 0,
    )


Weights = Mapping[str, torch.Tensor]  # float32, by our names: ``word``, ``norm.weight``, ``3.query.bias``...


def read_weights(path: Path, shape: Architecture) -> Weights:
    """Read a model directory's safetensors; raise ``NotPackedError`` naming a missing weight."""
    wanted = {theirs: own for own, theirs in _names(shape).items()}
    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(path):
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - not a dict
                own = wanted.get(_plain(key))
                if own is not None and own not in tensors:
                    # Copied, as mapped weights would change with the file.
                    tensors[own] = opened.get_tensor(key).to(torch.float32, copy=True)
    optional = ("segment",) if shape.buckets else ("segment", "distance")
    missing = next((theirs for theirs, own in wanted.items() if own not in tensors and own not in optional), None)
    if missing is not None:
        raise NotPackedError(f"it has no weight {missing}")
    return tensors


def _plain(key: str) -> str:
    """Return a weight's name without the prefix of models with a head, in current spelling."""
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


Spans = torch.Tensor | list[tuple[int, int]]  # boundaries int32 [n + 1], or runs of equal rows (rows, length)


class Dense(torch.nn.Module):
    """``x @ weight.T + bias``, then an activation ("": none), in the type of the weight.

    ``fused``: GELU is computed in the product's epilogue, before it is written; CUDA has only the tanh form.
    """

    fused = False

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype, activation: str = "") -> None:
        super().__init__()
        self.weight = torch.nn.Buffer(weight.to(dtype).contiguous())
        self.bias = torch.nn.Buffer(bias.to(dtype))
        self.dtype, self.activation = dtype, activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [tokens, in] to [tokens, out]."""
        x = x.to(self.dtype)
        if self.fused:
            return torch._addmm_activation(self.bias, x, self.weight.T, use_gelu=True)
        y = F.linear(x, self.weight, self.bias)
        if self.activation == "relu":
            return F.relu(y)
        if self.activation:
            return F.gelu(y, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return y


_ONEDNN = {"": ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", "")}


class OneDnnDense(torch.nn.Module):
    """``Dense`` on a CPU with oneDNN: the kernels of ``torch.compile``, without compiling."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype, activation: str = "") -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype).contiguous(), None)
        self.bias = bias.to(dtype)
        self.dtype = dtype
        self.post, self.algorithm = _ONEDNN[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [tokens, in] to [tokens, out]."""
        x = x.to(self.dtype)
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, self.post, [], self.algorithm)
        return y


class Norm(torch.nn.Module):
    """Layer norm, in the type of its input."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, epsilon: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Buffer(weight.to(dtype))
        self.bias = torch.nn.Buffer(bias.to(dtype))
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise [tokens, d]."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)


def varlen(qkv: torch.Tensor, spans: torch.Tensor, longest: int) -> torch.Tensor:
    """Return attention of ``qkv`` [tokens, 3, heads, d] in rows up to ``longest``, [tokens, heads · d]."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = qkv.unbind(1)
    found = varlen_attn(query, key, value, spans, spans, longest, longest)
    assert isinstance(found, torch.Tensor)
    return found.flatten(1)


def grouped(qkv: torch.Tensor, spans: list[tuple[int, int]], bias: torch.Tensor | None) -> torch.Tensor:
    """Return ``varlen`` for runs of equal rows, adding ``bias`` [heads, length, length] to the products."""
    found = []
    for some, (rows, length) in zip(torch.split(qkv, [rows * length for rows, length in spans]), spans, strict=True):
        query, key, value = some.view(rows, length, *qkv.shape[1:]).permute(2, 0, 3, 1, 4)
        added = None if bias is None else bias[:, :length, :length].to(query.dtype)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=added)
        found.append(mixed.transpose(1, 2).reshape(len(some), -1))
    return found[0] if len(found) == 1 else torch.cat(found)


class Layer(torch.nn.Module):
    """One layer: attention, and a feed-forward network for each token."""

    def __init__(self, weights: Weights, i: int, shape: Architecture, dense: type[Any], dtypes: Dtypes) -> None:
        super().__init__()

        def of(name: str) -> tuple[torch.Tensor, torch.Tensor]:
            return weights[f"{i}.{name}.weight"], weights[f"{i}.{name}.bias"]

        of_three = [of(name) for name in ("query", "key", "value")]
        self.qkv = dense(torch.cat([one for one, _ in of_three]), torch.cat([one for _, one in of_three]), dtypes[0])
        self.out, self.down = dense(*of("out"), dtypes[0]), dense(*of("down"), dtypes[0])
        self.up = dense(*of("up"), dtypes[0], shape.activation)
        self.norm1, self.norm2 = (Norm(*of(name), shape.epsilon, dtypes[1]) for name in ("norm1", "norm2"))
        self.heads = shape.heads

    def forward(
        self, x: torch.Tensor, spans: Any, longest: int, bias: torch.Tensor | None, first: torch.Tensor | None
    ) -> torch.Tensor:
        """Map [tokens, d] to the same; with ``first`` int64 [n], to [n, d] for these tokens only."""
        qkv = self.qkv(x).view(len(x), 3, self.heads, -1)
        mixed = varlen(qkv, spans, longest) if isinstance(spans, torch.Tensor) else grouped(qkv, spans, bias)
        if first is not None:
            mixed, x = mixed[first], x[first]
        x = self.norm1(x + self.out(mixed))
        y: torch.Tensor = self.norm2(x + self.down(self.up(x)))
        return y


Dtypes = tuple[torch.dtype, torch.dtype]  # of products, and of everything else


class PackedBert(torch.nn.Module):
    """A model on a device with "mean" or "cls" pooling; vectors are float32, not normalised."""

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

    def fuse_gelu(self, fused: bool) -> str:
        """Compute GELU in the product's epilogue, or apart; return "tanh" if that replaces exact GELU."""
        fused = fused and self.shape.activation in ("gelu", "gelu_tanh") and hasattr(torch, "_addmm_activation")
        for module in self.modules():
            if isinstance(module, Dense):
                module.fused = fused and bool(module.activation)
        return "tanh" if fused and self.shape.activation == "gelu" else ""

    def forward(
        self, ids: torch.Tensor, places: torch.Tensor, spans: Spans, longest: int, run: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        """Return vectors, float32 [n, d], of ``ids`` at ``places`` in ``spans``; ``run`` computes a layer."""
        x = self.norm(F.embedding(ids, self.word) + F.embedding(places, self.place))
        bias = None if self.distance is None else relative_bias(self.distance, longest, self.shape.buckets)
        *layers, last = self.layers
        for layer in layers:
            x = run(layer, x, spans, longest, bias, None)
        if self.pooling != "cls":
            return mean_of_rows(run(last, x, spans, longest, bias, None), spans)
        pooled: torch.Tensor = last(x, spans, longest, bias, _first(spans, ids))  # another shape: not compiled
        return pooled.float()


def _first(spans: Spans, ids: torch.Tensor) -> torch.Tensor:
    """Return the first token of each row, int64 [n]; any token for rows without."""
    if isinstance(spans, torch.Tensor):
        return spans[:-1].long().clamp(max=len(ids) - 1)
    lengths = torch.tensor([length for rows, length in spans for _ in range(rows)], device=ids.device)
    return torch.cumsum(lengths, 0) - lengths


def mean_of_rows(x: torch.Tensor, spans: Spans) -> torch.Tensor:
    """Return the mean over each row's tokens, float32 [n, d], summed in a fixed order."""
    if isinstance(spans, torch.Tensor):
        return torch.segment_reduce(x.float(), "mean", offsets=spans.long(), axis=0, unsafe=True)
    groups = zip(torch.split(x, [rows * length for rows, length in spans]), spans, strict=True)
    return torch.cat([some.view(rows, length, -1).float().mean(1) for some, (rows, length) in groups])


def relative_bias(table: torch.Tensor, length: int, buckets: int) -> torch.Tensor:
    """Return the attention bias of distances, [heads, length, length], from ``table`` [buckets, heads].

    Small distances have a bucket each, others logarithmic ones up to 128 (Raffel et al. 2020, section 2.1).
    """
    places = torch.arange(length, device=table.device)
    distance = places[:, None] - places[None, :]
    half = buckets // 2
    exact = half // 2
    logarithm = torch.log(distance.abs().clamp(min=1).float() / exact) / math.log(128 / exact)
    far = exact + (logarithm * (half - exact)).long()
    bucket = torch.where(distance.abs() < exact, distance.abs(), far.clamp(max=half - 1))
    return table[bucket + (distance < 0) * half].permute(2, 0, 1)
