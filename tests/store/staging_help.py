"""Finished tasks of all kinds, for the tests of staging."""

from __future__ import annotations

from pathlib import Path

from store_help import commit, make_store, write

from retrotool.store import folding, staging
from retrotool.store.atomic import FileEntry
from retrotool.store.runs import Run
from retrotool.store.staging import COUNTS, Staged, Unit
from retrotool.store.state import State
from retrotool.store.store import Store

PARTS = {("a", 0): 1, ("a", 1): 2, ("a", 2): 0, ("b", 0): 1}
"""How many parts each unit of two plans has, in the order of their numbers."""


def plan(store: Store, run: Run) -> None:
    """Commit the plans of ``PARTS``."""
    for order, name in enumerate("ab"):
        units = sum(plan == name for plan, _ in PARTS)
        progress = {"parts": 0, "units": units, "done": 0, "finished": False, "order": order}
        commit(store, run, records={f"plan:{name}": {**dict.fromkeys(COUNTS, 0), **progress}})


def unit(root: Path, run: str, name: str, index: int) -> Staged:
    """Do a unit of a plan: its files say which it is."""

    def file(slot: str) -> FileEntry:
        return write(root, run, "staging", f"{name}{index}.{slot}", f"{name} {index} {slot}".encode())

    parts = tuple(
        tuple(file(f"{part:04d}.{kind}") for kind in ("documents", "chunks")) for part in range(PARTS[name, index])
    )
    quarantine = file("quarantine") if (name, index) == ("a", 1) else None
    counts = dict.fromkeys(COUNTS, 10 + index)
    return Staged(f"task-{name}{index}", "chunk", run, unit=Unit(name, index, parts, quarantine, counts))


def embedding(root: Path, run: str, part: int, reads: tuple[str, ...], about: str = "one") -> Staged:
    """Embed a part."""
    data = f"{part} {about}".encode()
    add = write(root, run, "embeddings", f"{part:06d}", data, name="tiny")
    records = {"encoder:tiny": about}
    key = f"embed-{part}-{about}".replace(" ", "-")
    return Staged(key, "embed", run, reads=reads, add=(add,), records=records)


def numbered(state: State, root: Path) -> list[str]:
    """What the chunks of each part say, by part number."""
    assert state.parts() == list(range(len(state.parts())))
    return [(root / state.part_file("chunks", part).path).read_text() for part in state.parts()]


IN_ORDER = ["a 0 0000.chunks", "a 1 0000.chunks", "a 1 0001.chunks", "b 0 0000.chunks"]


def planned_store(root: Path) -> Store:
    """A store with the two plans of ``PARTS``."""
    store = make_store(root)
    with Run(store.root) as run:
        plan(store, run)
    return store


def staged_store(root: Path) -> Store:
    """A store with every unit staged but the first, which is committed, and embeddings of its part staged."""
    store = planned_store(root)
    with Run(store.root) as run:
        staging.stage(store.root, unit(store.root, run.id, "a", 0))
        folding.fold(store, run)
        for name, index in list(PARTS)[1:]:
            staging.stage(store.root, unit(store.root, run.id, name, index))
        read = store.state.part_file("chunks", 0).path
        staging.stage(store.root, embedding(store.root, run.id, 0, (read,)))
    return store
