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


def test_it_is_told_what_was_materialised(store_copy: Path, run: Run) -> None:
    chunks = api.info(store_copy).chunks
    assert "materialised" not in run("info", store_copy)[1] + run("verify", store_copy)[1]
    assert "Materialised" not in run("neighbours", store_copy)[1]
    code, out, err = run("neighbours", store_copy, "--materialise")
    assert (code, err) == (0, "")
    first, second = out.splitlines()
    assert first.startswith("Every chunk has its neighbours already")
    assert second.startswith(f"Materialised: 2 neighbours of {chunks} chunks, ")
    assert f"({chunks} chunks by this run, commit {api.info(store_copy).commit})" in second
    assert "(all of it before, commit" in run("neighbours", store_copy, "--materialise")[1]
    shown = run("info", store_copy)[1]
    assert f"  neighbours  main: 20 saved for {chunks} chunks, 2 materialised, " in shown and "stale" not in shown
    assert "\n  materialised " in run("verify", store_copy)[1]


def test_json_has_it_all(store_copy: Path, run: Run) -> None:
    made = json.loads(run("neighbours", store_copy, "--materialise", "--json")[1])["materialised"]
    chunks = api.info(store_copy).chunks
    assert (made["name"], made["k"], made["rows"], made["made"], made["parts"]) == ("main", 2, chunks, chunks, 4)
    info = json.loads(run("info", store_copy, "--json")[1])
    assert info["materialised"]["main"] == {
        "k": 2, "rows": chunks, "parts": 4, "current": 4, "bytes": made["bytes"],
    }  # fmt: skip
    assert info["bytes"]["materialised"] == made["bytes"]
    for part in info["parts"]:
        assert (store_copy / part["materialised"]["main"]["path"]).is_file()
    assert len(json.loads(run("verify", store_copy, "--json")[1])["materialised"]) == 64
