"""Inputs by URI: what patterns and folders match, and how files are read by ranges.

Objects are in memory here, so that no client is made in this process, which forks others.
"""

from __future__ import annotations

import glob
import io
import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_help import PACK

from retrotool.errors import UsageError
from retrotool.sources import Fields, cut_input, find_inputs, read_input, remote, survey
from retrotool.sources.remote import FIRST_BYTES, RemoteReader, split_uri

BUCKET = "s3://bucket"
GLOB = glob.glob


@dataclass(frozen=True)
class Status:
    path: str
    size: int
    tag: str
    modified: float = 0.0


class Objects:
    """The objects of a storage; ``ranges`` are those that were read."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.ranges: list[tuple[str, int, int]] = []
        self.listed: list[str] = []

    def get_range(self, path: str, start: int, length: int) -> bytes:
        found = self.files[path][start : start + length]
        self.ranges.append((path, start, len(found)))
        return found

    def stat(self, path: str) -> Status | None:
        return Status(path, len(self.files[path]), f'"{hash(self.files[path])}"') if path in self.files else None

    def list(self, prefix: str) -> Iterator[Status]:
        self.listed.append(prefix)
        yield from (self.stat(path) for path in sorted(self.files) if path.startswith(prefix))

    def read(self, path: str) -> int:
        return sum(length for name, _, length in self.ranges if name == path)


@pytest.fixture()
def objects(monkeypatch: pytest.MonkeyPatch) -> Objects:
    made = Objects()
    monkeypatch.setattr(remote, "objects_at", lambda root: made)
    return made


# Patterns and folders

NAMES = st.sampled_from(
    ["a", "b", "ab", ".a", "a.jsonl", "b.txt", ".h.jsonl", "[1].txt", "x.docx", "store.json", "w.bin"]
)
PATHS = st.lists(st.lists(NAMES, min_size=1, max_size=4).map("/".join), min_size=1, max_size=8)
PARTS = st.sampled_from(
    ["a", "b", "*", "**", "?", "a*", "*.jsonl", "*.txt", ".*", "[ab]", "[!a]*", "[[]1].txt", "[1].txt"]
)
PATTERNS = st.lists(PARTS, min_size=1, max_size=4).map("/".join)


def without_conflicts(paths: list[str]) -> list[str]:
    """Those paths that can be on a disk: none is a folder of another."""
    return [path for path in dict.fromkeys(paths) if not any(other.startswith(f"{path}/") for other in paths)]


def matches(pattern: str, *, recursive: bool) -> list[str]:
    """``glob`` of Python 3.13: before it, ``a/**`` also matched an ``a`` that is no folder."""
    return [name for name in GLOB(pattern, recursive=recursive) if not name.endswith("/") or Path(name).is_dir()]


def outcome(given: str, root: str) -> list[str] | str:
    """The inputs, or the error, without the place of the tree."""
    try:
        return [file.path.removeprefix(f"{root}/") for file in find_inputs([given])]
    except UsageError as error:
        return str(error).replace(f"{root}/", "").replace("/ ", " ")


@settings(max_examples=300, deadline=None)
@given(PATHS, PATTERNS, st.booleans())
def test_patterns_and_folders_give_the_same_inputs_of_keys_as_of_a_disk(tmp_path_factory, paths, pattern, is_folder):
    made, here = Objects(), tmp_path_factory.mktemp("tree")
    for path in without_conflicts(paths):
        made.files[f"t/{path}"] = b"{}"
        (here / "t" / path).parent.mkdir(parents=True, exist_ok=True)
        (here / "t" / path).write_bytes(b"{}")
    wanted = f"t/{pattern}{'/' * is_folder}"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(remote, "objects_at", lambda root: made)
        patched.setattr(glob, "glob", matches)
        assert outcome(f"{BUCKET}/{wanted}", BUCKET) == outcome(f"{here}/{wanted}", str(here))


def test_one_listing_is_made_for_a_pattern_and_for_a_folder(objects):
    objects.files = {f"data/{folder}/{i}.jsonl": b"{}" for folder in ("a", "b") for i in range(3)} | {
        "other.jsonl": b""
    }
    assert len(find_inputs([f"{BUCKET}/data/*/[01].jsonl"])) == 4
    assert objects.listed == ["data/"]
    assert [file.path for file in find_inputs([f"{BUCKET}/data/b"])] == [f"{BUCKET}/data/b/{i}.jsonl" for i in range(3)]
    assert objects.listed == ["data/", "data/b/"]
    assert len(find_inputs([BUCKET])) == 7
    assert not objects.ranges


def test_names_are_uris_and_what_is_left_out_is_reported_by_them(objects):
    objects.files = dict.fromkeys(("d/a.jsonl", "d/x.docx", "d/w.bin", "d/t.bin", "d/t.idx", "d/drafts/b.jsonl"), b"{}")
    found = survey([f"{BUCKET}/d/"], exclude=("drafts",))
    assert [file.name for file in found.files] == [f"{BUCKET}/d/a.jsonl", f"{BUCKET}/d/t.bin"]
    assert found.left_out == [f"{BUCKET}/d/w.bin", f"{BUCKET}/d/x.docx"]
    assert found.excluded == [f"{BUCKET}/d/drafts"]
    assert [file.path for file in find_inputs([f"{BUCKET}/d/t.idx", f"{BUCKET}/d/t"])] == [f"{BUCKET}/d/t.bin"]


def test_an_empty_object_that_marks_a_folder_is_not_an_input(objects):
    objects.files = {"d": b"", "d/a.jsonl": b"{}"}
    assert [file.path for file in find_inputs([f"{BUCKET}/d"])] == [f"{BUCKET}/d/a.jsonl"]


def test_a_saved_dataset_is_read_as_its_state_lists_it(objects):
    state = {"_data_files": [{"filename": "two.arrow"}, {"filename": "one.arrow"}]}
    objects.files = {"d/state.json": json.dumps(state).encode(), "d/dataset_info.json": b"{}"}
    objects.files |= {"d/one.arrow": b"1", "d/two.arrow": b"2", "d/cache.arrow": b"3"}
    assert [Path(file.path).name for file in find_inputs([f"{BUCKET}/d"])] == ["two.arrow", "one.arrow"]
    del objects.files["d/one.arrow"]
    with pytest.raises(UsageError, match=r"s3://bucket/d: one\.arrow is listed, but missing"):
        find_inputs([f"{BUCKET}/d"])


PLACES = {
    "s3://bucket/a/b.jsonl": ("s3://bucket", "a/b.jsonl"),
    "gs://bucket": ("gs://bucket", ""),
    "az://container/a b#c?": ("az://container", "a b#c?"),
    "https://host:81/a%20b/c": ("https://host:81", "a b/c"),
    "hf://datasets/org/name/a/b": ("hf://datasets/org/name", "a/b"),
    "hf://datasets/org/name@v1/a": ("hf://datasets/org/name@v1", "a"),
    "hf://datasets/org/name@refs/convert/parquet/a": ("hf://datasets/org/name@refs/convert/parquet", "a"),
}


@pytest.mark.parametrize("uri", PLACES)
def test_a_uri_is_a_storage_and_a_path_in_it(uri):
    assert split_uri(uri) == PLACES[uri]


@pytest.mark.parametrize(
    "uri", ["s3://", "s3:///a", "s3://b/../c", "s3://b/a//c", "https://h/a?b=1", "hf://org/name/a"]
)
def test_what_is_not_a_place_is_refused(uri):
    with pytest.raises(UsageError, match="not a place of inputs"):
        split_uri(uri)


# Reading


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 5000), st.lists(st.tuples(st.integers(0, 5200), st.integers(0, 3000)), max_size=8), st.data())
def test_a_reader_gives_the_bytes_of_the_file_wherever_it_is_read(size, reads, data):
    content = random.Random(size).randbytes(size)
    made, end = Objects(), data.draw(st.none() | st.integers(0, size))
    made.files["f"] = content
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(remote, "objects_at", lambda root: made)
        patched.setattr(remote, "FIRST_BYTES", 100)
        patched.setattr(remote, "BLOCK_BYTES", 1000)
        with io.BufferedReader(RemoteReader(f"{BUCKET}/f", size, end), 64) as file:
            for place, length in reads:
                file.seek(place)
                assert file.read(length) == content[place : place + length]
        with RemoteReader(f"{BUCKET}/f", size, exact=True) as file:
            for place, length in reads:
                file.seek(place)
                assert file.read(length) == content[place : place + length]


def test_a_file_that_is_read_in_order_is_fetched_once_in_growing_blocks(objects):
    objects.files["f"] = os.urandom(30 << 20)
    with io.BufferedReader(RemoteReader(f"{BUCKET}/f", 30 << 20)) as file:
        assert file.read() == objects.files["f"]
    assert [length for _, _, length in objects.ranges[:4]] == [256 << 10, 1 << 20, 4 << 20, 8 << 20]
    assert objects.read("f") == 30 << 20


def test_only_the_beginning_is_fetched_of_a_file_of_which_only_that_is_read(objects):
    objects.files["a.jsonl"] = b'{"text": "x"}\n' * 500_000
    (file,) = find_inputs([f"{BUCKET}/a.jsonl"])
    rows = read_input(file, Fields())
    next(rows)
    rows.close()
    assert objects.read("a.jsonl") == FIRST_BYTES


def rows_to(n: int) -> list[dict[str, object]]:
    return [{"id": f"d{i}", "text": f"Lake {i} is {i * i} metres deep."} for i in range(n)]


def as_lines(rows: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_parquet(rows: list[dict[str, object]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=1000)
    return sink.getvalue()


def as_arrow(rows: list[dict[str, object]], *, stream: bool = False) -> bytes:
    sink, table = io.BytesIO(), pa.Table.from_pylist(rows)
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)
    return sink.getvalue()


def as_csv(rows: list[dict[str, object]]) -> bytes:
    return b"id,text\n" + "".join(f"{row['id']},{row['text']}\n" for row in rows).encode()


ROWS = rows_to(20_000)
FILES: dict[str, Callable[[], bytes]] = {
    "a.jsonl": lambda: as_lines(ROWS),
    **{f"a.jsonl.{kind}": lambda pack=pack: pack(as_lines(ROWS)) for kind, pack in PACK.items()},
    "a.json": lambda: json.dumps(ROWS).encode(),
    "a.csv": lambda: as_csv(ROWS),
    "a.txt": lambda: b"One lake.\n\nAnother lake. " * 1000,
    "a.parquet": lambda: as_parquet(ROWS),
    "a.arrow": lambda: as_arrow(ROWS),
    "b.arrow": lambda: as_arrow(ROWS, stream=True),
    "a.u16": lambda: b"".join((i % 60_000).to_bytes(2, "little") for i in range(500_000)),
}


@pytest.mark.parametrize("name", FILES)
def test_slices_of_an_object_have_the_rows_of_the_file_and_their_bytes_are_fetched_once(objects, tmp_path, name):
    fields = Fields(separator="\n\n", end_of_document=7)
    path, content = tmp_path / name, FILES[name]()
    path.write_bytes(content)
    objects.files[name] = content
    (local,), (there,) = find_inputs([str(path)]), find_inputs([f"{BUCKET}/{name}"])
    expected = [row._replace(source="") for row in read_input(local, fields)]
    slices = cut_input(there, fields, 300_000)
    cutting = objects.read(name)
    found = [row for where in slices for row in read_input(there, fields, where)]
    assert len(slices) > 1 or name not in ("a.jsonl", "a.parquet", "a.u16")
    assert [str(row._replace(source="", line=0)) for row in found] == [str(row._replace(line=0)) for row in expected]
    footers = 64 << 10 if name.endswith("parquet") else 1 << 10
    heads = FIRST_BYTES if name in ("a.jsonl", "a.txt", "a.u16", "a.json") else footers
    assert objects.read(name) - cutting <= len(content) + heads * len(slices)


def test_an_object_is_known_by_its_size_and_tag_alone(objects):
    objects.files["a.jsonl"] = as_lines(ROWS[:10])
    (file,) = find_inputs([f"{BUCKET}/a.jsonl"])
    before = file.fingerprint()
    assert file.change() == ""
    objects.files["a.jsonl"] = objects.files["a.jsonl"].replace(b"Lake 1", b"lake 1")
    assert file.change() == "it was replaced since it was planned"
    assert find_inputs([f"{BUCKET}/a.jsonl"])[0].fingerprint() != before
    objects.files["a.jsonl"] += b"\n"
    assert "bytes when it was planned, now" in file.change()
    assert not objects.ranges
