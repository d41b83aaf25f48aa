"""``build``: the four commands in one, from nothing and after an append."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from conftest import make_rows, write_jsonl
from stored import stored_files
from typer.testing import CliRunner

from retrotool import api
from retrotool.app import app
from retrotool.reader import Reader
from retrotool.store.store import Store

ROWS = make_rows(16, words=60)
DIGESTS = ("content", "ids", "embeddings", "indexes", "neighbours", "materialised", "tombstones")


def run_cli(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def ok(*arguments: object) -> str:
    result = run_cli(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def digests(store: Path) -> dict[str, Any]:
    found = api.verify(store)
    assert found.ok, found.problems
    # The names of files are random, and part of the digests of files.
    return {name: getattr(found, name) for name in DIGESTS}


def by_hand(store: Path, *commands: str) -> None:
    for command in commands:
        name, *options = shlex.split(command)
        ok(name, store, *options)


def test_from_nothing_and_after_an_append_it_gives_what_the_commands_give(tmp_path: Path, tiny_encoder: Path) -> None:
    one, other = (write_jsonl(tmp_path / name, rows) for name, rows in (("one.jsonl", ROWS[:10]), ("two.jsonl", ROWS)))
    built, made = tmp_path / "built", tmp_path / "made"
    ok("build", built, one, "--tokenizer", tiny_encoder, "--encoder", tiny_encoder)
    by_hand(made, f"chunk {one} --tokenizer {tiny_encoder}", f"embed --encoder {tiny_encoder}", "index", "neighbours")
    assert digests(built) == digests(made)
    for store in (built, made):  # more of everything, each with its own settings
        by_hand(store, f"embed --encoder {tiny_encoder} --name other --pooling cls")
        by_hand(store, "index --name flat --nlist 0 --encoder other")
        by_hand(store, "neighbours --name few --exact --encoder other -k 1 --saved 3 --max-overlap 0.9")
    printed = ok("build", built, other)
    again = ["embed --encoder {e}", "embed --encoder {e} --name other --pooling cls", "index", "index --name flat"]
    by_hand(made, f"chunk {other}", *(command.format(e=tiny_encoder) for command in again))
    by_hand(made, "neighbours", "neighbours --name few --exact --encoder other -k 1 --saved 3")
    assert digests(built) == digests(made)
    assert printed.count("chunks embedded") == 2 and "('few': 3 saved, 1 used, exact search" in printed
    missing = run_cli("neighbours", built, "--index", "third", "--name", "third")
    (advice,) = (line for line in missing.stderr.splitlines() if line.startswith("Make it with: retrotool "))
    ok(*shlex.split(advice)[4:])  # with two encoders one has to be named
    ok("neighbours", built, "--index", "third", "--name", "third")


def test_it_says_first_what_it_runs_and_a_dry_run_runs_nothing(tmp_path: Path, tiny_encoder: Path) -> None:
    rows = [{"body": row["text"], "nr": row["id"], "a year": row["year"]} for row in ROWS]
    source, store = write_jsonl(tmp_path / "a corpus.jsonl", rows), tmp_path / "store"
    given = ["--encoder", tiny_encoder, "--tokenizer", tiny_encoder, "--text-field", "body", "--id-field", "nr"]
    given += ["--keep", "a year", "--existing", "replace"]
    planned = ok("build", store, source, *given, "--dry-run")
    assert not store.exists()
    result = run_cli("build", store, source, *given)
    assert result.stderr.startswith("Running:\n" + "".join(f"  {line}\n" for line in planned.splitlines()))
    for line in planned.splitlines():  # the printed commands are those of the same result
        assert (
            run_cli(*[word.replace(str(store), str(tmp_path / "other")) for word in shlex.split(line)[1:]]).exit_code
            == 0
        )
    assert digests(store) == digests(tmp_path / "other")


def test_a_store_that_is_up_to_date_stays_as_it_is(store_copy: Path) -> None:
    before = digests(store_copy)
    result = json.loads(ok("build", store_copy, "--json"))
    assert (result["chunk"], result["embed"][0]["chunks"], result["neighbours"][0]["queries"]) == (None, 0, 0)
    assert digests(store_copy) == before


def test_it_is_resumed_after_an_interruption(
    tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, store = write_jsonl(tmp_path / "rows.jsonl", ROWS), tmp_path / "store"
    with monkeypatch.context() as patch:
        patch.setattr("retrotool.build.run.index", _interrupt)
        given = ("build", store, source, "--encoder", tiny_encoder, "--tokenizer", tiny_encoder)
        assert run_cli(*given).exit_code == 130
    assert not Store.open(store).state.names("index")
    ok(*given)
    assert api.verify(store).ok and Store.open(store).state.names("neighbours")


def test_what_is_new_gets_vectors_as_short_as_the_others(tmp_path: Path, tiny_encoder: Path) -> None:
    source, store = write_jsonl(tmp_path / "rows.jsonl", ROWS), tmp_path / "store"
    ok("chunk", store, source, "--tokenizer", tiny_encoder)
    ok("embed", store, "--encoder", tiny_encoder, "--dimension", 8)
    ok("build", store, write_jsonl(tmp_path / "more.jsonl", make_rows(2, first=500)))
    assert [Reader(Store.open(store)).embeddings(part).shape[1] for part in (0, 1)] == [8, 8]
    (damaged,) = stored_files(store, "embeddings/*/000001-*.npy")
    damaged.write_bytes(damaged.read_bytes()[:-9])
    assert api.repair(store).repaired[0].same


def test_the_next_command_after_a_second_encoder_and_index_names_them(store_copy: Path, tiny_encoder: Path) -> None:
    result = run_cli("embed", store_copy, "--encoder", tiny_encoder, "--pooling", "cls", "--name", "other")
    following = ["index --name other --encoder other", "neighbours --index other --name other"]
    for command in following:
        first, _, options = command.partition(" ")
        assert result.stderr.endswith(f"Next: retrotool {first} {store_copy} {options}\n")
        result = run_cli(*shlex.split(result.stderr.splitlines()[-1])[2:])
    assert result.exit_code == 0
    shown = ok("info", store_copy)
    assert "  neighbours  other: 20 saved for " in shown and ", index 'other', encoder other\n" in shown
    result = run_cli("embed", store_copy, "--encoder", tiny_encoder, "--pooling", "mean", "--name", "third")
    assert f"retrotool index {store_copy} --name third --encoder third" in result.stderr


def test_what_is_wrong_is_said_before_anything_is_done(tmp_path: Path, store_copy: Path) -> None:
    result = run_cli("build", tmp_path / "none")
    assert result.exit_code == 2 and "Name files or folders to chunk." in result.stderr
    for inputs in (["gone.jsonl"], [tmp_path / "gone.jsonl", write_jsonl(tmp_path / "rows.jsonl", ROWS)]):
        for dry_run in ([], ["--dry-run"]):
            result = run_cli("build", tmp_path / "none", *inputs, *dry_run)
            assert result.exit_code == 2 and "gone.jsonl" in result.stderr and "Running" not in result.stderr
    result = run_cli("build", tmp_path / "new", write_jsonl(tmp_path / "rows.jsonl", ROWS), "--encoder", tmp_path)
    assert result.exit_code == 2 and "has no config.json" in result.stderr and not (tmp_path / "new").exists()
    number = Store.open(store_copy).state.number
    result = run_cli("build", store_copy, "--encoder", "another")
    assert result.exit_code == 2 and f"retrotool embed {store_copy} --encoder another" in result.stderr
    assert Store.open(store_copy).state.number == number


def test_rejected_rows_end_it_with_exit_code_3_after_the_rest(tmp_path: Path, tiny_encoder: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    source.write_text(f"{source.read_text()}{{\n")
    result = run_cli("build", tmp_path / "store", source, "--encoder", tiny_encoder, "--tokenizer", tiny_encoder)
    assert result.exit_code == 3
    assert "1 row rejected" in result.stdout and "Neighbours of" in result.stdout


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_files_that_are_left_out_are_left_out_by_the_command_that_is_run(tmp_path: Path, tiny_encoder: Path) -> None:
    (tmp_path / "texts").mkdir()
    write_jsonl(tmp_path / "texts" / "one.jsonl", ROWS[:3])
    write_jsonl(tmp_path / "texts" / "other.jsonl", [{"body": "no text"}])
    build = ("build", tmp_path / "store", tmp_path / "texts", "--tokenizer", tiny_encoder, "--encoder", tiny_encoder)
    assert run_cli(*build).exit_code == 2 and not (tmp_path / "store").exists()
    ok(*build, "--exclude", "other.jsonl")
    assert api.info(tmp_path / "store").documents == 3
