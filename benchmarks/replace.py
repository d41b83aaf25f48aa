"""Replace documents of a store, and compare it with a new store; kill it anywhere while it does so.

    python benchmarks/replace.py INPUT.jsonl [--documents 20000] [--changed 1000] [--kills 100] [--encoder minilm]

Takes as many different texts of at most 60 words as asked for, from the documents of INPUT, and changes some
of them. Then

* the time of ``chunk --existing replace`` and its count; the content digest beside that of a new store;
* ``embed``, ``index`` and ``neighbours`` of what is new; the neighbours beside those computed from scratch;
* searches, by the vectors of all replaced chunks, that return one of them;
* SIGKILL of ``chunk --existing replace`` at random moments: each store must have the old content or the new one,
  and the new one after the command has run again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from index import tool
from machine import describe

import retrotool
from retrotool import api
from retrotool.ann.excluded import Queries
from retrotool.store import parts
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones
from retrotool.store.vectors import read_vectors

WORDS = 60
DERIVED = (("embed", ()), ("index", ()), ("neighbours", ("--exact",)))  # exact, to be compared


def texts_of(path: Path, n: int) -> list[str]:
    """Return ``n`` different texts from the documents of a file."""
    found: dict[str, None] = {}
    with path.open(encoding="utf-8") as file:
        for line in file:
            words = json.loads(line)["text"].split()
            for start in range(0, len(words) - WORDS, WORDS):
                found[" ".join(words[start : start + WORDS])] = None
            if len(found) >= n:
                return list(found)[:n]
    raise SystemExit(f"{path} has only {len(found):,} texts of {WORDS} words")


def write(path: Path, texts: list[str]) -> None:
    rows = ({"id": f"text-{i}", "text": text} for i, text in enumerate(texts))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(*arguments: object) -> tuple[dict[str, Any], float]:
    start = time.perf_counter()
    done = subprocess.run([*tool(), *map(str, arguments), "--json"], capture_output=True, text=True, check=True)
    return json.loads(done.stdout), time.perf_counter() - start


def content(store: Path) -> str:
    found = api.verify(store)
    assert found.ok, found.problems
    return found.content


def replaced_found(store: Path, encoder: str) -> tuple[int, int]:
    """Search by the vectors of the tombstones; return how many there are, and how many are returned."""
    opened, database = Store.open(store), retrotool.open(store).database()
    purged = read_tombstones(opened)
    found = searched = 0
    for part in purged.parts():
        entry = parts.part_entry(opened, "embeddings", part, encoder)
        vectors = np.asarray(read_vectors(opened, entry))[purged.rows(part)].astype(np.float32)
        found += int(purged.contains(database.search(Queries.plain(vectors), 10).ids).sum())
        searched += len(vectors)
    return searched, found


def neighbours_of(store: Path, table: str) -> list[list[int]]:
    reader = retrotool.open(store)
    chunks = (int(chunk) for part in reader.parts() for chunk in reader.chunk_ids(part))
    return [[neighbour for neighbour, _ in reader.neighbour_ids(chunk, table)] for chunk in chunks]


def kill_all(arguments: list[object], before: Path, digests: tuple[str, str], seconds: float, kills: int) -> None:
    draw = random.Random(1)
    old = new = 0
    for _ in range(kills):
        store = before.with_name("killed")
        shutil.copytree(before, store)
        command = [*tool(), "chunk", str(store), *map(str, arguments)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(draw.uniform(0, seconds))
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = content(store)
        assert found in digests, "neither old nor new"
        old, new = old + (found == digests[0]), new + (found == digests[1])
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        assert content(store) == digests[1]
        shutil.rmtree(store)
    print(f"{kills} kills: {old} stores were old, {new} new, {kills - old - new} anything else; all new when run again")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--changed", type=int, default=1_000)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--encoder", default="minilm")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    print(describe())
    texts = texts_of(given.input, given.documents + given.changed)
    old, reserve = texts[: given.documents], texts[given.documents :]
    new = list(old)
    for place, text in zip(random.Random(0).sample(range(len(old)), given.changed), reserve, strict=True):
        new[place] = text
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store, fresh, path = folder / "store", folder / "fresh", folder / "rows.jsonl"
        write(path, new)
        _, floor = run("chunk", fresh, path)
        write(path, old)
        run("chunk", store, path)
        before = shutil.copytree(store, folder / "before")
        old_content = content(store)
        for command, options in DERIVED:
            run(command, store, *options)
        write(path, new)
        found, seconds = run("chunk", store, path, "--existing", "replace")
        print(f"{given.documents:,} documents, {found['replaced']:,} replaced, {found['unchanged']:,} unchanged")
        print(f"chunk --existing replace: {seconds:.1f} s; chunk of all into a new store: {floor:.1f} s")
        digests = old_content, content(fresh)
        print(f"content equal to that of a new store: {content(store) == digests[1]}")
        for command, options in DERIVED:
            _, took = run(command, store, *options)
            print(f"{command} of what is new: {took:.1f} s")
        print(
            "{:,} searches by replaced vectors: {:,} replaced chunks returned".format(*replaced_found(store, "minilm"))
        )
        tables = {}
        run("neighbours", store, "--name", "scratch", "--exact")
        for table in ("main", "scratch"):
            tables[table] = neighbours_of(store, table)
        print(f"neighbours equal to those from scratch: {tables['main'] == tables['scratch']}")
        kill_all([path, "--existing", "replace"], before, digests, 1.3 * seconds, given.kills)


if __name__ == "__main__":
    main()
