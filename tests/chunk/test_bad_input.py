"""Bad input: rejected with file, line and reason, or refused; what is good, and what was there before, stays."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chunk_helpers import (
    FORMATS,
    LINE_FORMATS,
    TABLE_FORMATS,
    Row,
    as_line,
    pack,
    quarantine,
    run_chunk,
    verified,
    write_rows,
)
from stored import contents_of, copy_store

from retrotool import api
from retrotool.chunk import chunk_plan
from retrotool.chunk.deduplicate import DIFFERING
from retrotool.sources import streams
from retrotool.store import parts
from retrotool.store.storage import storage_at
from retrotool.store.store import Store

BEFORE = [{"id": "before", "text": "What the store holds before the bad input comes."}]
GOOD = [{"id": f"good-{i}", "text": f"Good row number {i}."} for i in range(3)]
Content = Callable[[Sequence[Row]], str]


@pytest.fixture(scope="session")
def content(tmp_path_factory: pytest.TempPathFactory) -> Content:
    """The content hash of a store of exactly these rows."""
    known: dict[str, str] = {}

    def content_of(rows: Sequence[Row]) -> str:
        key = json.dumps(rows)
        if key not in known:
            folder = tmp_path_factory.mktemp("content")
            path = write_rows(folder / "rows.jsonl", rows)
            assert run_chunk(folder / "store", path, "--tokenizer", "minilm").exit_code == 0
            known[key] = verified(folder / "store").content
        return known[key]

    return content_of


@pytest.fixture(scope="session")
def first_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    path = write_rows(folder / "before.jsonl", BEFORE)
    assert run_chunk(folder / "store", path, "--tokenizer", "minilm").exit_code == 0, "it drops white space"
    return folder / "store"


@pytest.fixture
def store(first_store: Path, tmp_path: Path) -> Path:
    return copy_store(first_store, tmp_path / "store")


@dataclass
class Case:
    """A file, and what becomes of its rows: ``good`` documents and (line, reason) of those rejected."""

    name: str
    data: bytes | list[Row | bytes]
    aside: list[tuple[int, str]]
    good: list[Row] = field(default_factory=list)

    def write(self, folder: Path) -> Path:
        path = folder / self.name
        if isinstance(self.data, bytes):
            path.write_bytes(self.data)
            return path
        return write_rows(path, self.data)


def amid(name: str, faults: list[tuple[Row | bytes, str]]) -> Case:
    """Bad rows between good ones."""
    aside = [(line, reason) for line, (_, reason) in enumerate(faults, 2)]
    return Case(name, [GOOD[0], *(bad for bad, _ in faults), *GOOD[1:]], aside, GOOD)


def bad_utf8_table() -> bytes:
    texts = [b"good text", b"bad \xff text", b"good again"]
    column = pa.Array.from_buffers(pa.string(), 3, pa.array(texts, pa.binary()).buffers())
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": ["u0", "u1", "u2"], "text": column}), sink)
    return sink.getvalue().to_pybytes()


ROW_FAULTS = [
    ({"id": "bad", "text": None}, "'text' is null"),
    ({"id": "bad", "text": ""}, "'text' is empty"),
    ({"id": "bad", "text": " \n\t "}, "the text has no tokens"),
]
LINE_FAULTS = [
    ({"id": "bad"}, "no field 'text'"),
    ({"id": "bad", "text": 5}, "'text' is not a string"),
    ({"id": 1.5, "text": "x"}, "'id' is neither a string nor a whole number"),
    (b'{"text": "caf\xe9"}', "invalid UTF-8 at byte 13 of the line"),
    (b'{"text": "lone \\ud800"}', "not JSON"),
    (b'{"text": "half', "not JSON"),
    (b'["text"]', "not a JSON object but an array"),
    (b"17", "not a JSON object but a number"),
    (b"null", "not a JSON object but null"),
]
CASES = [
    *(amid(f"lines.{kind}", ROW_FAULTS + LINE_FAULTS) for kind in LINE_FORMATS),
    amid("rows.parquet", ROW_FAULTS),
    *(Case(f"empty.{kind}", b"", [(0, "the file is empty")]) for kind in FORMATS),
    Case("broken.txt", b"ab\xff", [(0, "invalid UTF-8 at byte 2")]),
    Case("blank.txt", b" \n ", [(0, "the text has no tokens")]),
    Case("mark.txt", b"\xef\xbb\xbf", [(0, "the text has no tokens")]),
    Case("plain.jsonl.gz", as_line(GOOD[0]), [(1, "broken off after line 0")]),
    Case("plain.jsonl.zst", as_line(GOOD[0]), [(1, "broken off after line 0")]),
    Case("no.parquet", b"no parquet at all", [(0, "can't be read: Parquet magic bytes not found")]),
    Case("numbers.parquet", [{"text": 1}, {"text": None}], [(1, "'text' is not a string"), (2, "'text' is null")]),
    Case(
        "utf8.parquet",
        bad_utf8_table(),
        [(2, "invalid UTF-8 at byte 4")],
        [{"id": "u0", "text": "good text"}, {"id": "u2", "text": "good again"}],
    ),
    Case("none.parquet", [{"text": "x"}][:0], []),
    Case("none.jsonl.gz", pack(b"", ".gz"), []),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_rows_are_set_aside_and_the_rest_is_kept(case, store, tmp_path, content):
    path = case.write(tmp_path)
    good = case.good
    if case.aside and not good and "no tokens" not in case.aside[0][1]:
        before = contents_of(store)
        result = run_chunk(store, path)
        assert (result.exit_code, contents_of(store)) == (2, before)
        (line, reason), *_ = case.aside
        assert f"no row of the input can be read. {tmp_path}/{case.name}" in result.stderr
        assert reason in result.stderr
        good = GOOD[:1]
        result = run_chunk(store, path, write_rows(tmp_path / "good.jsonl", good))
    else:
        result = run_chunk(store, path)
    assert result.exit_code == (3 if case.aside else 0)
    found = quarantine(store)
    assert [(name, line) for name, line, _ in found] == [(str(path), line) for line, _ in case.aside]
    for (_, _, said), (_, reason) in zip(found, case.aside, strict=True):
        assert reason in said
    for line, _ in case.aside[:1]:
        assert f"first: {path}" + (f", line {line}" if line else "") in result.stdout
    if isinstance(case.data, list):
        assert len(case.data) == len(case.good) + len(case.aside)
    there = api.info(store)
    assert (there.documents, there.rejected) == (len(BEFORE) + len(good), len(case.aside))
    assert verified(store).content == content([*BEFORE, *good])


def test_reasons_are_counted_and_placed(store, tmp_path):
    path = amid("lines.jsonl", ROW_FAULTS + LINE_FAULTS + ROW_FAULTS[:1]).write(tmp_path)
    lines_said = run_chunk(store, path).stdout.splitlines()
    assert lines_said[1] == "13 rows rejected:"
    assert lines_said[2].split() == ["2", "'text'", "is", "null", "first:", f"{path},", "line", "2"]
    assert len(lines_said) == 16
    assert "and 2 other reasons" in lines_said[-4]
    assert "--encoding" in lines_said[-3]


def test_reasons_that_differ_in_numbers_alone_are_one(store, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [*GOOD, b'{"text": "\xff"}', b'{"text": "a\xff"}'])
    assert "2  invalid UTF-8 at byte … of the line  first:" in run_chunk(store, path).stdout


MANY = [{"id": f"many-{i}", "text": f"Row {i} of {Random(i).randbytes(300).hex()}."} for i in range(2500)]


BREAKS = [("jsonl.gz", "truncated"), ("jsonl.zst", "truncated"), ("parquet", "overwritten")]


@pytest.mark.parametrize(("kind", "harm"), BREAKS)
def test_a_file_that_breaks_off_gives_what_comes_before(kind, harm, store, tmp_path, content, monkeypatch):
    monkeypatch.setattr(streams, "BLOCK_BYTES", 4096)
    path = write_rows(tmp_path / f"many.{kind}", MANY)
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(data[:middle] + (b"\0" * 64 + data[middle + 64 :] if harm == "overwritten" else b""))
    result = run_chunk(store, path)
    assert result.exit_code == 3
    ((name, line, reason),) = quarantine(store)
    good = MANY[: line - 1]
    assert name == str(path)
    assert 500 < len(good) < 2000
    assert f"broken off after {'row' if kind == 'parquet' else 'line'} {len(good):,}" in reason
    assert f"first: {path}, line {line:,}" in result.stdout
    if kind == "parquet":
        assert f"{len(MANY) - len(good):,} rows are lost" in reason
    assert verified(store).content == content([*BEFORE, *good])


def test_a_truncated_parquet_file_is_set_aside_whole(store, tmp_path, content):
    path = write_rows(tmp_path / "many.parquet", MANY)
    path.write_bytes(path.read_bytes()[:-10])
    assert run_chunk(store, path, write_rows(tmp_path / "good.jsonl", GOOD)).exit_code == 3
    ((name, line, reason),) = quarantine(store)
    assert (name, line) == (str(path), 0)
    assert reason.startswith("can't be read: Parquet magic bytes not found")
    assert verified(store).content == content([*BEFORE, *GOOD])


@pytest.mark.parametrize("kind", TABLE_FORMATS)
def test_of_documents_with_one_id_the_first_stays(kind, store, tmp_path, content):
    one = write_rows(tmp_path / f"one.{kind}", [GOOD[0], {"id": "good-0", "text": "Again."}, GOOD[1]])
    two = write_rows(tmp_path / f"two.{kind}", [GOOD[2], {"id": "good-1", "text": "In another file."}])
    result = run_chunk(store, one, two)
    reason = "duplicate document id"
    assert (result.exit_code, "rejected" in result.stdout) == (0, False)
    assert f"2 documents skipped: {reason} (first: {one}, line 2)." in result.stdout
    found = [(str(one), 2, reason), (str(two), 2, reason)]
    assert quarantine(store) == found
    three = write_rows(tmp_path / f"three.{kind}", [{"id": "good-2", "text": "In another run."}, *BEFORE])
    assert run_chunk(store, three).exit_code == 0
    assert quarantine(store) == sorted([*found, (str(three), 1, DIFFERING)])
    assert verified(store).content == content([*BEFORE, *GOOD])


def test_a_repeated_text_is_reported_alike_with_and_without_ids(store, tmp_path):
    texts = ["First text.", "Second text.", "First text."]
    given = [{"id": str(i), "text": text} for i, text in enumerate(texts)]
    rows = {"with": given, "without": [{"text": text} for text in texts]}
    results = []
    for name, some in rows.items():
        (tmp_path / name).mkdir()
        source = write_rows(tmp_path / name / "rows.jsonl", some)
        results.append(run_chunk(copy_store(Path(store), tmp_path / name / "store"), source))
    assert results[0].exit_code == results[1].exit_code == 0
    assert "1 document skipped: duplicate text (" in results[0].stdout
    note = "3 documents have no id: a hash of the text is used.\n"
    with_ids = results[0].stdout.replace("/with/", "/without/").replace(", such as 2, a copy of 0", "")
    assert with_ids == results[1].stdout.replace(note, "")


def test_duplicates_are_placed_as_rows_are_in_each_format(store, tmp_path):
    texts = [("a", "first"), ("b", "second,\n of two lines"), ("a", "third")]
    quoted = "".join(f'{name},"{text}"\n' for name, text in texts)
    (tmp_path / "rows.csv").write_text(f"id,text\n{quoted}")
    rows = json.dumps([{"id": f"json {name}", "text": text} for name, text in texts])
    (tmp_path / "rows.json").write_text(rows)
    run_chunk(store, tmp_path / "rows.csv", tmp_path / "rows.json", "--duplicates", "skip")
    opened = Store.open(store)
    tables = [
        parts.read_parquet(opened, entry) for entry in opened.state.files() if entry.path.startswith("quarantine/")
    ]
    placed = {
        Path(row["input"]).name: (row["line"], row["offset"])
        for table in tables
        for row in table.to_pylist()
        if row["reason"] == "duplicate document id"
    }
    csv = (tmp_path / "rows.csv").read_text()
    assert placed == {"rows.csv": (5, csv.rindex("a,")), "rows.json": (3, None)}


def test_duplicates_are_placed_in_their_own_file_of_several_with_one_name(store, tmp_path, content):
    for folder, rows in (
        ("a", GOOD),
        ("b", [{"id": "good-1", "text": "Twice."}]),
        ("c", [{"id": "c", "text": "More."}]),
    ):
        (tmp_path / folder).mkdir()
        write_rows(tmp_path / folder / "same.jsonl", rows)
    paths = [tmp_path / folder / "same.jsonl" for folder in "abc"]
    assert run_chunk(store, *paths).exit_code == 0
    assert quarantine(store) == [(str(paths[1]), 1, "duplicate document id")]
    assert verified(store).content == content([*BEFORE, *GOOD, {"id": "c", "text": "More."}])


def test_lines_are_those_of_the_file_in_each_range_of_it(store, tmp_path, monkeypatch):
    monkeypatch.setattr(chunk_plan, "_LEAST_UNIT_BYTES", 1000)
    rows = [{"id": f"row-{i}", "text": f"Row {i} of many, " * 5} for i in range(200)]
    bad = [3, 4, 99, 150, 199]
    for i in bad:
        del rows[i]["text"]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert run_chunk(store, path).exit_code == 3
    assert quarantine(store) == [(str(path), i + 1, "no field 'text'") for i in bad]


def test_rejected_rows_are_listed_in_a_printed_file_and_read_again_once_their_input_has_changed(store, tmp_path):
    path = write_rows(tmp_path / "new.jsonl", [GOOD[0], b"{", GOOD[1], {"id": "bad", "text": None}])
    other = write_rows(tmp_path / "other.jsonl", [b"[1]", GOOD[2]])
    first = run_chunk(store, path, other)
    assert first.exit_code == 3
    for result, skipped in ((first, ""), (run_chunk(store, path), "1 input skipped: already in the store, but for 2 ")):
        assert result.stdout.startswith(skipped)
        (listed,) = re.findall(r"^Rejected rows are listed in (\S+) \(Parquet\)\.$", result.stdout, re.MULTILINE)
        file = storage_at(store).local(Path(listed).relative_to(store).as_posix())
        rows = pq.read_table(file, columns=["input", "line", "reason"]).to_pylist()
        assert [(row["input"], row["line"]) for row in rows] == [(str(path), 2), (str(path), 4), (str(other), 1)]
        assert rows[1]["reason"] == "'text' is null"
        assert "They are read again when their input has changed.\n" in result.stdout
    write_rows(path, [GOOD[0], {"id": "repaired", "text": "Good now."}, GOOD[1], b"{"])
    again = json.loads(run_chunk(store, path, "--json").stdout)
    assert (again["documents"], again["unchanged"], again["rejected"], again["known_inputs"]) == (1, 2, 1, 0)
    known = json.loads(run_chunk(store, path, other, "--json").stdout)
    assert known["known_rejected"] == 2, "those of the newest versions alone"


def test_a_copy_is_named_with_what_it_copies_and_options_for_inputs_that_are_not_read_again_are_noted(store, tmp_path):
    rows = [GOOD[0], {**GOOD[0], "id": "copy"}, {**BEFORE[0], "id": "after"}, {"text": "No id."}, {"text": "No id."}]
    path = write_rows(tmp_path / "new.jsonl", [*rows, {"id": "good-0", "text": "Other."}])
    added = run_chunk(store, path)
    copied = "3 documents skipped: duplicate text (3 from new.jsonl), such as copy, a copy of good-0.\n"
    assert copied.replace("new.jsonl", path.as_posix().lstrip("/")) in added.stdout
    assert "Rejected" not in added.stdout
    found = json.loads(run_chunk(store, write_rows(tmp_path / "b.jsonl", [{**BEFORE[0], "id": "b"}]), "--json").stdout)
    assert found["duplicate_examples"] == [["b", "before"]]
    for option, what in (("--duplicates", "keep"), ("--keep", "year")):
        again = run_chunk(store, path, option, what)
        assert again.exit_code == 0
        assert f"{option} {what}: 1 input already in the store without " in again.stderr
        assert ", and not read again. A new store would " in again.stderr
    assert "--duplicates keep:" not in run_chunk(store, tmp_path / "b.jsonl").stderr
