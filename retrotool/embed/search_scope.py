"""A store seen as a database to search: what of it can be searched, where its documents are, its copies.

Shared by ``index`` (recall), ``neighbours`` and ``search``. Vectors are memory-mapped. A query's own document costs its
part's documents; across stores, or where documents of one id were kept, a join over the keys of all documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retrotool.ann.excluded import Excluded, Ids, Intervals
from retrotool.errors import UsageError
from retrotool.store import log, parts
from retrotool.store.parts import Chunks
from retrotool.store.storage import is_same
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones, named_chunks, read_tombstones, undone_purges
from retrotool.store.vectors import MappedVectors, read_vectors


def pick_encoder(store: Store, name: str | None = None) -> str:
    """The encoder to use: ``name``, or the only one the store has embeddings of; ``UsageError`` otherwise."""
    names = store.state.names("embeddings")
    if not store.state.parts():
        raise UsageError("the store has no chunks", f"Chunk documents: retrotool chunk {store.place} INPUT...")
    if not names:
        raise UsageError("the store has no embeddings", f"Make them with: retrotool embed {store.place}")
    if name is None and len(names) == 1:
        return names[0]
    if name is None:
        raise UsageError(f"the store has embeddings of {', '.join(names)}", "Choose one with --encoder.")
    if name not in names:
        raise UsageError(f"the store has no embeddings of {name!r}, but of {', '.join(names)}", "Choose one of these.")
    return name


def embedded_parts(store: Store, encoder: str) -> list[int]:
    """Numbers of the live parts that have embeddings, ascending."""
    return [part for slot in store.state.group("embeddings", encoder) if store.state.is_live(part := int(slot))]


def read_part_vectors(store: Store, encoder: str, part: int) -> MappedVectors:
    """A part's embeddings, float16 [n, d], memory-mapped."""
    return read_vectors(store, parts.part_entry(store, "embeddings", part, encoder))


def live_rows(chunks: Chunks, tombstones: Tombstones) -> npt.NDArray[np.bool_]:
    """Which rows of a part are neither erased nor purged, bool [n]; values of key-value records are among them."""
    alive: npt.NDArray[np.bool_] = chunks.n_tokens > 0
    alive[tombstones.rows(chunks.part)] = False
    return alive


def searchable_rows(store: Store, part: int, tombstones: Tombstones) -> npt.NDArray[np.int64]:
    """Rows of a part that are searched by and for, ascending: those that have a vector and are not purged."""
    searchable = parts.read_embedded(store, part)
    searchable[tombstones.rows(part)] = False
    return np.flatnonzero(searchable)


class SearchableRows(Mapping[int, npt.NDArray[np.int64]]):
    """The searchable rows of parts, read when they are asked for; ``counts`` says how many each has."""

    def __init__(self, store: Store, numbers: Iterable[int], tombstones: Tombstones) -> None:
        self._store, self._tombstones = store, tombstones
        self.counts = {part: count_live_keys(store, part, tombstones) for part in numbers}

    def __getitem__(self, part: int) -> npt.NDArray[np.int64]:
        return searchable_rows(self._store, part, self._tombstones)

    def __iter__(self) -> Iterator[int]:
        return iter(self.counts)

    def __len__(self) -> int:
        return len(self.counts)

    def draw(self, size: int, seed: int) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """Random rows of each part, ascending: of each in proportion to what it has, ``size`` in all."""
        total = sum(self.counts.values())
        rng = np.random.default_rng(seed)
        exact = {part: size * count / max(total, 1) for part, count in self.counts.items()}
        quotas = {part: int(share) for part, share in exact.items()}
        while (left := size - sum(quotas.values())) > 0:
            open_parts = [part for part, quota in quotas.items() if quota < self.counts[part]]
            for part in rng.permutation(open_parts)[:left].tolist():
                quotas[part] += 1
        for part, quota in quotas.items():
            if quota:
                yield part, self[part][np.sort(rng.choice(self.counts[part], quota, replace=False))]


def count_keys(store: Store, part: int) -> int:
    """How many rows of a part are keys, erased and purged ones too; the log knows, no file is read."""
    return parts.n_keys(parts.part_entry(store, "chunks", part))


def count_live_keys(store: Store, part: int, tombstones: Tombstones) -> int:
    """How many keys of a part are neither purged nor erased; reads which are keys only where some of both are there."""
    purged = tombstones.rows(part)  # the erased are among them
    keys = count_keys(store, part)
    if keys == parts.part_entry(store, "chunks", part).rows:
        return keys - len(purged)
    return keys - int(parts.read_key(store, part)[purged].sum()) if len(purged) else keys


def count_keys_of(store: Store, numbers: Iterable[int], tombstones: Tombstones | None = None) -> int:
    """Keys of some parts that are neither purged nor erased: those that ``tombstones`` has not, None: the store's."""
    tombstones = read_tombstones(store) if tombstones is None else tombstones
    return sum(count_live_keys(store, part, tombstones) for part in numbers)


def count_left(store: Store, done: Iterable[int], tombstones: Tombstones) -> int:
    """Live keys of the parts that are not among ``done``."""
    return count_keys_of(store, set(store.state.parts()).difference(done), tombstones)


def own_documents(store: Store, part: int, database: Store, tombstones: Tombstones, *, within: bool) -> Excluded:
    """What each row of a part must not find in ``database``: the chunks of documents of its own document's id.

    ``within``: ``database`` is the same store. Then no file but the part's documents is read, unless documents of one
    id were kept.
    """
    if within and not may_repeat(database):
        return Excluded(*document_intervals(store, part))
    documents = parts.read_documents(store, part, ["key", "n_chunks"])
    found = find_documents(database, documents["key"], tombstones)
    return found.take(np.repeat(np.arange(documents.num_rows), documents["n_chunks"].to_numpy()))


def document_intervals(store: Store, part: int) -> tuple[Ids, Ids]:
    """First and last chunk id of each row's own document, int64 [n] each."""
    table = parts.read_documents(store, part, ["first_row", "n_chunks"])
    first, count = table["first_row"].to_numpy(), table["n_chunks"].to_numpy()
    ids = parts.chunk_ids(part, first)
    return np.repeat(ids, count), np.repeat(ids + count - 1, count)


def may_repeat(store: Store) -> bool:
    """Whether several documents of one id may be live: if they were kept. The log knows.

    Also if one was purged, let in again, and the purge then undone.
    """
    plans = store.state.with_prefix("plan:").values()
    return any(record.get("repeats") for record in undone_purges(store.state).values()) or any(
        plan.get("duplicates") == "keep" and plan.get("duplicates_by_id") for plan in plans
    )


def find_documents(database: Store, keys: pa.ChunkedArray, tombstones: Tombstones) -> Excluded:
    """The chunks of the documents that have ``keys`` (nulls: of nobody), as intervals, one of ``Excluded`` a key.

    Documents of which nothing is live are left out: they are never found. Reads the keys of all documents of the
    database, one part at a time, and the places of those that are found.
    """
    coded = keys.cast(pa.binary()).combine_chunks().dictionary_encode()
    codes = coded.indices.fill_null(-1).to_numpy().astype(np.int64)
    found = [np.zeros((3, 0), np.int64)]
    for part in database.state.parts():
        held = parts.read_documents(database, part, ["key"])["key"].cast(pa.binary())
        place = pc.index_in(held, value_set=coded.dictionary)
        hit = place.is_valid()
        document = place.filter(hit).to_numpy().astype(np.int64)
        if not len(document):
            continue
        theirs = parts.read_documents(database, part, ["first_row", "n_chunks"]).filter(hit)
        low = parts.chunk_ids(part, theirs["first_row"].to_numpy())
        high = low + theirs["n_chunks"].to_numpy() - 1
        purged = np.searchsorted(tombstones.ids, high, side="right") - np.searchsorted(tombstones.ids, low)
        found.append(np.stack([document, low, high])[:, purged <= high - low])
    document, low, high = np.concatenate(found, axis=1)
    order = np.lexsort((low, document))
    document, low, high = document[order], low[order], high[order]
    further = np.zeros(len(document), np.bool_)
    further[1:] = document[1:] == document[:-1]
    first, last = np.zeros(len(coded.dictionary) + 1, np.int64), np.full(len(coded.dictionary) + 1, -1, np.int64)
    first[document[~further]], last[document[~further]] = low[~further], high[~further]
    if not further.any():
        return Excluded(first[codes], last[codes])
    ascending = np.flatnonzero(further)[np.argsort(low[further])]
    repeats = Intervals(low[ascending], high[ascending], document[ascending])
    return Excluded(first[codes], last[codes], codes, repeats)


def is_same_store(one: Store, other: Store) -> bool:
    """Whether two stores are one, and not copies; a copy has the same uuid, and goes its own way from then on."""
    return one.identity.uuid == other.identity.uuid and is_same(one.storage, other.storage)


def has_commit(store: Store, number: int, head: str) -> bool:
    """Whether the commit ``number`` of a store's view has a SHA-256 that begins with ``head``: its log, or a copy's."""
    if number == store.state.number:
        return store.state.head.startswith(head)
    commit = log.read(store.storage, number) if number < store.state.number else None
    return commit is not None and commit.sha256.startswith(head)


def purges_erased(store: Store) -> list[str]:
    """Ids of the purges of which nothing is left."""
    return [purge for purge, record in store.state.with_prefix("purge:").items() if record.get("erased")]


def erased_chunks(store: Store) -> Tombstones:
    """The chunks that were erased, copies of others that repeat them included."""
    return Tombstones(named_chunks(store, purges_erased(store)))


def last_change(store: Store) -> tuple[int, str]:
    """Number and SHA-256 of a view's newest commit that is more than a record of a dependent store.

    Such records are made by searching it. A copy that has none of them is the same database.
    """
    number, head = store.state.number, store.state.head
    while (commit := log.read(store.storage, number)) is not None and "dependent" in commit.settings:
        number, head = commit.number - 1, commit.parent
    return number, head
