"""Making the proofs of purges, before anything of them is erased.

A task is a part: it is read and decoded once for all purges that have chunks in it, and each of these gets its file of
proofs (``stages.proofs``), or one in place of that which it had, with what came to it since. What was drawn from before
is not drawn from again, as it may be erased. So a kill repeats one part, and an erase that is gone on with finds all
there. Which purges: all that have any of the chunks that are to go and are not erased, as nobody can make proofs of
these later.

Cost: that of ``stages.needles``; a part's memory, and 300 bytes a victim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from retrotool.engine.stage import Report, Task, check_there, task_key
from retrotool.errors import CorruptError
from retrotool.purge.needles import Draw, Ids, sampled_victims, tokenizer_of
from retrotool.purge.proofs import (
    KIND,
    Hashes,
    covering,
    hashed,
    joined_hashes,
    read_proofs,
    slot_of,
    write_proofs,
)
from retrotool.purge.purged_chunks import COPIES, has_any, tombstones_of
from retrotool.store import staging
from retrotool.store.atomic import FileEntry
from retrotool.store.restored import standing_purges
from retrotool.store.staging import Staged
from retrotool.store.state import State
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones, read_tombstones


@dataclass(frozen=True, slots=True)
class ProveStage:
    """The parts that have any of ``victims``, which are tombstones, of which a purge lacks proofs."""

    victims: Tombstones
    name: str = field(default="prove", init=False)
    unit: str = field(default="part", init=False)

    def plan(self, store: Store) -> list[Task]:
        """One task a part, with the purges that lack proofs of it."""
        purges = _purges(store, self.victims)
        tasks = []
        for part in sorted(set(self.victims.parts()) & set(store.state.parts())):
            encoders = _encoders(store.state, part)
            lacking = [
                purge
                for purge, chunks in purges.items()
                if len(rows := chunks.rows(part)) and not _is_proven(store.state, purge, part, rows, encoders)
            ]
            if lacking:
                reads = _reads(store.state, lacking, part)
                key = task_key("prove", {"purges": lacking}, reads)
                if not staging.is_staged(store.root, key):
                    tasks.append(Task(key, f"part {part}", 1, {"part": part, "purges": lacking, "reads": reads}))
        return tasks

    def open(self, store: Store) -> ProveWorker:
        """Get ready to decode."""
        return ProveWorker(store)


def _purges(store: Store, victims: Tombstones) -> dict[str, Tombstones]:
    """The purges that are not erased and have any of some chunks, with all of theirs."""
    return {
        purge: Tombstones(tombstones_of(store, purge))
        for purge, record in standing_purges(store.state).items()
        if not record["erased"] and has_any(store, purge, victims)
    }


def _encoders(state: State, part: int) -> list[str]:
    """The encoders that a part has vectors of."""
    return [name for name in state.names("embeddings") if state.part_file("embeddings", part, name) is not None]


def _is_proven(state: State, purge: str, part: int, rows: Ids, encoders: Sequence[str]) -> bool:
    entry = state.file(KIND, slot_of(purge, part))
    return entry is not None and entry.about == covering(rows, encoders)


def _reads(state: State, purges: Sequence[str], part: int) -> list[str]:
    """What a task is void without: that which tells who the victims are, and what is drawn from."""
    entries = [state.file("tombstones", slot) for purge in purges for slot in (purge, purge + COPIES)]
    entries += [state.file(KIND, slot_of(purge, part)) for purge in purges]
    entries += [state.part_file("chunks", part), state.part_file("documents", part)]
    entries += [state.part_file("embeddings", part, name) for name in _encoders(state, part)]
    return [entry.path for entry in entries if entry is not None]


class ProveWorker:
    """Makes the proofs of parts."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._tokenizer = tokenizer_of(store)

    def __call__(self, task: Task, run: str, report: Report) -> Staged:
        """Make the proofs of a part; ``ErasedError`` if what they are made of was replaced meanwhile."""
        reads = tuple(task.inputs["reads"])
        check_there(self._store, reads)
        part, purges = int(task.inputs["part"]), list(task.inputs["purges"])
        before = [self._store.state.file(KIND, slot_of(purge, part)) for purge in purges]
        try:
            add = self._proven(part, purges, before, run)
        except CorruptError:
            check_there(self._store, reads)
            raise
        report(1)
        remove = tuple(entry.path for entry in before if entry is not None)
        return Staged(task.key, "prove", run, reads=reads, add=tuple(add), remove=remove)

    def _proven(self, part: int, purges: list[str], before: list[FileEntry | None], run: str) -> list[FileEntry]:
        store = self._store
        chunks = [tombstones_of(store, purge) for purge in purges]
        rows = [Tombstones(ids).rows(part) for ids in chunks]
        known = [None if entry is None else read_proofs(store, entry) for entry in before]
        kept = [joined_hashes([] if one is None else [one.needles]) for one in known]
        fresh = [mine if one is None else np.setdiff1d(mine, one.rows) for mine, one in zip(rows, known, strict=True)]
        among = np.concatenate([Tombstones(sampled_victims(ids)).rows(part) for ids in chunks])
        draw = Draw(store, read_tombstones(store), self._tokenizer)
        self._add(kept, purges, draw, part, fresh, among)
        encoders = _encoders(store.state, part)
        for name in encoders:
            late = [
                np.intersect1d(mine, one.rows)
                if one is not None and name not in _seen(entry)
                else np.zeros(0, np.int64)
                for mine, one, entry in zip(rows, known, before, strict=True)
            ]
            self._add(kept, purges, draw, part, late, among, name)
        return [
            write_proofs(store, run, slot_of(purge, part), some, mine, about=covering(mine, encoders))
            for purge, some, mine in zip(purges, kept, rows, strict=True)
        ]

    def _add(
        self,
        kept: list[Hashes],
        purges: list[str],
        draw: Draw,
        part: int,
        groups: list[Ids],
        among: Ids,
        encoder: str | None = None,
    ) -> None:
        """Draw from the rows of each purge, and add what was drawn to what is kept of it."""
        if not any(map(len, groups)):
            return
        for several in draw.of_part(part, groups, among, None if encoder is None else [encoder]):
            for purge, some, needles in zip(purges, kept, several, strict=True):
                some.add(hashed(self._store, purge, needles))


def _seen(entry: FileEntry | None) -> list[str]:
    """The encoders whose vectors a file was made of, too."""
    return [] if entry is None or entry.about is None else list(entry.about["encoders"])
