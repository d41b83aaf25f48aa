"""Decide about documents of a plan whose id the store has already: ``--existing``.

A document with the text that the store has is unchanged, and left out. One with other text is left out, or
replaces the stored document. With ``mirror``, documents of an input that was read again and does not have
their id any more leave the store too. All of this is found when the plan is finished, so a reader sees it in
one commit.

Ids are compared in passes over ranges of their hashes, so memory does not grow with the number of documents:
about 100 bytes for each of ``PASS`` hashes, and 8 bytes for each document that is decided about. Cost: the
ids of all documents of earlier plans, 16 bytes each, are read once per pass, if any document repeats one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retrotool.chunk import chunk_plan
from retrotool.chunk.chunk_plan import HASHES, ChunkPlan, Existing, files_of_plan
from retrotool.chunk.hash_partitions import Places
from retrotool.chunk.quarantine import quarantine_files
from retrotool.ranges import is_in
from retrotool.store import parts
from retrotool.store.blocked import Hashes
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones, read_rejected

PASS = 8 << 20  # hashes compared at a time
_KEY = np.dtype(f"S{parts.HASH_BYTES}")
_NUMBERED = np.dtype(f"S{parts.HASH_BYTES + 4}")  # the number of an input, and a key
_NONE = np.zeros(0, np.int64)
# Documents: their place, their key and text hash (zero for an erased text), and again their key.
_DOCUMENT = np.dtype({
    "names": ["place", "pair", "key"], "formats": ["i8", HASHES, _KEY], "offsets": [0, 8, 8],
})  # fmt: skip
_Documents = npt.NDArray[np.void]


@dataclass(frozen=True, slots=True)
class Update:
    """Documents that a plan and the store have in common, as ascending places ``part << 32 | doc``.

    * ``unchanged``, ``differing``: documents of the plan to leave out: the store has their ids with the same
      text, or with other text.
    * ``new``: documents of the plan that stay, although they repeat the id of a stored one.
    * ``replaced``, ``removed``: live documents of earlier plans that have to go.
    * ``not_mirrored``: inputs of which nothing is removed, and why.
    """

    unchanged: Places
    differing: Places
    new: Places
    replaced: Places
    removed: Places
    not_mirrored: tuple[str, ...] = ()

    @property
    def outdated(self) -> Places:
        """The documents of earlier plans that have to go."""
        return np.union1d(self.replaced, self.removed)


def compare_ids(
    store: Store, plan_id: str, plan: ChunkPlan, tombstones: Tombstones, by_id: Places, existing: Existing, *,
    keep_repeats: bool,
) -> Update:  # fmt: skip
    """Compare the documents of a plan that repeat an id, ``by_id``, with the live ones of earlier plans.

    ``keep_repeats``: documents that repeat one of the same plan stay, so each may replace a stored one.
    """
    state = store.state
    old_parts = range(chunk_plan.parts_of_plan(state, plan_id).start)
    mirrored, not_mirrored = _mirrored(store, plan_id, plan) if existing == "mirror" else ({}, ())
    n_seen = sum(entry.rows for entry in files_of_plan(state, "seen", plan_id)) if mirrored else 0
    n_passes = max(1, -(-len(by_id) // PASS), -(-n_seen // PASS))
    found: list[tuple[Places, ...]] = [(_NONE,) * 5]
    for number in range(n_passes if len(by_id) or mirrored else 0):
        span = (number, n_passes)
        read = (_documents_of(store, part, docs) for part, docs in parts.rows_by_part(by_id))
        mine = np.concatenate([np.zeros(0, _DOCUMENT), *(some[_within(some["key"], span)] for some in read)])
        stored = _live_with(store, old_parts, tombstones, mine["key"])
        decided = _decide(mine, stored, _is_dead(store, mine["place"], tombstones), existing, keep_repeats)
        removed = _removed(store, plan_id, plan, mirrored, tombstones, mine["key"], span) if mirrored else _NONE
        found.append((*decided, removed))
    joined = (np.sort(np.concatenate(column)) for column in zip(*found, strict=True))
    unchanged, differing, new, replaced, removed = joined
    return Update(unchanged, differing, new, replaced, removed, not_mirrored)


def _decide(
    mine: _Documents, stored: _Documents, dead: npt.NDArray[np.bool_], existing: Existing, keep_repeats: bool
) -> tuple[Places, Places, Places, Places]:
    """Return the places of unchanged, differing, new and replaced documents."""
    known = is_in(mine["key"], np.sort(stored["key"]))
    same = is_in(mine["pair"], np.sort(stored["pair"]))
    place = mine["place"]
    if existing in ("skip", "fail"):
        return place[known & same], place[known & ~same], _NONE, _NONE
    candidates = known & ~dead  # a document that was purged since it was read replaces nothing
    if not keep_repeats:
        live = np.flatnonzero(candidates)
        _, first = np.unique(mine["key"][live], return_index=True)
        candidates[:] = False
        candidates[live[first]] = True
    chosen = mine[candidates]
    goes = is_in(stored["key"], np.sort(chosen["key"])) & ~is_in(stored["pair"], np.sort(chosen["pair"]))
    return place[candidates & same], _NONE, place[candidates & ~same], stored["place"][goes]


def _within(keys: Hashes, span: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Return which keys belong to pass ``number`` of ``n``, by their first two bytes."""
    first = np.frombuffer(keys.tobytes(), ">u2")[:: keys.itemsize // 2].astype(np.int64)
    return np.asarray(first * span[1] >> 16 == span[0])


def _documents_of(store: Store, part: int, docs: npt.NDArray[np.int64]) -> _Documents:
    table = parts.read_documents(store, part, ["key", "text_hash"])
    found = np.empty(len(docs), _DOCUMENT)
    found["place"], found["pair"] = parts.chunk_ids(part, docs), chunk_plan.pairs_of(table.take(pa.array(docs)))
    return found


def _live_with(store: Store, numbers: range, tombstones: Tombstones, keys: Hashes) -> _Documents:
    """Return the live documents of the parts ``numbers`` that have one of ``keys``."""
    found = [np.zeros(0, _DOCUMENT)]
    if len(keys):
        wanted = _values(keys)
        for part in filter(numbers.__contains__, store.state.all_parts()):
            docs = _with_keys(parts.read_documents(store, part, ["key"]), wanted)
            docs = np.setdiff1d(docs, chunk_plan.documents_within(store, part, tombstones), assume_unique=True)
            if len(docs):
                found.append(_documents_of(store, part, docs))
    return np.concatenate(found)


def _values(keys: Hashes) -> pa.Array:
    distinct = np.frombuffer(np.unique(keys).tobytes(), np.uint8).reshape(-1, parts.HASH_BYTES)
    return parts.fixed_binary(distinct).cast(pa.binary())


def _with_keys(table: pa.Table, wanted: pa.Array) -> npt.NDArray[np.int64]:
    return np.flatnonzero(pc.is_in(table["key"].cast(pa.binary()), value_set=wanted).to_numpy())


def _is_dead(store: Store, places: Places, tombstones: Tombstones) -> npt.NDArray[np.bool_]:
    """Return which documents have no live chunk."""
    numbers = parts.distinct_parts(places)
    dead = (parts.chunk_ids(part, chunk_plan.documents_within(store, part, tombstones)) for part in numbers)
    return np.isin(places, np.concatenate([_NONE, *dead]))


def _mirrored(store: Store, plan_id: str, plan: ChunkPlan) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return the numbers, by name, of the inputs to mirror, and of which others nothing is removed.

    The ids of rejected rows are unknown, so an input with any is not mirrored.
    """
    rejected: set[str] = set()
    for entry in quarantine_files(store.state, plan_id):
        for table in parts.read_tables(store, entry, ["input"]):
            rejected |= set(pc.unique(table["input"]).to_pylist())
    mirrored = {plan.files[number].name: number for number in plan.read_before}
    broken = [name for name, number in mirrored.items() if plan.files[number].path in rejected]
    why = tuple(f"{name} (it has rejected rows)" for name in broken)
    return {name: number for name, number in mirrored.items() if name not in broken}, why


def _removed(
    store: Store, plan_id: str, plan: ChunkPlan, mirrored: dict[str, int], tombstones: Tombstones, new: Hashes,
    span: tuple[int, int],
) -> Places:  # fmt: skip
    """Return the live documents of inputs to mirror whose id neither the input nor another one has now."""
    seen = np.sort(np.concatenate([np.zeros(0, _NUMBERED), *_seen(store, plan_id, set(mirrored.values()), span)]))
    earlier = {before for number in mirrored.values() for before in plan.read_before[number]}
    numbers = sorted({part for before in earlier for part in chunk_plan.parts_of_plan(store.state, before)})
    names = pa.array(mirrored)
    places, keys, inputs = [_NONE], [np.zeros(0, _KEY)], [pa.array([], pa.string())]
    for part in filter(set(numbers).__contains__, store.state.all_parts()):
        table = parts.read_documents(store, part, ["key", "input"])
        docs = np.flatnonzero(pc.is_in(table["input"], value_set=names).to_numpy())
        docs = np.setdiff1d(docs, chunk_plan.documents_within(store, part, tombstones), assume_unique=True)
        some = table.take(pa.array(docs))
        key = _keys_of(some["key"])
        of = np.array([mirrored[name] for name in some["input"].to_pylist()], np.int32)
        gone = _within(key, span) & ~is_in(_numbered(of, key), seen) & ~is_in(key, np.sort(new))
        places.append(parts.chunk_ids(part, docs[gone]))
        keys.append(key[gone])
        inputs.append(some["input"].combine_chunks().filter(pa.array(gone)))
    found, key, of_input = np.concatenate(places), np.concatenate(keys), pa.concat_arrays(inputs).to_pylist()
    elsewhere = _rejected_elsewhere(store, key, of_input) if len(found) else set()
    return found[[one not in elsewhere for one in zip(key.tolist(), of_input, strict=True)]] if elsewhere else found


def _seen(store: Store, plan_id: str, numbers: set[int], span: tuple[int, int]) -> Iterator[Hashes]:
    for entry in files_of_plan(store.state, "seen", plan_id):
        for table in parts.read_tables(store, entry):
            some = table.filter(pc.is_in(table["file"], value_set=pa.array(numbers, pa.int32())))
            key = _keys_of(some["key"])
            inside = _within(key, span)
            yield _numbered(some["file"].to_numpy()[inside], key[inside])


def _keys_of(column: pa.ChunkedArray) -> Hashes:
    return np.frombuffer(parts.from_fixed_binary(column, np.dtype(np.uint8)).tobytes(), _KEY)


def _numbered(files: npt.NDArray[np.int32], keys: Hashes) -> Hashes:
    rows = [files.astype(">i4").view(np.uint8).reshape(-1, 4), keys.view(np.uint8).reshape(-1, parts.HASH_BYTES)]
    return np.ascontiguousarray(np.hstack(rows)).view(_NUMBERED).reshape(-1)


def _rejected_elsewhere(store: Store, keys: Hashes, inputs: Sequence[str]) -> set[tuple[bytes, str]]:
    """Return those of the ids and inputs whose id another input had too, as a duplicate that was rejected."""
    wanted, purged, rejected = _values(keys), chunk_plan.chunks_of_purges(store), read_rejected(store)
    of = dict(zip(keys.tolist(), inputs, strict=True))
    found: set[tuple[bytes, str]] = set()
    for part in store.state.all_parts():
        table = parts.read_documents(store, part, ["key", "input"])
        docs = np.intersect1d(_with_keys(table, wanted), chunk_plan.documents_within(store, part, rejected))
        docs = np.setdiff1d(docs, chunk_plan.documents_within(store, part, purged))
        some = table.take(pa.array(docs))
        for key, name in zip(_keys_of(some["key"]).tolist(), some["input"].to_pylist(), strict=True):
            if of[key] != name:
                found.add((key, of[key]))
    return found
