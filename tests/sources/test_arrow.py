"""Arrow: files and streams give their rows, whole, in slices and up to a break; saved datasets give their files."""

from __future__ import annotations

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import orjson
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrotool.errors import UsageError
from retrotool.sources import WHOLE, Document, Fields, Rejected, cut_input, find_inputs, read_input

ROWS = [{"id": f"d{i}", "text": f"text {i} " * (i % 7 + 1), "n": i, "tags": ["x", str(i)]} for i in range(50)]
TABLE = pa.Table.from_pylist(ROWS)
KEEP = Fields(keep=("n", "tags"))


def input_of(path: Path):
    (file,) = find_inputs([str(path)])
    return replace(file, name=Path(file.path).name)  # as if given from its folder


def write_file(path: Path, table: pa.Table = TABLE, rows: int = 7, **options: Any) -> Path:
    with pa.ipc.new_file(path, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def write_stream(path: Path, table: pa.Table = TABLE, rows: int = 7, **options: Any) -> Path:
    with pa.ipc.new_stream(path, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def texts_of(rows) -> list[str | None]:
    return [row.text if isinstance(row, Document) else None for row in rows]


WRITERS = {
    "file.arrow": write_file,
    "stream.arrow": write_stream,
    "zstd.arrow": lambda path: write_file(path, compression="zstd"),
    "lz4.arrow": lambda path: write_stream(path, compression="lz4"),
    "old.arrow": lambda path: write_stream(path, use_legacy_format=True, metadata_version=pa.ipc.MetadataVersion.V4),
    "two.feather": lambda path: pa.feather.write_feather(TABLE, path, chunksize=7),
    "plain.feather": lambda path: pa.feather.write_feather(TABLE, path, compression="uncompressed", chunksize=7),
    "dictionary.arrow": lambda path: write_stream(
        path, TABLE.set_column(1, "text", TABLE["text"].dictionary_encode()), emit_dictionary_deltas=True
    ),
}


STREAMS = ("stream.arrow", "lz4.arrow", "old.arrow", "dictionary.arrow")


@pytest.mark.parametrize("name", WRITERS)
def test_files_and_streams_give_what_parquet_gives(tmp_path, name):
    WRITERS[name](tmp_path / name)
    pq.write_table(TABLE, tmp_path / "same.parquet")
    expected = [row._replace(source=name) for row in read_input(input_of(tmp_path / "same.parquet"), KEEP)]
    file = input_of(tmp_path / name)
    assert list(read_input(file, KEEP)) == expected
    slices = cut_input(file, Fields(), file.size // 3)
    assert len(slices) == 1 if name in STREAMS else len(slices) in (2, 3)
    together = []
    for where in slices:
        found = list(read_input(file, KEEP, where))
        assert where == WHOLE or len(found) == where.last - where.first
        together += [row._replace(line=row.line + where.first) for row in found]
    assert together == expected


KINDS = [
    pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view(),
    pa.dictionary(pa.int8(), pa.string()), pa.run_end_encoded(pa.int32(), pa.string()),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_text_of_every_layout_is_read(tmp_path, kind):
    values = ["a", None, "b" * 30, "ü🎈", "b" * 30]
    if pa.types.is_run_end_encoded(kind):
        column = pa.compute.run_end_encode(pa.array(values))
    else:
        column = pa.array(values).cast(kind)
    found = list(read_input(input_of(write_file(tmp_path / "t.arrow", pa.table({"text": column}))), Fields()))
    assert texts_of(found) == values
    assert found[1] == Rejected(2, "'text' is null")


def test_token_ids_of_a_dictionary_count_four_bytes_each(tmp_path):
    several = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0], pa.int8()), pa.array([[7] * 25, [8] * 26]))
    file = input_of(write_file(tmp_path / "tokens.arrow", pa.table({"ids": several})))
    first, second, third = read_input(file, Fields(tokens="ids", max_document=100))
    assert first.tokens.tolist() == third.tokens.tolist() == [7] * 25
    assert second == Rejected(2, "26 tokens, 4 bytes each, are more than --max-document 100")


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_invalid_utf8_rejects_the_rest_from_its_batch_on(tmp_path, kind):
    texts = ["good", "fine", "b?d and long enough for a view", "last"]
    table = pa.table({"text": pa.array(texts).cast(kind), "meta": [{"a": "x"}] * 4})
    path = write_file(tmp_path / "broken.arrow", table, rows=2)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"b?d", b"b\xffd"))
    *found, last = read_input(input_of(path), Fields(keep=("meta",)))
    assert [texts_of(found), last.damage] in ([["good", "fine"], True], [[], True])
    assert (last.line, "UTF" in last.reason) == (len(found) + 1, True)


def test_invalid_utf8_deep_in_a_kept_field_is_damage_where_it_is_asked_for(tmp_path):
    table = pa.table({"text": ["1", "2", "3"], "meta": [{"a": "x"}, {"a": "b?d"}, {"a": "y"}], "tags": [["t"]] * 3})
    path = write_file(tmp_path / "deep.arrow", table, rows=1)
    path.write_bytes(path.read_bytes().replace(b"b?d", b"b\xffd"))
    for keep in ("meta", "meta.a"):
        one, last = read_input(input_of(path), Fields(keep=(keep,)))
        assert (one.text, last.damage, last.line) == ("1", True, 2)
    assert texts_of(read_input(input_of(path), Fields(keep=("tags",)))) == ["1", "2", "3"]


@given(st.sampled_from(["file", "stream", "lists"]), st.floats(0, 1), st.binary(min_size=1, max_size=8))
def test_a_damaged_file_never_crashes_and_loses_no_row_in_silence(tmp_path_factory, kind, place, junk):
    path = tmp_path_factory.mktemp("junk", numbered=True) / "junk.arrow"
    small = TABLE.slice(0, 6)
    if kind == "lists":
        small = small.append_column("m", pa.array([{"a": "x", "b": [i]} for i in range(6)]))
    (write_stream if kind == "stream" else write_file)(path, small, rows=2)
    data = bytearray(path.read_bytes())
    at = int(place * (len(data) - len(junk)))
    data[at : at + len(junk)] = junk
    path.write_bytes(data)
    fields = Fields(keep=("n", "tags", "m"))
    found = list(read_input(input_of(path), fields))
    damage = [row for row in found if isinstance(row, Rejected) and row.damage]
    rows = [row for row in found if row not in damage]
    if not damage:
        # Without a checksum, a length that was changed to a possible one can't be reported from a true one.
        reader = pa.ipc.open_stream(path) if kind == "stream" else pa.ipc.open_file(path)
        with reader:
            assert len(rows) == reader.read_all().num_rows
    shutil.rmtree(path.parent)


@pytest.mark.parametrize("write", [write_file, write_stream])
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_of_a_cut_off_file_the_batches_before_come_out(tmp_path, write, compression):
    whole = write(tmp_path / "whole.arrow", rows=10, compression=compression).read_bytes()
    counts = set()
    for left in range(len(whole) - 1, 0, -97):
        path = tmp_path / "short.arrow"
        path.write_bytes(whole[:left])
        *found, last = read_input(input_of(path), Fields())
        assert texts_of(found) == [row["text"] for row in ROWS[: len(found)]]
        assert len(found) % 10 == 0
        assert last.damage
        assert last.line in (0, len(found) + 1)
        assert len(cut_input(input_of(path), Fields(), 1)) == 1
        counts.add(len(found))
    assert counts == {0, 10, 20, 30, 40, 50}


@pytest.mark.parametrize("write", [write_file, write_stream])
def test_a_file_that_becomes_shorter_while_it_is_read_is_damage(tmp_path, write):
    path = write(tmp_path / "a.arrow", pa.table({"text": ["x" * 5000] * 400}), 20)
    rows = read_input(input_of(path), Fields())
    first = [next(rows) for _ in range(20)]
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    *more, last = rows
    assert texts_of([*first, *more]) == ["x" * 5000] * (20 + len(more))
    assert last.damage
    assert f"broken off after row {20 + len(more)}" in last.reason


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("narrow", [True, False])
def test_slices_of_a_file_have_the_rows_that_were_counted(tmp_path, compression, narrow):
    columns = {"text": ["x" * (n % 90) + "y" for n in range(95)], **({"n": range(95)} if narrow else {})}
    path = write_file(tmp_path / "a.arrow", pa.table(columns), 10, compression=compression)
    file = input_of(path)
    slices = cut_input(file, Fields(), 1)
    assert [(where.first, where.last) for where in slices] == [(n, min(n + 10, 95)) for n in range(0, 95, 10)]
    together = [row for where in slices for row in read_input(file, Fields(), where)]
    assert [row.text for row in together] == columns["text"]
    assert [row.position for row in together] == list(range(1, 96))


def test_a_stream_without_its_end_mark_is_reported(tmp_path):
    path = write_stream(tmp_path / "open.arrow")
    path.write_bytes(path.read_bytes()[:-8])
    *found, last = read_input(input_of(path), Fields())
    assert len(found) == 50
    assert last == Rejected(
        51, "broken off after row 50: the stream has no end mark, so its writer was cut off", damage=True
    )


def test_what_follows_the_end_of_a_stream_is_reported(tmp_path):
    path = write_stream(tmp_path / "two.arrow")
    path.write_bytes(path.read_bytes() * 2)
    *found, last = read_input(input_of(path), Fields())
    assert len(found) == 50
    assert last.reason.endswith("bytes follow the end of the stream")


def test_offsets_that_lead_outside_are_damage(tmp_path):
    path = write_file(tmp_path / "outside.arrow", pa.table({"text": ["abc", "defg", "hi"]}))
    offsets = struct.pack("<4i", 0, 3, 7, 9)
    data = path.read_bytes()
    assert data.count(offsets) == 1
    for wrong in (struct.pack("<4i", 0, 2**30, 7, 9), struct.pack("<4i", 0, 7, 3, 9), struct.pack("<4i", -5, 3, 7, 9)):
        path.write_bytes(data.replace(offsets, wrong))
        (row,) = read_input(input_of(path), Fields())
        assert row.damage
        assert row.reason.startswith("broken off after row 0: ")


def test_feather_version_1_is_refused_with_advice(tmp_path):
    (tmp_path / "one.feather").write_bytes(b"FEA1" + bytes(60) + b"FEA1")
    (row,) = read_input(input_of(tmp_path / "one.feather"), Fields())
    assert row.damage
    assert "Feather version 1" in row.reason
    assert "version=2" in row.reason


def test_what_is_no_arrow_is_set_aside(tmp_path):
    (tmp_path / "no.arrow").write_bytes(b"something else altogether")
    (row,) = read_input(input_of(tmp_path / "no.arrow"), Fields())
    assert isinstance(row, Rejected)
    assert row.damage


def test_only_the_columns_that_are_asked_for_are_taken_out(tmp_path):
    path = write_file(tmp_path / "wide.arrow", pa.table({"image": ["?" * 50], "text": ["t"]}))
    data = path.read_bytes()
    path.write_bytes(data.replace(b"?" * 50, b"\xff" * 50))
    assert texts_of(read_input(input_of(path), Fields())) == ["t"]
    (row,) = read_input(input_of(path), Fields(text="body"))
    assert row == Rejected(1, "no column 'body' among 2", excerpt="image, text")


LISTS = [
    pa.list_(pa.int32()), pa.large_list(pa.uint16()), pa.list_(pa.int64(), 2), pa.list_view(pa.int32()),
    pa.large_list_view(pa.uint32()),
]  # fmt: skip


@pytest.mark.parametrize("kind", LISTS, ids=str)
def test_token_ids_are_taken_over_as_arrays(tmp_path, kind):
    array = pa.array([[9, 9], [1, 2], None, [3, None], [5, 6]], kind)
    path = write_file(tmp_path / "tokens.arrow", pa.table({"input_ids": array}).slice(1), rows=3)
    found = list(read_input(input_of(path), Fields(tokens="input_ids")))
    assert [row.tokens.tolist() for row in found if isinstance(row, Document)] == [[1, 2], [5, 6]]
    assert found[1:3] == [Rejected(2, "'input_ids' is null"), Rejected(3, "a token id is null")]


# Datasets that were saved to disk


def save(folder: Path, count: int = 20, shards: int = 3, **options: Any) -> None:
    data = datasets.Dataset.from_dict({"text": [f"text {i}" for i in range(count)]}, **options)
    data.save_to_disk(folder, num_shards=shards)


@pytest.fixture(autouse=True)
def _quiet():
    datasets.disable_progress_bars()


def test_a_saved_dataset_gives_its_rows_in_order(tmp_path):
    save(tmp_path / "corpus")
    shutil.copy(tmp_path / "corpus" / "data-00000-of-00003.arrow", tmp_path / "corpus" / "cache-1234.arrow")
    (tmp_path / "corpus" / "tmpabc").write_bytes(b"x")
    files = find_inputs([str(tmp_path / "corpus")])
    assert [file.name for file in files] == [f"corpus/data-0000{i}-of-00003.arrow" for i in range(3)]
    found = [row.text for file in files for row in read_input(file, Fields())]
    assert found == datasets.load_from_disk(str(tmp_path / "corpus"))["text"][:] == [f"text {i}" for i in range(20)]


def test_the_order_is_that_of_the_state(tmp_path):
    save(tmp_path / "corpus")
    state = json.loads((tmp_path / "corpus" / "state.json").read_text())
    state["_data_files"].reverse()
    (tmp_path / "corpus" / "state.json").write_text(json.dumps(state))
    files = find_inputs([str(tmp_path)])
    found = [row.text for file in files for row in read_input(file, Fields())]
    assert found == datasets.load_from_disk(str(tmp_path / "corpus"))["text"][:]


def test_a_selection_is_saved_as_its_rows(tmp_path):
    data = datasets.Dataset.from_dict({"text": [f"text {i}" for i in range(20)]})
    data.select([5, 3, 11]).save_to_disk(tmp_path / "selected")
    (file,) = find_inputs([str(tmp_path / "selected")])
    assert texts_of(read_input(file, Fields())) == ["text 5", "text 3", "text 11"]


def test_splits_are_folders(tmp_path):
    train = datasets.Dataset.from_dict({"text": ["a", "b"]})
    test = datasets.Dataset.from_dict({"text": ["c"]})
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "corpus")
    shutil.copytree(tmp_path / "corpus" / "test", tmp_path / "corpus" / "old")
    (tmp_path / "corpus" / "notes.jsonl").write_text('{"text": "no row"}')
    files = find_inputs([str(tmp_path / "corpus")])
    assert [file.name for file in files] == [f"corpus/{split}/data-00000-of-00001.arrow" for split in ("test", "train")]
    assert [row.text for file in files for row in read_input(file, Fields())] == ["c", "a", "b"]


@pytest.mark.parametrize("key", ["_indices_files", "_indices_data_files"])
def test_an_indices_mapping_is_refused(tmp_path, key):
    save(tmp_path / "corpus")
    path = tmp_path / "corpus" / "state.json"
    path.write_bytes(orjson.dumps(orjson.loads(path.read_bytes()) | {key: [{"filename": "indices.arrow"}]}))
    with pytest.raises(UsageError, match="indices mapping") as caught:
        find_inputs([str(tmp_path)])
    assert "flatten_indices" in caught.value.advice


def test_what_is_missing_from_a_saved_dataset_is_named(tmp_path):
    save(tmp_path / "corpus")
    (tmp_path / "corpus" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(UsageError, match=r"data-00001-of-00003\.arrow is listed, but missing"):
        find_inputs([str(tmp_path / "corpus")])
    save(tmp_path / "splits" / "train")
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UsageError, match="test is listed, but missing"):
        find_inputs([str(tmp_path / "splits")])


@pytest.mark.parametrize("name", ["../x.arrow", "/x.arrow", "", None, 5, "a/b.arrow", "data.json"])
def test_a_listed_file_outside_the_folder_is_refused(tmp_path, name):
    save(tmp_path / "corpus")
    path = tmp_path / "corpus" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_data_files": [{"filename": name}]}))
    with pytest.raises(UsageError, match="corpus lists"):
        find_inputs([str(tmp_path / "corpus")])


def test_token_ids_of_a_saved_dataset(tmp_path):
    data = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3], [4]], "attention_mask": [[1, 1, 1], [1]]})
    data.save_to_disk(tmp_path / "tokenized")
    (file,) = find_inputs([str(tmp_path / "tokenized")])
    found = list(read_input(file, Fields(tokens="input_ids")))
    assert [row.tokens.tolist() for row in found] == [[1, 2, 3], [4]]
    assert all(isinstance(row.tokens, np.ndarray) for row in found)
