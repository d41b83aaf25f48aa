"""Describe a store from its log, and list its live files for tools that read them without retrotool.

Only the log is read: 120,000 files take two seconds, and neither numpy nor pyarrow is imported. Where
embeddings or neighbours cover only some parts, and for key-value records, ``info`` also reads tombstones.

Folders of a store can also hold leftovers of killed commands and files that are not committed yet, and file
names do not have the number of the part. The log has both facts.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from retrotool.errors import RetrotoolError
from retrotool.index.index_records import IndexFiles
from retrotool.neighbours.dependents import Dependent, dependents
from retrotool.store.log import FileEntry
from retrotool.store.paths import DATA_KINDS, PART_KINDS, part_slot
from retrotool.store.staging import COUNTS
from retrotool.store.state import State
from retrotool.store.store import Store

_SAMPLED_PARTS = 64  # parts of a database that are searched for the names of sources


@dataclass(frozen=True, slots=True)
class Info:
    """Description of a store, see ``docs/json.md``."""

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
    dependents: list[Dependent] = field(default_factory=list)


def info(root: str | Path) -> Info:
    """Describe a store."""
    store = Store.open(root)
    state = store.state
    totals = state.records.get("totals", dict.fromkeys(COUNTS, 0))
    sizes: dict[str, int] = {}
    for file in state.files():
        sizes[file.kind] = sizes.get(file.kind, 0) + file.bytes
    own = store.identity
    every = not any("keys" in (entry.about or {}) for entry in _live_chunks(state))  # then the log has the number
    keys = totals["chunks"] if every else _count_keys(store, state.parts())
    encoders = _covered(store, keys, "encoder:", "embeddings")
    for name, check in state.with_prefix("fidelity:").items():
        if name in encoders:
            encoders[name]["check"] = check
    return Info(
        path=str(root), uuid=own.uuid, commit=state.number, bytes=sizes, **{name: totals[name] for name in COUNTS},
        keys=keys, chunk_length=own.chunk_length,
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
        dependents=dependents(store),
    )  # fmt: skip


def _count_keys(store: Store, parts: list[int]) -> int:
    from retrotool.embed.search_scope import count_keys_of

    return count_keys_of(store, parts)


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


def _covered(store: Store, keys: int, prefix: str, kind: str) -> dict[str, Any]:
    """Return records with the numbers of ``parts`` and live keys (``rows``, of ``keys``) that they cover."""
    found, live = {}, store.state.parts()
    for name, record in store.state.with_prefix(prefix).items():
        slots = store.state.group(kind, name)
        parts = [part for slot in slots if store.state.is_live(part := int(slot))]
        rows = keys if parts == live else _count_keys(store, parts)
        found[name] = {**record, "parts": len(slots), "rows": rows}
    return found


def _neighbours(store: Store, keys: int) -> dict[str, Any]:
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


@dataclass(frozen=True, slots=True)
class ListedFile:
    """A live file; its ``path`` is relative to the store."""

    path: str
    kind: str  # of content, such as chunks
    name: str  # encoder, index, table or scan it belongs to, empty for other kinds
    slot: str  # identifies it among the files of that kind and name
    part: int | None  # None for kinds without a file per part
    rows: int  # its items, such as chunks
    bytes: int
    pending: bool  # its part belongs to an unfinished ``chunk``, and no reader returns it


@dataclass(frozen=True, slots=True)
class FileList:
    """The live files of the store at ``path`` at one ``commit``, by kind, name and slot."""

    path: str
    commit: int
    files: tuple[ListedFile, ...]


def list_files(root: str | Path) -> FileList:
    """List the live files of a store without opening them."""
    state = Store.open(root).state
    listed = []
    for group in (state.group(kind, name) for kind in DATA_KINDS for name in state.names(kind)):
        for one in group.entries():
            part = one.part if one.kind in PART_KINDS else None
            pending = part is not None and part >= state.live
            listed.append(ListedFile(one.path, one.kind, one.name, one.slot, part, one.rows, one.bytes, pending))
    return FileList(str(root), state.number, tuple(listed))
