"""Measure what retrieval gives language models: docs/what-retrieval-gives.md.

    python benchmarks/retrieval_gain.py FOLDER --tokenizer MODEL --model MODEL --database F... --evaluation F
        --added F --related F --other F [--limit 600] [--context 256] [--sweep 100] [--encoder minilm]

All files are JSONL with ``id``, ``text`` and ``source``. FOLDER gets a store of each, in the tokens of the
models, and the evaluation text is scored with these tables of neighbours:

* main: in the database; overlap: the same in the order of their overlap;
* related and other: in these databases alone; mixed: in all three together;
* planted: in the database with every second document of the evaluation text in it;
* added: in the database with the texts ``added``, after what was planted is purged.

After the purge, planted is scored again, before and after another search. At the end what was added is purged,
too, and added is searched and scored again. ``--sweep N`` scores N chunks by main with k from 1 to 40.
A line of results.jsonl is a table in a state of the database, with everything that ``retrotool evaluate``
reports; what is there already is not measured again.

Cost: vectors of all texts, then forwards: ``retrotool plan`` and ``retrotool evaluate`` describe them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson
from machine import describe

from retrotool import api

K = (1, 2, 5, 10, 20, 40)
SAVED = 40  # neighbours of table main; overlap orders 20
ROW = "{:32} {:9} {:>3} {:>7} {:>17} {:>17} {:>18}"


class Gains:
    """Stores in a folder, models, and what was measured with them."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.folder = given, given.folder
        self.database, self.evaluation = self.folder / "database", self.folder / "evaluation"
        self.file = self.folder / "results.jsonl"
        lines = self.file.read_bytes().splitlines() if self.file.exists() else []
        rows = map(orjson.loads, lines)
        self.done = {(row["state"], row["model"], row["k"], row["name"], row["asked"]) for row in rows}

    def grow(self, store: Path, files: Sequence[Path]) -> None:
        """Add files to a store, and bring vectors and index up to date."""
        api.chunk(store, [str(file) for file in files], tokenizer=self.given.tokenizer)
        api.embed(store, encoder=self.given.encoder, dtype=self.given.dtype)
        if store != self.evaluation:
            api.index(store)

    def search(self, name: str, *more: Path, first: Path | None = None, **options: Any) -> None:
        """Search neighbours of the evaluation text in a database (``first``) and in ``more``."""
        api.neighbours(
            first or self.database, queries=self.evaluation, name=name, databases=[(store, None) for store in more],
            **options,
        )  # fmt: skip

    def measure(self, state: str, names: Sequence[str], k: int = 2, limit: int | None = None) -> None:
        """Score the evaluation text by every model with the neighbours ``names``, and print and keep the results."""
        limit = limit or self.given.limit
        asked = f"limit {limit}, context {self.given.context}, {self.given.dtype}"
        for model in self.given.model:
            left = [name for name in names if (state, str(model), k, name, asked) not in self.done]
            if not left:
                continue
            begun = time.monotonic()
            result = api.evaluate(
                self.database, queries=self.evaluation, model=model, names=left, k=k,
                context=self.given.context, limit=limit, dtype=self.given.dtype,
            )  # fmt: skip
            facts = {key: value for key, value in asdict(result).items() if key != "tables"}
            with self.file.open("ab") as out:
                for table in result.tables:
                    row = {
                        **facts,
                        "state": state,
                        "asked": asked,
                        "seconds": time.monotonic() - begun,
                        **asdict(table),
                    }
                    out.write(orjson.dumps(row) + b"\n")
            for table in result.tables:
                for group, found in (("all", table.all), ("<= 0.125", table.up_to["0.125"])):
                    values = (_text(one) for one in (found.on, found.off, found.difference))
                    print(ROW.format(f"{state}: {table.name}", group, k, found.chunks, *values), flush=True)

    def purge(self, source: str) -> None:
        """Purge all documents of a source, once."""
        if not any(one.reason == source for one in api.list_purges(self.database).purges):
            api.purge(self.database, api.Selectors(where=f"source = '{source}'"), reason=source)

    def take_out(self, source: str) -> None:
        """Purge a source, and search the table of its name again."""
        self.purge(source)
        self.search(source)


def _text(estimate: Any) -> str:
    if estimate is None:
        return "-"
    return f"{estimate.value:.4f}" + ("" if estimate.high is None else f" ± {estimate.high - estimate.value:.4f}")


def copy_rows(files: Sequence[Path], source: str, out: Path, step: int = 1) -> Path:
    """Write every ``step``-th document of JSONL files as one of another source."""
    rows = [orjson.loads(line) for file in files for line in file.read_bytes().splitlines()][::step]
    changed = [{**row, "id": f"{source}/{row['id']}", "source": source} for row in rows]
    out.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in changed))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--model", type=Path, action="append", required=True)
    for name in ("database", "evaluation", "added", "related", "other"):
        parser.add_argument(f"--{name}", type=Path, nargs="+", required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--context", type=int)
    parser.add_argument("--sweep", type=int, default=0)
    parser.add_argument("--encoder", default="minilm")
    parser.add_argument("--dtype", default="auto")
    given = parser.parse_args()
    print(describe())
    print(ROW.format("state: neighbours", "copied", "k", "chunks", "on", "off", "on - off"), flush=True)
    given.folder.mkdir(parents=True, exist_ok=True)
    gains = Gains(given)
    related, other = given.folder / "related", given.folder / "other"
    sources = {
        "planted": copy_rows(given.evaluation, "planted", given.folder / "planted.jsonl", 2),
        "added": copy_rows(given.added, "added", given.folder / "added.jsonl"),
    }
    names = ("main", "overlap", "related", "other", "mixed", "planted")

    def build() -> None:
        for store, files in (
            (gains.database, given.database), (related, given.related), (other, given.other),
            (gains.evaluation, given.evaluation),
        ):  # fmt: skip
            gains.grow(store, files)
        gains.search("main", saved=SAVED)
        gains.search("overlap")
        gains.search("overlap", rerank="overlap")
        gains.search("related", first=related)
        gains.search("other", first=other)
        gains.search("mixed", related, other)
        add("planted")

    def add(source: str) -> None:
        gains.grow(gains.database, [sources[source]])
        gains.search(source)

    states: list[tuple[str, Callable[[], object], Sequence[str]]] = [
        ("built", build, names),
        ("planted is purged", lambda: gains.purge("planted"), ["planted"]),
        ("and searched again", lambda: gains.take_out("planted"), ["planted"]),
        ("added", lambda: add("added"), ["added"]),
        ("added is purged", lambda: gains.take_out("added"), ["added"]),
    ]
    reached = given.folder / "state"
    for number, (state, prepare, tables) in enumerate(states):
        if number > (int(reached.read_text()) if reached.exists() else -1):
            prepare()
            reached.write_text(str(number))
        if number == int(reached.read_text()):  # later states have changed the database
            gains.measure(state, tables)
            if number == 0 and given.sweep:
                for k in K:
                    gains.measure(f"{given.sweep} chunks", ["main"], k, given.sweep)


if __name__ == "__main__":
    main()
