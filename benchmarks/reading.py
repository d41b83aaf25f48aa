"""Measure reading each input format: megabytes of text per second, and memory, one process, warm page cache.

    python benchmarks/reading.py [--megabytes 100] [FORMAT ...]

Each format is read three times, each in a separate process. Prints the best time and the largest increase of
memory by reading. The texts are the docstrings of Python's standard library, repeated.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import pydoc_data.topics
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from machine import describe

from retrotool.sources import Document, Fields, find_inputs, read_input

FORMATS = ("jsonl", "jsonl.zst", "json", "csv", "warc", "parquet", "arrow", "u16", "txt")
FIELDS = Fields(separator="\n\n\n", end_of_document=0)


def texts(size: int) -> Iterator[str]:
    topics = list(pydoc_data.topics.topics.values())
    number = 0
    while size > 0:
        text = f"{number}\n{topics[number % len(topics)]}".replace("\n\n\n", "\n\n")
        yield text
        number, size = number + 1, size - len(text.encode())


def write(path: Path, kind: str, size: int) -> None:
    rows = ({"id": f"id-{i}", "text": text} for i, text in enumerate(texts(size)))
    if kind in ("parquet", "arrow"):
        table = pa.Table.from_pylist(list(rows))
        if kind == "parquet":
            pq.write_table(table, path)
        else:
            with pa.ipc.new_file(path, table.schema) as writer:
                writer.write_table(table, 1000)
        return
    if kind == "u16":
        np.concatenate([np.frombuffer(row["text"].encode() + b"\0", "u1").astype("<u2") for row in rows]).tofile(path)
        return
    with path.open("w", newline="") as file:
        if kind.startswith("jsonl"):
            file.writelines(json.dumps(row) + "\n" for row in rows)
        elif kind == "json":
            file.write("[" + ",\n".join(json.dumps(row) for row in rows) + "]")
        elif kind == "csv":
            csv.writer(file).writerows([("id", "text"), *((row["id"], row["text"]) for row in rows)])
        elif kind == "txt":
            file.write("\n\n\n".join(row["text"] for row in rows))
        else:
            for row in rows:
                body = f"HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n{row['text']}"
                head = f"WARC-Type: response\r\nContent-Type: application/http\r\nWARC-Target-URI: http://{row['id']}/"
                file.write(f"WARC/1.0\r\n{head}\r\nContent-Length: {len(body.encode())}\r\n\r\n{body}\r\n\r\n")
    if kind.endswith(".zst"):
        path.write_bytes(zstandard.compress(path.read_bytes()))


def measure(path: Path) -> tuple[float, int, int, float]:
    (file,) = find_inputs([str(path)])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    documents = others = 0
    for row in read_input(file, FIELDS):
        documents += isinstance(row, Document)
        others += not isinstance(row, Document)
    seconds = time.perf_counter() - start
    return seconds, documents, others, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", default=FORMATS)
    parser.add_argument("--megabytes", type=int, default=100)
    options = parser.parse_args()
    print(describe())
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.formats:
            path = Path(folder) / f"texts.{kind}"
            write(path, kind, options.megabytes * 1_000_000)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                runs = [pool.apply(measure, (path,)) for _ in range(3)]
            seconds, documents, others, _ = min(runs)
            memory = max(run[3] for run in runs)
            rate = options.megabytes / seconds
            print(f"{kind:10} {rate:7.0f} MB/s  {documents:,} documents, {others:,} other rows, {memory:.0f} MiB")
            path.unlink()


if __name__ == "__main__":
    main()
