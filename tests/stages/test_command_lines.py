"""Who does what an error advises searches what is new, and not all of a table that was made in another way."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from conftest import make_rows, write_jsonl
from dataset_help import chunk
from typer.testing import CliRunner

import retrotool
from retrotool import RetroDataset, api
from retrotool.app import app
from retrotool.cli.command_lines import command_line
from retrotool.errors import UsageError
from retrotool.index.run import Options
from retrotool.inspect.run import Choice
from retrotool.neighbours.run import SearchOptions
from retrotool.store.store import Store


def test_a_name_is_left_out_only_where_it_is_the_default(store_copy: Path) -> None:
    found = command_line("neighbours", "db", queries="main", name="main", index="main", encoder="main", k=3, saved=None)
    assert found == "retrotool neighbours db --queries main --index main --encoder main -k 3"
    assert command_line("embed", "db", name="main") == "retrotool embed db --name main"
    assert command_line("index", "db", name="main") == "retrotool index db --name main"
    store = Store.open(store_copy)
    assert command_line("index", store, name="main") == f"retrotool index {store_copy}"
    assert command_line("neighbours", store, index="main") == f"retrotool neighbours {store_copy}"


def test_a_command_for_main_names_it_if_another_index_is_the_default(store_copy: Path) -> None:
    api.index(store_copy, name="other", options=Options(default=True))
    assert api.index(store_copy, name="main").retrain_command == f"retrotool index {store_copy} --name main --retrain"
    assert api.index(store_copy, name="other").retrain_command == f"retrotool index {store_copy} --retrain"


@pytest.mark.parametrize("exact", [True, False])
def test_what_is_advised_brings_a_table_up_to_date_as_it_was_made(
    built_store: Path, tmp_path: Path, tiny_encoder: Path, exact: bool
) -> None:
    training, name = chunk(tmp_path / "training", tiny_encoder, make_rows(9, first=150)), "few"
    how = SearchOptions(exact=exact)
    api.neighbours(built_store, queries=training, name=name, k=3, saved=7, search=how)
    before = len(retrotool.open(training).chunk_ids(0))
    chunk(training, tiny_encoder, make_rows(5, first=200))
    late = retrotool.open(training).chunk_ids(1).tolist()
    advice = []
    with pytest.raises(UsageError, match="has no neighbours 'few' yet") as error:
        api.inspect(training, Choice(chunk=late[0]), table=name)
    advice.append(error.value.advice)
    with pytest.raises(UsageError, match="has no neighbours 'few'") as error:
        RetroDataset(training, name, 64)
    advice.append(error.value.advice)
    with pytest.raises(UsageError, match="has no neighbours 'few' yet") as error:
        retrotool.open(training).neighbours(late[0], name)
    advice.append(error.value.advice)
    assert len(set(advice)) == 1
    words = shlex.split(advice[0].removeprefix("Compute them: "))
    printed = json.loads(CliRunner().invoke(app, [*words[1:], "--json"]).stdout)
    assert (printed["k"], printed["saved"], printed["index"]) == (3, 7, "" if exact else "main")
    assert printed["queries"] == len(late)
    assert len(list(RetroDataset(training, name, 64))) == before + len(late)


def test_an_exact_table_is_brought_up_to_date_with_its_encoder_though_the_database_got_another(
    store_copy: Path, tmp_path: Path, tiny_encoder: Path
) -> None:
    training = chunk(tmp_path / "training", tiny_encoder, make_rows(9, first=150))
    api.neighbours(store_copy, queries=training, search=SearchOptions(exact=True))
    for store in (store_copy, training):
        api.embed(store, encoder=str(tiny_encoder), name="another")
    (dependent,) = (one for one in api.info(store_copy).dependents if one.path == str(training))
    done = CliRunner().invoke(app, [*shlex.split(dependent.command)[1:], "--json"])
    assert (done.exit_code, json.loads(done.stdout)["encoder"], json.loads(done.stdout)["queries"]) == (0, "tiny", 0)


def test_queries_that_have_the_encoder_under_another_name_are_reported_how_to_get_this_one(
    store_copy: Path, tmp_path: Path, tiny_encoder: Path
) -> None:
    training = tmp_path / "training"
    rows = write_jsonl(tmp_path / "rows.jsonl", make_rows(9, first=150))
    api.chunk(training, [str(rows)], tokenizer=str(tiny_encoder))
    api.embed(training, encoder=str(tiny_encoder), name="another")
    with pytest.raises(UsageError, match="has no embeddings of 'tiny'") as error:
        api.neighbours(store_copy, queries=training)
    advice = error.value.advice.removeprefix("Make them with: ")
    assert CliRunner().invoke(app, shlex.split(advice)[1:]).exit_code == 0
    assert api.neighbours(store_copy, queries=training).queries > 0
