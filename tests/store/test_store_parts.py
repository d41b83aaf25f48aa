"""What is written into a part's files comes back from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from store_help import make_store, viewing
from stored import stored_file

from retrotool.embed.search_scope import count_keys, live_rows, searchable_rows
from retrotool.errors import CorruptError
from retrotool.store import neighbour_tables, parts, tombstones
from retrotool.store.log import FileEntry
from retrotool.store.neighbour_tables import NeighbourTable
from retrotool.store.paths import FileName, part_slot
from retrotool.store.state import Group
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones
from retrotool.store.vectors import read_vectors, write_vectors

RUN = "0123abcd"
Named = Callable[..., FileName]


hashes = st.binary(min_size=16, max_size=16)
int32 = st.integers(0, 2**31 - 1)
ids = st.builds(lambda part, row: part << 32 | row, st.integers(0, 3), st.integers(0, 20) | st.just(2**31 - 1))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store of two-byte tokens, eight a chunk."""
    return make_store(tmp_path_factory.mktemp("small") / "store", vocabulary=1 << 16)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store of four-byte tokens, eight a chunk."""
    return make_store(tmp_path_factory.mktemp("large") / "store", vocabulary=(1 << 16) + 1)


def name(kind: str, part: int = 0, folder: str = "") -> FileName:
    return FileName.new(RUN, kind, part_slot(part), "parquet", folder)


def test_a_vocabulary_of_two_to_the_sixteen_takes_two_bytes_a_token(small: Store, large: Store) -> None:
    assert (small.identity.tokenizer.token_bytes, large.identity.tokenizer.token_bytes) == (2, 4)
    assert [parts.token_dtype(n).str for n in (2, 4)] == ["<u2", "<u4"]


@st.composite
def chunk_columns(draw: st.DrawFn, dtype: str) -> tuple[np.ndarray, ...]:
    n = draw(st.integers(1, 30))
    columns = [draw(hnp.arrays(np.int32, n, elements=int32)) for _ in range(3)]
    return (*columns, draw(hnp.arrays(dtype, (n, 8))), draw(hnp.arrays(np.bool_, n)))


def check_chunks(store: Store, columns: tuple[np.ndarray, ...], part: int, row_group: int) -> None:
    table = parts.chunks_table(*columns)
    entry = parts.write_batches(store, name("chunks", part), table.schema, [table], row_group=row_group)
    n = len(columns[0])
    assert entry.rows == n
    view = viewing(store, entry)
    groups = range(-(-n // row_group))
    for rows, read in (
        (slice(None), parts.read_chunks(view, part)),
        *((slice(g * row_group, (g + 1) * row_group), parts.read_chunks(view, part, [g])) for g in groups),
    ):
        assert read.part == part
        for written, got in zip(columns, (read.doc, read.index, read.n_tokens, read.tokens, read.key), strict=True):
            assert got.dtype == written.dtype
            np.testing.assert_array_equal(got, written[rows])
        assert len(read) == len(columns[0][rows])
    np.testing.assert_array_equal(parts.read_parquet(view, entry, ["row"])["row"].to_numpy(), np.arange(n))


@given(columns=chunk_columns("<u2"), part=st.integers(0, 10**7), row_group=st.integers(1, 40))
def test_chunks_of_two_byte_tokens_come_back(small: Store, columns: Any, part: int, row_group: int) -> None:
    check_chunks(small, columns, part, row_group)


@given(columns=chunk_columns("<u4"), part=st.integers(0, 10**7), row_group=st.integers(1, 40))
def test_chunks_of_four_byte_tokens_come_back(large: Store, columns: Any, part: int, row_group: int) -> None:
    check_chunks(large, columns, part, row_group)


@given(st.lists(st.tuples(st.integers(0, 8), st.booleans(), st.booleans()), min_size=1, max_size=40), st.integers(1, 9))
def test_what_is_embedded_and_searched(small: Store, rows: list[tuple[int, bool, bool]], row_group: int) -> None:
    """Embedded: keys that are not erased. Searched: those of them that are not purged. However the mask is read."""
    n_tokens, key, purged = (np.array(column) for column in zip(*rows, strict=True))
    table = parts.chunks_table(range(len(rows)), [0] * len(rows), n_tokens, np.zeros((len(rows), 8), "<u2"), key)
    entry = parts.write_batches(small, name("chunks", 2), table.schema, [table], row_group=row_group)
    view = viewing(small, entry)
    embedded = [n > 0 and is_key for n, is_key, _ in rows]
    chunks = parts.read_chunks(view, 2)
    assert chunks.embedded.tolist() == embedded
    assert parts.read_embedded(view, 2).tolist() == embedded
    assert parts.read_key(view, 2).tolist() == key.tolist()
    assert parts.n_keys(entry) == count_keys(view, 2) == sum(key)
    dead = Tombstones(np.sort(np.concatenate([parts.chunk_ids(2, np.flatnonzero(purged)), np.array([5, 9 << 32])])))
    expected = [row for row, (n, is_key, gone) in enumerate(rows) if n > 0 and is_key and not gone]
    assert searchable_rows(view, 2, dead).tolist() == expected
    assert live_rows(chunks, dead).tolist() == [n > 0 and not gone for n, _, gone in rows]


def test_where_all_chunks_are_keys_nothing_is_said_of_keys(small: Store) -> None:
    columns = ([0, 0], [0, 1], [8, 1], np.zeros((2, 8), "<u2"))
    without, given_all = parts.chunks_table(*columns), parts.chunks_table(*columns, np.ones(2, np.bool_))
    assert without.equals(given_all) and without.schema.equals(parts.chunks_schema(16))
    entry = parts.write_parquet(small, name("chunks"), given_all)
    assert entry.about is None
    view = viewing(small, entry)
    assert parts.read_chunks(view, 0).key.tolist() == parts.read_key(view, 0).tolist() == [True, True]


def test_the_log_counts_the_keys_of_a_file_beside_what_else_it_says(small: Store) -> None:
    table = parts.chunks_table([0, 0], [0, 1], [8, 1], np.zeros((2, 8), "<u2"), np.array([True, False]))
    assert not table.schema.field("key").nullable
    assert parts.write_parquet(small, name("chunks"), table, about={"x": 1}).about == {"x": 1, "keys": 1}
    empty = table.slice(0, 0)
    assert parts.write_parquet(small, name("chunks"), empty).about == {"keys": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop_columns(["key"]), "column 'key' is missing, the log says bool"),
        (lambda table: table.rename_columns([*table.column_names[:-1], "kez"]), "column 'key' is missing"),
        (lambda table: retyped(table, pa.array([1, 0], pa.int8())), "column 'key' is int8, the log says bool"),
        (lambda table: retyped(table, pa.array([True, None])), "column 'key' has nulls"),
    ],
)
def test_a_file_that_does_not_tell_keys_from_values_is_corrupt(
    small: Store, change: Callable[[pa.Table], pa.Table], message: str
) -> None:
    table = parts.chunks_table([0, 0], [0, 1], [8, 1], np.zeros((2, 8), "<u2"), np.array([True, False]))
    entry = parts.write_parquet(small, name("chunks"), change(table), about={"keys": 1})
    view = viewing(small, entry)
    for read in (parts.read_chunks, parts.read_embedded, parts.read_key):
        with pytest.raises(CorruptError, match=message):
            read(view, 0)


def test_a_key_column_that_the_log_does_not_count_is_corrupt(small: Store) -> None:
    table = parts.chunks_table([0, 0], [0, 1], [8, 1], np.zeros((2, 8), "<u2"), np.array([True, False]))
    entry = parts.write_parquet(small, name("chunks"), table)
    with pytest.raises(CorruptError, match="column 'key' is bool, the log says missing"):
        parts.read_embedded(viewing(small, dataclasses.replace(entry, about=None)), 0)


def retyped(table: pa.Table, key: pa.Array) -> pa.Table:
    return table.drop_columns(["key"]).append_column("key", key)


@st.composite
def document_tables(draw: st.DrawFn) -> pa.Table:
    keep = draw(st.lists(st.sampled_from(["year", "licence", "ein Wort"]), unique=True))
    by_type = {
        pa.string(): st.none() | st.text(),
        pa.binary(16): st.none() | hashes,
        pa.int32(): int32,
        pa.int64(): st.integers(-(2**63), 2**63 - 1),
    }
    schema = parts.documents_schema(keep)
    rows = draw(st.lists(st.fixed_dictionaries({field.name: by_type[field.type] for field in schema}), max_size=10))
    return pa.Table.from_pylist(rows, schema=schema)


@given(table=document_tables())
def test_documents_come_back(small: Store, table: pa.Table) -> None:
    entry = parts.write_parquet(small, name("documents"), table)
    view = viewing(small, entry)
    assert parts.read_documents(view, 0).equals(table)
    assert parts.read_documents(view, 0, ["n_tokens", "id"]).equals(table.select(["n_tokens", "id"]))


@given(st.sampled_from(["<u2", "<u4", "<f2", "<i8"]), st.data())
def test_numbers_come_back_from_fixed_binary(dtype: str, data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(0, 20), st.integers(1, 9)))
    values = data.draw(hnp.arrays(np.uint8, (*shape, np.dtype(dtype).itemsize))).view(dtype)[..., 0]
    column = pa.chunked_array([parts.fixed_binary(values)])
    assert column.to_pylist() == [row.tobytes() for row in values]
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, shape[0])] * 2)))
    for rows, piece in ((slice(None), column), (slice(start, stop), column.slice(start, stop - start))):
        assert parts.from_fixed_binary(piece, np.dtype(dtype)).tobytes() == values[rows].tobytes()
    split = pa.chunked_array([*column.slice(0, start).chunks, *column.slice(start).chunks], column.type)
    assert parts.from_fixed_binary(split, np.dtype(dtype)).tobytes() == values.tobytes()


def test_fixed_binary_takes_numbers_that_do_not_lie_side_by_side() -> None:
    values = np.arange(24, dtype="<u2").reshape(4, 6)
    for view in (values[::2], values[:, ::2], values.T, values[::-1]):
        column = pa.chunked_array([parts.fixed_binary(view)])
        np.testing.assert_array_equal(parts.from_fixed_binary(column, view.dtype), view)


def test_nulls_come_back_from_fixed_binary_as_zeros() -> None:
    column = pa.chunked_array([pa.array([b"\1\0\2\0", None, b"\3\0\4\0"], pa.binary(4))])
    assert parts.from_fixed_binary(column, np.dtype("<u2")).tolist() == [[1, 2], [0, 0], [3, 4]]


@given(st.integers(0, 2**31 - 1), st.lists(st.integers(0, 2**31 - 1)))
def test_a_chunk_id_holds_its_part_and_its_row(part: int, rows: list[int]) -> None:
    found = parts.chunk_ids(part, np.array(rows, np.int32))
    assert found.dtype == np.int64
    assert found.tolist() == [part << 32 | row for row in rows]


@given(matrix=hnp.arrays(np.uint16, hnp.array_shapes(min_dims=2, max_dims=2, max_side=20)), fortran=st.booleans())
def test_vectors_come_back_bit_for_bit(small: Store, matrix: np.ndarray, fortran: bool) -> None:
    values = matrix.view(np.float16)  # every pattern of bits: infinities, several kinds of nan
    name = FileName.new(RUN, "embeddings", "000000", "npy", "tiny")
    entry = write_vectors(small, name, np.asfortranarray(values) if fortran else values)
    assert entry.rows == len(values)
    read = read_vectors(viewing(small, entry), entry)
    assert (read.dtype, read.shape) == (np.float16, values.shape)
    assert np.asarray(read).tobytes() == read[:].tobytes() == values.tobytes()
    assert stored_file(small, entry.path).read_bytes()[:8] == b"\x93NUMPY\1\0"
    assert np.load(stored_file(small, entry.path)).flags.c_contiguous


@st.composite
def drawn_tables(draw: st.DrawFn) -> NeighbourTable:
    """Tables as the search makes them: nearest first, then −1 and +inf."""
    n, saved = draw(st.integers(1, 20)), draw(st.integers(1, 6))
    found = np.full((n, saved), neighbour_tables.NO_NEIGHBOUR, np.int64)
    distances = np.full((n, saved), np.inf, np.float32)
    for row in range(n):
        near = sorted(draw(st.lists(st.floats(0, 4, width=32), max_size=saved)))
        distances[row, : len(near)] = near
        found[row, : len(near)] = draw(st.lists(ids, min_size=len(near), max_size=len(near)))
    return NeighbourTable(found, distances)


@given(table=drawn_tables())
def test_neighbours_come_back(small: Store, table: NeighbourTable) -> None:
    entry = neighbour_tables.write_table(
        small, name("neighbours", folder="main"), table, database="uuid", commit=7, uri="/db", about={"k": 2}
    )
    assert (entry.rows, entry.about) == (len(table.ids), {"k": 2})
    read = neighbour_tables.read_table(viewing(small, entry), entry)
    assert (read.ids.dtype, read.distances.dtype) == (np.int64, np.float32)
    assert read.ids.tolist() == table.ids.tolist()
    assert read.distances.tolist() == table.distances.tolist()
    metadata = pq.read_schema(stored_file(small, entry.path)).metadata
    assert {key: metadata[b"retrotool." + key] for key in (b"database", b"commit", b"uri")} == {
        b"database": b"uuid", b"commit": b"7", b"uri": b"/db",
    }  # fmt: skip


def test_row_groups_of_neighbours_can_be_read_alone(small: Store) -> None:
    found = np.arange(20_000 * 2).reshape(-1, 2)
    table = NeighbourTable(found, found.astype(np.float32))
    entry = neighbour_tables.write_table(
        small, name("neighbours", folder="main"), table, database="", commit=0, uri="", about={}
    )
    view = viewing(small, entry)
    assert neighbour_tables.read_table(view, entry, [1]).ids.tolist() == found[8192:16384].tolist()
    assert neighbour_tables.read_table(view, entry, [2]).ids.tolist() == found[16384:].tolist()


@given(purges=st.lists(st.sets(ids), max_size=4), asked=st.lists(ids | st.just(-1), max_size=24))
def test_tombstones_are_the_union_of_all_purges(small: Store, purges: list[set[int]], asked: list[int]) -> None:
    entries = [
        tombstones.write_tombstones(
            small, FileName.new(RUN, "tombstones", f"p{i}", "parquet"), np.array(list(purge), np.int64)
        )
        for i, purge in enumerate(purges)
    ]
    assert [entry.rows for entry in entries] == [len(purge) for purge in purges]
    view = viewing(small, *entries)
    check_tombstones(tombstones.read_tombstones(view), set().union(*purges), asked)
    for i, purge in enumerate(purges):
        check_tombstones(tombstones.read_tombstones(view, f"p{i}"), purge, asked)


def check_tombstones(found: Tombstones, expected: set[int], asked: list[int]) -> None:
    assert found.ids.dtype == np.int64
    assert found.ids.tolist() == sorted(expected)
    assert len(found) == len(expected)
    numbers = np.array(asked, np.int64)
    assert found.contains(numbers).tolist() == [i in expected for i in asked]
    assert found.contains(numbers.reshape(-1, 1)).shape == (len(asked), 1)
    assert found.parts() == sorted({i >> 32 for i in expected})
    for part in range(5):
        assert found.rows(part).tolist() == sorted(i & 0xFFFFFFFF for i in expected if i >> 32 == part)


def test_a_table_without_a_column_that_is_read_is_corrupt(small: Store, tmp_path: Path) -> None:
    table = parts.chunks_table([0], [0], [1], np.zeros((1, 8), "<u2")).drop_columns(["tokens"])
    entry = parts.write_parquet(small, name("chunks"), table)
    with pytest.raises(CorruptError, match=entry.path):
        parts.read_chunks(viewing(small, entry), 0)


@pytest.mark.parametrize("width", [4, 7, 9, 16])
def test_chunks_of_another_length_than_the_stores_are_corrupt(small: Store, width: int) -> None:
    entry = parts.write_parquet(small, name("chunks"), parts.chunks_table([0], [0], [1], np.zeros((1, width), "<u2")))
    with pytest.raises(CorruptError, match=entry.path):
        parts.read_chunks(viewing(small, entry), 0)


def test_the_tombstones_of_one_purge_are_found_without_looking_at_the_others(small: Store) -> None:
    several = [
        tombstones.write_tombstones(small, FileName.new(RUN, "tombstones", f"p{i}", "parquet"), np.array([i]))
        for i in range(30)
    ]
    store = viewing(small, *several)
    get, looked_at = Group.get, list[str]()

    def noting(group: Group, slot: str) -> FileEntry | None:
        looked_at.append(slot)
        return get(group, slot)

    with patch.object(Group, "get", noting):
        assert tombstones.named_chunks(store, ["p7", "p9"]).tolist() == [7, 9]
    assert looked_at == ["p7", "p9"]
