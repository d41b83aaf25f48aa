"""The BERT family: which models the packed forward computes, and where their files keep each weight.

BERT (also MiniLM, BGE, E5, GTE), RoBERTa, XLM-RoBERTa, CamemBERT, DistilBERT and MPNet are the same computation: word
and place embeddings, then layers of self-attention and a feed-forward network, each followed by a residual and a layer
norm. They differ in the names of their weights, in where places are numbered from, and MPNet in a bias that attention
gets from the distance of two tokens. What is any different is told apart by its configuration, and runs through
``transformers``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from retrotool.encoder.encoder_identity import OFFSET_POSITIONS

if TYPE_CHECKING:
    import torch

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
"""Names in ``config.json`` of the activations that the packed forward has."""

_BERT_EMBEDDINGS = {
    "word": "embeddings.word_embeddings.weight",
    "place": "embeddings.position_embeddings.weight",
    "norm": "embeddings.LayerNorm",
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
_SEGMENT = "embeddings.token_type_embeddings.weight"
_RELATIVE = "encoder.relative_attention_bias.weight"
_NOT_IN_ALL = ("segment", "distance")
FAMILY = ("bert", *OFFSET_POSITIONS, "distilbert")


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
    if family not in FAMILY:
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


Weights = Mapping[str, "torch.Tensor"]
"""A model's weights in float32 by our own names: ``word``, ``place``, ``norm.weight``, ``3.query.bias``..."""


def read_weights(path: Path, shape: Architecture) -> Weights:
    """Read a model directory's safetensors; ``NotPackedError`` names a weight that is missing."""
    import torch
    from safetensors import safe_open

    wanted = {theirs: own for own, theirs in _names(shape).items()}
    tensors: dict[str, torch.Tensor] = {}
    for file in _weight_files(path):
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - it is no dict
                own = wanted.get(_plain(key))
                if own is not None and own not in tensors:
                    # A copy: what is mapped changes with the file, or is gone with it.
                    tensors[own] = opened.get_tensor(key).to(torch.float32, copy=True)
    missing = next((theirs for theirs, own in wanted.items() if own not in tensors and own not in _NOT_IN_ALL), None)
    if missing is not None:
        raise NotPackedError(f"it has no weight {missing}")
    if shape.buckets and "distance" not in tensors:
        raise NotPackedError(f"it has no weight {_RELATIVE}")
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
    names = {"segment": _SEGMENT, "distance": _RELATIVE}
    for own, theirs in _BERT_EMBEDDINGS.items():
        if theirs.endswith(".weight"):
            names[own] = theirs
        else:
            names |= {f"{own}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}
    for i in range(shape.layers):
        for own, theirs in within.items():
            names |= {f"{i}.{own}.{kind}": f"{stem}.{i}.{theirs}.{kind}" for kind in ("weight", "bias")}
    return names
