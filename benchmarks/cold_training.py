"""Measure how long a training loop waits for a store in a bucket that answers after 20 ms.

    python benchmarks/cold_training.py [--documents 12000] [--rate 50] [--latency 0.02] [--blocks 16]

Random text is chunked, and each chunk gets two random neighbours with their tokens. The same loop reads an
epoch from the folder and from a bucket: LocalBucket on 127.0.0.1, behind a proxy that adds ``--latency``
seconds to every request. Batches are gathered in a thread, as a loader's worker does, and a training step is a
pause that makes ``--rate`` MB of the store's files per second. Nothing is cached before.

Prints the seconds to the first batch, the share of the time from then on in which the loop waits for a batch,
the MB/s that it consumed, and the requests.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from dataset import BATCH, chunks_in, files_of, write_tables
from machine import describe

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import buckets

_WORDS_PER_DOCUMENT = 1500


def make_store(folder: Path, documents: int) -> Path:
    from retrotool import api

    rng = np.random.default_rng(0)
    words = np.array(["".join(letters) for letters in itertools.product("bdfglmnprst", "aeiou", "klmnrst", "aeo")])
    with (folder / "text.jsonl").open("w") as file:
        for number in range(documents):
            text = " ".join(words[rng.integers(0, len(words), _WORDS_PER_DOCUMENT)])
            file.write(f'{{"id": "{number}", "text": "{text}"}}\n')
    store = folder.joinpath(buckets.BUCKET, "store")
    api.chunk(str(store), [str(folder / "text.jsonl")], tokenizer="minilm")
    write_tables(store, 2, text=True)
    return store


def stored_bytes(store: Path) -> int:
    """Return the bytes of the columns that training reads."""
    import pyarrow.parquet as pq

    found = 0
    for path in files_of(store, "chunks/", "neighbours/"):
        with pq.ParquetFile(path) as file:
            groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
            columns = (group.column(i) for group in groups for i in range(group.num_columns))
            unread = ("row", "ids", "distances")
            found += sum(
                one.total_compressed_size for one in columns if one.path_in_schema.partition(".")[0] not in unread
            )
    return found


def train(place: str, step: float, blocks: int) -> tuple[float, float, float]:
    """Return seconds to the first batch, the share of the rest that is spent waiting, and seconds of the rest."""
    from retrotool import RetroDataset
    from retrotool.read_ahead import ahead

    begun = time.perf_counter()
    batches = ahead(RetroDataset(place, sequence_length=2048, batch_size=BATCH, shuffle_blocks=blocks), 8)
    next(batches)
    first = asked = due = time.perf_counter()
    waited = 0.0
    for _ in batches:
        wait = time.perf_counter() - asked
        waited, due = waited + wait, due + wait + step
        time.sleep(max(0.0, due - time.perf_counter()))
        asked = time.perf_counter()
    return first - begun, waited / (asked - first), asked - first


def compare(arguments: argparse.Namespace, folder: Path) -> None:
    from retrotool.store.object_storage import TRAFFIC_VARIABLE

    store, traffic = make_store(folder, arguments.documents), folder / "traffic"
    size, chunks = stored_bytes(store), chunks_in(store)
    step = size / chunks * BATCH * (2048 // 64) / (arguments.rate * 1e6)
    print(f"{chunks:,} chunks, {size / 1e6:,.0f} MB of columns that training reads; a step takes {step * 1000:.1f} ms")
    with (
        buckets.local_bucket(folder) as server, buckets.faulty(server, arguments.latency) as slow,
        buckets.settings_of(slow),
    ):  # fmt: skip
        os.environ[TRAFFIC_VARIABLE] = str(traffic)
        for label, place in (("folder", str(store)), ("bucket", f"s3://{buckets.BUCKET}/store")):
            first, share, seconds = train(place, step, arguments.blocks)
            print(f"  {label}: first batch {first:5.1f} s, then waiting {100 * share:4.1f} % of {seconds:.1f} s, "
                  f"{size / seconds / 1e6:.0f} MB/s")  # fmt: skip
    print(f"  requests: {dict(Counter(line.split()[0] for line in traffic.read_text().splitlines()))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=12_000)
    parser.add_argument("--rate", type=float, default=50.0, help="MB/s")
    parser.add_argument("--latency", type=float, default=0.02, help="seconds that each request takes longer")
    parser.add_argument("--blocks", type=int, default=16, help="as in RetroDataset(shuffle_blocks=...)")
    arguments = parser.parse_args()
    print(describe())
    with tempfile.TemporaryDirectory() as folder:
        compare(arguments, Path(folder))


if __name__ == "__main__":
    main()
