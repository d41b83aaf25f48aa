"""The RETRO model is the paper's: its cross-attention, what each output may depend on, and its gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from retrotool.errors import UsageError
from retrotool.train.retro_model import ChunkedCrossAttention, RetroConfig, RetroModel

M, CHUNKS, K, R = 3, 4, 2, 5
"""Tokens of a chunk, chunks, neighbours, and tokens of a neighbour, which is not always two chunks long."""
SMALL = RetroConfig(
    vocabulary=11, chunk_length=M, dimension=8, layers=4, heads=2, first_cross_layer=2, cross_every=2,
    encoder_dimension=12, encoder_layers=2, encoder_heads=3, neighbours=K,
)  # fmt: skip


@pytest.fixture
def model() -> RetroModel:
    """With larger weights than at the beginning, so that all there is to see is visible."""
    found = RetroModel(SMALL, seed=1).double()
    with torch.no_grad():
        for weight in found.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
    return found


def inputs(b: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, neighbours, and masks that are all True."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(SMALL.vocabulary, (b, CHUNKS * M), generator=random)
    neighbours = torch.randint(SMALL.vocabulary, (b, CHUNKS, K, R), generator=random)
    return tokens, torch.ones_like(tokens, dtype=torch.bool), neighbours, torch.ones_like(neighbours, dtype=torch.bool)


def with_padding() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Short chunks, a purged one, chunks with one neighbour or none; and a sequence without tokens."""
    tokens, mask, neighbours, neighbour_mask = inputs(3)
    mask[0, M - 1] = mask[1, 2 * M - 1] = mask[0, M : 2 * M] = mask[2] = False
    neighbour_mask[0, 1], neighbour_mask[1, 0, 1], neighbour_mask[1, 2, 0, R - 2 :] = False, False, False
    neighbour_mask[2] = False
    return tokens, mask, neighbours, neighbour_mask


def normalised(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).sum() / len(x) + torch.finfo(x.dtype).eps) * weight


def turned(x: Tensor, place: int) -> Tensor:
    """One head's vector, whose pairs of numbers are turned by angles that are proportional to a position."""
    found, half = x.clone(), len(x) // 2
    for i in range(half):
        angle = place * 10_000.0 ** (-i / half)
        found[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        found[i + half] = x[i] * math.sin(angle) + x[i + half] * math.cos(angle)
    return found


def literal_cca(cca: ChunkedCrossAttention, h: Tensor, encoded: Tensor, mask: Tensor) -> Tensor:
    """Equations of section 2.4 for a sequence h [L, d], position by position, counted from 1; without the residual."""
    of, size = cca.attention, h.shape[1] // SMALL.heads
    found = torch.zeros_like(h)
    for position in range(M, len(h) + 1):  # at the first m - 1 positions, CCA is the identity
        u = position // M  # position = u m + i - 1
        i = position - u * M + 1
        assert 1 <= i <= M
        query = of.query.weight @ normalised(h[position - 1], of.norm.weight)
        heads = []
        for head in range(SMALL.heads):
            some = slice(head * size, (head + 1) * size)
            scores, values = [], []
            for j in range(K):
                for t in range(R):
                    if mask[u - 1, j, t]:
                        y = encoded[u - 1, j, t]
                        key = turned((of.key.weight @ y)[some], t)
                        scores.append((turned(query[some], M + i - 2) @ key) / math.sqrt(size))
                        values.append((of.value.weight @ y)[some])
            if scores:
                shares = torch.softmax(torch.stack(scores), 0)
                heads.append(sum(share * value for share, value in zip(shares, values, strict=True)))
        if heads:
            found[position - 1] = of.out.weight @ torch.cat(heads)
    return found


def test_chunked_cross_attention_is_that_of_the_paper(model: RetroModel) -> None:
    cca = model.cross_attention["2"]
    h = torch.randn(2, CHUNKS * M, SMALL.dimension, dtype=torch.float64)
    encoded = torch.randn(2, CHUNKS, K, R, SMALL.encoder_dimension, dtype=torch.float64)
    mask = torch.rand(2, CHUNKS, K, R) > 0.3
    mask[0, 1] = False
    found = cca(h, encoded, mask)
    wanted = torch.stack([literal_cca(cca, *one) for one in zip(h, encoded, mask, strict=True)])
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    assert (found[:, : M - 1] == 0).all() and (found[0, 2 * M - 1 : 3 * M - 1] == 0).all()
    assert (found[1] != 0).any(1)[M - 1 :].all()


def test_a_neighbour_is_encoded_with_the_chunk_that_retrieved_it_alone(model: RetroModel) -> None:
    _, mask, neighbours, neighbour_mask = inputs(1)
    x = torch.randn(1, CHUNKS * M, SMALL.dimension, dtype=torch.float64, requires_grad=True)
    for u in range(CHUNKS):
        encoded = model.encoder(model.embedding, neighbours, neighbour_mask, x, mask)
        (gradient,) = torch.autograd.grad(encoded[0, u, 1].sum(), x)
        touched = gradient[0].abs().sum(1) > 0
        assert touched.nonzero().flatten().tolist() == list(range(u * M, (u + 1) * M))


def test_no_output_depends_on_a_later_token(model: RetroModel) -> None:
    tokens, *others = inputs(1)
    before = model(tokens, *others)
    for position in range(CHUNKS * M):
        changed = tokens.clone()
        changed[0, position] = (changed[0, position] + 1) % SMALL.vocabulary
        after = model(changed, *others)
        assert torch.equal(after[:, :position], before[:, :position]), position
        assert (after != before).any(-1)[0, position:].all(), "and all later ones do depend on it"


def test_a_chunk_s_neighbours_are_used_from_its_last_token_on(model: RetroModel) -> None:
    tokens, mask, neighbours, neighbour_mask = inputs(1)
    before = model(tokens, mask, neighbours, neighbour_mask)
    for u in range(CHUNKS):
        for place in range(K * R):
            changed = neighbours.clone()
            changed[0, u, place // R, place % R] += 1
            changed %= SMALL.vocabulary
            differs = (model(tokens, mask, changed, neighbour_mask) != before).any(-1)[0]
            assert differs.nonzero().flatten().tolist() == list(range((u + 1) * M - 1, CHUNKS * M)), (u, place)


def test_gradients_are_those_of_finite_differences(model: RetroModel) -> None:
    given = with_padding()
    names, weights = zip(*model.named_parameters(), strict=True)

    def loss(*values: Tensor) -> Tensor:
        call: Any = torch.func.functional_call
        logits = call(model, dict(zip(names, values, strict=True)), given)
        return torch.log_softmax(logits, -1)[given[1]]

    assert torch.autograd.gradcheck(loss, weights, fast_mode=True)


def test_padding_has_no_effect_and_no_loss(model: RetroModel) -> None:
    tokens, mask, neighbours, neighbour_mask = with_padding()
    loss = model.loss_of(tokens, mask, neighbours, neighbour_mask)
    other = model.loss_of(
        tokens.where(mask, 7), mask, neighbours.where(neighbour_mask, SMALL.vocabulary - 1), neighbour_mask
    )
    assert torch.equal(loss, other)
    predicted = mask.clone()
    predicted[:, 0] = False
    assert (loss[predicted] > 0).all() and (loss[~predicted] == 0).all()
    loss.sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())


def test_padding_is_not_attended_to(model: RetroModel) -> None:
    """It is embedded as token 0, which these texts don't have."""
    tokens, mask, neighbours, neighbour_mask = with_padding()
    given = (tokens.clamp(min=1), mask, neighbours.clamp(min=1), neighbour_mask)
    before = model(*given)
    with torch.no_grad():
        model.embedding.weight[0] += 1
        after = model(*given)
    assert torch.equal(after[mask][:, 1:], before[mask][:, 1:])
    assert not torch.equal(after[~mask][:, 1:], before[~mask][:, 1:])


def test_the_loss_is_that_of_the_token_that_follows(model: RetroModel) -> None:
    given = inputs()
    chances = torch.softmax(model(*given), -1).detach()
    loss = model.loss_of(*given).detach()
    for b in range(2):
        for position in range(1, CHUNKS * M):
            wanted = -math.log(chances[b, position - 1, given[0][b, position]])
            assert math.isclose(loss[b, position], wanted, rel_tol=1e-9)


def test_only_what_is_scored_has_a_loss(model: RetroModel) -> None:
    given = with_padding()
    loss, scored = model.loss_of(*given), torch.rand(given[0].shape, generator=torch.Generator().manual_seed(0)) < 0.4
    torch.testing.assert_close(model.loss_of(*given, scored=scored), loss * scored, rtol=1e-12, atol=0)
    assert not model.loss_of(*given, scored=torch.zeros_like(scored)).any()


def test_without_neighbours_it_is_a_decoder(model: RetroModel) -> None:
    tokens, mask, neighbours, neighbour_mask = inputs()
    config = RetroConfig(**{**vars(SMALL), "retrieval": False})
    plain = RetroModel(config).double()
    assert not [name for name, _ in plain.named_parameters() if "cross" in name or "encoder" in name]
    plain.load_state_dict({name: weight for name, weight in model.state_dict().items() if name in plain.state_dict()})
    wanted = plain(tokens, mask, neighbours, neighbour_mask)
    assert torch.equal(model(tokens, mask), wanted)
    assert torch.equal(model(tokens, mask, neighbours, torch.zeros_like(neighbour_mask)), wanted)
    assert not torch.equal(model(tokens, mask, neighbours, neighbour_mask), wanted)


def test_the_layers_with_cross_attention() -> None:
    paper = RetroConfig(vocabulary=2, layers=32, first_cross_layer=9)
    assert list(paper.cross_layers) == [9, 12, 15, 18, 21, 24, 27, 30]
    assert list(RetroModel(SMALL).cross_attention) == ["2", "4"]


def test_what_does_not_fit_is_refused(model: RetroModel) -> None:
    for wrong, message in (
        ({"heads": 3}, "dimension=512 is not a multiple of twice its 3 heads"),
        ({"encoder_heads": 256}, "encoder_dimension=256 is not"),
        ({"layers": 4}, "first_cross_layer=6 is more than layers=4"),
    ):
        with pytest.raises(UsageError, match=message):
            RetroConfig(vocabulary=2, **wrong)
    assert not RetroConfig(vocabulary=2, layers=4, retrieval=False).cross_layers
    tokens, mask, neighbours, neighbour_mask = inputs()
    with pytest.raises(ValueError, match=r"tokens \[2, 11\] and mask \[2, 11\] are not alike, in chunks of 3"):
        model(tokens[:, 1:], mask[:, 1:])
    with pytest.raises(ValueError, match=r"neighbours \[2, 3, 2, 5\] are not those of 2 sequences of 4 chunks"):
        model(tokens, mask, neighbours[:, 1:], neighbour_mask[:, 1:])


def test_it_learns_to_copy_from_neighbours() -> None:
    """Of random tokens nothing is known but that each neighbour is the chunk itself, and goes on as the text does."""
    config = RetroConfig(
        vocabulary=16, chunk_length=8, dimension=32, layers=2, heads=2, first_cross_layer=1, cross_every=1,
        encoder_dimension=32, encoder_layers=1, encoder_heads=2, neighbours=1,
    )  # fmt: skip
    model, random, losses = RetroModel(config), torch.Generator().manual_seed(0), []
    optimiser = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(80):
        text = torch.randint(16, (32, 32), generator=random)
        tokens, neighbours = text[:, :24], text.unfold(1, 16, 8)[:, :, None]
        masks = torch.ones_like(tokens, dtype=torch.bool), torch.ones_like(neighbours, dtype=torch.bool)
        loss = model.loss_of(tokens, masks[0], neighbours, masks[1])[:, 8:].mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 2.6, "nats; log 16 is 2.77"
    assert losses[-1] < 1.6
