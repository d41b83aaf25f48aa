"""Compare what ``retrotool plan`` says with what the commands take, for stores of several sizes.

    python benchmarks/planned.py STORE INPUT.jsonl.zst [...] [--encoder minilm] [--first 500000]
        [--sizes 1000000,2000000,4000000] [--dimension 96]

Stores are made of the texts of INPUT, again and again with another beginning, until there are about as many
chunks. Their vectors are the first ``--dimension`` principal components of those of STORE, then noisy copies of
them, as in ``neighbours.py``: an encoder would take a day. So ``embed`` is not compared.

The store of ``--first`` chunks gives the rates of this machine, which are the only ones that ``plan`` is given
for the others, with the number of lists that ``neighbours`` compares. Printed are bytes by kind of file and seconds
by command, as planned and as found. Seconds are less those of the same command with nothing to do.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zstandard
from index import export, tool
from machine import describe
from neighbours import NOISE

from retrotool import api
from retrotool.plan.run import TABLE, Plan
from retrotool.store.store import Store

BLOCK = 1 << 16
COMMANDS = ("chunk", "index", "neighbours")


@dataclass(frozen=True, slots=True)
class Measured:
    """A store that was made: its counts, ``bytes`` by kind of file, ``seconds`` by command, lists compared."""

    tokens: int
    documents: int
    dimension: int
    bytes: dict[str, int]
    seconds: dict[str, float]
    nprobe: int

    def planned(self, rates: dict[str, float]) -> Plan:
        """Return the plan of the same store."""
        return api.plan(
            self.tokens, encoder=f"6x{self.dimension}", rates=rates,
            tokens_per_document=round(self.tokens / self.documents), nprobe=self.nprobe,
        )  # fmt: skip


def texts(files: list[Path]) -> Iterator[str]:
    """Yield the documents of the files without end; each time round they begin with another number."""
    for turn in itertools.count():
        for path in files:
            with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
                for line in io.TextIOWrapper(stream, encoding="utf-8"):
                    text = json.loads(line)["text"]
                    yield f"{turn}. {text}" if turn else text


def save_vectors(path: Path, vectors: np.ndarray, n: int) -> None:
    """Write ``n`` vectors as float16: the given ones, then noisy copies of random ones."""
    out = np.lib.format.open_memmap(path, "w+", np.float16, (n, vectors.shape[1]))
    known, draw = min(n, len(vectors)), np.random.default_rng(0)
    out[:known] = vectors[:known]
    for low in range(known, n, BLOCK):
        some = vectors[draw.integers(0, len(vectors), min(BLOCK, n - low))]
        length = np.linalg.norm(some, axis=1, keepdims=True)
        noise = draw.standard_normal(some.shape, np.float32) * (NOISE / some.shape[1] ** 0.5)
        near = some + noise * length
        out[low : low + len(some)] = near * (length / np.linalg.norm(near, axis=1, keepdims=True))
    out.flush()


def seconds_of(command: str, place: Path, *arguments: object) -> float:
    """Run a command, then again with nothing to do; return the difference in seconds."""
    taken = []
    for _ in range(2):
        begun = time.perf_counter()
        done = subprocess.run(
            [*tool(), command, str(place), *map(str, arguments)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        taken.append(time.perf_counter() - begun)
    return taken[0] - taken[1]


def measure(root: Path, files: list[Path], vectors: np.ndarray, n: int, bytes_a_chunk: float) -> Measured:
    """Make a store of about ``n`` chunks."""
    place, inputs, left = root / "store", root / "inputs.jsonl", n * bytes_a_chunk
    with inputs.open("w") as file:
        for number, text in enumerate(texts(files)):
            file.write(json.dumps({"id": str(number), "text": text}, ensure_ascii=False) + "\n")
            left -= len(text.encode())
            if left < 0:
                break
    seconds = {"chunk": seconds_of("chunk", place, inputs, "--tokenizer", "minilm")}
    inputs.unlink()
    chunks = sum(entry.rows for entry in Store.open(place).state.group("chunks").entries())
    save_vectors(root / "vectors.npy", vectors, chunks)
    embed = [*tool(), "embed", str(place), "--encoder", "real", "--from", str(root / "vectors.npy")]
    done = subprocess.run(embed, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("index", "neighbours"):
        seconds[command] = seconds_of(command, place)
    info, state = api.info(place), Store.open(place).state
    sizes: dict[str, int] = {}
    for entry in state.files():
        sizes[entry.kind] = sizes.get(entry.kind, 0) + entry.bytes
    nprobe = state.records["index:main"]["nprobe"] * 7 // 4
    shutil.rmtree(place)
    return Measured(info.tokens, info.documents, vectors.shape[1], sizes, seconds, nprobe)


def planned_seconds(plan: Plan) -> dict[str, float]:
    """Return the seconds of each command."""
    return {name: 3600 * sum(s.wall_hours for s in plan.stages if s.name.split(":")[0] == name) for name in COMMANDS}


def rates_of(first: Measured) -> dict[str, float]:
    """Return the rates with which the plan takes as long as this store took."""
    known = {name: TABLE[name, "core"].value for name in COMMANDS}
    fast = {"read": 1e15, "write": 1e15}  # everything is in the memory of this machine
    for name in ("chunk", "index"):
        known[name] *= planned_seconds(first.planned(known | fast))[name] / first.seconds[name]
    # neighbours: a part at the rate of index, another at its own.
    slow, half = (planned_seconds(first.planned(known | fast | {"neighbours": r}))["neighbours"] for r in (1e9, 2e9))
    searching = 2 * (slow - half)
    known["neighbours"] = 1e9 * searching / (first.seconds["neighbours"] - (slow - searching))
    return known | fast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("inputs", type=Path, nargs="+")
    parser.add_argument("--encoder", default="minilm")
    parser.add_argument("--first", type=int, default=500_000)
    parser.add_argument("--dimension", type=int, default=96)
    parser.add_argument("--sizes", default="1000000,2000000,4000000")
    arguments = parser.parse_args()
    print(describe())
    sizes = [arguments.first, *map(int, arguments.sizes.split(","))]
    root = Path(tempfile.mkdtemp(prefix="retrotool-planned-"))
    try:
        vectors = export(arguments.store, arguments.encoder, root, 0)[0]
        vectors = vectors @ np.linalg.eigh(np.cov(vectors.T))[1][:, -arguments.dimension :].astype(np.float32)
        sample = list(itertools.islice(texts(arguments.inputs), 2000))
        with (root / "sample.jsonl").open("w") as file:
            file.writelines(json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(sample))
        few = api.chunk(root / "sample", [str(root / "sample.jsonl")], tokenizer="minilm")
        bytes_a_chunk = sum(len(text.encode()) for text in sample) / few.chunks
        rates: dict[str, float] = {}
        for n in sizes:
            found = measure(root, arguments.inputs, vectors, n, bytes_a_chunk)
            rates = rates or rates_of(found)
            show(found, rates)
    finally:
        shutil.rmtree(root)


def show(found: Measured, rates: dict[str, float]) -> None:
    """Print what was planned and what was found."""
    plan, seconds = found.planned(rates), planned_seconds(found.planned(rates))
    print(f"\n{found.tokens:,} tokens, {found.documents:,} documents; {found.nprobe} lists of {plan.index.nlist:,}")
    print("| what | planned | found | ratio |\n|---|---|---|---|")
    for one in plan.files:
        real = found.bytes[one.kind]
        print(f"| {one.kind}, MB | {one.bytes / 1e6:,.1f} | {real / 1e6:,.1f} | {one.bytes / real:.2f} |")
    total = sum(found.bytes[one.kind] for one in plan.files)
    print(f"| all files, MB | {plan.bytes / 1e6:,.1f} | {total / 1e6:,.1f} | {plan.bytes / total:.2f} |")
    for name, took in found.seconds.items():
        print(f"| {name}, s | {seconds[name]:.1f} | {took:.1f} | {seconds[name] / took:.2f} |")
    whole = sum(found.seconds.values())
    print(
        f"| all commands, s | {sum(seconds.values()):.1f} | {whole:.1f} | {sum(seconds.values()) / whole:.2f} |",
        flush=True,
    )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    main()
