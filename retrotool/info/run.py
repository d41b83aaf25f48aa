"""Describe a store from its log.

For most stores ``info`` reads nothing but the log, and imports neither numpy nor pyarrow. Exceptions:

* tombstones, if embeddings or neighbours cover only some of the parts, and for key-value records;
* lengths and sources of documents, on request: three columns, about ten bytes per document.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrotool.errors import RetrotoolError
from retrotool.index.index_records import IndexFiles
from retrotool.neighbours.dependents import Dependent, dependents
from retrotool.store.log import FileEntry
from retrotool.store.paths import part_slot
from retrotool.store.staging import COUNTS
from retrotool.store.state import State
from retrotool.store.store import Store

if TYPE_CHECKING:
    from retrotool.store.tombstones import Tombstones

READ_DOCUMENTS = 20_000_000  # of more documents, those in evenly spread parts are counted, and scaled to all
LARGEST_SOURCES = 1000
_SAMPLED_PARTS = 64  # parts of a database that are searched for the names of sources


@dataclass(frozen=True, slots=True)
class Shape:
    """Live documents by length and by source. ``share`` of them was read; the counts are scaled to all."""

    lengths: tuple[dict[str, int], ...] = ()  # {tokens, documents}: those with ``tokens`` to 2 · ``tokens`` - 1
    sources: tuple[dict[str, Any], ...] = ()  # {source, documents, chunks, tokens}, the most tokens first
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Info:
    """Description of a store, see ``docs/json.md``; ``shape`` is None unless it was requested."""

    path: str
    uuid: str
    documents: int
    chunks: int
    keys: int
    tokens: int
    rejected: int
    purged: int
    chunk_length: int
    tokenizer: dict[str, Any]
    commit: int
    bytes: dict[str, int]
    parts: list[dict[str, Any]]
    encoders: dict[str, Any]
    indexes: dict[str, Any]
    neighbours: dict[str, Any]
    purges: dict[str, Any]
    tombstones: list[dict[str, Any]]
    blocked: list[dict[str, Any]]
    quarantine: list[dict[str, Any]]
    unfinished: int
    shape: Shape | None
    dependents: list[Dependent] = field(default_factory=list)


def info(root: str | Path, *, documents: bool = False) -> Info:
    """Describe a store. ``documents``: also count documents by length and source, which reads more files."""
    store = Store.open(root)
    state = store.state
    totals = state.records.get("totals", dict.fromkeys(COUNTS, 0))
    sizes: dict[str, int] = {}
    for file in state.files():
        sizes[file.kind] = sizes.get(file.kind, 0) + file.bytes
    own = store.identity
    keys = _Keys(store)
    encoders = _covered(store, keys, "encoder:", "embeddings")
    for name, check in state.with_prefix("fidelity:").items():
        if name in encoders:
            encoders[name]["check"] = check
    return Info(
        path=str(root), uuid=own.uuid, commit=state.number, bytes=sizes, **{name: totals[name] for name in COUNTS},
        keys=keys.count, chunk_length=own.chunk_length,
        purged=sum(entry.rows for entry in _live_chunks(state)) - totals["chunks"],
        tokenizer={name: getattr(own.tokenizer, name) for name in ("name", "sha256", "vocabulary", "lossless")},
        parts=[_part(store, part) for part in state.all_parts()], encoders=encoders,
        indexes={name: _index(store, name) for name in state.names("index")},
        neighbours=_neighbours(store, keys),
        # By age, as their ids are random.
        purges=dict(sorted(state.with_prefix("purge:").items(), key=lambda one: int(one[1]["commit"]))),
        tombstones=_files(store, "tombstones"), blocked=_files(store, "blocked"),
        quarantine=_files(store, "quarantine"),
        unfinished=sum(not plan["finished"] for plan in state.with_prefix("plan:").values()),
        shape=shape_of(store) if documents else None, dependents=dependents(store),
    )  # fmt: skip


class _Keys:
    def __init__(self, store: Store) -> None:
        self._store = store

    @cached_property
    def _tombstones(self) -> Tombstones:
        from retrotool.store.tombstones import read_tombstones

        return read_tombstones(self._store)

    @cached_property
    def count(self) -> int:
        """Number of live keys."""
        if not any("keys" in (entry.about or {}) for entry in _live_chunks(self._store.state)):  # all are keys
            return int(self._store.state.records.get("totals", {}).get("chunks", 0))
        return self._count(self._store.state.parts())

    def count_in(self, kind: str, name: str) -> int:
        """Count the live keys of the parts that have a file of a kind and name."""
        slots = self._store.state.group(kind, name)
        parts = [part for slot in slots if self._store.state.is_live(part := int(slot))]
        return self.count if parts == self._store.state.parts() else self._count(parts)

    def _count(self, parts: list[int]) -> int:
        from retrotool.embed.search_scope import count_live_keys

        return sum(count_live_keys(self._store, part, self._tombstones) for part in parts)


def shape_of(store: Store, read_documents: int = READ_DOCUMENTS) -> Shape:
    """Count the live documents of a store by length and source."""
    import numpy as np
    import pyarrow as pa

    from retrotool.chunk.chunk_plan import documents_within
    from retrotool.store import parts
    from retrotool.store.tombstones import read_tombstones

    tombstones = read_tombstones(store)
    entries = [(part, parts.part_entry(store, "documents", part)) for part in store.state.parts()]
    total = sum(entry.rows for _, entry in entries)
    if not total:
        return Shape()
    chosen = entries[:: -(-total // read_documents)]
    share = sum(entry.rows for _, entry in chosen) / total
    lengths = np.zeros(64, np.int64)
    sources: dict[str, Any] = {}
    for part, entry in chosen:
        table = parts.read_parquet(store, entry, ["source", "n_chunks", "n_tokens"])
        is_live = table["source"].is_valid().to_numpy(zero_copy_only=False).copy()  # erased ones have none
        is_live[documents_within(store, part, tombstones)] = False
        table = table.filter(pa.array(is_live))
        n_tokens = table["n_tokens"].to_numpy()
        lengths += np.bincount(np.log2(np.maximum(n_tokens, 1)).astype(np.int64), minlength=64)[:64]
        grouped = table.group_by("source", use_threads=False)
        for row in grouped.aggregate([("n_tokens", "count"), ("n_chunks", "sum"), ("n_tokens", "sum")]).to_pylist():
            found = np.array([row["n_tokens_count"], row["n_chunks_sum"], row["n_tokens_sum"]])
            sources[row["source"]] = sources.get(row["source"], 0) + found
    largest = Counter({source: int(counts[2]) for source, counts in sources.items()}).most_common(LARGEST_SOURCES)
    scaled = ((source, map(round, (sources[source] / share).tolist())) for source, _ in largest)
    return Shape(
        tuple({"tokens": 2**i, "documents": round(n / share)} for i, n in enumerate(lengths.tolist()) if n),
        tuple({"source": source, "documents": d, "chunks": c, "tokens": n} for source, (d, c, n) in scaled),
        share,
    )


def _live_chunks(state: State) -> list[FileEntry]:
    return [entry for entry in state.group("chunks").entries() if state.is_live(entry.part)]


def _part(store: Store, part: int) -> dict[str, Any]:
    state, slot = store.state, part_slot(part)

    def files(kind: str) -> dict[str, Any]:
        found = {name: state.file(kind, slot, name) for name in state.names(kind)}
        return {name: {"path": entry.path} for name, entry in found.items() if entry is not None}

    described: dict[str, Any] = {"part": part, "pending": not state.is_live(part)}
    for kind in ("documents", "chunks"):
        entry = state.file(kind, slot)
        if entry is not None:
            described[kind] = {"path": entry.path, "rows": entry.rows}
    return {**described, "embeddings": files("embeddings"), "neighbours": files("neighbours")}


def _files(store: Store, kind: str) -> list[dict[str, Any]]:
    return [{"path": entry.path, "rows": entry.rows} for entry in store.state.group(kind).entries()]


def _covered(store: Store, keys: _Keys, prefix: str, kind: str) -> dict[str, Any]:
    """Return records with the numbers of ``parts`` and live keys (``rows``) that they cover."""
    return {
        name: {**record, "parts": len(store.state.group(kind, name)), "rows": keys.count_in(kind, name)}
        for name, record in store.state.with_prefix(prefix).items()
    }


def _neighbours(store: Store, keys: _Keys) -> dict[str, Any]:
    found = _covered(store, keys, "neighbours:", "neighbours")
    for name, about in list(found.items()):
        if about.get("text"):
            from retrotool.store.neighbour_tables import text_size

            sizes = [text_size(entry) for entry in store.state.group("neighbours", name).entries()]
            about = found[name] = {**about, "text_parts": sum(size >= about["k"] for size in sizes)}
        if "mix" in about:
            of = [found[member["table"]] for member in about["mix"] if member["table"] in found]
            fewest = {count: min((one[count] for one in of), default=0) for count in ("parts", "rows")}
            found[name] = {**about, **fewest}
        elif "filters" in about:
            found[name] = {**about, "filters": _filters(store, name)}
        if (edits := store.state.file("edits", "all", name)) is not None:
            found[name]["edits"] = dict(edits.about or {})
    return found


def _filters(store: Store, table: str) -> dict[str, Any]:
    """Return a table's filters, with the names of sources that its database has in few parts."""
    from retrotool.neighbours.filters import Filters, named
    from retrotool.neighbours.stage import database_of

    filters = Filters.of(store.state.records[f"neighbours:{table}"])
    databases = []
    if filters.sources:
        with contextlib.suppress(RetrotoolError, OSError):
            databases = [database_of(store, table)[0]]
    return named(filters, store, databases, _SAMPLED_PARTS)


def _index(store: Store, name: str) -> dict[str, Any]:
    files = IndexFiles(store.state, name)
    return {
        **({} if files.record is None else asdict(files.record)),
        "vectors": files.vectors,  # the record has those of the last measurement; an erase may have removed some
        "trained": files.trained.path if files.trained else None,
        "shards": [entry.path for entry in files.shards.values()],
    }
