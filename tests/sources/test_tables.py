"""Parquet: every row comes out once, as reading by rows would give it, whatever its types, groups and damage."""

from __future__ import annotations

import datetime
import decimal
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrotool.sources import WHOLE, Document, Fields, Rejected, columnar, cut_input, find_inputs, read_input
from retrotool.sources.records import content_hash, document_of

texts = st.none() | st.text(st.characters(codec="utf-8"), max_size=12) | st.just("x" * 40)
records = st.lists(
    st.fixed_dictionaries(
        {
            "id": st.none() | st.sampled_from(["", "a", "b"]),
            "text": texts,
            "source": st.none() | st.sampled_from(["", "s"]),
            "year": st.none() | st.integers(-5, 5),
            "tags": st.none() | st.lists(st.none() | st.text(max_size=3), max_size=2),
            "meta": st.none() | st.fixed_dictionaries({"url": st.none() | st.text(max_size=3), "n": st.integers(0, 9)}),
        }
    ),
    min_size=1,
    max_size=30,
)
SCHEMA = pa.schema(
    [
        ("id", pa.string()), ("text", pa.string()), ("source", pa.string()), ("year", pa.int32()),
        ("tags", pa.list_(pa.string())), ("meta", pa.struct([("url", pa.string()), ("n", pa.int64())])),
    ]
)  # fmt: skip
field_choices = st.builds(
    Fields,
    text=st.sampled_from(["text", "meta.url"]),
    id=st.sampled_from(["id", "year", "meta.n", "missing", "tags"]),
    keep=st.lists(st.sampled_from(["source", "year", "tags", "meta", "meta.url", "none", "text"]), max_size=3).map(
        tuple
    ),
    max_document=st.sampled_from([4, 20, 1000]),
)
text_types = st.sampled_from(
    [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


def input_of(path: Path):
    (file,) = find_inputs([str(path)])
    return replace(file, name=Path(file.path).name)  # as if given from its folder


def write(path: Path, table: pa.Table, **options: Any):
    pq.write_table(table, path, **{"write_page_checksum": True, **options})
    return input_of(path)


def row_by_row(content: list[dict[str, Any]], fields: Fields, name: str) -> list[Document | Rejected]:
    """What the rows are, one at a time, by the rule for a row."""
    return [document_of(row, fields, name, n, n) for n, row in enumerate(content, 1)]


@given(records, field_choices, text_types, st.integers(1, 9), st.integers(1, 40))
def test_columns_give_what_rows_would(folder, content, fields, text_type, group, window_rows):
    table = pa.Table.from_pylist(content, schema=SCHEMA)
    content = table.to_pylist()
    table = table.set_column(1, "text", table["text"].cast(text_type))
    file = write(folder / "columns.parquet", table, row_group_size=group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columnar, "WINDOW_ROWS", window_rows)
        found = list(read_input(file, fields))
    expected = row_by_row(content, fields, file.name)
    for row, same in zip(found, expected, strict=True):
        if isinstance(row, Rejected) and "max-document" in row.reason:
            assert isinstance(same, Rejected)
            assert row.reason == same.reason
        else:
            # A field of a null struct is null, where a row has none.
            assert row == same or (str(same[1]).startswith("no field") and row.reason.endswith("is null"))


@given(records, st.integers(1, 5), st.integers(1, 2000))
def test_slices_are_the_whole(folder, content, group, target):
    file = write(folder / "slices.parquet", pa.Table.from_pylist(content, schema=SCHEMA), row_group_size=group)
    whole = list(read_input(file, Fields()))
    slices = cut_input(file, Fields(), target)
    assert (slices[0].start, slices[0].first) == (0, 0)
    together = []
    for where in slices:
        found = list(read_input(file, Fields(), where))
        assert [row.line for row in found] == list(range(1, len(found) + 1))
        if where != WHOLE:
            assert len(found) == where.last - where.first
        together += [row._replace(line=row.line + where.first) for row in found]
    assert together == whole


def test_ids_may_be_whole_numbers_and_missing_ones_are_made_of_the_text(tmp_path):
    for kind in (pa.int8(), pa.uint64(), pa.int64()):
        table = pa.table({"id": pa.array([1, None], kind), "text": ["a", "b"]})
        found = list(read_input(write(tmp_path / "ids.parquet", table), Fields()))
        assert [row.id for row in found] == ["1", content_hash("b").hex()]
    for column in ([1.5], [True], [[]], [{"a": 1}]):
        (row,) = read_input(write(tmp_path / "ids.parquet", pa.table({"id": column, "text": ["a"]})), Fields())
        assert row == Rejected(1, "'id' is neither a string nor a whole number")


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int8(), pa.string())])
def test_invalid_utf8_spoils_its_own_row_only(tmp_path, kind):
    raw = pa.array([b"good", b"b\xffd", "gööd".encode()])
    values = raw.dictionary_encode() if pa.types.is_dictionary(kind) else raw
    target = pa.dictionary(pa.int32(), pa.binary()) if pa.types.is_dictionary(kind) else kind
    if pa.types.is_dictionary(kind):
        strings = pa.StringArray.from_buffers(3, *values.dictionary.buffers()[1:])
        column = pa.DictionaryArray.from_arrays(values.indices, strings)
    elif pa.types.is_large_string(target):
        column = pa.LargeStringArray.from_buffers(3, *raw.cast(pa.large_binary()).buffers()[1:])
    elif pa.types.is_string(target):
        column = pa.StringArray.from_buffers(3, *raw.buffers()[1:])
    else:
        column = raw
    file = write(tmp_path / "broken.parquet", pa.table({"text": column, "id": ["1", "2", "3"]}))
    found = list(read_input(file, Fields()))
    assert [row.text for row in found if isinstance(row, Document)] == ["good", "gööd"]
    assert found[1] == Rejected(2, "invalid UTF-8 at byte 1 of a value")
    # As a kept value it spoils the row, too: it could not be kept.
    kept = list(read_input(file, Fields(text="id", keep=("text",))))
    assert [type(row) for row in kept] == [Document, Rejected, Document]


def test_kept_values_are_text_as_they_are_and_json_else(tmp_path):
    table = pa.table(
        {
            "text": ["a"],
            "when": pa.array([1_700_000_000_123_456_789], pa.timestamp("ns")),
            "day": [datetime.date(2020, 2, 3)],
            "price": [decimal.Decimal("1.50")],
            "tags": [["x", None]],
            "real": [1.5],
            "flag": [True],
            "tree": [{"a": {"b": "c"}}],
            "kind": pa.array(["k"]).dictionary_encode(),
        }
    )
    keep = ("when", "day", "price", "tags", "real", "flag", "tree", "tree.a", "tree.a.b", "kind", "tree.x", "text.x")
    (row,) = read_input(write(tmp_path / "kept.parquet", table), Fields(keep=keep))
    assert row.kept == (
        "2023-11-14 22:13:20.123456789", "2020-02-03", '"1.50"', '["x",null]', "1.5", "true",
        '{"a":{"b":"c"}}', '{"b":"c"}', "c", "k", None, None,
    )  # fmt: skip


def test_a_time_that_python_has_not_is_kept_as_arrow_writes_it(tmp_path):
    table = pa.table({"text": ["a", "b"], "when": pa.array([2**55, 0], pa.timestamp("ms"))})
    found = list(read_input(write(tmp_path / "far.parquet", table), Fields(keep=("when",))))
    assert [type(row) for row in found][1] is Document
    assert found[1].kept == ("1970-01-01 00:00:00.000",)


def test_a_whole_name_goes_before_a_path_and_maps_are_followed(tmp_path):
    table = pa.table(
        {
            "meta": [{"url": "inner", "text": "in"}],
            "meta.url": ["whole"],
            "labels": pa.array([[("lang", "en")]], pa.map_(pa.string(), pa.string())),
        }
    )
    fields = Fields(text="meta.text", id="meta.url", keep=("labels.lang", "labels.none"))
    (row,) = read_input(write(tmp_path / "names.parquet", table), fields)
    assert (row.id, row.text, row.kept) == ("whole", "in", ("en", None))


def test_of_a_struct_only_the_fields_that_are_asked_for_are_read(tmp_path):
    content = [{"text": "a", "meta": {"url": "u", "image": b"x" * 1000, "deep": {"k": "v"}}}]
    file = write(tmp_path / "nested.parquet", pa.Table.from_pylist(content))
    with pq.ParquetFile(file.path) as table:
        selected = columnar._selected(table, Fields(keep=("meta.url", "meta.deep.k")))
        batch = next(table.iter_batches(columns=selected))
    assert batch.to_pylist() == [{"text": "a", "meta": {"url": "u", "deep": {"k": "v"}}}]


def test_a_missing_column_sets_every_row_aside(tmp_path):
    file = write(tmp_path / "other.parquet", pa.table({"body": ["a", "b"], "n": [1, 2]}), row_group_size=1)
    rows = [Rejected(line, "no column 'text' among 2", excerpt="body, n") for line in (1, 2)]
    assert list(read_input(file, Fields())) == rows


def test_key_value_rows(tmp_path):
    table = pa.table({"q": ["k", None, "k3"], "a": ["v", "v2", None], "id": ["1", "2", "3"]})
    found = list(read_input(write(tmp_path / "pairs.parquet", table), Fields(key="q", value="a")))
    assert (found[0].text, found[0].value) == ("k", "v")
    assert [row.reason for row in found[1:]] == ["'q' is null", "'a' is null"]


LISTS = [
    pa.list_(pa.int32()), pa.large_list(pa.uint16()), pa.list_(pa.int64(), 2), pa.list_(pa.uint8()),
]  # fmt: skip


@pytest.mark.parametrize("kind", LISTS, ids=str)
def test_token_ids_are_taken_over_as_arrays(tmp_path, kind):
    rows_ = [[1, 2], None, [3, None], [5, 6]]
    if not pa.types.is_fixed_size_list(kind):
        rows_ += [[]]
    array = pa.array(rows_, kind)
    file = write(tmp_path / "tokens.parquet", pa.table({"input_ids": array}))
    found = list(read_input(file, Fields(tokens="input_ids")))
    assert [row.tokens.tolist() for row in found if isinstance(row, Document)] == [[1, 2], [5, 6]]
    assert found[0].id == content_hash("", None, np.array([1, 2])).hex()
    assert (found[0].text, found[0].tokens.dtype.kind in "iu") == ("", True)
    assert found[1:3] == [Rejected(2, "'input_ids' is null"), Rejected(3, "a token id is null")]
    assert found[4:] in ([], [Rejected(5, "'input_ids' is empty")])


def test_what_is_no_list_of_ids_is_set_aside(tmp_path):
    for column in ([[1.0, 2.0]], ["text"], [[["a"]]], [7]):
        (row,) = read_input(write(tmp_path / "odd.parquet", pa.table({"ids": column})), Fields(tokens="ids"))
        assert row == Rejected(1, "'ids' is not a list of token ids")
    (row,) = read_input(write(tmp_path / "odd.parquet", pa.table({"ids": [[1, -1]]})), Fields(tokens="ids"))
    assert row == Rejected(1, "'ids' has a negative token id")
    (row,) = read_input(
        write(tmp_path / "odd.parquet", pa.table({"ids": [[1] * 26]})), Fields(tokens="ids", max_document=100)
    )
    assert row == Rejected(1, "26 tokens, 4 bytes each, are more than --max-document 100")


@pytest.mark.parametrize("count", [25, 26, 10_000])
def test_the_limit_on_token_ids_is_the_same_in_every_format(tmp_path, count):
    fields = Fields(tokens="m.ids", max_document=100)
    content = [{"m": {"ids": [7] * count}}, {"m": {"ids": [7] * 25}}]
    write(tmp_path / "a.parquet", pa.Table.from_pylist(content))
    pa.feather.write_feather(pa.Table.from_pylist(content), tmp_path / "a.arrow")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (tmp_path / "a.json").write_text(json.dumps(content, indent=1))
    for suffix in ("parquet", "arrow", "jsonl", "json"):
        first, second = read_input(input_of(tmp_path / f"a.{suffix}"), fields)
        assert second.tokens.tolist() == [7] * 25
        if count == 25:
            assert first.tokens.tolist() == [7] * 25
        else:
            assert first.reason == f"{count:,} tokens, 4 bytes each, are more than --max-document 100"


@pytest.mark.parametrize("checksums", [True, False])
def test_rows_before_a_damaged_page_come_out_and_the_rest_is_counted(tmp_path, checksums):
    generator = np.random.default_rng(0)
    content = [generator.bytes(150).hex() for _ in range(6000)]
    path = tmp_path / "damaged.parquet"
    write(
        path, pa.table({"text": content}), row_group_size=3000, write_page_checksum=checksums, use_dictionary=False,
        data_page_size=1 << 14, write_batch_size=50, compression="none",
    )  # fmt: skip
    data = bytearray(path.read_bytes())
    # Pages hold 100 rows; of the one with row 4,500, the length of a value leads outside.
    place = data.index(content[4500].encode())
    data[place - 4 : place + 4] = b"\xff" * 8
    path.write_bytes(data)
    *good, last = read_input(input_of(path), Fields())
    assert [row.text for row in good] == content[: len(good)]
    assert len(good) == 4500
    assert last.damage
    assert last.line == len(good) + 1
    assert f"broken off after row {len(good):,}, {6000 - len(good):,} rows are lost" in last.reason
    (first, second) = cut_input(input_of(path), Fields(), 1)
    assert len(list(read_input(input_of(path), Fields(), first))) == 3000
    assert list(read_input(input_of(path), Fields(), second))[-1].line == len(good) - 3000 + 1


def test_a_single_flipped_bit_is_found_by_the_checksum(tmp_path):
    path = tmp_path / "flipped.parquet"
    write(path, pa.table({"text": ["plain text " * 20] * 50}), use_dictionary=False, compression="none")
    data = bytearray(path.read_bytes())
    data[data.index(b"plain text") + 500] ^= 1
    path.write_bytes(data)
    (row,) = read_input(input_of(path), Fields())
    assert row.damage
    assert "50 rows are lost" in row.reason


@pytest.mark.parametrize("left", [0, 3, 100, -1, -9])
def test_a_cut_off_file_is_one_damage_and_one_slice(tmp_path, left):
    path = tmp_path / "cut.parquet"
    write(path, pa.table({"text": ["some text"] * 500}), row_group_size=100)
    path.write_bytes(path.read_bytes()[:left])
    file = input_of(path)
    assert cut_input(file, Fields(), 1) == [WHOLE]
    (row,) = read_input(file, Fields())
    assert isinstance(row, Rejected)
    assert row.damage == bool(left)


def test_a_table_without_rows_has_none(tmp_path):
    file = write(tmp_path / "none.parquet", pa.table({"text": pa.array([], pa.string())}))
    assert list(read_input(file, Fields())) == []
    assert cut_input(file, Fields(), 1) == [WHOLE]


def test_long_rows_make_small_batches(tmp_path):
    file = write(tmp_path / "long.parquet", pa.table({"text": ["x" * 900_000 + str(i) for i in range(40)]}))
    sizes = []
    real = columnar.documents_of_batch

    def spy(batch, *rest):
        sizes.append(batch.num_rows)
        return real(batch, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columnar, "documents_of_batch", spy)
        assert len(list(read_input(file, Fields()))) == 40
    assert max(sizes) <= columnar.BATCH_BYTES // 900_000
