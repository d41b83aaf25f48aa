"""Training an index on a random sample of a store's vectors.

The sample is drawn over all parts in proportion, from a seed: the first n vectors are of few sources, and lists that
fit these serve the others badly. It is held as float16, at most half of the memory that was asked for. Then: k-means
for the lists, a rotation for the residuals, tables for their codes (``retrotool.ann``). Deterministic from the seed on
a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from retrotool.ann import codes
from retrotool.ann.choice import ITERATIONS, SAMPLES_A_LIST, IndexChoice
from retrotool.ann.codes import Codec, Product, Scalar, Whole
from retrotool.ann.kmeans import assign, kmeans
from retrotool.ann.trained import Trained
from retrotool.embed.search_scope import SearchableRows, read_part_vectors
from retrotool.errors import CorruptError
from retrotool.lazy import torch
from retrotool.store.parts import join_id
from retrotool.store.store import Store

SEED = 0
"""Of all that is drawn."""
_KMEANS_SHARE = 0.8
_MEASURED = 1 << 12
_LEAST_CODE_SAMPLE = 16 * 256


@dataclass(frozen=True, slots=True)
class Training:
    """A training, and how it fits its own sample of ``sample`` vectors.

    ``error`` and ``code_error`` are mean squared distances to the centroids and, of residuals, to what their codes
    stand for; ``imbalance`` is n·Σ(share of list)², 1 if all lists are as long.
    """

    trained: Trained
    sample: int
    error: float = 0.0
    code_error: float = 0.0
    imbalance: float = 1.0


def sample_size(n: int, choice: IndexChoice, memory: int | None) -> int:
    """Vectors to train on."""
    most = max(SAMPLES_A_LIST * choice.nlist, codes.SAMPLE)
    if memory is not None:
        most = min(most, max(memory // (4 * choice.d), choice.nlist))
    return min(n, most)


def _code_sample(choice: IndexChoice, memory: int | None) -> int:
    """Vectors to learn codes from; as float32, and three times over, they take a quarter of the memory."""
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
    report: Callable[[float], object] = lambda _: None,
) -> Training:
    """Train the index of ``choice`` on the searchable ``rows`` of parts; ``report`` is told shares of the work."""
    if choice.nlist == 0:
        report(1.0)
        return Training(Trained(choice.d, Whole(choice.coded, choice.code)), 0)
    n = sum(rows.counts.values())
    size = sample_size(n, choice, memory)
    sample = torch.from_numpy(draw_vectors(store, encoder, rows, size)).to(device)
    centroids = kmeans(
        sample, choice.nlist, iterations=ITERATIONS, seed=SEED, report=lambda share: report(_KMEANS_SHARE * share)
    )
    generator = torch.Generator().manual_seed(SEED)
    chosen = torch.randperm(len(sample), generator=generator)[: _code_sample(choice, memory)].to(device)
    residuals = sample[chosen].float()
    del sample
    distances, assigned = assign(residuals, centroids)
    residuals.sub_(centroids[assigned])
    rotation = None
    if choice.rotated:
        rotation = codes.train_rotation(residuals, choice.pieces, choice.rotated, seed=SEED)
        residuals, centroids = residuals @ rotation.T, centroids @ rotation.T
    codec = _codec(choice, residuals)
    trained = Trained(
        choice.d,
        codec,
        centroids.cpu().numpy(),
        None if rotation is None else rotation.cpu().numpy(),
        choice.nlist,
    )
    found = Training(
        trained,
        size,
        float(distances.mean()),
        _code_error(codec, residuals[:_MEASURED]),
        imbalance(assigned.cpu().numpy(), choice.nlist),
    )
    report(1.0 - _KMEANS_SHARE)
    return found


def imbalance(numbers: npt.NDArray[np.int64], nlist: int) -> float:
    """How uneven lists are, n·Σ(share of list)², less what chance alone makes of it; 1: all are as long.

    ``numbers`` [s] are the lists of vectors: of these alone the sum is about 1/s too high.
    """
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
    """``size`` searchable vectors, float16, drawn at random over all parts; ``CorruptError`` for one that is not."""
    sample = np.empty((size, read_part_vectors(store, encoder, next(iter(rows))).shape[1]), np.float16)
    done = 0
    for part, chosen in rows.draw(size, SEED):
        vectors = read_part_vectors(store, encoder, part)[chosen]
        check_finite(store, vectors, part, chosen)
        sample[done : done + len(chosen)] = vectors
        done += len(chosen)
    return sample


def check_finite(store: Store, vectors: npt.NDArray[np.float16], part: int, rows: npt.NDArray[np.int64]) -> None:
    """``CorruptError`` that names the first vector, float16 [n, d] at ``rows`` of a part, that is not finite."""
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        row = int(rows[int(np.argmin(finite))])
        raise CorruptError(
            f"the vector of chunk {join_id(part, row)} (part {part}, row {row}) is not finite",
            f"Embed the store under another name, with --name, and index that; or see: retrotool verify {store.place}",
        )
