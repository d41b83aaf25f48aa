"""Compare ``chunk`` with the tokenizer's own rate, with each step's floor, and with a plain script.

    python benchmarks/chunk.py INPUT.jsonl.zst [...] [--tokenizer tokenizer.json] [--datatrove PYTHON] [--long]

All measurements use the same texts: the floors of reading, decompressing, JSON, tokenizing and writing, each
alone and in memory; ``retrotool chunk`` as a process, from ``.jsonl.zst`` to committed Parquet; and, on a
slice of ``--slice`` MB, ``datasets.map`` (batched, one process per core) with ``tokenizers`` and pyarrow,
and datatrove's ``DocumentTokenizer``, by the Python of an environment that has it.
Without ``--tokenizer`` a byte-level BPE of 50,000 tokens is trained on the input. ``--long`` repeats the run
on a corpus four times as long and reports memory: the largest sum of proportional set sizes of the command
and its workers, sampled 20 times a second.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import zstandard
from machine import describe

from retrotool.chunk.chunker import cut_chunks
from retrotool.sources import streams
from retrotool.store import parts

BATCH = 2 << 20
LENGTH = 64
PLAIN = """
import sys
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
from datasets import load_dataset
from tokenizers import Tokenizer

source, tokenizer, target, processes = sys.argv[1:]


def cut(batch):
    encodings = Tokenizer.from_file(tokenizer).encode_batch(batch["text"], add_special_tokens=False)
    rows = {"doc": [], "index": [], "tokens": []}
    for doc, encoding in zip(batch["id"], encodings):
        for index in range(0, len(encoding.ids), 64):
            rows["doc"].append(str(doc))
            rows["index"].append(index // 64)
            rows["tokens"].append(encoding.ids[index : index + 64])
    return rows


data = load_dataset("json", data_files=source, split="train", cache_dir=target + ".cache")
chunks = data.map(cut, batched=True, num_proc=int(processes), remove_columns=data.column_names)
pq.write_table(chunks.data.table, target)
"""
"""The plain script, run as a separate process."""
DATATROVE = """
import sys

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer

source, tokenizer, target, processes = sys.argv[1:]
if __name__ == "__main__":
    steps = [
        JsonlReader(source),
        DocumentTokenizer(target, tokenizer_name_or_path=tokenizer, eos_token=None, shuffle_documents=False),
    ]
    LocalPipelineExecutor(steps, tasks=int(processes), workers=int(processes), logging_dir=target + ".logs").run()
"""
"""What datatrove does for the first half of it, a task per core: a file of token ids."""


def train(texts: list[str], path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=50_000, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def batches(texts: list[str]) -> list[list[str]]:
    found: list[list[str]] = [[]]
    size = 0
    for text in texts:
        found[-1].append(text)
        size += len(text)
        if size >= BATCH:
            found.append([])
            size = 0
    return [batch for batch in found if batch]


def unpacked(path: Path) -> bytes:
    """Return the text of a zstd archive."""
    return b"".join(streams.blocks(lambda: path.open("rb"), "zst"))


def rows(lines: bytes) -> Iterator[dict[str, Any]]:
    return (orjson.loads(line) for line in lines.split(b"\n") if line)


def floors(inputs: list[Path], tokenizer: Path, scratch: Path) -> tuple[list[tuple[str, float]], float]:
    """Run each step alone in this process; return (step, seconds) of each, and the megabytes of text."""
    import tokie

    steps: list[tuple[str, float]] = []
    seconds, _ = timed(lambda: [path.read_bytes() for path in inputs])
    steps.append(("read the files (page cache)", seconds))
    seconds, data = timed(lambda: [unpacked(path) for path in inputs])
    steps.append(("decompress", seconds))
    seconds, texts = timed(lambda: [row["text"] for d in data for row in rows(d)])
    steps.append(("JSON", seconds))
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    fast: Any = tokie.Tokenizer.from_json(str(tokenizer))
    fast.no_truncation()
    fast.no_padding()
    fast.encode_batch_flat(texts[:100], add_special_tokens=False)
    some = batches(texts)
    seconds, tokens = timed(lambda: [fast.encode_batch_flat(batch, add_special_tokens=False) for batch in some])
    steps.append(("tokenise (tokie, all cores)", seconds))
    dtype = np.dtype("<u2")
    seconds, cuts = timed(lambda: [cut_chunks(ids, n.astype(np.int64), LENGTH, dtype) for ids, n in tokens])
    steps.append(("cut into chunks", seconds))

    def write() -> None:
        import pyarrow.parquet as pq

        tables = [parts.chunks_table(c.doc, c.index, c.n_tokens, c.tokens) for c in cuts]
        pq.write_table(
            pa.concat_tables(tables), scratch / "floor.parquet", row_group_size=parts.ROW_GROUP, compression="zstd",
            write_page_checksum=True,
        )  # fmt: skip

    seconds, _ = timed(write)
    steps.append(("write Parquet, one thread", seconds))
    return steps, megabytes


class Memory:
    """Samples the memory of a process and its children: the sum of their proportional set sizes."""

    def __init__(self, process: int) -> None:
        self.peak = 0
        self._process = process
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()

    def _sample(self) -> None:
        while not self._stop.wait(0.05):
            self.peak = max(self.peak, sum(map(_proportional, _tree(self._process))))

    def stop(self) -> float:
        self._stop.set()
        self._thread.join()
        return self.peak / 1024


def _tree(process: int) -> list[int]:
    found = [process]
    for parent in found:
        try:
            children = Path(f"/proc/{parent}/task/{parent}/children").read_text()
        except OSError:
            continue
        found += map(int, children.split())
    return found


def _proportional(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def chunk(inputs: list[Path], tokenizer: Path, store: Path) -> tuple[float, float, dict[str, Any]]:
    """Run the command as a process; return seconds, peak MiB and its result."""
    command = [sys.executable, "-m", "retrotool", "chunk", str(store), *map(str, inputs), "--json"]
    start = time.perf_counter()
    with subprocess.Popen([*command, "--tokenizer", str(tokenizer)], stdout=subprocess.PIPE) as process:
        memory = Memory(process.pid)
        output = process.stdout.read() if process.stdout else b""
    seconds = time.perf_counter() - start
    return seconds, memory.stop(), json.loads(output)


def cut_slice(inputs: list[Path], megabytes: float, path: Path) -> float:
    """Write about so many megabytes of text, from all inputs, as JSON lines; return the actual number."""
    written = 0.0
    with path.open("wb") as file:
        for source in inputs:
            mine = 0.0
            for row in rows(unpacked(source)):
                if mine > megabytes / len(inputs):
                    break
                size = len(row["text"].encode()) / 1e6
                if size < megabytes / len(inputs):
                    file.write(orjson.dumps({"id": str(row.get("id", file.tell())), "text": row["text"]}) + b"\n")
                    mine += size
            written += mine
    return written


def run_script(text: str, python: str, source: Path, tokenizer: Path, target: Path) -> float:
    """Run a script as a process; return its seconds."""
    script = target.with_suffix(".py")
    script.write_text(text)
    arguments = [str(source), str(tokenizer), str(target), str(os.cpu_count())]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    subprocess.run([python, str(script), *arguments], check=True, env=environment, capture_output=True)
    return time.perf_counter() - start


def one_per_core(source: Path, folder: Path) -> Path:
    """Deal the lines of a file out to as many files as there are cores."""
    folder.mkdir()
    cores = os.cpu_count() or 1
    lines = source.read_bytes().splitlines(keepends=True)
    for number in range(cores):
        (folder / f"{number}.jsonl").write_bytes(b"".join(lines[number::cores]))
    return folder


def four_times(inputs: list[Path], folder: Path) -> list[Path]:
    """Copy the inputs with different ids and texts, so that nothing is a duplicate."""
    copies = []
    for number in range(4):
        for source in inputs:
            target = folder / f"{number}-{source.name}"
            with target.open("wb") as file, zstandard.ZstdCompressor(level=1).stream_writer(file) as packed:
                for row in rows(unpacked(source)):
                    changed = {**row, "id": f"{number}-{row['id']}", "text": f"{number} {row['text']}"}
                    packed.write(orjson.dumps(changed) + b"\n")
            copies.append(target)
    return copies


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("inputs", nargs="+", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--slice", type=float, default=8)
    parser.add_argument("--datatrove", metavar="PYTHON", help="of an environment with datatrove[io,processing]")
    parser.add_argument("--long", action="store_true")
    options = parser.parse_args()
    print(describe())
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        tokenizer = options.tokenizer or scratch / "tokenizer.json"
        if options.tokenizer is None:
            train([row["text"] for path in options.inputs for row in rows(unpacked(path))], tokenizer)
        measure(options.inputs, tokenizer, scratch, options)


def measure(inputs: list[Path], tokenizer: Path, scratch: Path, options: argparse.Namespace) -> None:
    steps, megabytes = floors(inputs, tokenizer, scratch)
    print(f"{megabytes:.1f} MB of text")
    for step, seconds in steps:
        print(f"  {step:<30} {seconds:7.2f} s {megabytes / seconds:9.1f} MB/s")
    in_memory = megabytes / dict(steps)["tokenise (tokie, all cores)"]
    seconds, memory, result = chunk(inputs, tokenizer, scratch / "store")
    rate = megabytes / seconds
    print(f"chunk: {result['documents']:,} documents, {result['chunks']:,} chunks, {result['tokens']:,} tokens")
    print(f"  end to end {seconds:7.2f} s {rate:9.1f} MB/s = {rate / in_memory:.2f} x tokie; peak {memory:,.0f} MiB")
    part = scratch / "slice.jsonl"
    size = cut_slice(inputs, options.slice, part)
    others = {
        "datasets.map + tokenizers + pyarrow": run_script(
            PLAIN, sys.executable, part, tokenizer, scratch / "plain.parquet"
        )
    }
    if options.datatrove:
        parts = one_per_core(part, scratch / "dealt")
        others["datatrove"] = run_script(DATATROVE, options.datatrove, parts, tokenizer, scratch / "with_datatrove")
    for what, taken in others.items():
        print(f"{what}, {size:.1f} MB: {taken:7.2f} s {size / taken:9.2f} MB/s")
        print(f"  chunk is {rate / (size / taken):.1f} x that")
    if options.long:
        (scratch / "long").mkdir()
        copies = four_times(inputs, scratch / "long")
        seconds, more, result = chunk(copies, tokenizer, scratch / "long-store")
        print(
            f"four times the corpus: {seconds:.2f} s {4 * megabytes / seconds:9.1f} MB/s; {more:,.0f} MiB at the peak"
        )
        print(f"  memory is {more / memory:.2f} x that of the corpus once")


if __name__ == "__main__":
    main()
