"""Who does what an error advises searches what is new, and not all of a table that was made in another way."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from conftest import make_rows
from dataset_help import chunk
from typer.testing import CliRunner

import retrotool
from retrotool import RetroDataset, api
from retrotool.app import app
from retrotool.errors import UsageError
from retrotool.inspect.run import Choice
from retrotool.neighbours.run import SearchOptions


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
        api.inspect(training, Choice(chunk=late[0]), name=name)
    advice.append(error.value.advice)
    with pytest.raises(UsageError, match="have no neighbours 'few'") as error:
        RetroDataset(training, name, 64)
    advice.append(error.value.advice)
    with pytest.raises(UsageError, match="has no neighbours 'few' yet") as error:
        retrotool.open(training).neighbours(late[0], name)
    advice.append(error.value.advice)
    assert len(set(advice)) == 1
    words = shlex.split(advice[0].removeprefix("Compute them: "))
    told = json.loads(CliRunner().invoke(app, [*words[1:], "--json"]).stdout)
    assert (told["k"], told["saved"], told["index"]) == (3, 7, "" if exact else "main")
    assert told["queries"] == len(late)
    assert len(list(RetroDataset(training, name, 64))) == before + len(late)
