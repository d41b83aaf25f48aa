"""``verify``: whether everything in a store is what the log says, and hashes by which two stores can be compared.

Checks the chain of the log and its fold, size and SHA-256 of every file, and that files agree with each other:
rows, documents and their chunks, keys, padding, embeddings, neighbour tables, index ids, tombstones, block lists,
totals.
Reports every problem and goes on. Cost: reading every byte of the store once for SHA-256 and its Parquet files a
second time; memory: one part, or the ids of one shard. Not checked: whether the ids in a neighbour table are keys
(readers mask them).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrotool.errors import CorruptError, RetrotoolError
from retrotool.store import atomic, log, parts, tables, vectors
from retrotool.store.atomic import FileEntry
from retrotool.store.blocked import read_hashes
from retrotool.store.digest import PartDigest, hexadecimal, lines_digest, part_digest
from retrotool.store.paths import FileName
from retrotool.store.state import State
from retrotool.store.store import Store, newest_checkpoint
from retrotool.store.tables import NO_NEIGHBOUR
from retrotool.store.tombstones import Tombstones, read_tombstones

Report = Callable[[int], object]
IndexIds = Callable[[Store, FileEntry], Iterator[Any]]
_BLOCK = 1 << 16


@dataclass(slots=True)
class Verification:
    """What ``verify`` found; digests are as ``docs/format.md`` defines them, empty where a problem prevents them."""

    commit: int
    problems: list[str] = field(default_factory=list)
    content: str = ""
    ids: str = ""
    tombstones: str = ""
    embeddings: str = ""
    indexes: str = ""
    neighbours: str = ""
    documents: int = 0
    chunks: int = 0
    tokens: int = 0
    files: int = 0
    bytes: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def total_bytes(store: Store) -> int:
    """Bytes that ``verify`` will hash."""
    return sum(entry.bytes for entry in store.state.files())


def verify(store: Store, report: Report = lambda _: None, index_ids: IndexIds | None = None) -> Verification:
    """Check the store at its view. ``index_ids`` reads the ids of a shard (given by who knows faiss)."""
    result = Verification(store.state.number)
    _check_log(store, result)
    broken = _check_files(store, result, report)
    tombstones = Tombstones(np.zeros(0, np.int64))
    with _noting(result, "tombstones"):
        tombstones = read_tombstones(store)
        result.tombstones = hashlib.blake2b(tombstones.ids.astype("<i8").tobytes(), digest_size=32).hexdigest()
    total = PartDigest()
    for part in store.state.parts():
        entries = [store.state.part_file(kind, part) for kind in ("documents", "keys", "chunks")]
        if any(entry is None for entry in entries):
            result.problems.append(f"part {part} lacks one of documents, keys and chunks")
        elif not broken.intersection(entry.path for entry in entries if entry is not None):
            with _noting(result, f"part {part}"):
                total += _check_part(store, part, tombstones, broken, result)
    sizes = {
        part: entry.rows for part in store.state.parts() if (entry := store.state.part_file("chunks", part)) is not None
    }
    _check_ids(tombstones.ids, {**sizes, **_withdrawn(store, sizes)}, "tombstones", result)
    _check_blocked(store, broken, result)
    result.embeddings = _digest_files(store, "embeddings")
    result.indexes = _digest_files(store, "index")
    result.neighbours = _check_neighbours(store, broken, result)
    if index_ids is not None:
        for name in store.state.names("index"):
            _check_index(store, name, broken, sizes, index_ids, result)
    if not broken:
        result.content, result.ids = hexadecimal(total.content), hexadecimal(total.ids)
        result.documents, result.chunks, result.tokens = total.documents, total.chunks, total.tokens
        for name, found in (("documents", total.documents), ("chunks", total.chunks), ("tokens", total.tokens)):
            said = store.state.records.get("totals", {}).get(name, 0)
            if found != said:
                result.problems.append(f"{found:,} living {name} found, the log says {said:,}")
    return result


@contextmanager
def _noting(result: Verification, what: str) -> Iterator[None]:
    """Turn what goes wrong with ``what`` into a problem, and go on: a broken file can break anything that reads it."""
    try:
        yield
    except RetrotoolError as error:
        result.problems.append(str(error))
    except (ArithmeticError, LookupError, OSError, SyntaxError, TypeError, ValueError, pa.ArrowException) as error:
        result.problems.append(f"{what}: can't be checked: {type(error).__name__}: {error}")


def _check_index(
    store: Store,
    name: str,
    broken: set[str],
    sizes: dict[int, int],
    index_ids: IndexIds,
    result: Verification,
) -> None:
    """Ids of an index are chunks that have a vector, and no part lies in two shards."""
    held: set[int] = set()
    for slot in store.state.group("index", name):
        entry = store.state.file("index", slot, name)
        if entry is None or not slot.startswith("shard-"):
            continue
        covered = set((entry.about or {}).get("parts", ()))
        if not held.isdisjoint(covered):
            result.problems.append(f"{entry.path}: holds parts that another shard holds too")
        held |= covered
        if entry.path in broken:
            continue
        with _noting(result, entry.path):
            ids = np.concatenate([np.zeros(0, np.int64), *index_ids(store, entry)])
            _check_ids(ids, sizes, entry.path, result)
            if not _have_vectors(store, ids, sizes, broken):
                result.problems.append(f"{entry.path}: holds chunks that are erased or no keys")


def _have_vectors(store: Store, ids: npt.NDArray[np.int64], sizes: dict[int, int], broken: set[str]) -> bool:
    """Whether all of ``ids`` that are rows of whole parts have a vector."""
    order = np.sort(ids)
    for part in sizes.keys() & set(np.unique(order >> parts.PART_SHIFT).tolist()):
        if parts.part_entry(store, "chunks", part).path not in broken:
            low, high = np.searchsorted(order, [part << parts.PART_SHIFT, (part + 1) << parts.PART_SHIFT])
            rows = order[low:high] - (part << parts.PART_SHIFT)
            if not parts.read_embedded(store, part)[rows[rows < sizes[part]]].all():
                return False
    return True


def _check_log(store: Store, result: Verification) -> None:
    """Fold the whole log anew, and hold the open state and the checkpoint against it."""
    checkpoint = newest_checkpoint(store.root)
    middle = -1 if checkpoint is None else min(checkpoint.number, store.state.number)
    with _noting(result, "log"):
        state = State(-1, store.genesis)
        commits = log.read_after(store.root, state.number, state.head)
        state = state.fold(itertools.islice(commits, middle + 1))
        if checkpoint is not None and middle == checkpoint.number and not _same(state, checkpoint):
            result.problems.append(f"the checkpoint of commit {middle} is not the fold of the log; remove it")
        state = state.fold(itertools.islice(commits, store.state.number - middle))
        if not _same(state, store.state):
            result.problems.append("the open state is not the fold of the log: commits are missing")


def _same(one: State, other: State) -> bool:
    def contents(state: State) -> tuple[Any, ...]:
        return sorted((e.path, e.rows, e.bytes, e.sha256) for e in state.files()), dict(state.records), state.head

    return contents(one) == contents(other)


def _check_files(store: Store, result: Verification, report: Report) -> set[str]:
    """Sizes and sums; returns the paths of files that are broken."""
    broken = set()
    with _noting(result, "tokenizer"):
        store.tokenizer_json()
    for entry in store.state.files():
        result.files += 1
        result.bytes += entry.bytes
        try:
            if atomic.file_sha256(store.path(entry)) != entry.sha256:
                raise CorruptError(f"{entry.path}: its SHA-256 is not what the log says")
        except RetrotoolError as error:
            result.problems.append(str(error))
            broken.add(entry.path)
        report(entry.bytes)
    return broken


def _check_part(store: Store, part: int, tombstones: Tombstones, broken: set[str], result: Verification) -> PartDigest:
    """Check a part's files against each other."""
    chunks = parts.read_chunks(store, part)
    documents = parts.read_documents(store, part, ["key", "first_row", "n_chunks", "n_tokens"])
    n, docs = len(chunks), documents.num_rows
    first, count, n_tokens = (documents[name].to_numpy() for name in ("first_row", "n_chunks", "n_tokens"))
    if count.sum() != n or (count < 0).any() or not ((chunks.doc >= 0) & (chunks.doc < docs)).all():
        result.problems.append(f"part {part}: {docs:,} documents and {n:,} chunks do not belong together")
        return PartDigest()
    row = parts.read_parquet(store, parts.part_entry(store, "chunks", part), ["row"])["row"].to_numpy()
    checks = {
        "rows are not numbered from 0": (row == np.arange(n)).all(),
        "documents do not follow one another": (first == np.cumsum(count) - count).all(),
        "chunks name other documents than documents name chunks": (
            chunks.doc == np.repeat(np.arange(docs), count)
        ).all(),
        "chunks are not numbered in their documents": (chunks.index == np.arange(n) - np.repeat(first, count)).all(),
        "documents and chunks differ in tokens": (
            np.bincount(chunks.doc, chunks.n_tokens, minlength=docs).astype(np.int64) == n_tokens
        ).all(),
        "padding is not zero": not (
            chunks.tokens * (np.arange(chunks.tokens.shape[1]) >= chunks.n_tokens[:, None])
        ).any(),
    }
    checks |= {
        "a document begins with a chunk that is no key": chunks.key[chunks.index == 0].all(),
        "the log counts other keys": chunks.key.sum() == parts.n_keys(parts.part_entry(store, "chunks", part)),
    }
    result.problems += [f"part {part}: {what}" for what, fine in checks.items() if not fine]
    keys = parts.read_parquet(store, parts.part_entry(store, "keys", part))
    if not keys.equals(parts.keys_table(parts.read_documents(store, part, ["key", "text_hash"]))):
        result.problems.append(f"part {part}: keys are not those of its documents")
    for encoder in store.state.names("embeddings"):
        entry = store.state.part_file("embeddings", part, encoder)
        if entry is not None and entry.path not in broken:
            matrix = vectors.read_vectors(store, entry)
            if len(matrix) != n:
                result.problems.append(f"{entry.path}: {len(matrix):,} rows for {n:,} chunks")
            elif _any_vector(matrix, np.flatnonzero(~chunks.embedded)):
                result.problems.append(f"{entry.path}: a chunk that is erased or no key has a vector")
    alive = chunks.n_tokens > 0
    purged = tombstones.rows(part)
    alive[purged[purged < n]] = False
    return part_digest(chunks, documents["key"].to_pylist(), alive)


def _any_vector(matrix: npt.NDArray[np.float16], rows: npt.NDArray[np.int64]) -> bool:
    """Whether any of these rows is not zero; block by block, for the matrix may be mapped and larger than memory."""
    return any(matrix[rows[start : start + _BLOCK]].any() for start in range(0, len(rows), _BLOCK))


def _withdrawn(store: Store, sizes: dict[int, int]) -> dict[int, int]:
    """Parts that were taken back, with the most rows that they can have had: only their tombstones are left."""
    plans = store.state.with_prefix("plan:").values()
    if not any(plan.get("withdrawn") for plan in plans):
        return {}
    return {part: 1 << 31 for part in range(int(store.state.records.get("parts", 0))) if part not in sizes}


def _check_ids(ids: Any, sizes: dict[int, int], what: str, result: Verification) -> None:
    """Note if any of ``ids`` is no row of a part."""
    limit = np.array([sizes.get(part, 0) for part in range(max(sizes, default=-1) + 1)] or [0], np.int64)
    part = np.clip(ids >> parts.PART_SHIFT, 0, len(limit) - 1)
    known = (ids >= 0) & (ids >> parts.PART_SHIFT < len(limit)) & ((ids & ((1 << parts.PART_SHIFT) - 1)) < limit[part])
    if not known.all():
        result.problems.append(f"{what}: {int((~known).sum()):,} ids are no chunks of the store")


def _check_blocked(store: Store, broken: set[str], result: Verification) -> None:
    """Block lists are sorted, and belong to purges."""
    group = store.state.group("blocked")
    for slot in group:
        entry = group.get(slot)
        if entry is None:
            continue
        if f"purge:{slot}" not in store.state.records:
            result.problems.append(f"{entry.path}: there is no purge {slot}")
        if entry.path not in broken:
            with _noting(result, entry.path):
                read_hashes(store, entry)


def _digest_files(store: Store, kind: str) -> str:
    names = store.state.names(kind)
    entries = [entry for entry in store.state.files() if FileName.parse(entry.path).kind == kind]
    return lines_digest(f"{_slot(entry)} {entry.sha256}" for entry in entries) if names else ""


def _slot(entry: FileEntry) -> str:
    name = FileName.parse(entry.path)
    return f"{name.kind}/{name.name}/{name.slot}"


def _check_neighbours(store: Store, broken: set[str], result: Verification) -> str:
    lines = []
    for name in store.state.names("neighbours"):
        for slot in store.state.group("neighbours", name):
            entry = store.state.file("neighbours", slot, name)
            if entry is None or entry.path in broken:
                continue
            with _noting(result, entry.path):
                table = tables.read_table(store, entry)
                chunks = store.state.file("chunks", slot)
                if chunks is None or len(table.ids) != chunks.rows:
                    result.problems.append(f"{entry.path}: {len(table.ids):,} rows are not those of its part")
                elif chunks.path not in broken and (table.ids[~parts.read_key(store, int(slot))] != NO_NEIGHBOUR).any():
                    result.problems.append(f"{entry.path}: a chunk that is no key has neighbours")
                if (table.distances[:, 1:] < table.distances[:, :-1]).any():
                    result.problems.append(f"{entry.path}: distances do not ascend")
                data = table.ids.astype("<i8").tobytes() + table.distances.astype("<f4").tobytes()
                lines.append(f"{_slot(entry)} {hashlib.blake2b(data, digest_size=32).hexdigest()}")
    return lines_digest(lines) if lines else ""
