"""A store as a database to search: searchable rows, locations of documents, copies of the store.

Vectors are memory-mapped. Finding a query's own document reads its part's documents; across stores, or if
documents may share an id, it joins the keys of all documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retrotool.ann.excluded import Excluded, Ids, Intervals
from retrotool.cli.command_lines import command_line
from retrotool.errors import UsageError
from retrotool.store import log, parts
from retrotool.store.storage import is_same
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones, named_chunks, read_tombstones, undone_purges
from retrotool.store.vectors import MappedVectors, read_vectors


def pick_encoder(store: Store, name: str | None = None) -> str:
    """Return the encoder to use: ``name`` or the only one with embeddings; raise ``UsageError`` otherwise."""
    names = store.state.names("embeddings")
    if not store.state.parts():
        raise UsageError("the store has no chunks", f"Chunk documents: {command_line('chunk', store.place)} INPUT...")
    if not names:
        raise UsageError("the store has no embeddings", f"Make them with: {command_line('embed', store.place)}")
    if name is None and len(names) > 1:
        raise UsageError(f"the store has embeddings of {', '.join(names)}", "Choose one with --encoder.")
    if name not in (None, *names):
        raise UsageError(f"the store has no embeddings of {name!r}, but of {', '.join(names)}", "Choose one of these.")
    return name or names[0]


def embedded_parts(store: Store, encoder: str) -> list[int]:
    """Return the numbers of live parts with embeddings, ascending."""
    return [part for slot in store.state.group("embeddings", encoder) if store.state.is_live(part := int(slot))]


def read_part_vectors(store: Store, encoder: str, part: int) -> MappedVectors:
    """Return a part's embeddings, float16 [n, d], memory-mapped."""
    return read_vectors(store, parts.part_entry(store, "embeddings", part, encoder))


def vectors_ahead(store: Store, encoder: str, numbers: Iterable[int]) -> Iterable[int]:
    """Iterate over parts whose embeddings are read in this order (``Store.copied_ahead``)."""
    return store.copied_ahead(numbers, lambda part: store.state.part_file("embeddings", part, encoder))


def live_rows(chunks: parts.Chunks, tombstones: Tombstones) -> npt.NDArray[np.bool_]:
    """Return which rows of a part are neither erased nor purged, bool [n], including values of records."""
    alive: npt.NDArray[np.bool_] = chunks.n_tokens > 0
    alive[tombstones.rows(chunks.part)] = False
    return alive


def searchable_rows(store: Store, part: int, tombstones: Tombstones) -> npt.NDArray[np.int64]:
    """Return the rows of a part with a vector that are not purged, ascending."""
    searchable = parts.read_embedded(store, part)
    searchable[tombstones.rows(part)] = False
    return np.flatnonzero(searchable)


class SearchableRows:
    """The searchable rows of parts, read on access; their ``counts`` are known without reading."""

    def __init__(self, store: Store, numbers: Iterable[int], tombstones: Tombstones) -> None:
        self._store, self._tombstones = store, tombstones
        self.counts = {part: count_live_keys(store, part, tombstones) for part in numbers}

    def __getitem__(self, part: int) -> npt.NDArray[np.int64]:
        return searchable_rows(self._store, part, self._tombstones)

    def draw(self, size: int, seed: int) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """Yield ``size`` random rows in all, ascending, from each part in proportion to its count."""
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
    """Return the number of keys in a part, including erased and purged ones, from the log."""
    return parts.n_keys(parts.part_entry(store, "chunks", part))


def count_live_keys(store: Store, part: int, tombstones: Tombstones) -> int:
    """Return the number of live keys of a part; reads the keys column only if there are values and purges."""
    purged = tombstones.rows(part)  # the erased are among them
    keys = count_keys(store, part)
    if keys == parts.part_entry(store, "chunks", part).rows:
        return keys - len(purged)
    return keys - int(parts.read_key(store, part)[purged].sum()) if len(purged) else keys


def count_keys_of(store: Store, numbers: Iterable[int], tombstones: Tombstones | None = None) -> int:
    """Return the number of keys of some parts outside ``tombstones`` (None: the store's)."""
    tombstones = read_tombstones(store) if tombstones is None else tombstones
    return sum(count_live_keys(store, part, tombstones) for part in numbers)


def count_left(store: Store, done: Iterable[int], tombstones: Tombstones) -> int:
    """Return the number of live keys of the parts not in ``done``."""
    return count_keys_of(store, set(store.state.parts()).difference(done), tombstones)


def own_documents(store: Store, part: int, database: Store, tombstones: Tombstones, *, within: bool) -> Excluded:
    """Return what each row of a part must not find in ``database``, or ``within`` its own: its document."""
    if within and not may_repeat(database):
        return Excluded(*document_intervals(store, part))
    documents = parts.read_documents(store, part, ["key", "n_chunks"])
    found = find_documents(database, documents["key"], tombstones)
    return found.take(np.repeat(np.arange(documents.num_rows), documents["n_chunks"].to_numpy()))


def document_intervals(store: Store, part: int) -> tuple[Ids, Ids]:
    """Return the first and last chunk id of each row's document, int64 [n] each."""
    table = parts.read_documents(store, part, ["first_row", "n_chunks"])
    first, count = table["first_row"].to_numpy(), table["n_chunks"].to_numpy()
    ids = parts.chunk_ids(part, first)
    return np.repeat(ids, count), np.repeat(ids + count - 1, count)


def may_repeat(store: Store) -> bool:
    """Check in the log whether documents may share an id: after ``duplicates: keep``, or an undone purge."""
    plans = store.state.with_prefix("plan:").values()
    return any(record.get("repeats") for record in undone_purges(store.state).values()) or any(
        plan.get("duplicates") == "keep" and plan.get("duplicates_by_id") for plan in plans
    )


def find_documents(database: Store, keys: pa.ChunkedArray, tombstones: Tombstones) -> Excluded:
    """Return the chunks of live documents with ``keys`` (null: none); reads the keys of all documents."""
    coded = keys.cast(pa.binary()).combine_chunks().dictionary_encode()
    codes = coded.indices.fill_null(-1).to_numpy().astype(np.int64)
    found = [np.zeros((3, 0), np.int64)]
    for part in database.state.parts():
        held = parts.read_documents(database, part, ["key"])["key"].cast(pa.binary())
        place = pc.index_in(held, value_set=coded.dictionary)
        if place.null_count == len(place):
            continue
        document = place.drop_null().to_numpy().astype(np.int64)
        theirs = parts.read_documents(database, part, ["first_row", "n_chunks"]).filter(place.is_valid())
        low = parts.chunk_ids(part, theirs["first_row"].to_numpy())
        high = low + theirs["n_chunks"].to_numpy() - 1
        purged = np.searchsorted(tombstones.ids, high, side="right") - np.searchsorted(tombstones.ids, low)
        found.append(np.stack([document, low, high])[:, purged <= high - low])
    document, low, high = np.concatenate(found, axis=1)
    order = np.lexsort((low, document))
    document, low, high = document[order], low[order], high[order]
    further = np.diff(document, prepend=-1) == 0
    first, last = np.zeros(len(coded.dictionary) + 1, np.int64), np.full(len(coded.dictionary) + 1, -1, np.int64)
    first[document[~further]], last[document[~further]] = low[~further], high[~further]
    if not further.any():
        return Excluded(first[codes], last[codes])
    ascending = np.flatnonzero(further)[np.argsort(low[further])]
    repeats = Intervals(low[ascending], high[ascending], document[ascending])
    return Excluded(first[codes], last[codes], codes, repeats)


def is_same_store(one: Store, other: Store) -> bool:
    """Check whether two stores are one; a copy has the same uuid, but diverges."""
    return one.identity.uuid == other.identity.uuid and is_same(one.storage, other.storage)


def has_commit(store: Store, number: int, head: str) -> bool:
    """Check whether the SHA-256 of commit ``number``, of a store or its copy, begins with ``head``."""
    if number == store.state.number:
        return store.state.head.startswith(head)
    commit = log.read(store.storage, number) if number < store.state.number else None
    return commit is not None and commit.sha256.startswith(head)


def purges_erased(store: Store) -> list[str]:
    """Return the ids of purges that were erased completely."""
    return [purge for purge, record in store.state.with_prefix("purge:").items() if record.get("erased")]


def erased_chunks(store: Store) -> Tombstones:
    """Return the chunks that were erased, including copies of them."""
    return Tombstones(named_chunks(store, purges_erased(store)))


def last_change(store: Store) -> tuple[int, str]:
    """Return number and SHA-256 of the newest commit that does not just record a dependent store."""
    number, head = store.state.number, store.state.head
    while (commit := log.read(store.storage, number)) is not None and "dependent" in commit.settings:
        number, head = commit.number - 1, commit.parent
    return number, head
