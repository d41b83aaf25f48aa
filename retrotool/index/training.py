"""Train an index on a random sample of a store's vectors: lists, rotation and codes (``retrotool.ann``).

The sample covers all parts in proportion, as the first n vectors come from few sources. It is held as float16
in at most half of the memory limit. Deterministic for a seed on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from retrotool.ann import codes
from retrotool.ann.choice import ITERATIONS, SAMPLES_PER_LIST, IndexChoice
from retrotool.ann.codes import Codec, Product, Scalar, Whole
from retrotool.ann.kmeans import ReportShare, assign, kmeans
from retrotool.ann.trained import Trained
from retrotool.embed.search_scope import SearchableRows, read_part_vectors
from retrotool.lazy import torch
from retrotool.store.store import Store
from retrotool.store.vectors import check_finite

SEED = 0
_KMEANS_SHARE = 0.8
_MEASURED = 1 << 12
_LEAST_CODE_SAMPLE = 16 * 256


@dataclass(frozen=True, slots=True)
class Training:
    """A training and how it fits its ``sample`` of vectors; the fields are those of ``TrainingRecord``."""

    trained: Trained
    sample: int
    error: float = 0.0
    code_error: float = 0.0
    imbalance: float = 1.0


def sample_size(n: int, choice: IndexChoice, memory: int | None) -> int:
    """Return the number of vectors to train on."""
    most = max(SAMPLES_PER_LIST * choice.nlist, codes.SAMPLE)
    if memory is not None:
        most = min(most, max(memory // (4 * choice.d), choice.nlist))
    return min(n, most)


def _code_sample(choice: IndexChoice, memory: int | None) -> int:
    """Return the number of vectors to train codes on: as float32, three times, a quarter of the memory."""
    if memory is None:
        return codes.SAMPLE
    return min(codes.SAMPLE, max(_LEAST_CODE_SAMPLE, memory // (48 * choice.d)))


def train(
    store: Store,
    encoder: str,
    rows: SearchableRows,
    choice: IndexChoice,
    *,
    memory: int | None = None,
    device: str = "cpu",
    report: ReportShare = lambda _: None,
) -> Training:
    """Train the index of ``choice`` on the searchable ``rows``; report shares of the work done."""
    if choice.nlist == 0:
        report(1.0)
        return Training(Trained(choice.d, Whole(choice.coded, choice.code)), 0)
    n = sum(rows.counts.values())
    size = sample_size(n, choice, memory)
    sample = torch.from_numpy(draw_vectors(store, encoder, rows, size)).to(device)
    centroids = kmeans(
        sample, choice.nlist, iterations=ITERATIONS, seed=SEED, report=lambda share: report(_KMEANS_SHARE * share)
    )
    rng = torch.Generator().manual_seed(SEED)
    chosen = torch.randperm(len(sample), generator=rng)[: _code_sample(choice, memory)].to(device)
    residuals = sample[chosen].float()
    del sample
    distances, assigned = assign(residuals, centroids)
    residuals.sub_(centroids[assigned])
    rotation = None
    if choice.rotated:
        rotation = codes.train_rotation(residuals, choice.pieces, choice.rotated, seed=SEED)
        residuals, centroids = residuals @ rotation.T, centroids @ rotation.T
    codec = _codec(choice, residuals)
    turned = None if rotation is None else rotation.cpu().numpy()
    trained = Trained(choice.d, codec, centroids.cpu().numpy(), turned, choice.nlist)
    code_error = _code_error(codec, residuals[:_MEASURED])
    report(1.0 - _KMEANS_SHARE)
    uneven = imbalance(assigned.cpu().numpy(), choice.nlist)
    return Training(trained, size, float(distances.mean()), code_error, uneven)


def imbalance(numbers: npt.NDArray[np.int64], nlist: int) -> float:
    """Return n·Σ(share of list)² of the lists ``numbers`` [s], less 1/s for chance; 1: equally long."""
    if not len(numbers):
        return 1.0
    shares = np.bincount(numbers, minlength=nlist) / len(numbers)
    return float(nlist * ((shares**2).sum() - 1 / len(numbers)))


def _codec(choice: IndexChoice, residuals: torch.Tensor) -> Codec:
    if choice.pieces:
        return Product(codes.train_product(residuals, choice.pieces, seed=SEED).cpu().numpy())
    return Scalar.train(residuals) if choice.code == "sq8" else Whole(choice.coded, choice.code)


def _code_error(codec: Codec, residuals: torch.Tensor) -> float:
    if isinstance(codec, Whole):
        return 0.0
    coded = codec.decode(codec.encode(residuals).cpu().numpy())
    return float((coded.to(residuals.device) - residuals).square().sum(1).mean())


def draw_vectors(store: Store, encoder: str, rows: SearchableRows, size: int) -> npt.NDArray[np.float16]:
    """Return ``size`` random searchable vectors, float16; raise ``CorruptError`` if some are not finite."""
    sample = np.empty((size, read_part_vectors(store, encoder, next(iter(rows))).shape[1]), np.float16)
    done = 0
    for part, chosen in rows.draw(size, SEED):
        vectors = read_part_vectors(store, encoder, part)[chosen]
        check_finite(store, vectors, part, chosen)
        sample[done : done + len(chosen)] = vectors
        done += len(chosen)
    return sample
