"""Tasks on a Ray cluster: what commands leave, and what happens when workers, nodes or the driver are lost."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import re
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from conftest import Shared, make_rows, write_jsonl
from ray_cluster import ENVIRONMENT, RayCluster, start
from ray_stages import MarkStage, await_file, drive
from typer.testing import CliRunner

from retrotool import api
from retrotool.app import app
from retrotool.chunk.chunk_plan import ChunkOptions
from retrotool.errors import TaskError, UsageError
from retrotool.store.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.on_disk]
STORY = [
    "chunk STORE INPUT --tokenizer ENCODER --part-size 60",
    "embed STORE --encoder ENCODER",
    "index STORE --nlist 8 --sample 50",
    "neighbours STORE --saved 6",
    "purge STORE --pattern river --allow-lossy --reason test --yes --erase",
    "verify STORE",
]


@pytest.fixture
def cluster(shared: Shared[RayCluster]) -> RayCluster:
    """A cluster of two nodes with a core each, of which one has a GPU, for all tests."""
    return shared("ray", lambda _: start())


@pytest.fixture
def driver() -> Iterator[ProcessPoolExecutor]:
    """A process of its own, which knows nothing of Ray yet, and takes it away when it ends."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            yield pool


@pytest.fixture
def store(tmp_path: Path, tiny_encoder: Path) -> Path:
    api.chunk(tmp_path / "store", [str(write_jsonl(tmp_path / "c.jsonl", make_rows(2)))], tokenizer=str(tiny_encoder))
    (tmp_path / "marks").mkdir()
    return tmp_path / "store"


def attempts(marks: Path) -> Counter[str]:
    """Count the attempts at each task."""
    return Counter(one.name.split(".")[0] for one in marks.iterdir() if one.name[0].isdigit())


def nodes_of(marks: Path) -> set[str]:
    return {one.name.split(".")[1] for one in marks.iterdir() if "." in one.name}


def tell(engine: str, address: str, words: dict[str, str]) -> list[tuple[str, dict[str, Any]]]:
    """Run the story; return what each command prints, and what ``verify`` says of the store then."""
    steps = []
    for line in STORY:
        words_of = [words.get(word, word) for word in line.split()]
        arguments = [*words_of, "--engine", engine, *(["--ray-address", address] if engine == "ray" else [])]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        api.use_engine("local")
        found = dataclasses.asdict(api.verify(words["STORE"]))
        del found["bytes"]
        if line.startswith("verify"):
            found["printed"] = re.sub(r"[\d.]+ [kM]?B", "", done.stdout)
        steps.append((line, found))
    return steps


def test_commands_leave_the_same_as_on_this_machine(
    cluster: RayCluster, driver: ProcessPoolExecutor, tmp_path: Path, tiny_encoder: Path
) -> None:
    words = {"INPUT": str(write_jsonl(tmp_path / "c.jsonl", make_rows(40))), "ENCODER": str(tiny_encoder)}
    local = tell("local", "", {**words, "STORE": str(tmp_path / "local")})
    on_ray = driver.submit(tell, "ray", cluster.address, {**words, "STORE": str(tmp_path / "ray")}).result()
    assert on_ray == local
    assert local[-1][1]["ok"]


def test_a_killed_worker_is_replaced_and_a_task_that_kills_three_is_named(
    cluster: RayCluster, driver: ProcessPoolExecutor, store: Path, tmp_path: Path
) -> None:
    stage = MarkStage(str(tmp_path / "marks"), tasks=3, die=(1, 3), opening=("die", 1))
    with pytest.raises(TaskError, match=r"task 1 failed 3 times: .*its worker was killed"):
        driver.submit(drive, cluster.address, str(store), stage).result()
    assert attempts(tmp_path / "marks") == {"0": 1, "1": 3, "2": 1}
    assert list(Store.open(store).state.group("selectors")) == ["t0", "t2"], "the others are kept"
    assert driver.submit(drive, cluster.address, str(store), stage).result() == ["t0", "t1", "t2"]


def build(address: str, words: dict[str, str]) -> str:
    """Build a store; its ``chunk`` does not end before something is embedded."""
    from retrotool.build import run as build_run

    chunk = build_run.chunk

    def chunk_until_embedded(*arguments: Any, **options: Any) -> Any:
        result = chunk(*arguments, **options)
        await_file(lambda: Store.open(words["STORE"]).state.names("embeddings"))
        return result

    build_run.chunk = chunk_until_embedded
    api.use_engine("ray", address)
    options = api.BuildOptions(words["ENCODER"], ChunkOptions(part_size=20), words["ENCODER"])
    return str(api.build(words["STORE"], [words["INPUT"]], options).commit)


def test_a_build_embeds_parts_while_others_are_chunked(
    cluster: RayCluster, driver: ProcessPoolExecutor, tmp_path: Path, tiny_encoder: Path
) -> None:
    words = {"INPUT": str(write_jsonl(tmp_path / "c.jsonl", make_rows(40))), "ENCODER": str(tiny_encoder)}
    store = {"STORE": str(tmp_path / "store")}
    driver.submit(build, cluster.address, {**words, **store}).result()
    found = api.verify(store["STORE"])
    api.use_engine()
    api.build(
        tmp_path / "local",
        [words["INPUT"]],
        api.BuildOptions(str(tiny_encoder), ChunkOptions(part_size=20), str(tiny_encoder)),
    )
    local = api.verify(tmp_path / "local")
    assert found.ok
    for digest in ("content", "ids", "embeddings", "neighbours"):
        assert getattr(found, digest) == getattr(local, digest)


@pytest.mark.nightly
@pytest.mark.parametrize(("kind", "error"), [("refuse", UsageError), ("die", TaskError)])
def test_if_no_node_can_open_the_stage_the_reason_is_raised(
    cluster: RayCluster, driver: ProcessPoolExecutor, store: Path, tmp_path: Path, kind: str, error: type[Exception]
) -> None:
    stage = MarkStage(str(tmp_path / "marks"), opening=(kind, 99))
    with pytest.raises(error, match="the model is not here" if kind == "refuse" else "end when they start"):
        driver.submit(drive, cluster.address, str(store), stage).result()
    assert len(list((tmp_path / "marks").glob("opening.*"))) == 3, "on the node without a GPU, which other work leaves"


def test_a_node_joins_and_is_lost(
    cluster: RayCluster, driver: ProcessPoolExecutor, store: Path, tmp_path: Path
) -> None:
    """Tasks are held until one is on the new node; then that is lost, and its task is done elsewhere."""
    marks = tmp_path / "marks"
    stage = MarkStage(str(marks), tasks=8, hold="go")
    done = driver.submit(drive, cluster.address, str(store), stage)
    await_file(lambda: len(attempts(marks)) == 1)
    known = nodes_of(marks)
    new = cluster.add(num_cpus=1)
    try:
        await_file(lambda: done.done() or nodes_of(marks) - known == {new})
    finally:
        cluster.remove(new)
    held = [Path("/proc") / one.name.split(".")[2] for one in marks.iterdir() if f".{new}." in one.name]
    await_file(lambda: not any(process.exists() for process in held))
    (marks / "go").touch()
    assert len(done.result()) == 8
    tried = attempts(marks)
    assert sorted(tried.values()) == [1] * 7 + [2], "the task in flight there was repeated, no other"


def test_if_the_driver_is_lost_the_same_command_goes_on(cluster: RayCluster, store: Path, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    stage = MarkStage(str(marks), tasks=4, hold="go")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as first:
        lost: Future[list[str]] = first.submit(drive, cluster.address, str(store), stage)
        await_file(lambda: len(attempts(marks)) == 1)
        for process in list(first._processes.values()):
            os.kill(process.pid or 0, signal.SIGKILL)
        assert lost.exception() is not None
    (marks / "go").touch()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as second:
        assert len(second.submit(drive, cluster.address, str(store), stage).result()) == 4
    tried = attempts(marks)
    assert sum(tried.values()) <= 5, "only what was in flight"


@pytest.mark.parametrize("is_lost", [True, False])
def test_a_node_that_is_lost_while_its_workers_start_does_not_end_the_run(
    is_lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("retrotool.engine.ray")
    error = ray.RayError("the actor died")
    monkeypatch.setattr(ray, "ray", SimpleNamespace(get=Mock(side_effect=error), kill=Mock()))
    monkeypatch.setattr(ray, "LOSS_SECONDS", -1.0)
    pool = ray.RayPool(Mock(), SimpleNamespace(name="mark"), Mock(), "", Mock())
    pool._nodes = {"one": {"CPU": 2.0}}
    actors = [ray._Actor(None, "one", number) for number in range(3)]
    pool._actors = {("one", actor.number): actor for actor in actors}
    pool._opening = {actor.number: actor for actor in actors}
    assert [list(pool._take(actor.number)) for actor in actors] == [[], [], []]
    assert not pool.busy
    if is_lost:
        pool._nodes = {}
        assert not list(pool._clarified())
    else:
        with pytest.raises(TaskError, match="mark: the workers on Ray end when they start: the actor died"):
            list(pool._clarified())


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no Ray cluster can be reached at 127.0.0.1:1"),
        ("http://127.0.0.1:8265", "ray job submit"),
        ("head", "--ray-address head is not HOST:PORT"),
    ],
)
def test_without_a_cluster_nothing_is_written(tmp_path: Path, address: str, message: str) -> None:
    source = write_jsonl(tmp_path / "c.jsonl", make_rows(2))
    done = CliRunner().invoke(
        app, ["chunk", str(tmp_path / "store"), str(source), "--engine", "ray", "--ray-address", address]
    )
    assert done.exit_code == 2 and message in done.stderr
    assert not (tmp_path / "store").exists()
