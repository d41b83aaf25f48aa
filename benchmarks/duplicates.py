"""Measure the time and memory to find duplicate documents, by id and by text.

    python benchmarks/duplicates.py [--documents 20000000] [--parts 40] [--append 100000]

Makes documents files of random hashes, without chunks, which the search does not read. One document in a
hundred repeats an id, one in ten repeats a text, and one in fifty has the same common text. Then finds the
duplicates, each time in a fresh process: when all parts are new, and when only the last, smaller part is. The
floor is reading one of the two columns of hashes, with checksums, without comparing.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from machine import describe

from retrotool.store import parts
from retrotool.store.identity import TokenizerIdentity
from retrotool.store.leases import Run
from retrotool.store.log import Draft, FileEntry
from retrotool.store.paths import FileName, part_slot
from retrotool.store.store import Store

FIND = """
import resource, time
from pathlib import Path
from retrotool.chunk.deduplicate import find_repeated_ids, find_repeated_texts
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones
store = Store.open({root!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
new, tombstones = range({start}, {end}), read_tombstones(store)
by_id = find_repeated_ids(store, new, tombstones, None)
by_text = find_repeated_texts(store, new, tombstones, None, by_id)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(f"{{seconds:.1f}} s, peak {{peak / 2**20:.2f}} GiB ({{before / 2**20:.2f}} GiB before), "
      f"{{len(by_id):,}} by id, {{len(by_text):,}} by text")
"""
FLOOR = """
import time
from retrotool.store import parts
from retrotool.store.store import Store
store = Store.open({root!r})
start = time.perf_counter()
for part in store.state.parts():
    parts.read_parquet(store, parts.part_entry(store, "documents", part), ["key"])
print(f"{{time.perf_counter() - start:.1f}} s")
"""


EMPTY = hashlib.sha256(b"").hexdigest()


def write_part(store: Store, run: Run, part: int, before: int, rows: int, draw: np.random.Generator) -> list[FileEntry]:
    """Write a documents file, and an empty chunks file: only its name counts."""
    number = np.arange(before, before + rows, dtype=np.uint64)
    key, text = number.copy(), number + np.uint64(1 << 40)
    again = draw.random(rows)
    earlier = draw.integers(0, max(before, 1), rows).astype(np.uint64)
    key[again < 0.01] = earlier[again < 0.01]
    text[again > 0.9] = earlier[again > 0.9] + np.uint64(1 << 40)
    text[again > 0.98] = 0
    schema = parts.documents_schema(())
    hashes = {"key": parts.fixed_binary(hashed(key)), "text_hash": parts.fixed_binary(hashed(text))}
    columns = [hashes.get(field.name, pa.nulls(rows, field.type)) for field in schema]
    table = pa.table(columns, schema=schema)
    names = [FileName.new(run.id, kind, part_slot(part), "parquet") for kind in ("documents", "chunks")]
    chunks = Path(store.place) / names[1].path
    chunks.parent.mkdir(exist_ok=True)
    chunks.touch()
    return [parts.write_parquet(store, names[0], table), FileEntry(names[1].path, names[1].slot, rows, 0, EMPTY)]


def hashed(numbers: np.ndarray) -> np.ndarray:
    """Hash numbers to uint64 [n, 2] (splitmix64)."""
    halves = []
    for salt in (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03):
        mixed = numbers * np.uint64(salt) + np.uint64(salt)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        halves.append(mixed ^ (mixed >> np.uint64(31)))
    return np.stack(halves, axis=1)


def fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20_000_000)
    parser.add_argument("--parts", type=int, default=40)
    parser.add_argument("--append", type=int, default=100_000)
    arguments = parser.parse_args()
    print(describe())
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "store"
        store = Store.create(root, TokenizerIdentity.of("none", b"{}", 30522, False), b"{}", 64)
        draw = np.random.default_rng(0)
        rows = arguments.documents // arguments.parts
        sizes = [rows] * arguments.parts + [arguments.append]
        started = time.perf_counter()
        with Run(store.storage) as run:
            add = [
                entry
                for part, size in enumerate(sizes)
                for entry in write_part(store, run, part, rows * part, size, draw)
            ]
            store.commit(run, lambda _: Draft("chunk", add=tuple(add)))
        size = sum(path.stat().st_size for path in (root / "documents").iterdir())
        made = time.perf_counter() - started
        print(f"{sum(sizes):,} documents in {len(sizes)} documents files of {size / 1e9:.2f} GB, made in {made:.0f} s")
        last = arguments.parts
        print("floor: read all keys       ", fresh(FLOOR.format(root=str(root))))
        print("all documents new          ", fresh(FIND.format(root=str(root), start=0, end=last)))
        print(f"{arguments.append:,} new of all ", fresh(FIND.format(root=str(root), start=last, end=last + 1)))


if __name__ == "__main__":
    main()
