"""Files that are what the log says they are, and yet do not agree with each other: ``verify`` finds that too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from retrotool import api
from retrotool.ann import lists
from retrotool.ann.codes import Whole
from retrotool.ann.lists import Trained, to_faiss
from retrotool.store import neighbour_tables, parts, tombstones
from retrotool.store.leases import Run
from retrotool.store.log import Draft, FileEntry
from retrotool.store.paths import FileName, part_slot
from retrotool.store.store import Store
from retrotool.store.sums import with_sums
from retrotool.store.vectors import read_vectors, write_vectors

PART = 1
NO_PURGE = {
    "commit": 0, "erased": False, "selector": "ids", "hash": "", "reason": "", "who": "", "documents": 0, "chunks": 0,
    "tokens": 0,
}  # fmt: skip
Change = Callable[[np.ndarray], np.ndarray]


def flat(ids: np.ndarray, vectors: np.ndarray) -> Any:
    """An exact index as a store has it."""
    index = to_faiss(Trained(vectors.shape[1], Whole(vectors.shape[1])))
    lists.fill(index, np.zeros(len(ids), np.int64), ids, vectors.view(np.uint8))
    return index


@dataclasses.dataclass
class Liar:
    """Commits files in place of others, by the book but for what they say."""

    store: Store
    run: Run

    def commit(self, entry: FileEntry | None = None, remove: FileEntry | None = None, **records: Any) -> None:
        add = (entry,) if entry else ()
        gone = (remove.path,) if remove else ()
        self.store.commit(self.run, lambda _: Draft("test", add=add, remove=gone, records=records))

    def old(self, kind: str, name: str = "", slot: str = part_slot(PART)) -> FileEntry:
        return self.store.state.file(kind, slot, name)

    def name(self, old: FileEntry) -> FileName:
        name = FileName.parse(old.path)
        return FileName.new(self.run.id, name.kind, old.slot, name.extension, name.name)

    def copy(self, old: FileEntry, name: FileName | None = None) -> FileEntry:
        """The same bytes under a new name."""
        storage, copy = self.store.storage, (name or self.name(old)).path
        for source, target in zip(with_sums(old.path), with_sums(copy), strict=True):
            storage.put(target, self.run.id, lambda sink, source=source: sink.write(storage.get(source)))
        return dataclasses.replace(old, path=copy)

    def write_index(self, old: FileEntry, index: Any, about: dict[str, Any] | None) -> FileEntry:
        return self.store.write(self.name(old), lambda sink: lists.write_lists(index, sink.write), about=about)

    def table(self, kind: str, change: Callable[[pa.Table], pa.Table]) -> None:
        old = self.old(kind)
        self.commit(parts.write_parquet(self.store, self.name(old), change(parts.read_parquet(self.store, old))), old)

    def column(self, kind: str, column: str, change: Callable[[list[Any]], None]) -> None:
        def changed(table: pa.Table) -> pa.Table:
            values = table[column].to_pylist()
            change(values)
            place = table.schema.get_field_index(column)
            return table.set_column(place, column, pa.array(values, table.schema.field(column).type))

        self.table(kind, changed)

    def embeddings(self, change: Change) -> None:
        old = self.old("embeddings", "tiny")
        matrix = np.array(read_vectors(self.store, old))
        self.commit(write_vectors(self.store, self.name(old), change(matrix)), old)

    def neighbours(self, ids: Change, distances: Change, database: str | None = None) -> None:
        old = self.old("neighbours", "main")
        table = neighbour_tables.read_table(self.store, old)
        changed = neighbour_tables.NeighbourTable(ids(table.ids.copy()), distances(table.distances.copy()))
        of = {"database": database or self.store.identity.uuid, "commit": 0, "uri": "", "about": old.about}
        self.commit(neighbour_tables.write_table(self.store, self.name(old), changed, **of), old)

    def in_shard(self, ids: Change, vectors: Change, **about: Any) -> None:
        """The vectors of all parts, changed."""
        old = self.old("index", "main", "shard-0000")
        found = lists.read_lists(self.store.storage.local(old.path))
        index = flat(ids(found.ids(0).copy()), vectors(found.codes(0).view(np.float16).copy()))
        self.commit(self.write_index(old, index, {**old.about, **about}), old)

    def shard(self, ids: np.ndarray) -> None:
        old = self.old("index", "main", "shard-0000")
        index = flat(ids, np.ones((len(ids), 32), np.float16))
        self.commit(self.write_index(old, index, old.about), old)

    def tombstone(self, *ids: int) -> None:
        name = FileName.new(self.run.id, "tombstones", "p", "parquet")
        self.commit(tombstones.write_tombstones(self.store, name, np.array(ids, np.int64)))

    def block(self, purge: str, *hashes: bytes) -> None:
        name = FileName.new(self.run.id, "blocked", purge, "parquet")
        column = pa.array(hashes, pa.binary(16))
        self.commit(parts.write_parquet(self.store, name, pa.table({"hash": column})), **{"purge:p": NO_PURGE})


def put(place: int, value: Any) -> Callable[[list[Any]], None]:
    return lambda values: values.__setitem__(place, value)


def pad(values: list[bytes]) -> None:
    row = next(i for i, tokens in enumerate(values) if tokens.endswith(b"\0\0"))
    values[row] = values[row][:-2] + b"\1\0"


def swap_first(values: list[Any]) -> None:
    values[:2] = values[1::-1]


def same(array: np.ndarray) -> np.ndarray:
    return array


def with_value(value: float, place: Any = slice(None)) -> Change:
    """Put a value into an array."""

    def change(array: np.ndarray) -> np.ndarray:
        array[place] = value
        return array

    return change


def column(target: int, source: int) -> Change:
    """Make a column of a table equal to another."""

    def change(array: np.ndarray) -> np.ndarray:
        array[:, target] = array[:, source]
        return array

    return change


def without(row: int) -> Change:
    return lambda array: np.delete(array, row, axis=0)


def repeated(array: np.ndarray) -> np.ndarray:
    return np.concatenate([array, array[:1]])


def themselves(ids: np.ndarray) -> np.ndarray:
    ids[:, 0] = (PART << 32) + np.arange(len(ids))
    return ids


LIES: dict[str, tuple[Callable[[Liar], None], str]] = {
    "embeddings of another number of rows": (lambda liar: liar.embeddings(lambda m: m[:-1]), "rows for"),
    "neighbours of another number of rows": (
        lambda liar: liar.neighbours(lambda i: i[1:], lambda d: d[1:]), "rows don't match its part",
    ),
    "neighbours farthest first": (lambda liar: liar.neighbours(same, lambda d: d[:, ::-1]), "do not ascend"),
    "neighbours that are no parts": (
        lambda liar: liar.neighbours(with_value(10**15), same), "ids that are not chunks of the store: 2,000",
    ),
    "neighbours that are no rows": (
        lambda liar: liar.neighbours(with_value(1 << 32 | 10**6, (5, 3)), same), "not chunks of the store: 1",
    ),
    "neighbours below zero": (lambda liar: liar.neighbours(with_value(-7, (5, 3)), same), "an id is negative"),
    "a neighbour twice": (lambda liar: liar.neighbours(column(4, 9), same), "a row has a neighbour twice"),
    "a chunk that is its own neighbour": (lambda liar: liar.neighbours(themselves, same), "in its own document"),
    "neighbours that are no numbers away": (
        lambda liar: liar.neighbours(same, with_value(np.nan, (5, 3))), "a distance is negative or not a number",
    ),
    "neighbours less than nothing away": (
        lambda liar: liar.neighbours(same, with_value(-1, (5, 0))), "a distance is negative or not a number",
    ),
    "no neighbour that is somewhere": (
        lambda liar: liar.neighbours(with_value(-1, (5, 19)), same), "or an empty place has one",
    ),
    "a neighbour that is nowhere": (
        lambda liar: liar.neighbours(same, with_value(np.inf, (5, 19))), "or an empty place has one",
    ),
    "neighbours that are not where they are said to be": (
        lambda liar: liar.neighbours(same, lambda d: 2 * d), "are not those of the vectors",
    ),
    "neighbours that are all here": (lambda liar: liar.neighbours(same, with_value(0)), "are not those of the vectors"),
    "neighbours of another database": (
        lambda liar: liar.neighbours(same, same, "another"), "its database is not that of its record",
    ),
    "embeddings of another dimension": (
        lambda liar: liar.embeddings(lambda m: m[:, :7]), "7 dimensions, but its encoder has 32",
    ),
    "a vector that is no numbers": (lambda liar: liar.embeddings(with_value(np.nan, 3)), "are not finite: row 3"),
    "an infinite vector": (lambda liar: liar.embeddings(with_value(-np.inf, (3, 5))), "are not finite: row 3"),
    "a vector of zeros": (lambda liar: liar.embeddings(with_value(0, 3)), "has a zero vector"),
    "embeddings of other chunks": (lambda liar: liar.embeddings(lambda m: m[::-1]), "has vectors that differ"),
    "an index of other vectors": (lambda liar: liar.in_shard(same, with_value(1)), "has vectors that differ"),
    "an index that lacks a chunk": (
        lambda liar: liar.in_shard(without(7), without(7)), "chunks of its parts are missing: 1",
    ),
    "an index with a chunk twice": (lambda liar: liar.in_shard(repeated, repeated), "has a chunk twice"),
    "an index of fewer parts than it holds": (
        lambda liar: liar.in_shard(same, same, parts=[0, 1]), "has chunks of parts that it does not list",
    ),
    "an index of parts that are not there": (
        lambda liar: liar.in_shard(same, same, parts=[0, 1, 2, 3, 4]), "lists part 4, which doesn't exist",
    ),
    "embeddings of an unknown encoder": (
        lambda liar: liar.commit(**{"encoder:tiny": None}), "the record 'encoder:tiny' is missing",
    ),
    "an unknown index": (lambda liar: liar.commit(**{"index:main": None}), "the record 'index:main' is missing"),
    "neighbours of unknown chunks": (
        lambda liar: liar.commit(**{"neighbours:main": None}), "the record 'neighbours:main' is missing",
    ),
    "a document with another key": (lambda liar: liar.column("documents", "key", put(0, b"x" * 16)), "keys are not"),
    "a document with another id": (lambda liar: liar.column("documents", "id", put(0, "x")), "keys are not"),
    "a document of more tokens": (
        lambda liar: liar.column("documents", "n_tokens", put(0, 10**6)), "have different numbers of tokens",
    ),
    "a document that begins elsewhere": (
        lambda liar: liar.column("documents", "first_row", put(1, 0)), "documents are not contiguous",
    ),
    "a document of more chunks": (lambda liar: liar.column("documents", "n_chunks", put(0, 99)), "part 1"),
    "a document too many": (
        lambda liar: liar.table("documents", lambda t: pa.concat_tables([t, t.slice(0, 1)])), "part 1",
    ),
    "chunks that lack one": (lambda liar: liar.table("chunks", lambda t: t.slice(0, t.num_rows - 1)), "part 1"),
    "chunks in another order": (lambda liar: liar.column("chunks", "row", swap_first), "not numbered from 0"),
    "chunks of another document": (lambda liar: liar.column("chunks", "doc", put(0, 1)), "about which belong together"),
    "a chunk of a document that is not there": (lambda liar: liar.column("chunks", "doc", put(-1, 10**6)), "part 1"),
    "a chunk of no document": (lambda liar: liar.column("chunks", "doc", put(0, -1)), "part 1"),
    "chunks numbered wrong in their document": (
        lambda liar: liar.column("chunks", "index", put(0, 7)), "wrong positions in their documents",
    ),
    "padding that is not zero": (lambda liar: liar.column("chunks", "tokens", pad), "padding is not zero"),
    "more tokens than a chunk holds": (lambda liar: liar.column("chunks", "n_tokens", put(0, 65)), "numbers of tokens"),
    "fewer tokens than none": (lambda liar: liar.column("chunks", "n_tokens", put(0, -1)), "part 1"),
    "a part without documents": (lambda liar: liar.commit(remove=liar.old("documents")), "has no documents file"),
    "a tombstone of no part": (lambda liar: liar.tombstone(99 << 32), "are not chunks of the store"),
    "a tombstone of no row": (lambda liar: liar.tombstone(1 << 32 | 10**6), "are not chunks of the store"),
    "a tombstone below zero": (lambda liar: liar.tombstone(-1), "are not chunks of the store"),
    "a tombstone that was not counted": (lambda liar: liar.tombstone(0), "live chunks, but the log says"),
    "a block list in another order": (lambda liar: liar.block("p", b"b" * 16, b"a" * 16), "hashes are not sorted"),
    "a block list with a hash twice": (lambda liar: liar.block("p", b"a" * 16, b"a" * 16), "hashes are not sorted"),
    "a block list of no purge": (lambda liar: liar.block("q", b"a" * 16), "purge q doesn't exist"),
    "an indexed vector of no chunk": (lambda liar: liar.shard(np.array([0, 99 << 32])), "are not chunks of the store"),
    "totals that are wrong": (
        lambda liar: liar.commit(totals={"documents": 1, "chunks": 2, "tokens": 3, "rejected": 0}),
        "live documents, but the log says 1",
    ),
    "a part in the place of another": (
        lambda liar: liar.commit(dataclasses.replace(liar.copy(liar.old("chunks")), slot="000009"), liar.old("chunks")),
        "part 9 has no documents file or no chunks file",
    ),
    "parts that wait for a plan that is finished": (
        lambda liar: liar.commit(pending=1), "live documents, but the log says",
    ),
    "fewer parts than there are": (lambda liar: liar.commit(parts=1), "live documents, but the log says"),
    "rows that are not in the file": (
        lambda liar: liar.commit(
            dataclasses.replace(liar.copy(liar.old("documents")), rows=10**6), liar.old("documents"),
        ),
        "rows, the log says 1,000,000",
    ),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_found(store_copy: Path, lie: str) -> None:
    tell, expected = LIES[lie]
    store = Store.open(store_copy)
    with Run(store.storage) as run:
        tell(Liar(store, run))
    problems = [problem.text for problem in api.verify(store_copy).problems]
    assert any(expected in problem for problem in problems), problems


def test_an_erased_chunk_with_a_vector_is_found(store_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "ids").write_text(f"{PART << 32 | 3}\n")
    api.purge(store_copy, api.Selectors(chunk=tmp_path / "ids"), reason="test", erase=True)
    assert api.verify(store_copy).problems == []
    store = Store.open(store_copy)

    def revive(matrix: np.ndarray) -> np.ndarray:
        matrix[3] = 1
        return matrix

    with Run(store.storage) as run:
        Liar(store, run).embeddings(revive)
    assert any(
        "a chunk that is erased or not a key has a vector" in problem.text
        for problem in api.verify(store_copy).problems
    )


def test_every_part_is_looked_at(store_copy: Path) -> None:
    store = Store.open(store_copy)
    assert len(store.state.parts()) > 2
    with Run(store.storage) as run:
        liar = Liar(store, run)
        for part in store.state.parts():
            old = liar.old("embeddings", "tiny", part_slot(part))
            liar.commit(write_vectors(store, liar.name(old), np.zeros((1, 32), np.float16)), old)
    problems = "\n".join(problem.text for problem in api.verify(store_copy).problems)
    assert all(f"{part_slot(part)}-" in problems for part in store.state.parts())


def test_what_is_not_finished_is_no_lie(store_copy: Path) -> None:
    """An index, or a table, of which a run was killed before it could record it."""
    store = Store.open(store_copy)
    with Run(store.storage) as run:
        liar = Liar(store, run)
        for kind, slot, name in (("index", "trained", "begun"), ("neighbours", part_slot(PART), "begun")):
            old = liar.old(kind, "main", slot)
            liar.commit(liar.copy(old, dataclasses.replace(liar.name(old), name=name)))
    assert api.verify(store_copy).problems == []


def test_purged_chunks_may_be_missing_from_an_index(store_copy: Path) -> None:
    """They are left out of what is indexed later, and stay in what is there until they are erased."""
    api.purge(store_copy, api.Selectors(where="id = 'doc-3'"), reason="test")
    assert api.verify(store_copy).problems == []
    api.index(store_copy, name="later")
    assert api.verify(store_copy).problems == []


def test_vectors_of_zeros_may_be_right_where_texts_are_tokenised_again(store_copy: Path) -> None:
    """Of white space that another tokenizer made tokens of, the encoder's own sees nothing."""
    store = Store.open(store_copy)
    with Run(store.storage) as run:
        liar = Liar(store, run)
        liar.commit(**{"encoder:tiny": {**store.state.records["encoder:tiny"], "tokenizer": "another"}})
        liar.embeddings(with_value(0, 3))
        assert not any("zeros" in problem.text for problem in api.verify(store_copy).problems)
        liar.embeddings(with_value(0))
    assert any("has a zero vector" in problem.text for problem in api.verify(store_copy).problems), "not of all"
