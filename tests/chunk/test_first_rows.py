"""Fields that no row has, and inputs without a readable row, stop ``chunk`` before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from chunk_helpers import documents, quarantine, run_chunk, write_rows
from stored import contents_of

from retrotool import api
from retrotool.errors import UsageError
from retrotool.sources import heads

ROWS = [
    {"uuid": f"u{i}", "content": {"body": f"The text of row {i} is the longest field.", "lang": "en"}, "meta": {"n": i}}
    for i in range(30)
]
THERE = "It has: uuid, content.body, content.lang, meta.n"


def write_nested(path: Path) -> Path:
    table = pa.Table.from_pylist(ROWS)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".arrow":
        pyarrow.feather.write_feather(table, path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS))
    else:
        write_rows(path, ROWS)
    return path


@pytest.mark.parametrize("name", ["f.jsonl", "f.jsonl.gz", "f.json", "f.parquet", "f.arrow"])
def test_a_field_that_no_row_has_names_those_that_are_there_and_writes_nothing(name, tmp_path):
    path = write_nested(tmp_path / name)
    for dry in ([], ["--dry-run"]):
        result = run_chunk(tmp_path / "store", path, *dry)
        assert (result.exit_code, result.stdout) == (2, "")
        assert f"no row of {path} has 'text'. {THERE}\n" in result.stderr
        assert "Name it: --text-field content.body. Nothing was changed." in result.stderr
        wrong = run_chunk(tmp_path / "store", path, "--text-field", "content.body", "--id-field", "uuidd", *dry)
        assert wrong.exit_code == 2
        assert f"has 'uuidd'. {THERE}\nName it: --id-field uuid, or leave --id-field out" in wrong.stderr
    assert not (tmp_path / "store").exists()
    result = run_chunk(tmp_path / "store", path, "--text-field", "content.body", "--id-field", "uuid")
    assert (result.exit_code, "no id" in result.stdout) == (0, False)


@pytest.mark.parametrize("name", ["t.csv", "t.tsv"])
def test_the_header_of_a_table_decides(name, tmp_path):
    mark = {"t.csv": ",", "t.tsv": "\t"}[name]
    path = tmp_path / name
    path.write_text(f"topic{mark}text\n" + "".join(f"t{i}{mark}Text {i}.\n" for i in range(3)))
    assert "has 'topik'" in run_chunk(tmp_path / "store", path, "--id-field", "topik").stderr
    refused = run_chunk(tmp_path / "store", path, "--keep", "topik")
    assert (refused.exit_code, "--keep topik: no input has this field" in refused.stderr) == (2, True)
    refused = run_chunk(tmp_path / "store", path, "--key-field", "topic", "--value-field", "answer", "--json")
    assert (json.loads(refused.stdout)["exit_code"], "--value-field" in refused.stdout) == (2, True)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("ids", [0, 2, 3])
def test_documents_without_an_id_are_counted(ids, tmp_path):
    rows = [{"text": f"Text {i}."} | ({"id": f"d{i}"} if i < ids else {}) for i in range(3)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "notes.txt").write_text("A text has a name.")
    result = run_chunk(tmp_path / "store", path, tmp_path / "notes.txt", "--json")
    assert json.loads(result.stdout)["hashed_ids"] == 3 - ids
    again = run_chunk(tmp_path / "again", path).stdout
    assert ("no id: a hash of the text is used" in again) == (ids < 3)
    assert "1 document has no id" in again or ids != 2


def test_a_given_id_field_must_be_in_a_row_and_the_default_need_not(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "One."}, {"text": "Two."}])
    assert "has 'id'" in run_chunk(tmp_path / "store", path, "--id-field", "id").stderr
    write_rows(path, [{"text": "One."}, {"text": "Two.", "id": "sparse"}])
    assert run_chunk(tmp_path / "store", path, "--id-field", "id").exit_code == 0


def test_the_head_decides_for_json_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(heads, "ROWS", 10)
    path = write_rows(tmp_path / "rows.jsonl", [{"body": "x"}] * 10 + [{"text": "late"}])
    assert "none of the first 10 rows of" in run_chunk(tmp_path / "store", path).stderr
    write_rows(path, [{"body": "x"}] * 9 + [{"text": "in time"}])
    assert run_chunk(tmp_path / "store", path).exit_code == 3


def test_of_many_inputs_the_first_of_each_folder_and_format_and_others_are_looked_at(tmp_path, monkeypatch):
    for i in range(500):
        (tmp_path / "in" / f"{i % 5}").mkdir(parents=True, exist_ok=True)
        write_rows(tmp_path / "in" / f"{i % 5}" / f"{i}.jsonl", [{"text": f"Text {i}."}])
    looked_at = []
    monkeypatch.setattr(heads, "_head", lambda file, *_: looked_at.append(file.path) or ([], heads.Counter(text=1), 1))
    assert run_chunk(tmp_path / "store", tmp_path / "in").exit_code == 0
    firsts = {str(min((tmp_path / "in" / f"{i}").iterdir())) for i in range(5)}
    assert firsts <= set(looked_at)
    assert 30 < len(looked_at) <= 2 * heads.FILES


@pytest.mark.parametrize("data", [b"", b"\xff\xfe\xfd\n", b"{\n{\n", b"[1]"])
def test_nothing_is_written_for_inputs_without_a_readable_row(data, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(data)
    store = tmp_path / "store"
    result = run_chunk(store, path)
    assert (result.exit_code, store.exists()) == (2, False)
    assert "no row of the input can be read" in result.stderr
    assert ("--encoding" in result.stderr) == (b"\xff" in data)
    good = write_rows(tmp_path / "good.jsonl", [{"id": "a", "text": "One."}])
    assert run_chunk(store, good).exit_code == 0
    before = contents_of(store)
    assert run_chunk(store, path).exit_code == 2
    assert contents_of(store) == before
    assert run_chunk(store, path, good).exit_code == 3, "with others, its rows are rejected"
    assert {Path(name).name for name, _, _ in quarantine(store)} == {"bad.jsonl"}


def test_a_dry_run_gives_the_reasons_of_the_run(tmp_path):
    rows = [
        *({"id": f"{i}", "text": f"Row {i}."} for i in range(5)),
        *[{"id": "x"}] * 3,
        b"{",
        {"id": 1.5, "text": "y"},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    dry = [path, "--dry-run", "--exact-tokenizer"]
    said = json.loads(run_chunk(tmp_path / "store", *dry, "--json").stdout)
    shown = run_chunk(tmp_path / "store", *dry).stdout
    came = json.loads(run_chunk(tmp_path / "store", path, "--json").stdout)
    assert {(one["reason"], one["rows"]) for one in said["reasons"]} == {
        (one["reason"], one["rows"]) for one in came["reasons"]
    }
    assert "3  no field 'text': id" in shown
    assert f"first: {path}, line 6" in shown


def test_inputs_of_an_unfinished_run_are_not_counted_as_known(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "rows.jsonl", [{"id": "a", "text": "One."}])
    monkeypatch.setattr("retrotool.engine.execute", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run_chunk(tmp_path / "store", path).exit_code == 130
    monkeypatch.undo()
    dry = [path, "--dry-run", "--exact-tokenizer", "--json"]
    said = json.loads(run_chunk(tmp_path / "store", *dry).stdout)
    assert (said["inputs"], said["known_inputs"], said["documents"]) == (1, 0, 1)
    assert run_chunk(tmp_path / "store", path).exit_code == 0
    assert json.loads(run_chunk(tmp_path / "store", *dry).stdout)["known_inputs"] == 1


def test_columns_that_the_store_always_has_may_be_kept(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"id": "a", "text": "One.", "source": "here", "year": 1999}])
    result = run_chunk(tmp_path / "store", path, "--keep", "source", "--keep", "id", "--keep", "year")
    assert (result.exit_code, "--keep" in result.stderr) == (0, False)
    (row,) = documents(tmp_path / "store")
    assert (row["id"], row["source"], row["year"]) == ("a", "here", "1999")


def test_the_python_api_checks_too(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"body": "x"}])
    with pytest.raises(UsageError, match="has 'text'"):
        api.chunk(tmp_path / "store", [str(path)])
    assert not (tmp_path / "store").exists()
