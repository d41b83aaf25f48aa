"""Bits per byte of groups of chunks, with 95 % confidence intervals.

Bits per byte is a ratio: the bits that a model needs for all tokens of a group, divided by the UTF-8 bytes of
their text. Tokens of one document are not independent, but documents are, so the variance is that of a ratio
estimator with documents as clusters (Cochran, Sampling Techniques, 1977, section 6.3). The difference of two
models on the same chunks is the ratio of their differences, which is more exact than two intervals.

An interval is the ratio ± 1.96 standard errors. With fewer than some 30 documents it is too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_QUANTILE = 1.959964  # of the normal distribution


@dataclass(frozen=True, slots=True)
class RatioEstimate:
    """A ratio in bits per byte, and its 95 % confidence interval; None with fewer than two documents."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class BitsPerByte:
    """Bits per byte of a group of chunks with retrieval ``on`` and ``off``; None if it has no text.

    ``difference`` is on − off: below 0, retrieval helps.
    """

    chunks: int
    documents: int
    bytes: int
    on: RatioEstimate | None
    off: RatioEstimate | None
    difference: RatioEstimate | None


def estimate_ratio(amounts: Floats, sizes: Ints, clusters: Ints) -> RatioEstimate | None:
    """Return the sum of ``amounts`` [n] over that of ``sizes`` [n]; ``clusters`` [n] are independent."""
    _, cluster = np.unique(clusters, return_inverse=True)
    amount, size = np.bincount(cluster, amounts), np.bincount(cluster, sizes)
    whole, n = float(size.sum()), len(size)
    if not whole:
        return None
    value = float(amount.sum()) / whole
    if n == 1:
        return RatioEstimate(value)
    variance = n / (n - 1) * float(((amount - value * size) ** 2).sum()) / whole**2
    margin = _QUANTILE * math.sqrt(variance)
    return RatioEstimate(value, value - margin, value + margin)


@dataclass(frozen=True, slots=True)
class Scores:
    """n chunks, all [n]: nats with retrieval on and off, and what they are grouped by."""

    on: Floats
    off: Floats
    n_bytes: Ints
    document: Ints
    source: npt.NDArray[Any]
    copied: Floats  # longest run of a chunk in its neighbours, as a share of the chunk

    @classmethod
    def joined(cls, some: Sequence[Scores]) -> Scores:
        """Concatenate scores."""
        return cls(*(np.concatenate([getattr(one, name) for one in some]) for name in cls.__slots__))

    def of(self, chosen: npt.NDArray[np.bool_]) -> BitsPerByte:
        """Return the bits per byte of the ``chosen`` chunks, bool [n]."""
        sizes, documents = self.n_bytes[chosen], self.document[chosen]
        on, off = self.on[chosen] / math.log(2), self.off[chosen] / math.log(2)
        estimates = [estimate_ratio(amounts, sizes, documents) for amounts in (on, off, on - off)]
        return BitsPerByte(len(sizes), len(np.unique(documents)), int(sizes.sum()), *estimates)
