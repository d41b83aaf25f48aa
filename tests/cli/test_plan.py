"""``plan``: sums that add up, costs that grow with the corpus, and rates that are shown."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stored import stored_files
from test_inspect import in_terminal
from typer.testing import CliRunner

from retrotool import api
from retrotool.ann.choice import FLAT_LIMIT
from retrotool.app import app
from retrotool.cli import output
from retrotool.cli.options import parse_count
from retrotool.errors import UsageError
from retrotool.plan.command import _duration, _rate
from retrotool.plan.run import STAGES, Plan, find_shape
from retrotool.sizes import parse_size


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def made(tokens: int, **settings: object) -> Plan:
    return api.plan(tokens, **{"cores": 8, "memory_per_host": 10**11, **settings})  # type: ignore[arg-type]


TOKENS = st.integers(1, 10**13)
MACHINES = st.fixed_dictionaries(
    {
        "gpus": st.sampled_from([0, 1, 8, 64, 1000]),
        "hosts": st.sampled_from([None, 1, 3]),
        "cores": st.integers(1, 256),
        "bucket": st.booleans(),
    }
)
SETTINGS = st.fixed_dictionaries(
    {
        "encoder": st.sampled_from(["minilm", "bert-base", "24x1024"]),
        "tokens_per_document": st.sampled_from([1, 50, 700, 10**6]),
        "chunk_length": st.sampled_from([1, 64, 4096]),
        "saved": st.integers(1, 1000),
        "target_recall": st.sampled_from([0.5, 0.95, 1.0]),
    }
)


def costs(plan: Plan) -> dict[str, float]:
    """All that a plan says of what a database costs, by name."""
    found: dict[str, float] = {name: getattr(plan, name) for name in ("documents", "chunks", "parts")}
    found |= {one.kind: one.bytes for one in plan.files}
    found |= {name: getattr(plan.index, name) for name in ("memory", "hosts", "shards", "sample", "trained_bytes")}
    for stage in plan.stages:
        for field in dataclasses.fields(stage)[2:-2]:
            name = f"{stage.name.split(':')[0]}.{field.name}"
            found[name] = found.get(name, 0) + getattr(stage, field.name)
    return found


@given(TOKENS, MACHINES, SETTINGS)
def test_totals_are_sums(tokens, machines, settings):
    plan = made(tokens, **machines, **settings)
    assert plan.bytes == sum(one.bytes for one in plan.files)
    assert [one.kind for one in plan.files] == ["documents", "chunks", "embeddings", "index", "neighbours"]
    for total in ("gpu_hours", "core_hours", "wall_hours"):
        assert getattr(plan, total) == pytest.approx(sum(getattr(stage, total) for stage in plan.stages))
    assert all(value >= 0 for value in costs(plan).values())
    assert plan.chunks >= max(plan.documents, tokens / plan.chunk_length)
    assert plan.documents <= tokens
    assert plan.index.memory <= plan.index.hosts * plan.machines.memory


@given(TOKENS, MACHINES, SETTINGS)
def test_no_more_hours_are_worked_than_the_machines_have(tokens, machines, settings):
    plan = made(tokens, **machines, **settings)
    for stage in plan.stages:
        assert stage.gpu_hours <= stage.wall_hours * plan.machines.gpus * 1.000001
        assert stage.core_hours <= stage.wall_hours * plan.machines.hosts * plan.machines.cores * 1.000001


@given(TOKENS, TOKENS, MACHINES, SETTINGS)
def test_more_tokens_never_cost_less_with_the_same_index(one, other, machines, settings):
    less, more = (made(tokens, **machines, **settings) for tokens in sorted((one, other)))
    before, after = costs(less), costs(more)
    if less.index.factory != more.index.factory:  # lists save work that exact search does, and codes bytes
        kept = ("documents", "chunks", "parts", "embeddings", "neighbours")
        stages = tuple(name for name in before if name.startswith(("chunk.", "embed.")))
        before, after = ({name: found[name] for name in (*kept, *stages)} for found in (before, after))
    # Chunks, documents and parts are whole: what is in them differs in the last digits.
    assert all(after[name] >= before[name] * 0.9999 for name in before)


@given(st.integers(2 * 10**8, 10**12), st.integers(2, 100), MACHINES, SETTINGS)
def test_a_corpus_twice_as_large_costs_more(tokens, times, machines, settings):
    less, more = made(tokens, **machines, **settings), made(times * tokens, **machines, **settings)
    assert less.chunks > FLAT_LIMIT
    assert more.bytes > less.bytes
    assert more.gpu_hours + more.core_hours > less.gpu_hours + less.core_hours


def test_chunks_that_are_not_full_cost_what_they_have():
    full, short = (made(10**9, tokens_per_document=n).stages[1].core_hours for n in (10**9, 32))
    assert full < short < 1.1 * full


@given(TOKENS, st.integers(1, 64), SETTINGS)
def test_more_gpus_never_take_longer(tokens, gpus, settings):
    few, many = (made(tokens, gpus=n, hosts=8, **settings) for n in (gpus, 2 * gpus))
    assert many.wall_hours <= few.wall_hours
    assert many.gpu_hours == few.gpu_hours


@given(st.integers(1, 10**14))
def test_counts_and_sizes_are_read_as_they_are_shown(n):
    assert parse_count("--tokens", output.scaled(n)) == pytest.approx(n, rel=0.006)
    assert parse_size("--memory", output.size(n)) == pytest.approx(n, rel=0.06)
    assert parse_count("--tokens", str(n)) == n


@pytest.mark.parametrize(
    ("text", "count"),
    [("1.75T", 1_750_000_000_000), ("300B", 3 * 10**11), ("300 g", 3 * 10**11), ("0.5k", 500), ("2e12", 2 * 10**12)],
)
def test_counts_are_read(text, count):
    assert parse_count("--tokens", text) == count


@pytest.mark.parametrize(
    ("text", "size"), [("512GB", 512 * 10**9), ("1 TiB", 2**40), ("2tb", 2 * 10**12), ("64KiB", 2**16)]
)
def test_sizes_are_read(text, size):
    assert parse_size("--memory-per-host", text) == size


def test_arithmetic_of_a_chunk_is_that_of_the_docs():
    def gigaflops(name: str) -> float:
        return 64 * find_shape(name).flops_per_token(64) / 1e9

    reported = {"minilm": 1.4, "12x384": 2.9, "bert-base": 11.3, "bert-large": 40}
    assert {name: gigaflops(name) for name in reported} == pytest.approx(reported, rel=0.05)


def test_a_model_directory_says_its_own_sizes(tiny_encoder, tmp_path):
    shape = find_shape(str(tiny_encoder))
    assert dataclasses.astuple(shape) == ("tiny", 2, 32, 64)
    distilled = {"model_type": "distilbert", "dim": 768, "n_layers": 6, "hidden_dim": 3072}
    (tmp_path / "config.json").write_text(json.dumps(distilled))
    assert dataclasses.astuple(find_shape(str(tmp_path)))[1:] == dataclasses.astuple(find_shape("6x768"))[1:]
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 6}')
    with pytest.raises(UsageError, match="hidden_size is None, not a number"):
        find_shape(str(tmp_path))


def test_sizes_are_those_of_a_store(built_store, tiny_encoder):
    """Small files are mostly their own headers; what has none is as large as reckoned."""
    info = api.info(built_store)
    plan = made(info.tokens, encoder=str(tiny_encoder), tokens_per_document=-(-info.tokens // info.documents))
    assert plan.chunks == pytest.approx(info.chunks, rel=0.1)
    files = stored_files(built_store, "embeddings/*.npy")
    vectors = sum(file.stat().st_size - 128 for file in files)
    assert vectors == 64 * info.chunks
    assert plan.files[2].bytes == 64 * plan.chunks


MOST = {"--tokens": "1T", "--gpus": 8, "--cores": 4, "--memory-per-host": "1TB"}
WRONG = [
    (("--tokens", "many"), "--tokens many"),
    (("--tokens", "0"), "--tokens 0"),
    (("--tokens", "-1T"), "--tokens -1T"),
    (("--tokens", "1e20"), "is not between 1 and 100,000,000,000,000"),
    (("--tokens", "1T", "--encoder", "nobody"), "encoder 'nobody' is not a known name"),
    (("--tokens", "1T", "--gpus", "-1"), "--gpus -1"),
    (("--tokens", "1T", "--hosts", "0"), "--hosts 0"),
    (("--tokens", "1T", "--cores", "0"), "--cores 0"),
    (("--tokens", "1T", "--memory-per-host", "much"), "--memory-per-host much"),
    (("--tokens", "1T", "--tokens-per-document", "0"), "--tokens-per-document 0"),
    (("--tokens", "1T", "--chunk-length", "0"), "--chunk-length 0"),
    (("--tokens", "1T", "--neighbours", "1001"), "--neighbours 1001"),
    (("--tokens", "1T", "--target-recall", "1.5"), "--target-recall 1.5"),
    (("--tokens", "1T", "--encoder", "0x768"), "encoder '0x768'"),
    (("--tokens", "1T", "--rate", "embed"), "--rate embed is not NAME=NUMBER"),
    (("--tokens", "1T", "--price", "gpu"), "--price gpu is not NAME=NUMBER"),
    (("--tokens", "1T", "--price", "cpu=1"), "'cpu' is not one of gpu, host, get, put, stored"),
    (("--tokens", "1T", "--price", "gpu=0"), "--price gpu=0"),
    (("--tokens", "1T", "--price", "gpu=free"), "--price gpu free"),
    (("--tokens", "1T", "--nprobe", "0"), "--nprobe 0"),
    (("--tokens", "1T", "--rate", "purge=1"), "'purge' is not one of chunk, embed, feed"),
    (("--tokens", "1T", "--rate", "read=0"), "--rate read=0"),
    (("--tokens", "1T", "--rate", "read=fast"), "--rate read fast"),
    (("--tokens", "1T", "--rate", "read=1e30"), "--rate read=1e+30"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_usage_ends_with_2_and_says_what_is_wrong(arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    code, out, _ = run(*arguments, "--json")
    reported = json.loads(out)
    assert (code, reported["exit_code"], message in reported["error"]) == (2, 2, True)


def test_a_plan_is_of_so_many_tokens():
    assert made("100k", memory_per_host="64GB") == made(100_000, memory_per_host=64 * 10**9)  # type: ignore[arg-type]
    code, out, err = run("--gpus", 8)
    assert (code, out) == (2, "") and "Missing option '--tokens'" in err


def test_an_encoder_that_is_not_known_is_reported_those_that_are():
    advice = run("--tokens", "1T", "--encoder", "gpt-7")[2]
    assert all(name in advice for name in ("minilm", "bert-base", "bert-large", "12x768"))
    assert "directory" in advice


def test_rates_that_are_given_replace_those_of_the_table():
    before, after = (made(10**12, encoder="bert-base", gpus=8, rates=given) for given in ({}, {"embed": 7e4}))
    old, new = ({rate.stage: rate for rate in plan.rates} for plan in (before, after))
    assert after.stages[1].gpu_hours == pytest.approx(before.stages[1].gpu_hours * old["embed"].value / 7e4)
    assert after.stages[4] == before.stages[4]
    assert new["embed"] == dataclasses.replace(old["embed"], value=7e4, source="given")
    assert run("--tokens", "1T", "--rate", "embed=70k", "--rate", "read=3e9")[0] == 0


def test_every_rate_that_is_used_is_shown_and_no_other():
    for gpus, bucket in itertools.product((0, 8), (False, True)):
        plan = made(10**12, gpus=gpus, bucket=bucket)
        shown = {rate.stage: rate for rate in plan.rates}
        assert len(shown) == len(plan.rates)
        assert {rate.per for rate in plan.rates if rate.unit == "FLOP/s"} == {"GPU" if gpus else "core"}
        for stage in STAGES:
            differs = made(10**12, gpus=gpus, bucket=bucket, rates={stage: 1.0}).stages != plan.stages
            assert differs == (stage in shown)


def test_the_embed_rate_is_the_one_that_it_is_reported_as():
    plan = made(64 * 31_600 * 3600, encoder="bert-base", gpus=1, tokens_per_document=10**9)
    assert plan.stages[1].gpu_hours == pytest.approx(1, rel=0.01)


def test_json_has_the_keys_that_scripts_rely_on():
    code, out, err = run(*(word for pair in MOST.items() for word in pair), "--json")
    assert (code, err) == (0, "")
    reported = json.loads(out)
    assert set(reported) == {field.name for field in dataclasses.fields(Plan)}
    assert set(reported["files"][0]) == {"kind", "bytes", "each"}
    assert set(reported["stages"][0]) == {
        "name", "tasks", "gpu_hours", "core_hours", "wall_hours", "read_bytes", "written_bytes", "gets", "puts",
        "price", "limit",
    }  # fmt: skip
    assert set(reported["index"]) == {
        "factory", "kind", "why", "nlist", "bytes_per_vector", "trained_bytes", "sample", "sample_bytes", "shards",
        "memory", "hosts",
    }  # fmt: skip
    assert set(reported["rates"][0]) == {"stage", "value", "unit", "per", "source"}
    assert set(reported["machines"]) == {"gpus", "hosts", "cores", "memory", "bucket"}
    assert set(reported["encoder"]) == {"name", "layers", "hidden", "intermediate"}
    assert [stage["name"] for stage in reported["stages"]] == [
        "chunk", "embed", "index: train", "index: encode", "index: recall", "neighbours: route", "neighbours: search",
        "neighbours: merge",
    ]  # fmt: skip


def test_tables_have_lines_in_a_terminal_and_none_in_a_pipe():
    arguments = [word for pair in MOST.items() for word in pair]
    plain, shown = run(*arguments)[1], in_terminal("plan", *arguments)
    assert plain.isascii() and "─" in shown and "\x1b" not in shown
    assert "  embed " in plain and all(word in shown for word in plain.split() if word.isalpha())


def test_the_largest_plan_is_json_too(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"num_hidden_layers": 16384, "hidden_size": 16384, "intermediate_size": 16384}'
    )
    arguments = {"--tokens": "100T", "--encoder": tmp_path, "--neighbours": 1000, "--chunk-length": 1, "--cores": 1}
    rates = [word for stage in STAGES for word in ("--rate", f"{stage}=1")]
    slow = ("--tokens-per-document", 1, *rates, "--target-recall", 1.0, "--json")
    code, out, _ = run(*(word for pair in arguments.items() for word in pair), *slow)
    reported = json.loads(out)
    assert code == 0
    assert reported["bytes"] == sum(one["bytes"] for one in reported["files"])
    assert all(isinstance(stage["wall_hours"], float) for stage in reported["stages"])


def test_text_says_the_same():
    out = run(*(word for pair in MOST.items() for word in pair))[1]
    plan = api.plan(10**12, gpus=8, cores=4, memory_per_host=10**12)
    for one in plan.files:
        assert re.search(rf"^  {one.kind} +{output.size(one.bytes)}  ", out, re.MULTILINE)
    for stage in plan.stages:
        assert re.search(rf"^  {stage.name} .* {_duration(stage.wall_hours)}  {stage.limit}$", out, re.MULTILINE)
    for rate in plan.rates:
        assert re.search(rf"^  {rate.stage} +{_rate(rate)}  per {rate.per} +{rate.source}$", out, re.MULTILINE)
    assert f"Index {plan.index.factory}: " in out
    assert all(f"  {one}\n" in out for one in plan.assumptions)


def test_a_price_is_that_of_hours_and_requests():
    given = {"gpu": 2.5, "host": 1.0, "get": 0.0004, "put": 0.005, "stored": 0.02}
    plan = made(10**12, gpus=16, bucket=True, prices=given)
    free = made(10**12, gpus=16, bucket=True)
    assert free.price is free.price_a_month is None and {stage.price for stage in free.stages} == {None}
    hours, gets, puts = (sum(getattr(stage, name) for stage in plan.stages) for name in ("wall_hours", "gets", "puts"))
    assert plan.price == pytest.approx(hours * (16 * 2.5 + 2 * 1.0) + gets * 0.0004 / 1000 + puts * 0.005 / 1000)
    assert plan.price == pytest.approx(sum(stage.price or 0 for stage in plan.stages))
    assert plan.price_a_month == pytest.approx(plan.bytes / 1e9 * 0.02)
    on_disks = made(10**12, gpus=16, prices=given)
    assert on_disks.price == pytest.approx(on_disks.wall_hours * 42)
    words = [word for name, price in given.items() for word in ("--price", f"{name}={price}")]
    out = run("--tokens", "1T", "--gpus", 16, "--cores", 8, "--memory-per-host", "100GB", "--bucket", *words)[1]
    assert f"{plan.price:,.2f}" in out and f"Stored for a month: {plan.price_a_month:,.2f}" in out


def test_more_lists_are_more_work_to_search():
    few, many = (costs(made(10**11, gpus=8, nprobe=n))["neighbours.gpu_hours"] for n in (32, 320))
    assert few < many < 10 * few
