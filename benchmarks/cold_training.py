"""Measure how long a training loop waits for a store in a bucket that answers after 20 ms.

    python benchmarks/cold_training.py [--documents 12000] [--rate 50] [--delay 20] [--blocks 16]

Random text is chunked, and each chunk gets two random neighbours with their tokens. The same loop reads an
epoch from the folder and from a bucket: LocalBucket on 127.0.0.1, through a relay that holds each request
back by ``--delay`` ms. Batches are gathered in a thread, as a loader's worker does, and a training step is a
pause that makes ``--rate`` MB of the store's files per second. Nothing is cached before.

Prints the seconds to the first batch, the share of the time from then on in which the loop waits for a batch,
the MB/s that it consumed, and the requests.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
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

_WORDS_PER_DOCUMENT, _WORDS_AT_ONCE = 1500, 1 << 12
_READ_BYTES = 1 << 20


async def relay_late(port: int, target: int, seconds: float) -> None:
    """Relay connections to a port of this machine, and hold back what clients send."""

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter, delay: float) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(_READ_BYTES):
                await asyncio.sleep(delay)
                sink.write(data)
                await sink.drain()
        sink.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", target, limit=_READ_BYTES)
        await asyncio.gather(copy(reader, back, seconds), copy(there, writer, 0.0))

    server = await asyncio.start_server(connect, "127.0.0.1", port, limit=_READ_BYTES)
    await server.serve_forever()


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
    port = buckets.free_port()
    with buckets.local_bucket(folder) as address:
        delaying = [sys.executable, __file__, "--relay", str(port), address.rpartition(":")[2]]
        with buckets.process_on(port, *delaying, "--delay", str(arguments.delay)) as slow, buckets.settings_of(slow):
            os.environ[TRAFFIC_VARIABLE] = str(traffic)
            for place in (str(store), f"s3://{buckets.BUCKET}/store"):
                first, share, seconds = train(place, step, arguments.blocks)
                print(f"  {place.partition(':')[0] if ':' in place else 'folder':<8} first batch {first:5.1f} s, then "
                      f"waiting {100 * share:4.1f} % of {seconds:.1f} s, {size / seconds / 1e6:.0f} MB/s")  # fmt: skip
    print(f"  requests: {dict(Counter(line.split()[0] for line in traffic.read_text().splitlines()))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=12_000)
    parser.add_argument("--rate", type=float, default=50.0, help="MB/s")
    parser.add_argument("--delay", type=float, default=20.0, help="ms")
    parser.add_argument("--blocks", type=int, default=16, help="as in RetroDataset(shuffle_blocks=...)")
    parser.add_argument("--relay", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.relay:
        port, target = arguments.relay
        asyncio.run(relay_late(port, target, arguments.delay / 1000))
        return
    print(describe())
    with tempfile.TemporaryDirectory() as folder:
        compare(arguments, Path(folder))


if __name__ == "__main__":
    main()
