"""Several jobs, devices and runs on one store: every part once, whichever dies."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import INTERRUPTED, Cli, make_rows, write_jsonl
from forked import Forked
from hypothesis import given
from hypothesis import strategies as st
from stored import copy_store, stored_files

from retrotool import api
from retrotool.chunk.chunk_plan import ChunkOptions
from retrotool.embed.stage import EmbedStage, EmbedWorker
from retrotool.encoder import find_encoder
from retrotool.engine.task import Task, own_first
from retrotool.errors import UsageError
from retrotool.store import leases, log
from retrotool.store.leases import Run
from retrotool.store.storage import storage_at
from retrotool.store.store import Store


def test_an_embed_beside_another_waits_and_has_everything(
    chunked: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(chunked)
    task = EmbedStage(str(tiny_encoder), find_encoder(str(tiny_encoder))[1]).plan(store)[2]
    with Run(store.storage) as other:
        assert leases.take_claim(store.storage, task.key, other.id)
        monkeypatch.setattr(time, "sleep", lambda _: leases.release_claim(store.storage, task.key, other.id))
        result = api.embed(chunked, encoder=str(tiny_encoder))
    assert (result.parts, result.in_other_runs) == (len(store.state.parts()), 0)


@pytest.fixture
def chunked(tmp_path: Path, tiny_encoder: Path) -> Path:
    source = write_jsonl(tmp_path / "c.jsonl", make_rows(200))
    api.chunk(tmp_path / "store", [str(source)], tokenizer=str(tiny_encoder), part_size=40)
    return tmp_path / "store"


def sums(store: Path) -> dict[str, str]:
    state = Store.open(store).state
    return {slot: state.file("embeddings", slot, "tiny").sha256 for slot in state.group("embeddings", "tiny")}


def embeds(store: Path) -> list[str]:
    """Slots that commits of ``embed`` added, in order; one twice would be one done twice."""
    state = Store.open(store).state
    commits = [log.read(storage_at(store), number) for number in range(state.number + 1)]
    return [entry.slot for c in commits if c and c.kind == "embed" for entry in c.add]


@given(st.sets(st.integers(0, 2**128 - 1), max_size=30), st.integers(1, 6), st.data())
def test_a_job_begins_with_its_own_share_and_then_has_all_the_others(
    keys: set[int], jobs: int, data: st.DataObject
) -> None:
    job = data.draw(st.integers(0, jobs - 1))
    tasks = [Task(f"{key:032x}", "part", 1, {}) for key in sorted(keys)]
    found = own_first(tasks, job, jobs)
    assert sorted(t.key for t in found) == sorted(t.key for t in tasks)
    own = [t for t in tasks if int(t.key, 16) % jobs == job]
    assert found[: len(own)] == own
    others = [int(t.key, 16) % jobs for t in found[len(own) :]]
    assert others == sorted(others, key=lambda other: (other - job) % jobs)
    less = [t for t in tasks if int(t.key, 16) % 3]
    assert [t for t in found if t in less] == own_first(less, job, jobs), "whatever else there is to do"


def start(store: Path, encoder: Path, *options: str, before: str = "") -> Forked:
    """An ``embed`` in a process of its own; ``before`` is Python that it runs first."""
    arguments = ["embed", str(store), "--encoder", str(encoder), "--json", *options]
    return Forked(arguments, before=lambda: exec(before, {}))


SLOW = """
import time
from retrotool.embed.stage import EmbedWorker
write = EmbedWorker._write
def slow(self, part, *arguments):
    time.sleep(0.2)
    with open(MARKS, 'a') as file:
        file.write(f'{part}\\n')
    return write(self, part, *arguments)
EmbedWorker._write = slow
"""


def test_two_jobs_at_once_do_every_part_once(chunked: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    slow = f"MARKS = {str(marks)!r}\n{SLOW}"
    jobs = [start(chunked, tiny_encoder, "--shard", f"{i}/2", before=slow) for i in range(2)]
    results = []
    for job in jobs:
        out, errors = job.communicate(timeout=200)
        assert job.returncode == 0, errors
        results.append(orjson.loads(out))
    n = len(Store.open(chunked).state.parts())
    assert sorted(map(int, marks.read_text().split())) == list(range(n)), "begun once each"
    assert len(embeds(chunked)) == len(set(embeds(chunked))) == n
    assert [result["parts"] for result in results] != [0, n]
    assert sum(result["parts"] for result in results) == n
    assert sum(result["chunks"] for result in results) == api.info(chunked).chunks
    assert not stored_files(chunked, "leases/*")
    assert api.verify(chunked).ok


FOLDING = """
import time
from retrotool.chunk import chunk_plan
from retrotool.engine import run
run.FOLD_SECONDS, chunk_plan._LEAST_UNIT_BYTES = 0.05, 1
from {module} import {worker}
work = {worker}.{method}
def slow(self, *arguments):
    with open({marks!r}, 'a') as file:
        file.write(f'{{{label}}}\\n')
    time.sleep(0.15)
    return work(self, *arguments)
{worker}.{method} = slow
"""
WORK = {
    "chunk": ("retrotool.chunk.stage", "_Unit", "batches", "arguments[0]"),
    "index": ("retrotool.index.stage", "IndexWorker", "_write_shard", "arguments[0].label"),
    "neighbours": ("retrotool.neighbours.stage", "NeighboursWorker", "_compute", "arguments[1].label"),
}
"""Per command: the module, class and method that does a task, and what distinguishes its tasks."""


@pytest.mark.parametrize("command", WORK)
def test_jobs_do_nothing_again_that_another_has_committed(
    command: str, chunked: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    """Each task takes longer than it is until the next fold, after which no claim or staged entry is left of it."""
    marks, store = tmp_path / "marks", chunked
    arguments = {"index": ["--shard-size", "1"], "neighbours": []}.get(command, [])
    if command == "chunk":
        store = tmp_path / "new"
        files = [str(write_jsonl(tmp_path / f"{n}.jsonl", make_rows(6, first=6 * n))) for n in range(8)]
        arguments = [*files, "--tokenizer", str(tiny_encoder), "--part-size", "10", "--workers", "1"]
    else:
        api.embed(store, encoder=str(tiny_encoder))
    if command == "neighbours":
        api.index(store)
    module, worker, method, label = WORK[command]
    slow = FOLDING.format(module=module, worker=worker, method=method, label=label, marks=str(marks))
    jobs = [
        Forked([command, str(store), *arguments, "--shard", f"{i}/2"], before=lambda: exec(slow, {})) for i in range(2)
    ]
    for job in jobs:
        _, errors = job.communicate(timeout=200)
        assert job.returncode == 0, errors
    begun = marks.read_text().splitlines()
    assert len(begun) == len(set(begun)) >= 5, begun
    assert api.verify(store).ok


def test_a_job_leaves_alone_what_a_living_run_is_at_and_says_so(chunked: Path, tiny_encoder: Path, cli: Cli) -> None:
    store = Store.open(chunked)
    stage = EmbedStage(str(tiny_encoder), find_encoder(str(tiny_encoder))[1])
    task = stage.plan(store)[2]
    with Run(store.storage) as other:
        assert leases.take_claim(store.storage, task.key, other.id)
        job = (int(task.key, 16) + 1) % 2
        api.use_engine(shard=(job, 2))
        result = api.embed(chunked, encoder=str(tiny_encoder))
        assert result.in_other_runs == 1
        assert result.parts == len(store.state.parts()) - 1
        again = cli("embed", chunked, "--encoder", tiny_encoder, "--shard", f"{job}/2")
        assert again.returncode == 0, "its share is done"
        assert "Nothing is left for this run" in again.stdout
        assert "1 part is being embedded by other runs" in again.stdout
        for shard in ([], ["--shard", f"{1 - job}/2"]):
            refused = cli("embed", chunked, "--encoder", tiny_encoder, "--no-wait", *shard)
            assert (refused.returncode, refused.stdout) == (14, "")
            assert f"part 2, held by run {other.id} (process {os.getpid()} on " in refused.stderr
    api.use_engine()
    last = api.embed(chunked, encoder=str(tiny_encoder))
    assert (last.parts, last.in_other_runs) == (1, 0)


def test_a_killed_job_s_parts_are_done_by_the_next(chunked: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    job = start(chunked, tiny_encoder, before=f"MARKS = {str(marks)!r}\n{SLOW}")
    deadline = time.monotonic() + 100
    while not (marks.exists() and len(marks.read_text().split()) >= 3) and time.monotonic() < deadline:
        assert job.poll() is None, job.communicate()
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.communicate()
    begun = len(marks.read_text().split())
    result = api.embed(chunked, encoder=str(tiny_encoder))
    n = len(Store.open(chunked).state.parts())
    assert n - begun <= result.parts <= n - begun + 1, "at most the part at hand is done again"
    assert result.in_other_runs == 0
    assert len(sums(chunked)) == n
    assert not stored_files(chunked, "leases/*")


def test_several_devices_give_the_same_files_as_one(chunked: Path, tiny_encoder: Path, tmp_path: Path) -> None:

    one = copy_store(chunked, tmp_path / "one")
    api.embed(one, encoder=str(tiny_encoder), devices="cpu")
    result = api.embed(chunked, encoder=str(tiny_encoder), devices="cpu,cpu")
    assert sums(chunked) == sums(one)
    assert result.devices == 2
    assert result.parts == len(sums(one))
    assert result.tokens > 0
    assert 0 < result.busy <= 1
    assert (result.forward, result.device) == ("packed", "cpu")


class DyingStage(EmbedStage):
    """The first process that comes to the end of part 2 kills itself."""

    def open(self, store: Store) -> EmbedWorker:
        worker = super().open(store)
        write, mark = worker._write, Path(store.place).parent / "mark"

        def dying(part: int, *arguments: Any) -> Any:
            if part == 2 and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return write(part, *arguments)

        worker._write = dying  # type: ignore[method-assign]
        return worker


def test_a_process_of_a_device_that_is_killed_is_replaced(
    chunked: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrotool.embed.run.EmbedStage", DyingStage)
    result = api.embed(chunked, encoder=str(tiny_encoder), devices="cpu,cpu")
    assert (tmp_path / "mark").exists()
    assert result.in_other_runs == 0
    assert sorted(embeds(chunked)) == sorted(sums(chunked))
    assert len(sums(chunked)) == len(Store.open(chunked).state.parts())


def test_ctrl_c_keeps_what_is_finished_and_the_rest_is_done_by_the_next(
    chunked: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    marks = tmp_path / "marks"
    job = start(chunked, tiny_encoder, before=f"MARKS = {str(marks)!r}\n{SLOW}")
    deadline = time.monotonic() + 100
    while not (marks.exists() and len(marks.read_text().split()) >= 3) and time.monotonic() < deadline:
        assert job.poll() is None, job.communicate()
        time.sleep(0.01)
    job.send_signal(signal.SIGINT)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 130, errors
    assert "Traceback" not in errors
    assert len(sums(chunked)) >= 2
    assert api.embed(chunked, encoder=str(tiny_encoder)).embedded == api.info(chunked).chunks
    assert api.verify(chunked).ok


SWALLOWED = """
import os, signal
from retrotool.embed.stage import EmbedWorker
prepare = EmbedWorker._prepare
class Finaliser:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass
def swallowing(self, part):
    if HOW == 'finaliser':
        Finaliser()
    else:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except BaseException:
            pass
    return prepare(self, part)
EmbedWorker._prepare = swallowing
"""


@pytest.mark.parametrize("how", ["finaliser", "library"])
def test_ctrl_c_that_a_library_swallows_is_kept_in_mind(chunked: Path, tiny_encoder: Path, how: str) -> None:
    job = start(chunked, tiny_encoder, before=f"HOW = {how!r}\n{SWALLOWED}")
    _, errors = job.communicate(timeout=100)
    assert job.returncode == 130, errors
    assert errors == INTERRUPTED
    assert len(sums(chunked)) <= 1, "it ends at the next step"
    assert api.embed(chunked, encoder=str(tiny_encoder)).embedded == api.info(chunked).chunks


@pytest.mark.parametrize("shard", [(2, 2), (0, 0), (-1, 2)])
def test_a_job_that_does_not_exist_is_refused(shard: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match=f"--shard {shard[0]}/{shard[1]}"):
        api.use_engine(shard=shard)


def test_jobs_that_chunk_at_once_make_the_store_of_one(tmp_path: Path, tiny_encoder: Path) -> None:
    files = [str(write_jsonl(tmp_path / f"{n}.jsonl", make_rows(6, first=6 * n))) for n in range(6)]
    arguments = ["chunk", str(tmp_path / "store"), *files, "--tokenizer", str(tiny_encoder), "--part-size", "10"]
    jobs = [Forked([*arguments, "--workers", "1", "--shard", f"{job}/3"]) for job in range(3)]
    for job in jobs:
        _, errors = job.communicate(timeout=200)
        assert job.returncode == 0, errors
    api.chunk(tmp_path / "one", files, tokenizer=str(tiny_encoder), options=ChunkOptions(part_size=10, workers=1))
    found, one = api.verify(tmp_path / "store"), api.verify(tmp_path / "one")
    assert (found.ok, found.content, found.ids) == (True, one.content, one.ids)
    assert api.info(tmp_path / "store").unfinished == 0
