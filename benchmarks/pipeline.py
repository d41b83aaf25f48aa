"""Measure the rates of commands on real text, each compared with a common alternative.

    python benchmarks/pipeline.py INPUT.jsonl[.zst] [...] [--embed-chunks 2000]

chunk is compared with ``tokenizers`` alone on the same texts (its floor); neighbours with ``faiss`` searching
query by query in an exact float32 index of the same vectors. ``embed.py`` measures embedding, which is slow
on a CPU, so neighbours use only the first ``--embed-chunks`` chunks.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
from machine import describe

import retrotool
from retrotool import api
from retrotool.embed.store_encoder import EncoderRows
from retrotool.encoder import Encoder
from retrotool.sources import Document, Fields, find_inputs, read_input
from retrotool.store.parts import read_chunks
from retrotool.store.store import Store


def report(what: str, rate: float, unit: str, reference: float = 0.0, of: str = "") -> None:
    ratio = f"   {rate / reference:6.2f} x {of} ({reference:,.1f})" if reference else ""
    print(f"{what:<24} {rate:12,.1f} {unit:<10}{ratio}", flush=True)


def bench_chunk(inputs: list[str], store: Path) -> None:
    documents = [row for file in find_inputs(inputs) for row in read_input(file, Fields()) if isinstance(row, Document)]
    texts = [document.text for document in documents]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    start = time.perf_counter()
    result = api.chunk(store, inputs, workers=os.cpu_count() or 1)
    ours = megabytes / (time.perf_counter() - start)
    tokenizer = retrotool.open(store).tokenizer.backend
    start = time.perf_counter()
    for first in range(0, len(texts), 64):
        tokenizer.encode_batch_fast(texts[first : first + 64], add_special_tokens=False)
    floor = megabytes / (time.perf_counter() - start)
    print(f"{megabytes:.1f} MB of text, {result.chunks:,} chunks in {result.parts} parts")
    report("chunk", ours, "MB/s", floor, "tokenizers alone, in memory, all cores")


def embed_some(store: Path, limit: int) -> np.ndarray:
    """Embed the first chunks; ``benchmarks/embed.py`` measures that."""
    opened, encoder = Store.open(store), Encoder("minilm")
    chunks = read_chunks(opened, 0)
    return encoder.embed(EncoderRows(opened, encoder).rows(chunks.tokens[:limit], chunks.n_tokens[:limit]))


def bench_search(vectors: np.ndarray) -> None:
    from retrotool.ann.excluded import Queries
    from retrotool.ann.lists import VectorLists
    from retrotool.ann.ranking import rerank
    from retrotool.ann.search import SPARE, Search, nothing_banned

    queries = vectors.astype(np.float32)
    everything = VectorLists(np.arange(len(vectors)), vectors)
    start = time.perf_counter()
    search = Search(everything.trained, Queries.plain(queries), 1, 20 + SPARE, nothing_banned)
    search.add(everything)
    rerank(queries, search.candidates, lambda ids: vectors[ids], 20)
    ours = len(queries) / (time.perf_counter() - start)
    index = faiss.IndexFlatL2(queries.shape[1])
    index.add(queries)
    start = time.perf_counter()
    index.search(queries, 20)
    report("neighbours (exact)", ours, "queries/s", len(queries) / (time.perf_counter() - start), "faiss, exact")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+")
    parser.add_argument("--embed-chunks", type=int, default=2000)
    arguments = parser.parse_args()
    print(describe())
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        bench_chunk(arguments.inputs, store)
        bench_search(embed_some(store, arguments.embed_chunks))
        start = time.perf_counter()
        found = api.verify(store)
        report("verify", found.bytes / 1e6 / (time.perf_counter() - start), "MB/s")
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"largest worker process: {children:.2f} GiB")


if __name__ == "__main__":
    main()
