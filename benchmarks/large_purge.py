"""Measure a purge of a million chunks in a store of 100 million chunks, and in one of a billion.

    python benchmarks/large_purge.py [--purged 1000000] [--sizes 100000000 1000000000] [--parts 40]

The log is made up: parts of 250,000 chunks. Only the files of the ``--parts`` parts with chunks to purge
exist, because no others may be read; their documents have 100 chunks. The command purges the same chunks,
given by ids, from both stores, in a fresh process; then opening is timed.
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
import orjson
import pyarrow as pa
from machine import describe

from retrotool.store import log, parts
from retrotool.store.identity import TokenizerIdentity
from retrotool.store.leases import Run
from retrotool.store.log import Draft, FileEntry
from retrotool.store.parts import PART_SHIFT
from retrotool.store.paths import FileName, part_slot
from retrotool.store.store import Store

ROWS, DOCUMENT = 250_000, 100
RUN = "0123abcd"
OPEN = """
import time
start = time.perf_counter()
from retrotool.store.leases import Run
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones
assert len(read_tombstones(Store.open({root!r}))) == {purged}
print(time.perf_counter() - start)
"""


def real_part(store: Store, part: int) -> list[FileEntry]:
    slot, rng = part_slot(part), np.random.default_rng(part)
    row = np.arange(ROWS)
    tokens = np.repeat(rng.integers(1, 30_000, (ROWS // 8, 64), np.uint16), 8, axis=0)
    doc = (row // DOCUMENT).astype(np.int32)
    chunks = parts.chunks_table(doc, (row % DOCUMENT).astype(np.int32), np.full(ROWS, 64, np.int32), tokens)
    count = ROWS // DOCUMENT
    names = [f"document-{part}-{i}" for i in range(count)]
    hashes = [hashlib.blake2b(name.encode(), digest_size=16).digest() for name in names]
    documents = pa.table(
        [
            names, hashes, hashes, ["made up"] * count, np.arange(count, dtype=np.int32) * DOCUMENT,
            np.full(count, DOCUMENT, np.int32), np.full(count, 64 * DOCUMENT), ["input"] * count, np.arange(count),
        ],
        schema=parts.documents_schema(()),
    )  # fmt: skip
    found = {"documents": documents, "chunks": chunks}
    return [
        parts.write_parquet(store, FileName.new(RUN, kind, slot, "parquet"), table) for kind, table in found.items()
    ]


def made_up(part: int) -> list[FileEntry]:
    """Return entries of a part whose files are not written, because none is read."""
    slot, empty = part_slot(part), hashlib.sha256(b"").hexdigest()
    rows = {"documents": ROWS // DOCUMENT, "chunks": ROWS}
    return [FileEntry(FileName.new(RUN, kind, slot, "parquet").path, slot, n, 1000, empty) for kind, n in rows.items()]


def make(root: Path, chunks: int, real: list[int]) -> None:
    store = Store.create(root, TokenizerIdentity.of("none", b"{}", 30522, lossless=False), b"{}", 64)
    total = chunks // ROWS
    with Run(store.storage, RUN):
        for first in range(0, total, 100):
            numbers = range(first, min(first + 100, total))
            entries = [
                entry for part in numbers for entry in (real_part(store, part) if part in real else made_up(part))
            ]
            n = ROWS * numbers.stop
            totals = {"chunks": n, "documents": n // DOCUMENT, "tokens": 64 * n, "rejected": 0}
            draft = Draft("chunk", add=tuple(entries), records={"parts": numbers.stop, "totals": totals})
            assert log.append(store.storage, RUN, store.state.number + 1, store.state.head, draft)
            store.refresh()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--purged", type=int, default=1_000_000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000_000, 1_000_000_000])
    parser.add_argument("--parts", type=int, default=40)
    arguments = parser.parse_args()
    print(describe())
    each = arguments.purged // arguments.parts
    for size in arguments.sizes:
        total = size // ROWS
        real = np.unique(np.linspace(0, total - 1, arguments.parts).astype(int)).tolist()
        with tempfile.TemporaryDirectory() as folder:
            root, listed = Path(folder) / "store", Path(folder) / "ids"
            make(root, size, real)
            documents = np.linspace(0, ROWS // DOCUMENT - 1, each // DOCUMENT).astype(np.int64)
            rows = (documents[:, None] * DOCUMENT + np.arange(DOCUMENT)).ravel()
            ids = np.concatenate([(part << PART_SHIFT) + rows for part in real])
            listed.write_text("\n".join(map(str, ids.tolist())))
            purge = ["purge", str(root), "--chunk", f"@{listed}", "--yes", "--json", "--reason", "benchmark"]
            start = time.perf_counter()
            done = subprocess.run([sys.executable, "-m", "retrotool", *purge], capture_output=True, check=True)
            seconds = time.perf_counter() - start
            result = orjson.loads(done.stdout)
            assert result["chunks"] == len(ids), result
            opening = [sys.executable, "-c", OPEN.format(root=str(root), purged=len(ids))]
            opened = subprocess.run(opening, capture_output=True, check=True, text=True)
        print(
            f"{size:>13,} chunks in {total:,} parts: {result['chunks']:,} chunks ({result['documents']:,} documents) "
            f"of {len(real)} parts purged in {seconds:.2f} s; opened with tombstones in {float(opened.stdout):.2f} s"
        )


if __name__ == "__main__":
    main()
