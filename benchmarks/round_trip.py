"""Take text through a store and back, and compare every byte; count bytes a token, and the rate of ``chunk``.

    python benchmarks/round_trip.py INPUT.jsonl[.zst] [...] [--tokenizer bytes-32k minilm]

For each tokenizer: ``retrotool chunk`` of all inputs as a process, with its CPU time and that of its workers;
then all documents of the store, decoded from their chunks, are compared with the ``text`` of the inputs, which
need an ``id``. Those that differ are counted, and the first one is shown.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import zstandard
from machine import describe

from retrotool.store import parts
from retrotool.store.store import Store
from retrotool.tokenizers import DEFAULT_TOKENIZER, stored_tokenizer


def texts_in(paths: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """Yield id and UTF-8 of every document of the inputs."""
    for path in paths:
        with path.open("rb") as file:
            lines = zstandard.ZstdDecompressor().stream_reader(file) if path.suffix == ".zst" else file
            for line in io.TextIOWrapper(io.BufferedReader(lines), "utf-8"):
                row = json.loads(line)
                yield str(row["id"]), row["text"].encode()


def decoded(place: Path) -> Iterator[tuple[str, bytes]]:
    """Yield id and bytes of every document in a store."""
    store = Store.open(place)
    tokenizer = stored_tokenizer(store)
    for part in store.state.all_parts():
        chunks = parts.read_chunks(store, part)
        pieces = tokenizer.decode(chunks.tokens, chunks.n_tokens)
        offsets = np.frombuffer(pieces.buffers()[1], np.int64, len(pieces) + 1)
        data = memoryview(pieces.buffers()[2])
        for row in parts.read_documents(store, part, ["id", "first_row", "n_chunks"]).to_pylist():
            first, last = row["first_row"], row["first_row"] + row["n_chunks"]
            yield row["id"], bytes(data[int(offsets[first]) : int(offsets[last])])


def scripts_of(paths: Sequence[Path]) -> str:
    """Return the scripts with most letters above ASCII, and their share of all characters."""
    counts = Counter[str]()
    for _, text in texts_in(paths):
        counts.update(text.decode())
    found = Counter[str]()
    for character, n in counts.items():
        if character.isalpha():
            found["LATIN" if character.isascii() else unicodedata.name(character, "?").split()[0].split("-")[0]] += n
    total = counts.total()
    return ", ".join(f"{name.capitalize()} {n / total:.1%}" for name, n in found.most_common(10))


def cpu_seconds() -> float:
    """Return the CPU seconds of all processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Print a row per tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", type=Path)
    parser.add_argument("--tokenizer", nargs="+", default=[DEFAULT_TOKENIZER, "minilm"])
    arguments = parser.parse_args()
    print(describe())
    due = dict(texts_in(arguments.inputs))
    size = sum(map(len, due.values()))
    print(f"{len(due):,} documents, {size / 1e6:,.1f} MB of text: {scripts_of(arguments.inputs)}")
    for tokenizer in arguments.tokenizer:
        with tempfile.TemporaryDirectory() as folder:
            store = Path(folder) / "store"
            command = [sys.executable, "-m", "retrotool", "chunk", store, *arguments.inputs, "--json"]
            before = cpu_seconds()
            done = subprocess.run(
                [*command, "--duplicates", "keep", "--tokenizer", tokenizer], check=False, stdout=subprocess.PIPE
            )
            seconds = cpu_seconds() - before
            counts = json.loads(done.stdout)
            unlike = [name for name, text in decoded(store) if text != due[name]]
            print(
                f"{tokenizer}: {size / seconds / 1e6:.1f} MB/s of CPU, {size / counts['tokens']:.3f} bytes a token, "
                f"{counts['documents']:,} documents, {counts['rejected']:,} rejected, {counts['exact']:,} by tokenizers"
            )
            print(f"  {len(unlike):,} documents are not their text{f', such as {unlike[0]}' if unlike else ''}")


if __name__ == "__main__":
    main()
