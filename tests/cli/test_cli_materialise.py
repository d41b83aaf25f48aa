"""``neighbours --materialise`` and what ``info`` and ``verify`` say of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from retrotool import api
from retrotool.app import app

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            app([str(argument) for argument in arguments], prog_name="retrotool")
        return int(end.value.code or 0), *capfd.readouterr()

    return call


def test_it_is_shown_what_was_materialised(store_copy: Path, run: Run) -> None:
    chunks = api.info(store_copy).chunks
    assert "materialised" not in run("info", store_copy)[1] + run("verify", store_copy)[1]
    assert "Materialised" not in run("neighbours", store_copy)[1]
    code, out, err = run("neighbours", store_copy, "--materialise")
    assert (code, err) == (0, "")
    first, second = out.splitlines()
    assert first.startswith("All embedded chunks have their neighbours")
    assert second == "Materialised: the tokens of the first 2 neighbours of each chunk."
    assert second in run("neighbours", store_copy)[1], "later runs keep them"
    shown = run("info", store_copy)[1]
    assert f"  neighbours  main: 20 saved for {chunks} chunks, index 'main', encoder tiny, 2 materialised\n" in shown
    assert "\n  materialised " in run("verify", store_copy)[1]


def test_json_has_it_all(store_copy: Path, run: Run) -> None:
    assert json.loads(run("neighbours", store_copy, "--json")[1])["materialised"] is False
    assert json.loads(run("neighbours", store_copy, "--materialise", "--json")[1])["materialised"] is True
    about = json.loads(run("info", store_copy, "--json")[1])["neighbours"]["main"]
    assert (about["text"], about["text_parts"]) == (True, 4)
    assert len(json.loads(run("verify", store_copy, "--json")[1])["materialised"]) == 64
