"""Compile the kernels of ``ann.resident`` for GPUs that are not here; print what they use, one JSON object a line.

python tests/ann/compile_kernels.py
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from retrotool.ann import resident_kernels as kernels

POINTERS = {
    "_scan": {"q": "fp16", "x": "fp16", "halves": "fp32", "ranks": "i32", "own": "i32", "pairs": "i64", "offset": "i64",
              "bounds": "i64", "starts": "i64", "tiles": "i64", "best": "fp32"},
    "_rank": {"q": "fp32", "x": "fp16", "ranks": "i32", "own": "i32", "first": "i64", "end": "i64", "keys": "i64"},
}  # fmt: skip
SIZES = {"_scan": ["lists", "width", "queries", "per_query", "d"], "_rank": ["queries", "depth", "d"]}


def compile_for(name: str, capability: int, folder: Path) -> dict[str, Any]:
    constants = kernels.CONSTANTS[name]
    types = {**{key: f"*{kind}" for key, kind in POINTERS[name].items()}, **dict.fromkeys(SIZES[name], "i32")}
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    # As at a launch: pointers are aligned, and the dimension is a multiple of 16.
    aligned = {(i,): [["tt.divisibility", 16]] for i, key in enumerate(types) if key in POINTERS[name] or key == "d"}
    source = ASTSource(getattr(kernels, name), signature, constants, aligned)
    found: Any = triton.compile(source, GPUTarget("cuda", capability, 32), kernels.OPTIONS[name])
    code: str = found.asm["ptx"]
    (folder / "kernel.ptx").write_text(code)
    target = re.search(r"\.target (sm_\w+)", code)
    assert target
    # Triton has two assemblers; which of them knows its code depends on the version.
    tools = (Path(triton.__file__).parent / "backends" / "nvidia" / "bin").glob("ptxas*")
    options = ["-v", f"--gpu-name={target[1]}", "kernel.ptx", "-o", "kernel.cubin"]
    runs = [subprocess.run([tool, *options], cwd=folder, capture_output=True, text=True) for tool in tools]
    said = next((run.stderr for run in runs if run.returncode == 0), "")
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill", said)]
    instruction = next((one for one in ("wgmma", "mma.sync") if one in code), "")
    # Ten million vectors of 768 numbers are more than an int32 can count.
    narrow = re.findall(r"arith\.muli [^:]*: (?:tensor<\w*x)?i32", found.asm["ttir"])
    return {"kernel": name, "capability": capability, "product": instruction, "shared": found.metadata.shared,
            "spilled": sum(spilled) if spilled else None, "narrow": narrow}  # fmt: skip


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for name in POINTERS:
            for capability in (80, 90):
                print(json.dumps(compile_for(name, capability, Path(folder))))
