"""Read and write the files of an index, and search a store: by an index, or exactly.

Candidates from an index are re-ranked by the embeddings themselves. Shards and embeddings are memory-mapped;
only the probed lists and the candidates' vectors are read. The operating point, ``nprobe`` lists and
``depth`` candidates per 10 neighbours, comes from the index's record unless given. Exact search multiplies
all queries with all vectors, part by part. For few vectors that is faster than building an index, and it is
the truth that indexes are compared with.

If only some sources are searched, the documents' ``source`` is read at the first search and kept as one bit
per chunk: 125 MB for a billion. Only allowed vectors of a list are decoded. A query's nearest lists may
contain hardly any, so it probes until its lists contain as many allowed vectors as those of the operating
point contain in all, and re-ranks twice as many: recall@10 within one of five sources rises from 0.515–0.956
to 0.967–1.000 (``benchmarks/neighbour_filters.py``).
"""

from __future__ import annotations

import contextlib
import errno
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import chain, islice, pairwise, product
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retrotool.ann import lists
from retrotool.ann.codes import Whole
from retrotool.ann.excluded import Ids, Queries
from retrotool.ann.lists import InvertedLists, Lists, SomeLists, Trained, VectorLists
from retrotool.ann.ranking import Best, merged, rerank
from retrotool.ann.resident import ResidentLists, free_memory
from retrotool.ann.search import ROOM, SPARE, Search, nearest_lists, nothing_banned
from retrotool.chunk.chunk_plan import documents_within
from retrotool.cli.command_lines import command_line, embed_command
from retrotool.embed import search_scope
from retrotool.embed.search_scope import embedded_parts, read_part_vectors, searchable_rows, vectors_ahead
from retrotool.errors import CorruptError, StorageError, UsageError
from retrotool.index.index_records import INDEX, IndexFiles, IndexRecord, ShardRecord, default_index, index_record
from retrotool.index.on_device import OnDevice, in_blocks
from retrotool.lazy import torch
from retrotool.machine import memory_of_machine
from retrotool.ranges import as_slice, in_steps
from retrotool.store import parts
from retrotool.store.expressions import Where
from retrotool.store.log import FileEntry
from retrotool.store.parts import part_of, row_of
from retrotool.store.paths import FileName, part_slot
from retrotool.store.storage import each
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones, stands_for
from retrotool.store.vectors import MappedFile


def read_trained(store: Store, name: str, generation: int | None = None) -> tuple[FileEntry, Trained]:
    """Read the training of an index; raise ``CorruptError`` if it does not match the log, to the byte."""
    entry = IndexFiles(store.state, name, generation).trained
    if entry is None:
        raise store.corrupt(f"index {name!r} has no training")
    if store.is_local:
        store.check_sum(entry)
    with store.reading(entry), store.local(entry) as path:
        if not store.is_local:  # a copy, which was compared with the log when it was made
            MappedFile(store, entry, path).check_all()
        return entry, lists.read_lists(path).trained


def read_shard(store: Store, entry: FileEntry, trained: Trained | None = None) -> InvertedLists:
    """Map a shard; raise ``ErasedError`` if erased since the store was opened, ``CorruptError`` if broken."""
    with store.reading(entry), store.local(entry) as path:
        file = MappedFile(store, entry, path)
        # faiss reads everything before the lists at once, and may crash on unexpected bytes.
        in_lists = 0 if trained is None or trained.centroids is None else entry.rows * (trained.codec.size + 8)
        file.check(0, entry.bytes - in_lists)
        shard = lists.read_lists(path, trained, file.check)
    if len(shard) != entry.rows:
        raise store.corrupt(f"{store.where(entry.path)} contains {len(shard):,} vectors, the log says {entry.rows:,}")
    return shard


def write_index(store: Store, index: Any, name: FileName, about: dict[str, Any] | None) -> FileEntry:
    """Write a faiss index to the store."""
    try:
        return store.write(name, lambda sink: lists.write_lists(index, sink.write), about=about)
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        raise StorageError(
            f"{name.path}: {error.strerror}; earlier commits are unaffected",
            "The file system or a process limit (ulimit -f) does not allow files of this size.",
        ) from error


_Shard = TypeVar("_Shard", bound=Lists)
Allows = Callable[[str], bool]  # checks whether a source may be searched


class AllowedChunks:
    """The ``count`` chunks, some perhaps purged, whose document, or its source, ``allows``."""

    def __init__(self, store: Store, allows: Allows | Where) -> None:
        self._rows = {part: parts.part_entry(store, "chunks", part).rows for part in store.state.parts()}
        self._first = np.zeros(max(self._rows, default=-1) + 1, np.int64)  # first bit of each part
        sizes = [-(-rows // 8) for rows in self._rows.values()]
        self._first[list(self._rows)] = 8 * (np.cumsum(sizes) - sizes)
        self._bits, self.count = np.zeros(sum(sizes), np.uint8), 0
        for part in self._rows:
            table = parts.read_documents(store, part, ["source", "n_chunks"])
            if isinstance(allows, Where):
                documents = allows.rows(store, part)
            else:  # called once per source and part
                sources = table["source"].combine_chunks().dictionary_encode()
                allowed = np.array([*(allows(name) for name in sources.dictionary.to_pylist()), False])
                # Erased documents have no source: −1 selects the final False.
                documents = allowed[sources.indices.fill_null(-1).to_numpy()]
            self.count += int(table["n_chunks"].to_numpy()[documents].sum())
            packed = np.packbits(np.repeat(documents, table["n_chunks"].to_numpy()))
            start = int(self._first[part]) // 8
            self._bits[start : start + len(packed)] = packed

    def contains(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Return which chunks are allowed, bool [n]."""
        place = self._first[part_of(ids)] + row_of(ids)
        found: npt.NDArray[np.bool_] = (self._bits[place >> 3] << (place & 7) & 0x80) > 0
        return found

    def rows(self, part: int) -> npt.NDArray[np.bool_]:
        """Return which rows of a part are allowed, bool [n]."""
        start = int(self._first[part]) // 8
        return np.unpackbits(self._bits[start:], count=self._rows[part]).astype(np.bool_)


def source_names(store: Store) -> Iterator[set[str]]:
    """Yield the sources of live documents for each part; parts may share sources."""
    tombstones = read_tombstones(store)
    for part in store.state.parts():
        sources = parts.read_documents(store, part, ["source"])["source"]
        live = np.delete(np.arange(len(sources)), documents_within(store, part, tombstones))
        yield set(pc.unique(sources.take(pa.array(live))).drop_null().to_pylist())


def find_sources(
    databases: Iterable[Store], keyed: Callable[[str], str], hashes: Collection[str], parts_of_each: int | None = None
) -> dict[str, str]:
    """Return source names by their keyed hashes, looking in up to ``parts_of_each`` parts per store."""
    found: dict[str, str] = {}
    for names in chain.from_iterable(islice(source_names(one), parts_of_each) for one in databases if hashes):
        found |= {hashed: name for name in names if (hashed := keyed(name)) in hashes}
        if set(hashes) <= set(found):
            break
    return found


def probes_by_query(
    nearest: Callable[[npt.NDArray[np.floating], int], Ids],
    vectors: npt.NDArray[np.floating],
    nprobe: int,
    everything: Ids,
    allowed: Ids,
) -> Iterator[tuple[int, Ids]]:
    """Yield (lists to probe, queries): lists with as many allowed vectors as the nearest ``nprobe`` in all.

    ``nearest`` finds the nearest lists; ``everything`` and ``allowed`` are the vectors in each list, [nlist].
    """
    first, left, wanted = nprobe, np.arange(len(vectors)), np.zeros(len(vectors), np.int64)
    while len(left) and nprobe < len(everything):
        enough, size = np.zeros(len(left), np.bool_), max(1, _MOST_PROBES // nprobe)
        for start in range(0, len(left), size):
            rows = left[start : start + size]
            lists = nearest(vectors[rows], nprobe)
            if nprobe == first:
                wanted[rows] = everything[lists].sum(axis=1)
            enough[start : start + size] = allowed[lists].sum(axis=1) >= wanted[rows]
        if enough.any():
            yield nprobe, left[enough]
        left = left[~enough]
        nprobe *= 2
    if len(left):
        yield len(everything), left


TUNED_K = 10  # neighbours that an operating point is tuned for
NO_INDEX = ""  # the name for exact search
_KEPT_PARTS, _KEPT_ROWS = 512, 64
_VECTOR_BYTES = 2
_SHARED_LISTS = 4  # queries per list from which reading all its vectors pays off
_LEAST_ROOM = 1 << 20
_BLOCK_ROWS = 1 << 15  # vectors that are copied to a GPU at a time
_MOST_PROBES = 1 << 25  # pairs of a query and a list that are chosen at a time
_BYTES_PER_CANDIDATE, _BYTES_PER_DIMENSION = 70, 14  # memory of a query during search and re-ranking


@dataclass(frozen=True, slots=True)
class Point:
    """An operating point: lists to probe per query, and candidates to re-rank by their vectors."""

    nprobe: int
    depth: int


def pick_index(store: Store, name: str | None = None) -> str:
    """Return the index to use: ``name``, the default, or the only one; raise ``UsageError`` without any."""
    have = store.state.with_prefix(INDEX)
    if name is None:
        name = default_index(store.state)
        if name not in have and len(have) == 1:
            name = next(iter(have))
    if name not in have:
        found = f"has no index {name!r}; it has: {', '.join(have)}" if have else "has no index"
        raise UsageError(f"the store {store.place} {found}", _how_to_make(store, name))
    return name


def _how_to_make(store: Store, name: str) -> str:
    names, embed = store.state.names("embeddings"), command_line("embed", store.place)
    index = command_line("index", store, name=name, encoder=names[0] if len(names) > 1 else None)
    if not store.state.parts():
        return f"It has no chunks yet: {command_line('chunk', store.place)} INPUT..., then {embed} and {index}"
    if not names:
        return f"It has no embeddings yet: {embed}, then {index}"
    return f"Make it with: {index}"


def commands_to_index(store: Store, encoder: str, index: str | None) -> list[str]:
    """Return the commands that bring all chunks into an index (None: exact search): embed, then index."""
    left = search_scope.count_left(store, embedded_parts(store, encoder), read_tombstones(store))
    found = [embed_command(store, encoder)] if left else []
    return found if index is None else [*found, command_line("index", store, name=index)]


class Vectors:
    """The embeddings of a store by chunk id."""

    def __init__(self, store: Store, encoder: str) -> None:
        self._store, self._encoder = store, encoder
        self._part = lru_cache(_KEPT_PARTS)(lambda part: read_part_vectors(store, encoder, part))
        self._met: set[int] = set()  # parts that were opened

    def __call__(self, ids: Ids) -> npt.NDArray[np.float16]:
        """Return vectors, float16 [n, d], of ascending chunk ids; raise ``CorruptError`` for unknown ids."""
        found = self.mapped(ids)
        return found if found.flags.writeable else np.array(found)

    def mapped(self, ids: Ids) -> npt.NDArray[np.float16]:
        """Return the same, of consecutive ids the mapped memory itself, which is read-only."""
        found = []
        numbers = part_of(ids)
        if not self._store.is_local:
            self._open_together(parts.distinct_parts(ids))
        for start, stop in pairwise([*np.flatnonzero(np.diff(numbers, prepend=-1)), len(ids)]):
            part, rows = int(numbers[start]), row_of(ids[start:stop])
            known = part >= 0 and self._store.state.part_file("chunks", part) is not None
            if not known or rows[-1] >= len(self._part(part)):
                place, chunk = self._store.place, int(ids[stop - 1])
                raise self._store.corrupt(f"an index of {place} refers to chunk {chunk}, which does not exist")
            found.append(self._part(part)[as_slice(rows)])
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _open_together(self, numbers: list[int]) -> None:
        known = self._store.state.group("embeddings", self._encoder)
        new = [part for part in numbers if part not in self._met and known.get(part_slot(part))][:_KEPT_PARTS]
        self._met.update(new)
        list(each(self._store.storage, self._part, new))


_MOST_SORTED, _SORT_BYTES = 1 << 31, 48  # numbers that a GPU can sort at a time, and bytes that it takes for each
_READ_ONCE = ("trained", "shards", "_allowed", "_searched", "_n_searched", "_list_sizes")  # cached properties


class _Open(ABC):
    """A store opened for search on a device, in ``room`` bytes per buffer, for sources that ``allows``.

    Several threads may search: on a GPU together (``OnDevice``), on a CPU one after the other.
    """

    def __init__(
        self, store: Store, encoder: str, device: str, memory: int | None, allows: Allows | AllowedChunks | None
    ) -> None:
        self.store, self.encoder = store, encoder
        self.tombstones = read_tombstones(store)
        self.room = room_in(memory)
        self._device, self._allows = device, allows
        self.is_restricted = allows is not None
        self._lock, self._resident = threading.RLock(), list[OnDevice]()

    @property
    def _on_device(self) -> OnDevice:
        """The searchable vectors on a GPU."""
        with self._lock:
            if not self._resident:
                self._resident.append(self._open_on_device())
            return self._resident[0]

    @abstractmethod
    def _open_on_device(self) -> OnDevice: ...

    def take_over(self, other: AnyDatabase) -> None:
        """Use what ``other``, with the same ``searched_of``, has read, and has or will have on a GPU."""
        self._lock, self._resident = other._lock, other._resident
        known = vars(other).copy()  # other threads may be searching in it
        vars(self).update({name: known[name] for name in _READ_ONCE if name in known})

    def leave_device(self) -> None:
        """Give back the memory of a GPU."""
        self._resident.clear()

    @contextlib.contextmanager
    def _turn(self, queries: Queries) -> Iterator[Queries]:
        """Yield the queries as they are searched for; on a CPU in float32, while no other thread searches."""
        if searches_on_device(self._device, queries):
            yield queries
        else:
            with self._lock:
                yield queries.widened()

    @cached_property
    def _allowed(self) -> AllowedChunks:
        assert self._allows is not None
        return self._allows if isinstance(self._allows, AllowedChunks) else AllowedChunks(self.store, self._allows)


class Database(_Open):
    """An indexed store, opened for search; ``record`` is the index's record, see ``docs/format.md``.

    ``allow_missing``: collect broken shards in ``missing`` instead of raising ``CorruptError``. ``thorough``:
    probe three quarters more lists, since training reads the best 2, but indexes are tuned by recall@10.
    """

    def __init__(
        self,
        store: Store,
        name: str | None = None,
        *,
        allow_missing: bool = False,
        device: str = "cpu",
        memory: int | None = None,
        thorough: bool = False,
        allows: Allows | AllowedChunks | None = None,
    ) -> None:
        self.name = pick_index(store, name)
        record = index_record(store.state, self.name)
        assert record is not None, "pick_index found it"
        super().__init__(store, record.encoder, device, memory, allows)
        self.record: IndexRecord = record
        depth = min(record.depth, max(self.vectors_in_log, 1))
        self.point = Point(record.nprobe * 7 // 4 if thorough else record.nprobe, depth)
        self.vectors = Vectors(store, self.encoder)
        self.missing: list[FileEntry] = []
        self._allow_missing = allow_missing
        vectors = (store.state.part_file("embeddings", part, self.encoder) for part in self.held())
        mapped = filter(None, (self._files.trained, *self._files.shards.values(), *vectors))
        store.cache.check_room(mapped, f"the index {self.name!r} of {store.place}")

    @property
    def _files(self) -> IndexFiles:
        return IndexFiles(self.store.state, self.name)

    @property
    def vectors_in_log(self) -> int:
        """Number of vectors in the index, including broken shards."""
        return self._files.vectors

    @cached_property
    def trained(self) -> Trained:
        """The training of the index."""
        return read_trained(self.store, self.name)[1]

    @cached_property
    def shards(self) -> list[InvertedLists]:
        """The mapped shards; raises ``CorruptError`` for a broken one."""
        trained, entries = self.trained, self._files.shards.values()

        def opened(entry: FileEntry) -> InvertedLists | None:
            try:
                return read_shard(self.store, entry, trained)
            except CorruptError:
                if not self._allow_missing:
                    raise
                return None

        found = list(each(self.store.storage, opened, entries))
        self.missing += [entry for entry, shard in zip(entries, found, strict=True) if shard is None]
        return [shard for shard in found if shard is not None]

    @property
    def settings(self) -> list[Any]:
        """The settings that affect results, besides vectors and operating point (which meets the target)."""
        return [self.name, self.record.target, self.record.generation]

    def held(self) -> list[int]:
        """Return the numbers of the parts searched, ascending."""
        return self._files.parts

    def reads(self) -> list[str]:
        """Return paths of the files searched, which an erase replaces."""
        return [entry.path for entry in self._files.shards.values()]

    def search(
        self,
        queries: Queries,
        k: int,
        point: Point | None = None,
        *,
        only: Collection[int] | None = None,
        wider: int = 1,
        beyond: int = 0,
    ) -> Best:
        """Return the k nearest live keys of each query, probing more lists while there are fewer than k.

        ``only``: search only shards with any of these parts. ``wider``: multiply the lists probed.
        ``beyond``: skip this many nearest lists, if sources are not restricted.
        """
        point = point or self.point
        nprobe, beyond = point.nprobe * wider, 0 if self.is_restricted else beyond * wider
        if searches_on_device(self._device, queries):
            search: _SearchLists = partial(self._on_device.search, k=k, only=only, beyond=beyond)
        else:
            search = self._search_shards(k, self._depth_for(k, point), only, beyond)
        with self._turn(queries) as queries:
            best = Best.nothing(len(queries), k)
            for probed, rows in self._probes(queries, nprobe):
                asked = queries if len(rows) == len(queries) else queries.take(rows)
                found = search(asked, probed)
                while only is None and not beyond and probed < self.trained.nlist:
                    short = np.flatnonzero((found.ids < 0).any(axis=1))
                    if not len(short):
                        break
                    probed = min(2 * probed, self.trained.nlist) if k < self._n_searched else self.trained.nlist
                    found.put(short, search(asked.take(short), probed))
                best.put(rows, found)
            return best

    def _probes(self, queries: Queries, nprobe: int) -> Iterable[tuple[int, Ids]]:
        """Return numbers of lists to probe, with the queries that need so many."""
        if not self.is_restricted or self.trained.centroids is None:
            return [(nprobe, np.arange(len(queries)))]
        nearest = self._nearest_lists
        if searches_on_device(self._device, queries):
            nearest = self._on_device.nearest_lists
        return probes_by_query(nearest, queries.vectors, nprobe, *self._list_sizes)

    def _nearest_lists(self, vectors: npt.NDArray[np.float32], nprobe: int) -> Ids:
        return nearest_lists(self.trained, self.trained.rotate(torch.from_numpy(vectors)), nprobe)

    @cached_property
    def _searched(self) -> list[InvertedLists] | list[SomeLists]:
        """The shards, or their allowed vectors."""
        return [SomeLists(shard, self._is_wanted) for shard in self.shards] if self.is_restricted else self.shards

    @cached_property
    def _n_searched(self) -> int:
        return sum(map(len, self._searched))

    @cached_property
    def _list_sizes(self) -> tuple[Ids, Ids]:
        """Vectors in each list, all and allowed, int64 [nlist] each."""
        some, none = (
            [one for one in self._searched if isinstance(one, SomeLists)],
            np.zeros(self.trained.nlist, np.int64),
        )
        return sum((one.whole for one in some), none), sum((one.sizes for one in some), none)

    def _open_on_device(self) -> OnDevice:
        n = sum(map(len, self.shards))
        ids, numbers, at = np.empty(n, np.int64), np.empty(n, np.int32), 0
        for shard, number in chain.from_iterable(product([one], one.numbers) for one in self.shards):
            rows = slice(at, at := at + shard.size(number))
            ids[rows], numbers[rows] = shard.ids(number), number
        on_gpu = n < _MOST_SORTED and _SORT_BYTES * n < free_memory(torch.device(self._device))
        order = torch.from_numpy(ids).to(self._device if on_gpu else "cpu").argsort().cpu().numpy()
        order = order[self._is_wanted(ids[order])]
        listed = None if self.trained.centroids is None else numbers[order]
        return OnDevice(self._device, self.trained, ids[order], listed, self.vectors.mapped, self.trained.d)

    def _search_shards(self, k: int, depth: int, only: Collection[int] | None, beyond: int) -> _SearchLists:
        shards: Sequence[Lists] = self._searched
        if only is not None:
            shards = self.shards_with(only, shards)
        depth = min(depth, max(self._n_searched, 1))

        def search(queries: Queries, nprobe: int) -> Best:
            # Compare many queries with the vectors of lists, if these stay in memory: faster than re-ranking
            # many candidates of each, and no less accurate.
            by_vectors = self._fits and not isinstance(self.trained.codec, Whole)
            by_vectors &= len(queries) * nprobe >= _SHARED_LISTS * self.trained.nlist
            found = Search(
                self.trained, queries, nprobe, min(depth, k + SPARE) if by_vectors else depth, self.tombstones.contains,
                room=self.room, vectors=self.vectors if by_vectors else None, rough=True, beyond=beyond,
            )  # fmt: skip
            found.add(*shards)
            return rerank(queries.vectors, found.candidates, self.vectors, k)

        return search

    def shards_with(self, numbers: Collection[int], shards: Sequence[_Shard]) -> list[_Shard]:
        """Return those of the ``shards``, in the order of the log, that have some of these parts."""
        records = map(ShardRecord.of, self._files.shards.values())
        return [shard for shard, one in zip(shards, records, strict=True) if not set(one.parts).isdisjoint(numbers)]

    @property
    def _fits(self) -> bool:
        return self.vectors_in_log * self.trained.d * _VECTOR_BYTES <= memory_of_machine() // 2

    def candidates_for(self, k: int) -> int:
        """Return the candidates that each of many queries takes for k neighbours."""
        return k + SPARE if self._fits else self._depth_for(k, self.point)

    def _depth_for(self, k: int, point: Point) -> int:
        """Return the re-rank depth, doubled under a filter: codes are worse for far vectors."""
        if isinstance(self.trained.codec, Whole):
            return k + SPARE  # whole vectors need hardly more
        depth = point.depth if self._allows is None else 2 * point.depth
        return max(depth, -(-depth * k // TUNED_K), k + SPARE)

    def _is_wanted(self, ids: Ids) -> npt.NDArray[np.bool_]:
        live: npt.NDArray[np.bool_] = ~self.tombstones.contains(ids)
        return live & self._allowed.contains(ids) if self.is_restricted else live


def room_in(memory: int | None) -> int:
    """Return the bytes for each of distances and candidates if a search may use ``memory``."""
    return ROOM if memory is None else max(_LEAST_ROOM, min(ROOM, memory // 6))


def rows_in(room: int, depth: int, d: int) -> int:
    """Return the number of queries searched at a time, for ``depth`` candidates, in ``room`` bytes."""
    return max(1, room // (_BYTES_PER_CANDIDATE * depth + _BYTES_PER_DIMENSION * d))


class ExactDatabase(_Open):
    """A store searched exactly, with the methods of ``Database``."""

    name = NO_INDEX

    def __init__(
        self,
        store: Store,
        encoder: str | None = None,
        *,
        device: str = "cpu",
        memory: int | None = None,
        allows: Allows | AllowedChunks | None = None,
    ) -> None:
        super().__init__(store, search_scope.pick_encoder(store, encoder), device, memory, allows)
        self._rows = lru_cache(_KEPT_ROWS)(self._read_rows)

    def _read_rows(self, part: int) -> npt.NDArray[np.int64]:
        rows = searchable_rows(self.store, part, self.tombstones)
        return rows if self._allows is None else rows[self._allowed.rows(part)[rows]]

    @property
    def settings(self) -> list[Any]:
        """The settings that affect results, besides the vectors: none."""
        return [NO_INDEX]

    def held(self) -> list[int]:
        """Return the numbers of the parts searched, ascending."""
        return embedded_parts(self.store, self.encoder)

    def reads(self) -> list[str]:
        """Return paths of the files searched, which an erase replaces."""
        return [parts.part_entry(self.store, "embeddings", part, self.encoder).path for part in self.held()]

    def candidates_for(self, k: int) -> int:
        """Return the candidates that each query takes for k neighbours."""
        return k + SPARE

    def search(
        self, queries: Queries, k: int, *, only: Collection[int] | None = None, wider: int = 1, beyond: int = 0
    ) -> Best:
        """Return the k nearest live keys of each query; ``only``: in these parts. Every key is compared."""
        del wider, beyond
        if searches_on_device(self._device, queries):
            return self._on_device.search(queries, 0, k, only=only)
        best: Best | None = None
        with self._turn(queries) as queries:
            for part in vectors_ahead(self.store, self.encoder, self.held()):
                rows = self._rows(part)
                if len(rows) and (only is None or part in only):
                    vectors = read_part_vectors(self.store, self.encoder, part)
                    for some_rows in in_steps(rows, max(1, self.room // (2 * vectors.shape[1]))):
                        some = VectorLists(parts.chunk_ids(part, some_rows), vectors[as_slice(some_rows)])
                        best = nearest_of(queries, some, k, best, room=self.room)
        return best or Best.nothing(len(queries), k)

    def _open_on_device(self) -> OnDevice:
        ids = np.concatenate(
            [np.zeros(0, np.int64), *(parts.chunk_ids(part, self._rows(part)) for part in self.held())]
        )
        d = self.store.state.records[f"encoder:{self.encoder}"]["dimension"]
        return OnDevice(self._device, None, ids, None, Vectors(self.store, self.encoder).mapped, d)


def nearest_of(
    queries: Queries, some: VectorLists, k: int, before: Best | None, *, room: int, device: str = "cpu"
) -> Best:
    """Return the k nearest of ``some`` and ``before``."""
    if searches_on_device(device, queries):
        ids = some.ids(0)
        loaded = ResidentLists(None, None, ids, in_blocks(ids, some.vectors, _BLOCK_ROWS), device)
        found = loaded.search(queries, k)
        return found if before is None else merged(before, found, k)
    found, at = Best.nothing(len(queries), k), 0
    for asked in queries.blocks(rows_in(room, k + SPARE, queries.vectors.shape[1])):
        search = Search(some.trained, asked, 1, k + SPARE, nothing_banned, room=room)
        search.add(some)
        found.put(slice(at, at := at + len(asked)), rerank(asked.vectors, search.candidates, some.vectors, k))
    return found if before is None else merged(before, found, k)


def searches_on_device(device: str, queries: Queries) -> bool:
    """Check whether a GPU searches for queries. Repeated documents, which are rare, are left to the CPU."""
    return device != "cpu" and queries.excluded.repeats is None


def searched_of(database: AnyDatabase) -> list[Any]:
    """Return what decides which vectors may be found in a database."""
    state, held, encoder = database.store.state, database.held(), database.encoder
    files = [entry.path for part in held if (entry := state.part_file("embeddings", part, encoder)) is not None]
    return [database.settings, database.reads(), files, stands_for(state)]


AnyDatabase = Database | ExactDatabase
_SearchLists = Callable[[Queries, int], Best]  # takes queries and the number of lists that each probes
