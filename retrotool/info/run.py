"""``info`` and ``verify``."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retrotool.ann import lists
from retrotool.chunk.chunk_plan import unfinished_plans
from retrotool.embed.search_scope import count_living_keys
from retrotool.errors import CorruptError, ErasedError, RetrotoolError
from retrotool.index.index_files import read_trained, shards, trained_entry
from retrotool.info.corpus_statistics import Shape, shape_of
from retrotool.neighbours.dependents import Dependent, dependents
from retrotool.neighbours.filters import Filters, named
from retrotool.neighbours.stage import database_of
from retrotool.purge.undo_run import count_behind
from retrotool.store.atomic import FileEntry
from retrotool.store.parts import n_keys, read_key
from retrotool.store.paths import FileName, generation_in, part_slot
from retrotool.store.store import Store
from retrotool.store.tables import text_size
from retrotool.store.tombstones import Tombstones, read_tombstones
from retrotool.store.verify import Verification, total_bytes
from retrotool.store.verify import verify as verify_store

_LOOKED_AT = 64
"""Parts of a database in which names of sources are looked for."""
ATTEMPTS = 5
"""How often ``verify`` begins, when other processes remove what it checks."""


@dataclass(frozen=True, slots=True)
class Info:
    """What is in a store. Current files are listed with paths relative to it.

    ``keys`` are the chunks that are searched by and for: all but the values of key-value records. ``dependents``
    are the stores that are recorded to have neighbours in this one.
    """

    path: str
    uuid: str
    documents: int
    chunks: int
    keys: int
    tokens: int
    set_aside: int
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
    shape: Shape
    dependents: list[Dependent] = field(default_factory=list)


def info(root: str | Path) -> Info:
    """Describe a store; reads the log, the tombstones, and some columns of documents.

    Also read are the keys of parts that have both values and purged chunks.
    """
    store = Store.open(root)
    state = store.state
    totals = state.records.get("totals", {})
    sizes: dict[str, int] = {}
    for file in state.files():
        kind = FileName.parse(file.path).kind
        sizes[kind] = sizes.get(kind, 0) + file.bytes
    own = store.identity
    tombstones = read_tombstones(store)
    chunks = int(totals.get("chunks", 0))
    return Info(
        path=str(root),
        uuid=own.uuid,
        documents=int(totals.get("documents", 0)),
        chunks=chunks,
        keys=chunks - _living_values(store, tombstones),
        tokens=int(totals.get("tokens", 0)),
        set_aside=int(totals.get("set_aside", 0)),
        purged=len(tombstones),
        chunk_length=own.chunk_length,
        tokenizer={name: getattr(own.tokenizer, name) for name in ("name", "sha256", "vocabulary", "lossless")},
        commit=state.number,
        bytes=sizes,
        parts=[_part(store, part) for part in state.parts()],
        encoders=_encoders(store, tombstones),
        indexes={name: _index(store, name) for name in state.names("index")},
        neighbours=_neighbours(store, tombstones),
        # The oldest first: their ids are random.
        purges=dict(sorted(state.with_prefix("purge:").items(), key=lambda one: int(one[1]["commit"]))),
        tombstones=_files(store, "tombstones"),
        blocked=_files(store, "blocked"),
        quarantine=_files(store, "quarantine"),
        unfinished=len(unfinished_plans(state)),
        shape=shape_of(store, tombstones),
        dependents=dependents(store),
    )  # fmt: skip


def _living_values(store: Store, tombstones: Tombstones) -> int:
    """Chunks that are no keys and not purged. The log counts them by part; only which of them are purged is read."""
    values = 0
    for part in store.state.parts():
        entry = store.state.part_file("chunks", part)
        if entry is not None and n_keys(entry) < entry.rows:
            values += entry.rows - n_keys(entry)
            purged = tombstones.rows(part)
            if len(purged):  # the erased are among them
                values -= int((~read_key(store, part)[purged]).sum())
    return values


def _part(store: Store, part: int) -> dict[str, Any]:
    state, slot = store.state, part_slot(part)

    def files(kind: str) -> dict[str, Any]:
        found = {name: state.file(kind, slot, name) for name in state.names(kind)}
        return {name: {"path": entry.path} for name, entry in found.items() if entry is not None}

    described: dict[str, Any] = {"part": part}
    for kind in ("documents", "chunks"):
        entry = state.file(kind, slot)
        if entry is not None:
            described[kind] = {"path": entry.path, "rows": entry.rows}
    return {**described, "embeddings": files("embeddings"), "neighbours": files("neighbours")}


def _files(store: Store, kind: str) -> list[dict[str, Any]]:
    group = store.state.group(kind)
    return [{"path": e.path, "rows": e.rows} for slot in group if (e := group.get(slot)) is not None]


def _encoders(store: Store, tombstones: Tombstones) -> dict[str, Any]:
    """What is covered by embeddings, and what ``embed --check`` found last."""
    checks = store.state.with_prefix("fidelity:")
    found = _covered(store, tombstones, "encoder:", "embeddings")
    return {name: {**about, "check": checks[name]} if name in checks else about for name, about in found.items()}


def _covered(store: Store, tombstones: Tombstones, prefix: str, kind: str) -> dict[str, Any]:
    """Records with how many parts, and living keys in them, they cover."""
    found = {}
    for name, record in store.state.with_prefix(prefix).items():
        group = store.state.group(kind, name)
        rows = sum(count_living_keys(store, int(slot), tombstones) for slot in group)
        found[name] = {**record, "parts": len(group), "rows": rows}
    return found


def _neighbours(store: Store, tombstones: Tombstones) -> dict[str, Any]:
    """Tables, with what is left out of them in names, and mixtures of them."""
    found = _covered(store, tombstones, "neighbours:", "neighbours")
    for name, about in list(found.items()):
        if tabled := count_behind(store, name):
            found[name] = {**about, "behind": tabled}
        if about.get("text"):
            sizes = [text_size(entry) for entry in store.state.group("neighbours", name).entries()]
            found[name] = {**found[name], "text_parts": sum(size >= about["k"] for size in sizes)}
    for name, about in found.items():
        if "mix" in about:
            of = [found[member["table"]] for member in about["mix"] if member["table"] in found]
            found[name] = {
                **about,
                **{count: min((one[count] for one in of), default=0) for count in ("parts", "rows")},
            }
        elif "filters" in about:
            found[name] = {**about, "filters": _filters(store, name)}
    return found


def _filters(store: Store, table: str) -> dict[str, Any]:
    """What a table leaves out, with the names of sources as far as its database is there and they are soon found."""
    filters = Filters.of(store.state.records[f"neighbours:{table}"])
    databases = []
    if filters.sources:
        with contextlib.suppress(RetrotoolError, OSError):
            databases = [database_of(store, table)[0]]
    return named(filters, store, databases, _LOOKED_AT)


def _index(store: Store, name: str) -> dict[str, Any]:
    record = dict(store.state.records.get(f"index:{name}", {}))
    record.pop("curve", None)
    trained = trained_entry(store.state, name)
    entries = list(shards(store.state, name).values())
    # The record keeps what was measured; an erase has taken vectors away since.
    vectors = sum(entry.rows for entry in entries)
    return {
        **record,
        "vectors": vectors,
        "trained": trained.path if trained else None,
        "shards": [e.path for e in entries],
    }


def verify(root: str | Path, report: Callable[[int], object] = lambda _: None) -> Verification:
    """Check every file of a store, and give the hashes by which stores are compared.

    A store that can't be opened for what is in it is a problem too; ``ErasedError`` if other processes keep removing
    files that were to be checked.
    """
    for attempt in range(ATTEMPTS):
        reported = 0

        def counted(n: int) -> None:
            nonlocal reported
            reported += n
            report(n)

        try:
            return verify_store(Store.open(root), counted, _read_lists)
        except CorruptError as error:
            return Verification(-1, [f"{error}. {error.advice}".removesuffix(" ")])
        except ErasedError:
            if attempt == ATTEMPTS - 1:
                raise
            report(-reported)  # from the beginning, on the newest commit
    raise AssertionError("the last attempt returns or raises")


def bytes_to_verify(root: str | Path) -> int:
    """How many bytes ``verify`` will report; 0 if the store can't be opened for what is in it."""
    try:
        return total_bytes(Store.open(root))
    except CorruptError:
        return 0


def _read_lists(store: Store, entry: FileEntry) -> Iterator[tuple[Any, Callable[[int, Any], bool]]]:
    name = FileName.parse(entry.path)
    # A training that is broken is noted as such: its shards are still read, by what they hold of it.
    trained = None
    with contextlib.suppress(CorruptError):
        trained = read_trained(store, name.name, generation_in(name.slot))[1]
    shard = lists.read_lists(store.path(entry), trained)
    for number in shard.numbers:
        yield shard.ids(number), functools.partial(shard.may_stand_for, number)
