"""The kernels of ``ann.resident`` in Triton: compiled for GPUs that are not here, and run in its interpreter.

Both in processes of their own, as Triton reads its settings when it is imported.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="kernels for GPUs are not tested: there is no Triton"
)


def run(script: str, cache: Path, **environment: str) -> str:
    command = [sys.executable, Path(__file__).with_name(script)]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_CACHE_DIR": str(cache), **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_compile_for_tensor_cores_and_do_not_spill(tmp_path: Path) -> None:
    found = {
        (one["kernel"], one["capability"]): one
        for one in map(json.loads, run("compile_kernels.py", tmp_path).splitlines())
    }
    assert set(found) == {(kernel, capability) for kernel in ("_scan", "_rank") for capability in (80, 90)}
    assert all(one["spilled"] == 0 for one in found.values()), found
    assert not any(one["narrow"] for one in found.values()), "offsets are int64"
    assert found["_scan", 80]["product"] == "mma.sync" and found["_scan", 90]["product"] == "wgmma"
    # The next vectors are read while these are multiplied.
    assert all(found["_scan", capability]["shared"] >= 64 << 10 for capability in (80, 90))


def test_kernels_find_what_torch_finds(tmp_path: Path) -> None:
    assert run("interpret_kernels.py", tmp_path, TRITON_INTERPRET="1").count("equal") == 3
