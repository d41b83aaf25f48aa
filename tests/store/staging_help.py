"""Finished tasks of all kinds, for the tests of staging."""

from __future__ import annotations

import hashlib
from pathlib import Path

from store_help import commit, make_store, write
from stored import stored_file

from retrotool.store import folding, staging
from retrotool.store.leases import Run
from retrotool.store.log import FileEntry
from retrotool.store.staging import COUNTS, Staged, Unit
from retrotool.store.state import State
from retrotool.store.storage import Storage
from retrotool.store.store import Store

PARTS = {("a", 0): 1, ("a", 1): 2, ("a", 2): 0, ("b", 0): 1}
"""How many parts each unit of two plans has, in the order of their numbers."""


def plan(store: Store, run: Run) -> None:
    """Commit the plans of ``PARTS``."""
    for order, name in enumerate("ab"):
        units = sum(plan == name for plan, _ in PARTS)
        progress = {"parts": 0, "units": units, "done": 0, "finished": False, "order": order}
        commit(store, run, records={f"plan:{name}": {**dict.fromkeys(COUNTS, 0), **progress}})


def unit(root: Path | Storage, run: str, name: str, index: int) -> Staged:
    """Do a unit of a plan: its files say which it is."""

    def file(kind: str, part: int, slot: str = "") -> FileEntry:
        return write(root, run, kind, slot, f"{name} {index} {part:04d}.{kind}".encode())

    parts = tuple(tuple(file(kind, part) for kind in ("documents", "chunks")) for part in range(PARTS[name, index]))
    quarantine = file("quarantine", 0, f"{name}.{index}") if (name, index) == ("a", 1) else None
    counts = dict.fromkeys(COUNTS, 10 + index)
    return Staged("chunk", unit=Unit(name, index, parts, quarantine, counts), task=task_key(f"{name}{index}"), run=run)


def task_key(what: str) -> str:
    """The key of a task, 32 hexadecimal digits."""
    return hashlib.blake2b(what.encode(), digest_size=16).hexdigest()


def encoder(about: str) -> dict[str, object]:
    """The record of an encoder."""
    return {"origin": about, "sha256": hashlib.sha256(about.encode()).hexdigest(), "pooling": "mean", "dimension": 32}


def embedding(root: Path | Storage, run: str, part: int, reads: tuple[str, ...], about: str = "one") -> Staged:
    """Embed a part."""
    data = f"{part} {about}".encode()
    add = write(root, run, "embeddings", f"{part:06d}", data, name="tiny")
    records = {"encoder:tiny": encoder(about)}
    return Staged("embed", reads=reads, add=(add,), records=records, task=task_key(f"embed {part} {about}"), run=run)


def numbered(state: State, root: Path) -> list[str]:
    """What the chunks of each part say, by part number."""
    assert state.all_parts() == list(range(len(state.all_parts())))
    return [stored_file(root, state.part_file("chunks", part).path).read_text() for part in state.all_parts()]


TOTALS = {**dict.fromkeys(COUNTS, 0), "rejected": 10 + 11 + 12 + 10}
"""Totals of a store in which all units are committed: their plans are not finished, so their parts are pending."""
IN_ORDER = ["a 0 0000.chunks", "a 1 0000.chunks", "a 1 0001.chunks", "b 0 0000.chunks"]


def planned_store(root: Path | str) -> Store:
    """A store with the two plans of ``PARTS``."""
    store = make_store(root)
    with Run(store.storage) as run:
        plan(store, run)
    return store


def staged_store(root: Path) -> Store:
    """A store with every unit staged but the first, which is committed, and embeddings of its part staged."""
    store = planned_store(root)
    with Run(store.storage) as run:
        staging.stage(store.storage, unit(Path(store.place), run.id, "a", 0))
        folding.fold(store, run)
        for name, index in list(PARTS)[1:]:
            staging.stage(store.storage, unit(Path(store.place), run.id, name, index))
        read = store.state.part_file("chunks", 0).path
        staging.stage(store.storage, embedding(Path(store.place), run.id, 0, (read,)))
    return store
