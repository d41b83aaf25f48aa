"""``repair``: verify a store, rebuild what was derived from chunks, and verify it again.

A rebuilt file gets a new name, and one commit replaces the damaged one. So a kill leaves the old state or the
new one, a concurrent erase makes the commit fail instead of returning what it erased, and sound files stay as
they are. The stages that made them rebuild embeddings (with the recorded encoder), then shards, then
neighbour tables. Training that gives other bytes than before becomes a new generation of the index. A later
round repairs what only shows once others are repaired. Scans are dropped, as they only save time.

A job of an array verifies its share of the files. If it finds damage, it looks for broken files in the whole
store, as nothing may be rebuilt from these, and rebuilds them and its own, together with other such jobs.

Cost: reading the store once, and again after each round; and the work to make the damaged files.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from retrotool import engine, interrupts
from retrotool.ann.choice import parse_factory
from retrotool.ann.lists import to_faiss
from retrotool.cli.command_lines import command_line
from retrotool.embed.search_scope import SearchableRows, embedded_parts
from retrotool.embed.stage import EmbedStage
from retrotool.encoder import find_encoder
from retrotool.encoder.devices import pick_device
from retrotool.engine.task import task_key
from retrotool.errors import AbortError, CorruptError, RetrotoolError, StorageError, UsageError
from retrotool.index.index_records import RECALL, RECALL_SAMPLE, SHARD, IndexFiles
from retrotool.index.recall import measure_until_committed
from retrotool.index.run import Options, index
from retrotool.index.searching import write_index
from retrotool.index.stage import IndexStage, train_index
from retrotool.info.problems import Problem, problem_with
from retrotool.info.verify import Verification, verify
from retrotool.neighbours.filters import Filters
from retrotool.neighbours.stage import NeighboursStage, database_of
from retrotool.store import leases, log
from retrotool.store.folding import writing
from retrotool.store.leases import Run
from retrotool.store.log import Draft, FileEntry
from retrotool.store.paths import FileName, generation_in
from retrotool.store.state import State, decode_checkpoint
from retrotool.store.store import Store, checkpoint_files
from retrotool.store.sums import with_sums
from retrotool.store.tombstones import read_tombstones

_ROUNDS = 4
_POLL_SECONDS = 1.0  # between two looks at whether another job has trained an index again


@dataclass(frozen=True, slots=True)
class Repaired:
    """A damaged file and its ``replacement`` ("": removed); ``same``: with the SHA-256 that was logged."""

    path: str
    replacement: str
    same: bool


@dataclass(frozen=True, slots=True)
class RepairResult:
    """The result of ``repair``, see ``docs/json.md``: ``problems`` as they were, and those ``remaining``.

    ``shard``: I/N in a job of an array, which are those of its share, and broken files of others.
    """

    ok: bool
    commit: int
    shard: str
    problems: tuple[Problem, ...]
    remaining: tuple[Problem, ...]
    repaired: tuple[Repaired, ...] = ()


def repair(root: str | Path, *, dry_run: bool = False, devices: str = "auto") -> RepairResult:
    """Rebuild the damaged files that can be rebuilt; ``dry_run``: only say what is damaged."""
    before = found = _verified(root)
    if found.ok and not dry_run:
        with suppress(StorageError), writing(Store.open(root)):  # removes what a killed repair left
            pass
    if found.ok or not any(problem.repairable for problem in found.problems) or dry_run:
        return RepairResult(found.ok, found.commit, found.shard, tuple(found.problems), tuple(found.problems))
    store, used = Store.open(root), tuple(engine.worker_devices(devices))
    tried, failed = dict[str, FileEntry | None](), dict[str, str]()
    for _ in range(_ROUNDS):
        wanted = {problem.path for problem in found.problems if problem.repairable}.difference(failed)
        if not wanted:
            break
        files = {entry.path: entry for entry in store.at(found.commit).state.files()}  # others may repair them, too
        tried |= {path: files.get(path) for path in sorted(wanted)}
        with engine.doing_everything():
            _Round(store, wanted, used, failed).work()
        found = _verified(root)
    store.refresh()
    repaired = (_repaired(store, path, entry) for path, entry in tried.items())
    return RepairResult(
        found.ok, found.commit, found.shard, tuple(before.problems),
        tuple(
            replace(one, remedy=failed[one.path], repairable=False) if one.path in failed else one
            for one in found.problems
        ),
        tuple(one for one in repaired if one is not None),
    )  # fmt: skip


def _verified(root: str | Path) -> Verification:
    """Verify a store; damaged checkpoints, which readers ignore, are problems too."""
    found = verify(root)
    if found.shard and not found.ok:
        found = verify(root, all_sums=True)
    job, _ = engine.engine_in_use().shard or (0, 1)
    if found.commit >= 0 and job == 0:
        store = Store.open(root)
        torn = [path for _, path in checkpoint_files(store.storage) if not _is_checkpoint(store, path)]
        found.problems += [problem_with(store, path, f"{path} is damaged: readers ignore it") for path in torn]
        found.ok = not found.problems
    return found


def _is_checkpoint(store: Store, path: str) -> bool:
    with suppress(CorruptError, FileNotFoundError):  # reported by verify; replaced by a newer one
        return decode_checkpoint(store.storage.get(path)) is not None
    return True


def _repaired(store: Store, path: str, entry: FileEntry | None) -> Repaired | None:
    """Return how a damaged file was replaced; None if it was not. ``entry``: of a file in the state."""
    now = None if entry is None else store.state.file(entry.kind, entry.slot, entry.name)
    if now is None:
        return Repaired(path, "", False) if store.storage.stat(path) is None else None
    return Repaired(path, now.path, entry is not None and now.sha256 == entry.sha256) if now.path != path else None


@dataclass(frozen=True, slots=True)
class _Round:
    """One attempt at all damaged files; ``failed`` gets the reasons, with advice, of those that it leaves."""

    store: Store
    wanted: set[str]
    devices: tuple[str, ...]
    failed: dict[str, str]

    def work(self) -> None:
        ways = {"embeddings": self._embed, "index": self._index, "neighbours": self._search}
        with writing(self.store) as run:  # which also removes broken entries of staging/
            if bad := [path for _, path in checkpoint_files(self.store.storage) if path in self.wanted]:
                self.store.storage.delete(bad)
                self.store.write_checkpoint(run)
            for kind in (*ways, "scans", "routes"):
                files = self.store.refresh().files()
                broken = [entry for entry in files if entry.path in self.wanted and entry.kind == kind]
                for name in dict.fromkeys(entry.name for entry in broken):
                    mine = [entry for entry in broken if entry.name == name]
                    try:
                        ways.get(kind, self._drop)(run, name, mine)
                    except (StorageError, AbortError):
                        raise
                    except RetrotoolError as error:
                        reason = f"It can't be rebuilt: {error}. {error.advice}"
                        self.failed.update((one.path, reason) for one in mine if self.store.refresh().has(one.path))

    def _embed(self, run: Run, name: str, broken: Sequence[FileEntry]) -> None:
        record = self.store.state.records[f"encoder:{name}"]
        origin = str(record["origin"])
        shape = {"pooling": record["pooling"], "dimension": record["dimension"]}
        identity = find_encoder(origin, name=name, **shape)[1]
        if identity.sha256 != record["sha256"]:
            moved = f"If it was moved, record its new place: {command_line('embed', self.store)} --encoder DIR"
            raise UsageError(f"the encoder at {origin} is not the one that embedded the store", moved)
        dtype = _recorded_dtype(self.store, name, pick_device(self.devices[0]))
        stage = EmbedStage(origin, identity, self.devices, dtype, broken=_paths(broken))
        engine.execute(stage, self.store, run, workers=len(self.devices))

    def _index(self, run: Run, name: str, broken: Sequence[FileEntry]) -> None:
        store = self.store
        for entry in broken:
            if entry.slot.startswith("trained") and not self._train_alone(run, name, entry):
                if engine.is_a_job():
                    advice = f"Run it without --shard: {command_line('repair', store)}"
                    raise UsageError("its training gives other bytes now, and one process has to train it", advice)
                index(store.place, name=name, options=Options(devices=",".join(self.devices), retrain=True))
                return
        shards = [entry for entry in broken if entry.slot.startswith(SHARD)]
        for generation in sorted({generation_in(entry.slot) for entry in shards}):
            encoder, mine = IndexFiles(store.state, name, generation).encoder or "", _paths(shards)
            stage = IndexStage(name, encoder, generation=generation, devices=self.devices, broken=mine, trained=True)
            engine.execute(stage, store, run, workers=len(self.devices))
        record = IndexFiles(store.refresh(), name).record
        if record is not None and (shards or any(entry.slot == RECALL for entry in broken)):
            generation, target = record.generation, record.target
            measure_until_committed(store, run, name, generation, target, RECALL_SAMPLE, self.devices, None)

    def _train_alone(self, run: Run, name: str, entry: FileEntry) -> bool:
        """Return whether the file was trained again to the same bytes, by this run or by another."""
        store, key = self.store, task_key("repair", {"training": entry.path}, [])
        while not leases.take_claim(store.storage, key, run.id):
            interrupts.check()
            time.sleep(_POLL_SECONDS)
        try:
            return not store.refresh().has(entry.path) or self._train(run, name, entry)
        finally:
            leases.release_claim(store.storage, key, run.id)

    def _train(self, run: Run, name: str, entry: FileEntry) -> bool:
        """Train with the recorded settings; replace the file and return True if that gave the same bytes."""
        store = self.store
        training = IndexFiles(store.state, name, generation_in(entry.slot)).training
        assert training is not None, "its file is live"
        rows = sorted(training.sampled(embedded_parts(store, training.encoder)))
        searchable = SearchableRows(store, rows, read_tombstones(store))
        choice = parse_factory(training.factory, training.dimension)
        memory, device = training.asked.memory, pick_device(self.devices[0])
        made, _ = train_index(store, training.encoder, searchable, choice, memory=memory, device=device)
        file = FileName.new(run.id, "index", entry.slot, "faiss", name)
        new = write_index(store, to_faiss(made), file, entry.about)
        if new.sha256 == entry.sha256:
            replaced = Draft("repair", add=(new,), remove=(entry.path,))
            store.commit(run, lambda state: replaced if state.has(entry.path) else None)
        if not store.state.has(new.path):
            store.storage.delete(with_sums(new.path))
        return new.sha256 == entry.sha256

    def _search(self, run: Run, name: str, broken: Sequence[FileEntry]) -> None:
        database, record = database_of(self.store, name)
        stage = NeighboursStage(
            database.uri, record["index"], name, record["saved"], record["k"], record["encoder"],
            devices=self.devices, filters=Filters.of(record), text=bool(record.get("text")),
            rerank=record.get("rerank", ""), broken=_paths(broken),
        )  # fmt: skip
        engine.execute(stage, self.store, run, workers=len(self.devices))

    def _drop(self, run: Run, _: str, broken: Sequence[FileEntry]) -> None:
        def remove(state: State) -> Draft | None:
            left = tuple(filter(state.has, _paths(broken)))
            return Draft("repair", remove=left) if left else None

        self.store.commit(run, remove)


def _paths(entries: Sequence[FileEntry]) -> tuple[str, ...]:
    return tuple(entry.path for entry in entries)


def _recorded_dtype(store: Store, encoder: str, device: str) -> str:
    """Return the number type in which vectors were computed last, if that was on the same kind of device."""
    for number in range(store.state.number, -1, -1):
        commit = log.read(store.storage, number)
        made = {} if commit is None or commit.kind != "embed" else commit.settings
        if made.get("encoder") == encoder and "dtype" in made:
            return str(made["dtype"]) if (made["device"] == "cpu") == (device == "cpu") else "auto"
    return "auto"
