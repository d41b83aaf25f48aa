"""Commands on a store in a bucket that are killed, or whose requests fail: the old or the new state, nothing lost.

The server is LocalBucket, whose buckets are folders: a store in one is looked at as a folder, too. Commands run in
forked children, so the process that forks them must never have sent a request: each test's work is done in a new one.

RETROTOOL_KILLS sets how many kills and faults and RETROTOOL_SEED which ones; ``make torture`` tries every fault at
every request of two commands.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import buckets
import pytest
from conftest import times
from faulty_proxy import KINDS, set_fault
from stored import copy_store
from test_kills import (  # noqa: F401 - a fixture is among them
    CASES,
    SEED,
    Case,
    begin_child,
    cases,
    check_after,
    check_between,
    in_child,
    problems,
    stages,
    uninterrupted,
)

from retrotool import api
from retrotool.errors import StorageError
from retrotool.store import log
from retrotool.store.cache import cache_folder
from retrotool.store.leases import Run
from retrotool.store.log import Draft
from retrotool.store.storage import storage_at
from retrotool.store.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.on_disk]

KILLS = int(os.environ.get("RETROTOOL_KILLS", times(1, 5)))
TORTURE = "RETROTOOL_KILLS" in os.environ
FAULTS = times(3, 20)
EVERY_REQUEST = ("chunk", "purge")  # whose every request has every fault in ``make torture``; of others some


def all_cases(by_default: str) -> list[Any]:
    """Numbers of all cases, of which ``make test`` tries one."""
    marks = {name: [] if name == by_default else pytest.mark.nightly for name in CASES}
    return [pytest.param(i, id=name, marks=marks[name]) for i, name in enumerate(CASES)]


def in_new_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """Return ``work(*arguments)``, done by a process that was not forked from this one.

    It is forked from one that has imported what it needs (``quick_workers``), and has sent no request.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
        return pool.submit(work, *arguments).result()


class Bucket:
    """Stores in a bucket, of which each is a folder, too; this process and its children get a cache of their own."""

    def __init__(self, root: Path) -> None:
        self.root = root / buckets.BUCKET
        cache, shared = root / "cache", cache_folder() / "tokenizers"
        if shared.exists():  # what is known about tokenizers takes seconds
            shutil.copytree(shared, cache / "tokenizers", dirs_exist_ok=True)
        os.environ["RETROTOOL_CACHE"] = str(cache)

    def place(self, name: str) -> str:
        return f"s3://{buckets.BUCKET}/{name}"

    def fill(self, name: str, before: Path) -> Path:
        """Copy a store of the disk into the bucket, of which nothing is cached; return its folder."""
        shutil.rmtree(cache_folder() / "files", ignore_errors=True)
        folder = self.root / name
        if before.exists():
            copy_store(before, folder)
        return folder


def killed(number: int, stages: dict[str, Path], encoder: Path, tmp: Path, kills: int) -> int:  # noqa: F811
    """Kill a command ``kills`` times, each in another copy of its store; return how many kills hit."""
    case = cases(stages, encoder)[number]
    before = stages[case.name.split()[0]]
    expected, _ = uninterrupted(case, before, tmp / "whole")
    known, draw, hit = problems(before), random.Random(SEED + number), 0
    with buckets.local_bucket(tmp / "root") as address, buckets.settings_of(address):
        bucket = Bucket(tmp / "root")
        for name in ("whole", "counted"):  # the first run fills this machine's cache, the others have fewer calls
            folder = bucket.fill(name, before)
            calls = in_child(lambda name=name: case.work(bucket.place(name)), None)[1]  # type: ignore[misc]
        assert calls > 10
        check_after(folder, case, expected)
        for attempt in range(kills):
            name = f"store-{attempt}"
            folder = bucket.fill(name, before)
            hit += in_child(lambda name=name: case.work(bucket.place(name)), draw.randint(1, calls))[0]  # type: ignore[misc]
            check_between(folder, before, known, expected)
            in_child(lambda name=name: case.work(bucket.place(name)), None)  # type: ignore[misc]
            check_after(folder, case, expected)
            shutil.rmtree(folder)
    return hit


@pytest.mark.parametrize("number", all_cases("erase"))
def test_a_killed_command_run_again_gives_what_an_uninterrupted_one_gives(
    number: int,
    stages: dict[str, Path],  # noqa: F811
    tiny_encoder: Path,
    tmp_path: Path,
) -> None:
    assert in_new_process(killed, number, stages, tiny_encoder, tmp_path, KILLS) == KILLS


def faulted(number: int, stages: dict[str, Path], encoder: Path, tmp: Path, faults: int | None) -> tuple[int, int]:  # noqa: F811
    """Let requests of a command fail, one in each run; return how many did, and how often the command ended by it.

    ``faults``: how many kinds and requests are drawn; None: all kinds at all requests.
    """
    case = cases(stages, encoder)[number]
    before = stages[case.name.split()[0]]
    expected, _ = uninterrupted(case, before, tmp / "whole")
    known, draw = problems(before), random.Random(SEED + 100 + number)
    os.environ["RETROTOOL_CLOUD_TIMEOUT"] = "1"
    with (
        buckets.local_bucket(tmp / "root") as server,
        buckets.faulty(server) as proxy,
        buckets.settings_of(proxy),
        buckets.short_waits(),
    ):
        bucket = Bucket(tmp / "root")
        bucket.fill("whole", before)
        set_fault(proxy)
        in_child(lambda: case.work(bucket.place("whole")), None)  # type: ignore[arg-type]
        requests, _ = set_fault(proxy)
        due = [(kind, at) for kind in KINDS for at in range(1, requests + 1)]
        hit = ended = 0
        for attempt, (kind, at) in enumerate(due if faults is None else draw.sample(due, faults)):
            name = f"store-{attempt}"
            folder = bucket.fill(name, before)
            set_fault(proxy, kind, at)
            ended += begin_child(lambda name=name: try_work(case, bucket.place(name))).end()[1] == "failed"  # type: ignore[misc]
            hit += set_fault(proxy)[1]
            check_between(folder, before, known, expected)
            in_child(lambda name=name: case.work(bucket.place(name)), None)  # type: ignore[misc]
            check_after(folder, case, expected)
            shutil.rmtree(folder)
    return hit, ended


def try_work(case: Case, place: str) -> str:
    try:
        case.work(place)  # type: ignore[arg-type]
    except StorageError:
        return "failed"
    return "done"


@pytest.mark.parametrize("number", all_cases("chunk"))
def test_whatever_goes_wrong_with_a_request_nothing_is_lost_or_doubled(
    number: int,
    stages: dict[str, Path],  # noqa: F811
    tiny_encoder: Path,
    tmp_path: Path,
) -> None:
    """A request is repeated, so the command also ends as if nothing had happened."""
    faults = FAULTS if not TORTURE else None if CASES[number] in EVERY_REQUEST else KILLS
    hit, ended = in_new_process(faulted, number, stages, tiny_encoder, tmp_path, faults)
    assert hit >= (faults or 500), "the faults were due"
    assert ended == 0


def write_commits(place: str, writer: int, commits: int) -> None:
    store = Store.open(place)
    with Run(store.storage) as run:
        for i in range(commits):
            store.commit(run, lambda _, i=i: Draft("test", {"writer": writer, "commit": i}))  # type: ignore[misc]


def race(before: Path, tmp: Path, writers: int, commits: int) -> list[tuple[int, int]]:
    """Let processes commit at once to one store in a bucket; return who made which commit, in their order."""
    with buckets.local_bucket(tmp / "root") as address, buckets.settings_of(address):
        bucket = Bucket(tmp / "root")
        folder = bucket.fill("race", before)
        first = Store.open(folder).state.number
        children = [
            begin_child(lambda writer=writer: write_commits(bucket.place("race"), writer, commits))  # type: ignore[misc]
            for writer in range(writers)
        ]
        assert not any(child.end()[0] for child in children)
        last = Store.open(folder).state.number
        found = [log.read(storage_at(folder), number) for number in range(first + 1, last + 1)]
        assert not list(folder.glob("leases/*"))
    return [(commit.settings["writer"], commit.settings["commit"]) for commit in found if commit is not None]


def test_of_writers_at_once_each_commits_all_in_order(
    stages: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    writers, commits = times(4, 16), times(10, 50)
    found = in_new_process(race, stages["index"], tmp_path, writers, commits)
    assert sorted(found) == [(writer, i) for writer in range(writers) for i in range(commits)]
    for writer in range(writers):
        assert [i for one, i in found if one == writer] == list(range(commits))


def refused(tmp: Path, encoder: Path, source: Path) -> str:
    with buckets.nanio(tmp / "root") as address, buckets.settings_of(address):
        try:
            api.chunk(f"s3://{buckets.BUCKET}/store", [str(source)], tokenizer=str(encoder))
        except StorageError as error:
            left = [info.path for info in storage_at(f"s3://{buckets.BUCKET}/store").list("")]
            return f"{error} {left}"
    return "not refused"


def test_a_server_that_ignores_conditions_is_refused(
    tiny_encoder: Path,
    stages: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    source = stages["inputs"] / "one.jsonl"
    assert "ignores the condition" in (said := in_new_process(refused, tmp_path, tiny_encoder, source))
    assert said.endswith("[]"), "nothing is left there"
