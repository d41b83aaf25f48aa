"""How vectors are compared, against brute force; and the devices that can be asked for."""

from __future__ import annotations

import numpy as np
import pytest

from retrotool.embed.store_encoder import compare
from retrotool.encoder import cosines, find_devices
from retrotool.encoder.devices import is_lost, is_out_of_memory
from retrotool.errors import UsageError


def brute_recall(found: np.ndarray, true: np.ndarray, document: np.ndarray, k: int) -> float:
    hits = 0
    for i in range(len(true)):
        others = [j for j in range(len(true)) if document[j] != document[i]]
        best = [
            set(sorted(others, key=lambda j, v=vectors, i=i: float(((v[i] - v[j]) ** 2).sum()))[:k])  # type: ignore[misc]
            for vectors in (found.astype(np.float64), true.astype(np.float64))
        ]
        hits += len(best[0] & best[1])
    return hits / k / len(true)


def test_cosine_and_recall_are_those_of_brute_force() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(size=(80, 8))
    found = true + rng.normal(size=true.shape) * 0.3
    document = rng.integers(0, 20, 80)
    cosine, recall = compare(found, true, document)
    expected = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(found, true, strict=True)]
    assert np.allclose(cosines(found, true), expected)
    assert np.allclose(cosine, expected)
    assert 0.3 < recall < 0.95
    assert recall == pytest.approx(brute_recall(found, true, document, 10))
    assert compare(found, true)[1] == pytest.approx(brute_recall(found, true, np.arange(80), 10))


def test_few_vectors_and_none() -> None:
    one = np.ones((1, 4), np.float16)
    assert compare(one, one)[1] == 1.0
    three = np.eye(3)
    assert compare(three, three)[1] == 1.0
    assert compare(three, three, np.zeros(3))[1] == 1.0, "nothing but own documents"


def test_zero_rows_are_alike_and_unlike_anything_else() -> None:
    zero, one = np.zeros((1, 4)), np.ones((1, 4))
    assert cosines(zero, zero).tolist() == [1.0]
    assert cosines(zero, one).tolist() == [0.0]


def test_what_devices_stand_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert find_devices("auto") == ["cuda:0", "cuda:1", "cuda:2"]
    assert find_devices("cuda") == ["cuda:0"]
    assert find_devices("cuda:2, cuda:0") == ["cuda:2", "cuda:0"]
    assert find_devices("cpu,cpu") == ["cpu", "cpu"]
    for devices, message in (
        ("cuda:3", "sees 3 GPUs"),
        ("cuda:1,cuda:1", "named twice"),
        ("cuda,cuda:0", "named twice"),
        ("cuda:0,", "is unknown"),
        ("", "is unknown"),
    ):
        with pytest.raises(UsageError, match=message):
            find_devices(devices)
    with pytest.raises(UsageError, match="int8"):
        find_devices("cpu", "int8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_devices("auto") == ["cpu"]


def test_what_says_that_memory_has_run_out() -> None:
    import torch

    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    wrapped = ValueError("a compiler's error")
    wrapped.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    assert is_out_of_memory(wrapped)
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
    assert is_lost(RuntimeError("CUDA error: device-side assert triggered\nCompile with ..."))
    assert is_lost(RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"))
    for message in ("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", "out of memory"):
        assert is_out_of_memory(RuntimeError(f"CUDA error: {message}"))
        assert not is_lost(RuntimeError(f"CUDA error: {message}"))
    assert not is_out_of_memory(ValueError("not enough memory"))
