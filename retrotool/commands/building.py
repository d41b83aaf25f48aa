"""``embed``, ``index`` and ``neighbours``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from retrotool import engine
from retrotool.commands.writing import writing
from retrotool.encoder import find_encoder
from retrotool.errors import ConflictError, UsageError
from retrotool.stages.chunk_plan import write_json
from retrotool.stages.database import Database, count_keys, embedded_parts, pick_encoder
from retrotool.stages.embed import EmbedStage
from retrotool.stages.index import IndexStage, encoder_of, shards
from retrotool.stages.neighbours import NeighboursStage, check_encoders
from retrotool.stages.recall import Recall, tune
from retrotool.store.log import Draft
from retrotool.store.paths import FileName, check_name
from retrotool.store.runs import Run
from retrotool.store.state import State
from retrotool.store.store import Store
from retrotool.tokenizers import BUNDLED

SAVED = 20


@dataclass(frozen=True, slots=True)
class EmbedResult:
    """What ``embed`` did; ``chunks`` are the keys embedded by this run, ``embedded`` those the store has now."""

    encoder: str
    dimension: int
    pooling: str
    chunks: int
    embedded: int
    commit: int


def embed(root: str | Path, *, encoder: str = BUNDLED, device: str = "auto", dtype: str = "auto") -> EmbedResult:
    """Embed every part that has no embeddings of ``encoder``."""
    store = Store.open(root)
    identity = find_encoder(encoder)[1]
    with writing(store) as run:
        stage = EmbedStage(encoder, identity, device, dtype)
        todo = sum(task.weight for task in stage.plan(store))
        engine.execute(stage, store, run)
    state = store.refresh()
    group = state.group("embeddings", identity.name)
    embedded = sum(count_keys(store, int(slot)) for slot in group)
    return EmbedResult(identity.name, identity.dimension, identity.pooling, todo, embedded, state.number)


@dataclass(frozen=True, slots=True)
class IndexResult:
    """What ``index`` made. ``bytes_per_vector`` is what the shards' files take, divided by their vectors."""

    name: str
    encoder: str
    kind: str
    vectors: int
    shards: int
    nlist: int
    nprobe: int
    bytes_per_vector: float
    recall_at_10: float
    recall_error: float
    commit: int
    curve: tuple[Recall, ...] = ()


def index(
    root: str | Path,
    *,
    name: str = "main",
    encoder: str | None = None,
    target_recall: float = 0.95,
    stage: IndexStage | None = None,
) -> IndexResult:
    """Index every part that has embeddings and is in no shard, and measure the recall."""
    if not 0 < target_recall <= 1:
        raise UsageError(f"--target-recall {target_recall} is not above 0 and at most 1")
    check_name(name, "--name")
    store = Store.open(root)
    chosen = pick_encoder(store, encoder or encoder_of(store, name))
    stage = stage or IndexStage(name, chosen)
    with writing(store) as run:
        engine.execute(stage, store, run)
        record = store.refresh().records.get(f"index:{name}")
        current = sorted(shards(store.state, name))
        vectors = sum(entry.rows for slot in current if (entry := store.state.file("index", slot, name)) is not None)
        made = {"shards": current, "vectors": vectors, "target": target_recall}
        if record is None or any(record[key] != value for key, value in made.items()):
            record = _measure_until_committed(store, run, name, chosen, target_recall)
    state = store.refresh()
    curve = tuple(Recall(**point) for point in record["curve"])
    shown = {
        key: record[key]
        for key in ("encoder", "kind", "vectors", "nlist", "nprobe", "bytes_per_vector", "recall_at_10", "recall_error")
    }
    return IndexResult(name=name, shards=len(record["shards"]), commit=state.number, curve=curve, **shown)


def _measure_until_committed(store: Store, run: Run, name: str, encoder: str, target: float) -> dict[str, Any]:
    """Measure, and again if another process has changed the shards meanwhile."""
    while True:
        try:
            return _measure(store, run, name, encoder, target)
        except ConflictError:
            store.refresh()


def _measure(store: Store, run: Run, name: str, encoder: str, target: float) -> dict[str, Any]:
    """Measure an index's recall and commit its record."""
    parts = len(embedded_parts(store, encoder))
    with tqdm(total=parts, unit="part", desc="recall", disable=None, delay=2, file=sys.stderr) as bar:
        point, curve = tune(store, encoder, name, target, bar.update)
    group = store.state.group("index", name)
    entries = {slot: entry for slot in group if slot.startswith("shard-") and (entry := group.get(slot)) is not None}
    trained = group.get("trained")
    assert trained is not None, "the stage has just trained"
    count = sum(entry.rows for entry in entries.values())
    size = sum(entry.bytes for entry in entries.values())
    nlist = _nlist(store, trained.path)
    record: dict[str, Any] = {
        "encoder": encoder, "kind": "IVF, float16" if nlist else "flat, float16",
        "nlist": nlist, "nprobe": point.nprobe, "target": target,
        "vectors": count, "bytes_per_vector": round(size / max(count, 1), 2), "shards": sorted(entries),
        "recall_at_10": round(point.recall, 4), "recall_error": round(point.error, 4),
        "curve": [{"nprobe": p.nprobe, "recall": p.recall, "error": p.error, "queries": p.queries} for p in curve],
    }  # fmt: skip
    report = write_json(store.root, FileName.new(run.id, "index", "recall", "json", name), record, len(curve))

    def build(state: State) -> Draft:
        if {slot: state.file("index", slot, name) for slot in shards(state, name)} != entries:
            raise ConflictError(f"index {name!r} was changed while its recall was measured")
        old = state.file("index", "recall", name)
        settings = {"name": name, "encoder": encoder, "target": target}
        return Draft(
            "index", settings, add=(report,), remove=(old.path,) if old else (), records={f"index:{name}": record}
        )

    store.commit(run, build)
    return record


def _nlist(store: Store, trained: str) -> int:
    import faiss

    index = faiss.read_index(str(store.root / trained))
    return int(index.nlist) if isinstance(index, faiss.IndexIVF) else 0


@dataclass(frozen=True, slots=True)
class NeighboursResult:
    """What ``neighbours`` did; ``queries`` are the keys searched for by this run, ``rows`` those the table has now."""

    name: str
    database: str
    index: str
    encoder: str
    queries: int
    rows: int
    k: int
    saved: int
    commit: int


def neighbours(
    root: str | Path,
    *,
    queries: str | Path | None = None,
    k: int = 2,
    saved: int = SAVED,
    name: str = "main",
    index: str = "main",
) -> NeighboursResult:
    """Find the neighbours, in the store ``root``, of every chunk of ``queries`` (default: of itself)."""
    if not 1 <= k <= saved:
        raise UsageError(f"-k {k} is not between 1 and --saved {saved}")
    if saved > 1000:
        raise UsageError(f"--saved {saved} is more than 1000")
    check_name(name, "--name")
    database = Database(Store.open(root), index)
    store = Store.open(queries) if queries is not None else Store.open(root)
    check_encoders(store, database)
    with writing(store) as run:
        stage = NeighboursStage(str(Path(root).absolute()), index, name, saved, k)
        todo = sum(task.weight for task in stage.plan(store))
        engine.execute(stage, store, run)
        record = stage.record(database)
        store.commit(run, lambda state: _record(state, f"neighbours:{name}", record))
    state = store.refresh()
    group = state.group("neighbours", name)
    rows = sum(count_keys(store, int(slot)) for slot in group)
    return NeighboursResult(name, str(root), index, database.encoder, todo, rows, k, saved, state.number)


def _record(state: State, key: str, value: dict[str, Any]) -> Draft | None:
    """A commit that sets a record, if it is not so already."""
    return None if state.records.get(key) == value else Draft("neighbours", records={key: value})
