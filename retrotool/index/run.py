"""Run ``index``: build what is new and measure it; retrain, merge or drop an index."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from retrotool import engine
from retrotool.ann.choice import IndexOptions, parse_factory
from retrotool.chunk.chunk_plan import read_json_file
from retrotool.cli.command_lines import command_line
from retrotool.embed.search_scope import count_left, embedded_parts, pick_encoder
from retrotool.errors import UsageError
from retrotool.index.index_records import (
    DEFAULT,
    INDEX,
    RECALL,
    RECALL_SAMPLE,
    IndexFiles,
    IndexRecord,
    default_index,
    index_record,
)
from retrotool.index.recall import Drift, Recall, drift, measure_until_committed
from retrotool.index.searching import commands_to_index
from retrotool.index.stage import IndexStage, choose_for, superseded
from retrotool.ranges import consecutive_ranges
from retrotool.store import parts
from retrotool.store.folding import writing
from retrotool.store.leases import Run
from retrotool.store.log import Draft, FileEntry
from retrotool.store.paths import check_name
from retrotool.store.specs import COUNT, PART
from retrotool.store.state import State
from retrotool.store.store import Store, retry_overtaken
from retrotool.store.tombstones import read_tombstones

_RETRAIN = "Retrain it with --retrain, or choose another name for the new index with --name."
_POINT = {
    "nprobe": PART, "depth": PART,
    **dict.fromkeys(("recall_at_1", "recall_at_10", "recall_at_100", "error", "scanned", "rate"), float),
}  # fmt: skip
_SOURCE = re.compile(".*", re.DOTALL)
_MEASURED = {"curve?": [_POINT], "groups?": {_SOURCE: {_SOURCE: (float, float, COUNT)}}}


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexResult(IndexRecord):
    """The index after ``index``, see ``docs/json.md``."""

    name: str
    added: int  # vectors indexed by this run
    shards: int
    index_bytes: int
    embedding_bytes: int  # read for re-ranking
    commit: int
    retrain_command: str
    drift: Drift
    curve: tuple[Recall, ...] = ()
    groups: dict[str, dict[str, tuple[float, float, int]]] = field(default_factory=dict)
    in_other_runs: int = 0
    not_embedded: int = 0
    next: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Dropped:
    """The result of ``index --drop``; ``tables`` are neighbours found with the index, which are kept."""

    name: str
    files: int
    bytes: int
    commit: int
    tables: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Options:
    """Options of ``retrotool index``, see its ``--help``; recall is measured with ``sample`` chunks."""

    wanted: IndexOptions = field(default_factory=IndexOptions)
    devices: str = "auto"
    sample: int = RECALL_SAMPLE
    tune: bool = False
    retrain: bool = False
    merge: bool = False
    default: bool = False
    wait: bool = True  # for other runs, which train or write shards


def index(
    root: str | Path,
    *,
    name: str | None = None,
    encoder: str | None = None,
    target_recall: float | None = None,
    options: Options | None = None,
) -> IndexResult:
    """Index embedded parts that are in no shard, and measure recall (default target: as before, or 0.95)."""
    options = options or Options()
    _check(options, target_recall)
    store = Store.open(root)
    name = default_index(store.state) if name is None else name
    check_name(name, "--name")
    asked = [option for option in ("tune", "retrain", "merge") if getattr(options, option)]
    if asked and name not in store.state.names("index"):
        raise _no_index(store, name, asked[0])
    files = IndexFiles(store.state, name)
    wanted = _wanted(files, options, target_recall)
    chosen = pick_encoder(store, encoder or files.encoder)
    store.cache.check_room(store.state.group("embeddings", chosen).entries(), f"an index of {store.place}")
    is_trained = files.trained is not None
    generation = files.generation + (options.retrain and is_trained)
    devices = engine.worker_devices(options.devices)
    stage = IndexStage(
        name, chosen, wanted, generation, tuple(devices), options.merge,
        trained=is_trained and not options.retrain,
    )  # fmt: skip
    before = 0 if options.retrain else files.vectors
    with writing(store) as run:
        if options.retrain:
            _delete_unfinished(store, run, stage)
        _check_training(store, stage, wanted)
        elsewhere = engine.execute(stage, store, run, workers=len(devices), wait=options.wait)
        _check_training(store, stage, wanted)  # another run may have trained it
        if not elsewhere and (options.tune or not _is_measured(store.state, name, generation, wanted.target)):
            target, memory = wanted.target, wanted.memory
            measure_until_committed(store, run, name, generation, target, options.sample, stage.devices, memory)
        if options.default and store.refresh().records.get(DEFAULT) != name and index_record(store.state, name):
            store.commit(run, lambda _: Draft("index", {"default": name}, records={DEFAULT: name}))
    return retry_overtaken(lambda: describe(store, name, before=before, elsewhere=elsewhere))


def drop(root: str | Path, *, name: str) -> Dropped:
    """Delete an index, finished or not, with all its files."""
    store = Store.open(root)
    with writing(store) as run:  # which also deletes the leftovers of an interrupted drop
        if name not in store.state.names("index"):
            raise _no_index(store, name, "drop")
        removed: list[FileEntry] = []

        def build(state: State) -> Draft:
            group = state.group("index", name)
            removed[:] = group.entries()
            records: dict[str, Any] = {key: None for key in (INDEX + name,) if key in state.records}
            if state.records.get(DEFAULT) == name:
                records[DEFAULT] = None
            return Draft("index", {"name": name, "drop": True}, remove=tuple(e.path for e in removed), records=records)

        store.commit(run, build)
    records = store.refresh().with_prefix("neighbours:")
    tables = [table for table, about in records.items() if about.get("index") == name]
    return Dropped(name, len(removed), sum(entry.bytes for entry in removed), store.state.number, tuple(tables))


def describe(store: Store, name: str, *, before: int | None = None, elsewhere: int = 0) -> IndexResult:
    """Return the result for the current index; ``before``: previous number of vectors (None: same)."""
    state = store.refresh()
    files = IndexFiles(state, name)
    record, trained = files.record, files.training
    if record is None:
        if trained is None:
            raise superseded(name)
        record = IndexRecord(encoder=trained.encoder, factory=trained.factory, why=trained.why)
    embedded = embedded_parts(store, record.encoder)
    left = count_left(store, embedded, read_tombstones(store))
    entries, vectors = files.shards.values(), files.vectors
    measured = state.file("index", RECALL, name)
    content = {} if measured is None else read_json_file(store, measured, _MEASURED)
    vector_files = [parts.part_entry(store, "embeddings", part, record.encoder) for part in embedded]
    return IndexResult(
        **{**asdict(record), "vectors": vectors}, name=name, added=0 if before is None else vectors - before,
        shards=len(entries), index_bytes=sum(entry.bytes for entry in entries),
        embedding_bytes=sum(entry.bytes for entry in vector_files), commit=state.number,
        retrain_command=f"{command_line('index', store, name=name)} --retrain", drift=drift(files),
        curve=tuple(Recall(**{one: point[one] for one in _POINT}) for point in content.get("curve", ())),
        groups={kind: {n: tuple(v) for n, v in some.items()} for kind, some in content.get("groups", {}).items()},
        in_other_runs=elsewhere, not_embedded=left,
        next=tuple(commands_to_index(store, record.encoder, name)) if left else (),
    )  # fmt: skip


def _is_measured(state: State, name: str, generation: int, target: float) -> bool:
    files = IndexFiles(state, name, generation)
    record, now = files.record, (files.digest, target, generation, files.vectors)
    return record is not None and (record.files, record.target, record.generation, record.vectors) == now


def _wanted(files: IndexFiles, options: Options, target: float | None) -> IndexOptions:
    wanted, trained = options.wanted, files.training
    if target is None:
        target = wanted.target if files.record is None else files.record.target
    before = trained.asked if trained is not None and options.retrain else IndexOptions()
    if not wanted.names_index:
        wanted = replace(wanted, factory=before.factory, nlist=before.nlist, code=before.code)
    return replace(
        wanted, target=target, memory=before.memory if wanted.memory is None else wanted.memory,
        shard_rows=before.shard_rows if wanted.shard_rows is None else wanted.shard_rows,
    )  # fmt: skip


def _check(options: Options, target: float | None) -> None:
    if target is not None and not 0 < target <= 1:
        raise UsageError(f"--target-recall {target} is not above 0 and at most 1")
    if options.merge and options.retrain:
        raise UsageError("--merge and --retrain can't be combined", "Run one after the other.")
    if options.retrain and engine.is_a_job():
        raise UsageError(
            "--retrain and --shard can't be combined: every job would train",
            "For several GPUs of one machine use --devices; for several machines, --shard with a new --name.",
        )


def _no_index(store: Store, name: str, asked: str) -> UsageError:
    have = ", ".join(store.state.names("index")) or "none"
    return UsageError(
        f"--{asked}: the store {store.place} has no index {name!r}; it has: {have}",
        f"Make it with: {command_line('index', store, name=name)}" if asked != "drop" else "",
    )


def _check_training(store: Store, stage: IndexStage, wanted: IndexOptions) -> None:
    trained = stage.files(store.state).training
    if trained is None:
        return
    if wanted.shard_rows not in (None, trained.shard_rows):
        raise UsageError(
            f"index {stage.index!r} is already trained, for shards of {trained.shard_rows:,} vectors, not "
            f"{wanted.shard_rows:,}",
            _RETRAIN,
        )
    if not wanted.names_index:
        return
    current = parse_factory(trained.factory, trained.dimension)
    requested = choose_for(store, stage.encoder, wanted)
    # The automatic choice may have changed since training: only compare what was requested.
    if wanted.factory is None and wanted.nlist is None:
        requested = replace(requested, nlist=current.nlist)
    if wanted.factory is None and wanted.code is None:
        requested = replace(requested, code=current.code, rotated=current.rotated)
    if requested.factory != current.factory:
        raise UsageError(
            f"index {stage.index!r} is already trained, as {current.factory}, not {requested.factory}", _RETRAIN
        )


def _delete_unfinished(store: Store, run: Run, stage: IndexStage) -> None:
    """Delete an interrupted ``--retrain`` that used other settings or a smaller store."""
    unfinished = stage.files(store.state).training
    if unfinished is None or (
        unfinished.factory == choose_for(store, stage.encoder, stage.wanted).factory
        and unfinished.trained_parts == consecutive_ranges(embedded_parts(store, stage.encoder))
    ):
        return

    def build(state: State) -> Draft:
        files = stage.files(state)
        paths = tuple(one.path for one in (*files.shards.values(), files.trained) if one is not None)
        return Draft("index", {"name": stage.index, "retrain": "restarted"}, remove=paths)

    store.commit(run, build)
