"""Run the kernels of ``ann.resident`` in Triton's interpreter, on tiny shapes, against those in torch.

TRITON_INTERPRET=1 python tests/ann/interpret_kernels.py
"""

from __future__ import annotations

import os

import numpy as np
import torch

from retrotool.ann.codes import Whole
from retrotool.ann.excluded import Excluded, Queries
from retrotool.ann.kmeans import assign
from retrotool.ann.lists import Trained
from retrotool.ann.resident import Centroids, ResidentLists, TorchKernels
from retrotool.ann.resident_kernels import TritonKernels


def check(n: int, d: int, nlist: int, nprobe: int, k: int, q: int) -> None:
    rng = np.random.default_rng(n)
    vectors = (rng.normal(size=(9, d))[np.arange(n) % 9] * 2 + rng.normal(size=(n, d))).astype(np.float16)
    vectors[n // 2 : n // 2 + 5] = vectors[3]
    rows = torch.from_numpy(vectors.astype(np.float32))
    ids, first = np.arange(n) * 3, rng.integers(0, n, q) * 3
    queries = Queries(vectors[:q].astype(np.float32), Excluded(first, first + 20))
    centroids = numbers = None
    if nlist:
        centroids = Centroids(Trained(d, Whole(d), rows[:nlist].numpy(), nlist=nlist), torch.device("cpu"))
        numbers = assign(rows, rows[:nlist])[1].numpy()
    found = []
    for kernels in (TorchKernels(), TritonKernels()):
        found.append(ResidentLists(centroids, numbers, ids, [vectors], "cpu", kernels).search(queries, k, nprobe))
    assert np.array_equal(found[0].ids >= 0, found[1].ids >= 0)
    there = found[0].ids >= 0
    assert np.allclose(found[0].distances[there], found[1].distances[there], rtol=1e-4, atol=1e-6)
    assert (found[0].ids == found[1].ids).mean() > 0.97, "but for equal distances, whose sums are rounded differently"


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1", __doc__
    for shape in ((150, 64, 6, 3, 4, 20), (90, 40, 20, 2, 5, 12), (70, 16, 0, 1, 3, 8)):
        check(*shape)
        print(f"equal: {shape}")
