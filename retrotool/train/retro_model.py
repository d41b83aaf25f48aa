"""RETRO (arXiv 2112.04426, sections 2.3 to 2.5) in PyTorch: a decoder that reads neighbours of its chunks.

A reference of the architecture, to validate databases and for small research models. Names follow the paper:
a sequence of L tokens is l = L / m chunks C_u of m tokens; each of the k neighbours of a chunk, with its
continuation, has r tokens.

* Decoder: layers of causal self-attention with rotary positions, of chunked cross-attention in some of them,
  and of a gated feed-forward. Each normalises its input by RMSNorm, and is added to it. The embedding of the
  tokens is also that of the output, and of the tokens of neighbours (projected).
* Encoder: reads each neighbour in both directions. Its first layer attends to the chunk that retrieved the
  neighbour, as it is in the decoder's first layer with cross-attention.
* Chunked cross-attention: the neighbours of a chunk are known from its last token on. So that token and the
  first m − 1 of the next chunk attend to the tokens of all its neighbours at once.

Padding, as in purged slots and missing neighbours, is never attended to; what has nothing to attend to gets
0. No output depends on later tokens, or on neighbours of a chunk that is not complete.

Cost: attention takes a mask [b, L, L], so memory grows with L². There is no cache for generating text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrotool.errors import UsageError
from retrotool.store.storage import Place
from retrotool.train.training_config import parse_section
from retrotool.train.training_folder import TrainingFolder

_ROTARY_BASE = 10_000.0
_INITIAL_DEVIATION = 0.02


@dataclass(frozen=True)
class RetroConfig:
    """Sizes of a model; ``UsageError`` if they are impossible.

    Layers are counted from 1; by default 6, 9 and 12 have cross-attention, as in the paper's small models.
    ``neighbours``: to train with; a model reads any number. Without ``retrieval`` it is a plain decoder.
    """

    vocabulary: int
    chunk_length: int = 64
    dimension: int = 512
    layers: int = 12
    heads: int = 8
    first_cross_layer: int = 6
    cross_every: int = 3
    encoder_dimension: int = 256
    encoder_layers: int = 2
    encoder_heads: int = 4
    neighbours: int = 2
    retrieval: bool = True

    def __post_init__(self) -> None:
        for name, heads in (("dimension", self.heads), ("encoder_dimension", self.encoder_heads)):
            if getattr(self, name) % (2 * heads):
                advice = "Rotary positions turn pairs of the numbers of each head."
                raise UsageError(f"{name}={getattr(self, name)} is not a multiple of twice its {heads} heads", advice)
        if self.retrieval and not self.cross_layers:
            advice = "Lower first_cross_layer, or set retrieval to false."
            raise UsageError(f"first_cross_layer={self.first_cross_layer} is more than layers={self.layers}", advice)

    @property
    def cross_layers(self) -> range:
        """The layers with chunked cross-attention."""
        return range(self.first_cross_layer, self.layers + 1 if self.retrieval else 0, self.cross_every)


def rotate(x: Tensor, places: Tensor) -> Tensor:
    """Rotate pairs of the numbers of x [..., n, d] by angles that are proportional to ``places`` [n].

    The product of two rotated vectors depends on the distance of their places only.
    """
    half, exact = x.shape[-1] // 2, torch.promote_types(x.dtype, torch.float32)
    angles = places[:, None] * _ROTARY_BASE ** (-torch.arange(half, device=x.device, dtype=exact) / half)
    one, other = x.to(exact).chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([one * cos - other * sin, one * sin + other * cos], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Normalises vectors of ``dimension`` numbers; they attend to each other, or to vectors of ``source``."""

    def __init__(self, dimension: int, heads: int, source: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.RMSNorm(dimension)
        self.query = nn.Linear(dimension, dimension, bias=False)
        self.key = nn.Linear(source or dimension, dimension, bias=False)
        self.value = nn.Linear(source or dimension, dimension, bias=False)
        self.out = nn.Linear(dimension, dimension, bias=False)

    def forward(
        self, x: Tensor, places: Tensor, allowed: Tensor, source: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        """Return what x [n, t, dimension] finds in itself or ``source`` [n, s, ...]; 0 if nothing is allowed.

        ``places`` [t] and ``at`` [s] are their positions; ``allowed``: bool [n, t or 1, s].
        """
        x = self.norm(x)
        source, at = (x, places) if source is None or at is None else (source, at)
        query, key, value = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projected in (self.query(x), self.key(source), self.value(source))
        )
        # A softmax over nothing is NaN in some kernels: such a row attends to everything, and is dropped.
        some = allowed.any(-1, keepdim=True)
        mask = (allowed | ~some)[:, None]
        attended = F.scaled_dot_product_attention(rotate(query, places), rotate(key, at), value, attn_mask=mask)
        found: Tensor = self.out(attended.transpose(1, 2).flatten(2)) * some
        return found


class FeedForward(nn.Module):
    """Normalises, then SwiGLU with as many weights as a plain feed-forward of four times the dimension."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        hidden = 8 * math.ceil(dimension / 3)
        self.norm = nn.RMSNorm(dimension)
        self.gate = nn.Linear(dimension, hidden, bias=False)
        self.up = nn.Linear(dimension, hidden, bias=False)
        self.down = nn.Linear(hidden, dimension, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., dimension] for x [..., dimension]."""
        x = self.norm(x)
        found: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return found


class ChunkedCrossAttention(nn.Module):
    """CCA of the paper, without the residual: position um + i − 1, for i = 1 … m, attends to E_u."""

    def __init__(self, config: RetroConfig) -> None:
        super().__init__()
        self.chunk_length = config.chunk_length
        self.attention = Attention(config.dimension, config.heads, config.encoder_dimension)

    def forward(self, x: Tensor, encoded: Tensor, mask: Tensor) -> Tensor:
        """Return [b, L, d] for x [b, L, d], encoded neighbours [b, l, k, r, e] and their mask [b, l, k, r].

        The first m − 1 positions are 0, as are those that attend to neighbours without tokens.
        """
        m, (b, n, k, r) = self.chunk_length, mask.shape
        # From the last token of each chunk; for the last chunk it is the only one.
        attending = F.pad(x, (0, 0, 1 - m, m - 1)).reshape(b * n, m, -1)
        # A neighbour is aligned with its chunk, and the continuation with the next chunk.
        places = torch.arange(m - 1, 2 * m - 1, device=x.device)
        at = torch.arange(r, device=x.device).repeat(k)
        source, allowed = encoded.reshape(b * n, k * r, -1), mask.reshape(b * n, 1, k * r)
        found = self.attention(attending, places, allowed, source, at)
        return F.pad(found.reshape(b, n * m, -1), (0, 0, m - 1, 1 - m))


class NeighbourEncoder(nn.Module):
    """Encodes neighbours, each conditioned on the activations of the chunk that retrieved it."""

    def __init__(self, config: RetroConfig) -> None:
        super().__init__()
        dimension, heads, layers = config.encoder_dimension, config.encoder_heads, range(config.encoder_layers)
        self.project = nn.Linear(config.dimension, dimension, bias=False)
        self.attention = nn.ModuleList(Attention(dimension, heads) for _ in layers)
        self.chunk_norm = nn.RMSNorm(config.dimension)
        self.chunk_attention = Attention(dimension, heads, config.dimension)
        self.feed_forward = nn.ModuleList(FeedForward(dimension) for _ in layers)
        self.norm = nn.RMSNorm(dimension)

    def forward(self, embedding: nn.Embedding, neighbours: Tensor, mask: Tensor, x: Tensor, x_mask: Tensor) -> Tensor:
        """Return [b, l, k, r, e] for neighbours [b, l, k, r], activations x [b, L, d], and their masks."""
        b, n, k, r = neighbours.shape
        places, chunk_places = (torch.arange(size, device=x.device) for size in (r, x.shape[1] // n))
        chunks, chunk_mask = self.chunk_norm(x).reshape(b * n, -1, x.shape[-1]), x_mask.reshape(b * n, 1, -1)
        # In the precision of x, as sums are, where autocast projects in a lower one.
        found = self.project(embedding(neighbours.masked_fill(~mask, 0))).flatten(0, 2).to(x.dtype)
        for number, (attention, feed_forward) in enumerate(zip(self.attention, self.feed_forward, strict=True)):
            found = found + attention(found, places, mask.reshape(b * n * k, 1, r))
            if number == 0:  # P_enc of the paper
                merged = found.reshape(b * n, k * r, -1)
                found = (
                    merged + self.chunk_attention(merged, places.repeat(k), chunk_mask, chunks, chunk_places)
                ).view_as(found)
            found = found + feed_forward(found)
        encoded: Tensor = self.norm(found).reshape(b, n, k, r, -1)
        return encoded


class RetroModel(nn.Module):
    """A decoder that retrieves; ``seed`` decides its initial weights."""

    def __init__(self, config: RetroConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        layers = range(1, config.layers + 1)
        self.embedding = nn.Embedding(config.vocabulary, config.dimension)
        self.attention = nn.ModuleList(Attention(config.dimension, config.heads) for _ in layers)
        self.cross_attention = nn.ModuleDict(
            {str(number): ChunkedCrossAttention(config) for number in config.cross_layers}
        )
        self.feed_forward = nn.ModuleList(FeedForward(config.dimension) for _ in layers)
        self.norm = nn.RMSNorm(config.dimension)
        self.encoder = NeighbourEncoder(config) if config.retrieval else None
        random = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                # Every layer adds its output: smaller, so that the sum does not grow with the depth.
                added = name.endswith(("out.weight", "down.weight"))
                deviation = _INITIAL_DEVIATION / math.sqrt(2 * config.layers if added else 1)
                nn.init.normal_(weight, std=deviation, generator=random)

    def forward(
        self, tokens: Tensor, mask: Tensor, neighbours: Tensor | None = None, neighbour_mask: Tensor | None = None
    ) -> Tensor:
        """Return the logits [b, L, vocabulary] of the token after each position, by ``activations``."""
        return F.linear(self.activations(tokens, mask, neighbours, neighbour_mask), self.embedding.weight)

    def activations(
        self, tokens: Tensor, mask: Tensor, neighbours: Tensor | None = None, neighbour_mask: Tensor | None = None
    ) -> Tensor:
        """Return the normalised output of the last layer, [b, L, d].

        ``tokens``: int64 [b, L], L a multiple of the chunk length. ``mask``: bool [b, L], False for padding.
        ``neighbours``: int64 [b, l, k, r], in place u those **of chunk u** (the model shifts them), and their
        bool mask. Without them, cross-attention is left out. ``ValueError`` for other shapes.
        """
        (b, length), m = tokens.shape, self.config.chunk_length
        encoder = None if neighbours is None else self.encoder
        if length % m or mask.shape != tokens.shape:
            raise ValueError(f"tokens {[*tokens.shape]} and mask {[*mask.shape]} are not alike, in chunks of {m}")
        if neighbours is not None and (b, length // m) != neighbours.shape[:2]:
            raise ValueError(f"neighbours {[*neighbours.shape]} are not those of {b} sequences of {length // m} chunks")
        places = torch.arange(length, device=tokens.device)
        allowed = (places[:, None] >= places) & mask[:, None]
        x, encoded = self.embedding(tokens.masked_fill(~mask, 0)), None
        for number, (attention, feed_forward) in enumerate(zip(self.attention, self.feed_forward, strict=True), 1):
            x = x + attention(x, places, allowed)
            if encoder is not None and number in self.config.cross_layers:
                if encoded is None:
                    encoded = encoder(self.embedding, neighbours, neighbour_mask, x, mask)
                x = x + self.cross_attention[str(number)](x, encoded, neighbour_mask)
            x = x + feed_forward(x)
        normalised: Tensor = self.norm(x)
        return normalised

    def loss_of(
        self, tokens: Tensor, mask: Tensor, neighbours: Tensor | None = None, neighbour_mask: Tensor | None = None,
        *, scored: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return −log p of each token given those before, in nats [b, L]; arguments as of ``activations``.

        It is 0 for padding, for the first position, which nothing predicts, and for tokens that are not
        ``scored``, bool [b, L]: logits are computed for these alone.
        """
        x, due = self.activations(tokens, mask, neighbours, neighbour_mask), targets_of(mask)
        due = due if scored is None else due & scored
        logits = F.linear(x[due.roll(-1, 1)], self.embedding.weight)
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nats = exact.new_zeros(tokens.shape)
        nats[due] = F.cross_entropy(exact, tokens[due], reduction="none")
        return nats


def targets_of(mask: Tensor) -> Tensor:
    """Return which tokens are predicted, bool [b, L]: those of ``mask`` but for the first position."""
    return F.pad(mask[:, 1:], (1, 0))


def nats_of(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Return −log p of each token, in nats [b, L], by the logits [b, L, v] of the position before."""
    # All positions, the last one too: leaving it out would copy the largest tensor there is.
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    nats = F.cross_entropy(exact, tokens.roll(-1, 1).flatten(), reduction="none").view_as(tokens)
    return nats.roll(1, 1) * targets_of(mask)


def load_model(directory: Place) -> RetroModel:
    """Load the newest checkpoint of ``retrotool train`` in ``directory``, on the CPU, for evaluation.

    Raises ``UsageError`` if there is none, ``CorruptError`` if it is damaged.
    """
    return load_checkpoint(directory)[0]


def load_checkpoint(directory: Place) -> tuple[RetroModel, dict[str, Any]]:
    """Load a model as ``load_model`` does, with the facts of its checkpoint."""
    folder = TrainingFolder(directory)
    checkpoint = folder.newest()
    if checkpoint is None:
        raise UsageError(f"{folder.storage.place} has no checkpoint", "Name the --out of retrotool train.")
    model = RetroModel(parse_section(RetroConfig, checkpoint["model"], f"{folder.storage.place}: model"))
    model.load_state_dict(folder.tensors(checkpoint, "model"))
    return model.eval(), checkpoint
