"""A store with files of every kind, and what can be done with it: for tests that damage one file at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import pyarrow.parquet as pq
import pytest
from conftest import make_rows, write_jsonl
from typer.testing import CliRunner

import retrotool
from retrotool import api
from retrotool.ann.choice import IndexOptions
from retrotool.app import app
from retrotool.chunk import run as chunk_run
from retrotool.errors import TaskError
from retrotool.index.run import Options
from retrotool.neighbours.run import SearchOptions
from retrotool.neighbours.tiles import LoadedTile
from retrotool.store import leases, log, tombstones
from retrotool.store.storage import storage_at

KINDS = {
    "documents": "documents/*",
    "chunks": "chunks/*",
    "embeddings": "embeddings/tiny/*.npy",
    "sums of embeddings": "embeddings/tiny/*.npy.xxh3",
    "trained": "index/*/trained-*.faiss",
    "shard": "index/*/shard-*.faiss",
    "sums of an index": "index/*/*.faiss.xxh3",
    "recall": "index/*/recall-*",
    "neighbours": "neighbours/main/*",
    "neighbours with text": "neighbours/text/*",
    "undone": "undone/*",
    "tombstones": "tombstones/*",
    "blocked": "blocked/*",
    "quarantine": "quarantine/*",
    "plans": "plans/*",
    "inputs": "inputs/*",
    "selectors": "selectors/*",
    "scans": "scans/*/*",
    "routes": "routes/*/*",
    "tokenizer": "tokenizer-*",
    "store.json": "store.json",
    "log": "log/*",
    "staging": "staging/*",
    "staged files": "embeddings/again/*",
    "checkpoints": "checkpoints/*",
    "leases": "leases/*",
}
HARMLESS = {
    "checkpoints": "a cache: a reader whose sum is wrong folds the log instead",
    "leases": "they say who is writing; one that can't be read counts by its age, and nothing but time hangs on it",
    "staged files": "no commit names them yet; once one does they are files as all others, and verify names them",
}
"""Kinds of which ``verify`` need not find the damage, and why."""
ELSEWHERE = "0123abcd"
"""A run of another machine that has given a sign of life just now."""


class Stopped(Exception):
    pass


def stop(*_: object, **__: object) -> None:
    raise Stopped


@dataclass(frozen=True)
class Everything:
    """``store``, the folder with what it was made of, and its purges: erased, undone, neither."""

    store: Path
    inputs: Path
    encoder: Path
    purges: tuple[str, str, str]


def make_everything(folder: Path, encoder: Path) -> Everything:
    """A small store of two parts with something of every kind, what a kill leaves included."""
    rows = make_rows(14, words=40)
    store = folder / "store"
    first = write_jsonl(folder / "first.jsonl", [*rows, rows[3], {"id": "bad", "text": 5}])
    api.chunk(store, [str(first)], tokenizer=str(encoder), part_size=20, chunk_length=16)
    api.embed(store, encoder=str(encoder), devices="cpu")
    api.index(store)
    api.neighbours(store, saved=4)
    api.neighbours(store, saved=4, name="text", materialise=True)
    with mock.patch("retrotool.store.store.CHECKPOINT_EVERY", 1):
        purges = tuple(
            api.purge(store, api.Selectors(where=f"id = 'doc-{i}'"), reason="test", erase=i == 4).purge
            for i in (4, 5, 6)
        )
    api.undo(store, purges[1], reason="test")
    api.index(store, name="lists", options=Options(IndexOptions(nlist=2, code="sq8")))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TaskError):
        patch.setattr(LoadedTile, "answers", stop)
        api.neighbours(store, index="lists", name="tiled", search=SearchOptions(memory=500))
    api.purge(store, api.Selectors(pattern="river", allow_lossy=True), dry_run=True)
    last = write_jsonl(folder / "last.jsonl", make_rows(3, first=20, words=40))
    write_jsonl(folder / "more.jsonl", make_rows(4, first=40, words=40))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(chunk_run, "finish_plans", stop)
        api.chunk(store, [str(last)])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(log, "append", stop)
        api.embed(store, encoder=str(encoder), devices="cpu", name="again")
    storage = storage_at(store)
    storage.overwrite(leases.run_path(ELSEWHERE), ELSEWHERE, json.dumps({"run": ELSEWHERE, "host": "far"}).encode())
    storage.put_if_absent(f"leases/{'0' * 32}-00000000", ELSEWHERE, json.dumps({"run": ELSEWHERE}).encode())
    assert api.verify(store).problems == []
    empty = [kind for kind, pattern in KINDS.items() if not list(store.glob(pattern))]
    assert not empty, empty
    return Everything(store, folder, encoder, purges)  # type: ignore[arg-type]


Action = Callable[[], object]


class Refused(Exception):
    """A command ended with an exit code other than 0; what it printed."""

    def __init__(self, code: int, printed: str) -> None:
        super().__init__(f"exit code {code}: {printed}")
        self.code, self.printed = code, printed


def run_command(*arguments: object) -> str:
    """Run the command line in this process, which has read no file of the store before; return what it prints."""
    tombstones._small.clear()
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(f"{arguments} stumbled") from result.exception
    if result.exit_code:
        raise Refused(result.exit_code, result.output)
    return result.stdout


def exported(store: Path, folder: Path) -> object:
    """The rows of an export, and what it says of itself."""
    try:
        reported = run_command("export", store, folder / "exported", "--table", "text", "--json")
        files = sorted((folder / "exported").glob("**/*.parquet"))
        return reported, [pq.read_table(file).to_pylist() for file in files]
    finally:
        shutil.rmtree(folder / "exported", ignore_errors=True)


def trained_on(store: Path, name: str) -> object:
    """What a training loop gets, as bytes."""
    tombstones._small.clear()
    dataset = retrotool.RetroDataset(store, sequence_length=64, shuffle_blocks=2, name=name)
    return [{key: value.numpy().tobytes() for key, value in batch.items()} for batch in dataset]


def read_neighbours(store: Path) -> object:
    """Every chunk and its neighbours, from both tables."""
    tombstones._small.clear()
    reader = retrotool.open(store)
    ids = [int(i) for part in reader.parts() for i in reader.chunk_ids(part) if reader.is_searchable([i])[0]]
    near = [repr(reader.neighbours(i, name=name)) for i in ids for name in ("main", "text")]
    return [reader.chunk(i).text for i in ids], reader.tokens(ids).tolist(), near


def reads(made: Everything, folder: Path) -> dict[str, Action]:
    """What reads a store, and what it gives to compare."""
    store = made.store
    commands: dict[str, tuple[object, ...]] = {
        "info": ("info", store, "--sources", "--json"),
        "info --files": ("info", store, "--files", "--json"),
        "log": ("log", store, "--json"),
        "search": ("search", store, "a river in the forest", "-k", "5", "--json"),
        "search lists": ("search", store, "a river in the forest", "--index", "lists", "--json"),
        "inspect --document": ("inspect", store, "--document", "doc-3", "--json"),
        "inspect --random": ("inspect", store, "--random", "5", "--table", "text", "--json"),
    }
    found: dict[str, Action] = {name: partial(run_command, *arguments) for name, arguments in commands.items()}
    return {
        **found,
        "export": lambda: exported(store, folder),
        "train": lambda: trained_on(store, "main"),
        "train on text": lambda: trained_on(store, "text"),
        "neighbours": lambda: read_neighbours(store),
    }


def writes(made: Everything, store: Path) -> dict[str, tuple[object, ...]]:
    """Command lines that change ``store``, a copy."""
    kept = made.purges[2]
    of = ("--encoder", "tiny")
    pattern = ("--pattern", "river", "--allow-lossy", "--reason", "test")
    return {
        "chunk": ("chunk", store, made.inputs / "more.jsonl"),
        "embed": ("embed", store, "--encoder", made.encoder, "--devices", "cpu"),
        "embed --name": ("embed", store, "--encoder", made.encoder, "--devices", "cpu", "--name", "third"),
        "index": ("index", store, "--name", "main", *of),
        "index --name": ("index", store, "--name", "third", "--nlist", "2", "--code", "sq8", *of),
        "index --retrain": ("index", store, "--name", "lists", "--retrain", *of),
        "repair": ("repair", store),
        "neighbours": ("neighbours", store, "--saved", "5"),
        "neighbours --name": ("neighbours", store, "--name", "third", "--materialise"),
        "purge": ("purge", store, "--document", "doc-9", "--reason", "test", "--yes"),
        "purge --pattern": ("purge", store, *pattern, "--yes"),
        "purge --erase": ("purge", store, "--document", "doc-5", "--reason", "test", "--yes", "--erase"),
        "purge --dry-run": ("purge", store, *pattern, "--dry-run"),
        "erase": ("erase", store, kept, "--yes"),
        "undo": ("undo", store, kept, "--reason", "test"),
    }
