"""SIGKILL at the n-th store call of each command, then the same command again: nothing lost, nothing twice.

A parent that has everything imported forks a child for every kill, so a kill costs milliseconds. n is drawn uniformly
over the calls of an uninterrupted run of the same command. RETROTOOL_KILLS sets how many and RETROTOOL_SEED which ones
(``make torture``: 1,000, others each time).
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Shared, make_rows, times, write_jsonl
from stored import copy_store

import retrotool
from retrotool import api
from retrotool.ann.choice import IndexOptions
from retrotool.chunk import hash_partitions
from retrotool.chunk import run as chunk_run
from retrotool.chunk.deduplicate import finish_plans
from retrotool.embed import stage as embed_stage
from retrotool.errors import UsageError
from retrotool.index import run as index_run
from retrotool.index.run import Options
from retrotool.info.run import info
from retrotool.info.verify import Verification, verify
from retrotool.neighbours.run import SearchOptions
from retrotool.purge.undo import undo
from retrotool.store import disk, leases
from retrotool.store.blocked import read_blocked
from retrotool.store.folding import writing
from retrotool.store.paths import DATA_KINDS
from retrotool.store.storage import Storage
from retrotool.store.store import Store
from retrotool.store.sums import with_sums

pytestmark = [pytest.mark.slow, pytest.mark.on_disk]

KILLS = int(os.environ.get("RETROTOOL_KILLS", times(2, 5)))
SEED = int(os.environ.get("RETROTOOL_SEED", "2026"))


class Countdown:
    """Counts store calls; at the n-th, if there is an n, the process kills itself."""

    calls = 0
    fatal: int | None = None
    installed = False

    @classmethod
    def hear(cls, event: str, arguments: tuple[object, ...]) -> None:
        if event == disk.EVENT:
            cls.calls += 1
            if cls.calls == cls.fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    @classmethod
    def start(cls, fatal: int | None) -> None:
        if not cls.installed:
            sys.addaudithook(cls.hear)
            cls.installed = True
        cls.calls, cls.fatal = 0, fatal


@dataclass
class Child:
    """A forked process at some work; ``pipe`` can be read from once it has ended."""

    process: int
    pipe: int

    def end(self) -> tuple[bool, str]:
        """Wait for its end; return whether it was killed, and what it said: what its work returned, as text."""
        with os.fdopen(self.pipe) as pipe:
            said = pipe.read()
        status = os.waitpid(self.process, 0)[1]
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed or status == 0, "the command failed by itself"
        return killed, said

    def stop(self) -> None:
        """Kill it if its end was not waited for: nobody would."""
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(self.process, os.WNOHANG)[0] == 0:
                os.kill(self.process, signal.SIGKILL)
                os.waitpid(self.process, 0)


def begin_child(work: Callable[[], object]) -> Child:
    """Begin ``work`` in a forked child."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            import torch

            gc.freeze()  # else a collection would copy all pages that are shared with the parent
            torch.set_num_threads(1)  # the parent's thread pool did not survive the fork
            os.write(write, str(work()).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    return Child(child, read)


def in_child(work: Callable[[], object], fatal: int | None) -> tuple[bool, int]:
    """Do ``work`` in a forked child; return whether it was killed, and how many store calls it made if it was not."""

    def counted() -> int:
        Countdown.start(fatal)
        work()
        return Countdown.calls

    killed, calls = begin_child(counted).end()
    return killed, int(calls or 0)


@dataclass(frozen=True)
class Case:
    """A command, what of the result must be equal, and which purges there must be (erased or not)."""

    name: str
    work: Callable[[Path], object]
    equal: tuple[str, ...]
    purges: list[bool]


@pytest.fixture(scope="module")
def stages(shared: Shared[dict[str, Path]], tiny_encoder: Path) -> dict[str, Path]:
    """The store before each command."""
    return shared("kills", lambda root: make_stages(root, tiny_encoder))


def make_stages(root: Path, tiny_encoder: Path) -> dict[str, Path]:
    rows = make_rows(24, words=60)
    write_jsonl(root / "one.jsonl", [*rows[:14], rows[3]])
    write_jsonl(root / "two.jsonl", rows[14:])
    (root / "targets.txt").write_text("doc-3\ndoc-20\n")
    stores = {"inputs": root, "chunk": root / "empty"}
    steps: list[tuple[str, Callable[[Path], object]]] = [
        (
            "embed",
            lambda s: api.chunk(
                s, [str(root / "one.jsonl"), str(root / "two.jsonl")], tokenizer=str(tiny_encoder), part_size=8
            ),
        ),
        ("index", lambda s: api.embed(s, encoder=str(tiny_encoder), devices="cpu")),
        ("neighbours", api.index),
        ("materialise", api.neighbours),
        ("purge", lambda s: api.neighbours(s, materialise=True)),
    ]
    extra = write_jsonl(root / "extra.jsonl", make_rows(6, first=100, words=60))

    def grown(store: Path) -> None:
        """Lists in one shard, and in another one what came later."""
        lists_index(store, shard_rows=10_000)
        api.chunk(store, [str(extra)], part_size=8)
        api.embed(store, encoder=str(tiny_encoder), devices="cpu")
        lists_index(store)

    before = stores["chunk"]
    for name, step in steps:
        stores[name] = root / name
        if before.exists():
            copy_store(before, stores[name])
        step(stores[name])
        before = stores[name]
    updated = write_jsonl(root / "updated.jsonl", rows)
    stores["mirror"] = root / "mirror"
    api.chunk(stores["mirror"], [str(updated)], tokenizer=str(tiny_encoder), part_size=8)
    write_jsonl(updated, [*({**row, "text": f"{row['text']} corrected"} for row in rows[:9]), *rows[14:]])
    in_chunks = sum(part["chunks"]["rows"] for part in api.info(stores["embed"]).parts)
    np.save(root / "vectors.npy", np.random.default_rng(0).normal(size=(in_chunks, 16)))
    stores["undo"] = copy_store(stores["purge"], root / "undo")
    api.purge(stores["undo"], api.Selectors(document=root / "targets.txt"), reason="test")
    lists_index(stores["undo"])
    stores["earlier"] = stores["undo"]
    stores["refill"] = copy_store(stores["neighbours"], root / "refill")
    api.neighbours(stores["refill"], saved=3)
    (root / "half.txt").write_text("".join(f"{row['id']}\n" for row in rows[::2]))
    api.purge(stores["refill"], api.Selectors(document=root / "half.txt"), reason="test")
    assert api.neighbours(copy_store(stores["refill"], root / "refilled"), saved=3).queries > 10
    stores["lists"] = stores["index"]
    stores["renew"] = copy_store(stores["index"], root / "renew")
    grown(stores["renew"])
    stores["broken"] = copy_store(stores["renew"], root / "broken")
    api.neighbours(stores["broken"], index="lists", saved=3)
    for pattern in ("embeddings/*/000001-*.npy", "index/lists/trained-*.faiss", "index/lists/shard-0000-*.faiss",
                    "index/lists/recall-*", "neighbours/*/000000-*"):  # fmt: skip
        flip_a_bit(next(stores["broken"].glob(pattern)))
    return stores


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


def lists_index(store: Path, shard_rows: int | None = None, **options: Any) -> object:
    wanted = IndexOptions(nlist=4, code="sq8", shard_rows=shard_rows)
    return api.index(store, name="lists", options=Options(wanted, **options))


def embed_in_pieces(store: Path, encoder: Path) -> None:
    """Every block of four rows is staged as a piece of its part."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed_stage, "_BLOCK_ROWS", (4, 4))
        patch.setattr(embed_stage, "PIECE_SECONDS", 0.0)
        api.embed(store, encoder=str(encoder), devices="cpu")


def in_tiles(store: Path) -> None:
    """Search as if hardly anything fitted into memory."""
    api.neighbours(store, name="tiled", index="lists", materialise=True, search=SearchOptions(memory=1000))


def drop_if_there(store: Path) -> None:
    with contextlib.suppress(UsageError):
        index_run.drop(store, name="lists")


def restore_if_purged(store: Path) -> None:
    (purge,) = api.info(store).purges
    with contextlib.suppress(UsageError):
        undo(store, purge, reason="test")


def erase_earlier(store: Path) -> None:
    api.erase(store, list(api.info(store).purges))


def cases(stages: dict[str, Path], encoder: Path) -> list[Case]:
    inputs = [str(stages["inputs"] / name) for name in ("one.jsonl", "two.jsonl")]
    targets = str(stages["inputs"] / "targets.txt")
    vectors = stages["inputs"] / "vectors.npy"

    def purge(store: Path) -> object:
        return api.purge(store, api.Selectors(document=Path(targets)), reason="test")

    def mirror(store: Path) -> object:
        return api.chunk(store, [str(stages["inputs"] / "updated.jsonl")], existing="mirror", part_size=8)

    def erase(store: Path) -> object:
        return api.purge(store, api.Selectors(document=Path(targets)), reason="test", erase=True)

    logical: tuple[str, ...] = ("content", "ids", "tombstones", "embeddings", "neighbours", "materialised")
    logical = (*logical, "documents", "chunks", "tokens")
    return [
        Case("chunk", lambda s: api.chunk(s, inputs, tokenizer=str(encoder), part_size=8), logical, []),
        Case("mirror", mirror, logical, [False]),
        Case("embed", lambda s: api.embed(s, encoder=str(encoder), devices="cpu"), logical, []),
        Case("index", api.index, (*logical, "indexes"), []),
        Case("lists", lambda s: lists_index(s, shard_rows=12), (*logical, "indexes"), []),
        Case("renew --merge", lambda s: lists_index(s, merge=True), (*logical, "indexes"), []),
        # Once it has switched, the same command trains once more.
        Case("renew --retrain", lambda s: lists_index(s, retrain=True), logical, []),
        Case("renew --drop", drop_if_there, (*logical, "indexes"), []),
        Case("broken --repair", lambda s: api.repair(s), (*logical, "indexes"), []),
        Case("neighbours", api.neighbours, logical, []),
        Case("neighbours --materialise", lambda s: api.neighbours(s, materialise=True), logical, []),
        Case("materialise", lambda s: api.neighbours(s, materialise=True), logical, []),
        Case("purge", purge, logical, [False]),
        Case("purge --erase", erase, (*logical, "indexes"), [True]),
        Case("earlier --erase", erase_earlier, (*logical, "indexes"), [True]),
        Case("undo", restore_if_purged, (*logical, "indexes"), [False]),
        Case("embed --in-pieces", lambda s: embed_in_pieces(s, encoder), logical, []),
        Case("refill", lambda s: api.neighbours(s, saved=3), logical, [False]),
        Case("renew --tiles", in_tiles, logical, []),
        Case("purge --rerank", lambda s: api.neighbours(s, rerank="overlap"), logical, []),
        Case("embed --from", lambda s: api.embed(s, encoder="their/model", vectors=vectors), logical, []),
    ]


CASES = ["chunk", "mirror", "embed", "index", "lists", "merge", "retrain", "drop", "repair", "neighbours", "both"]
CASES += ["materialise", "purge", "erase", "erase earlier", "undo", "pieces", "refill", "tiles", "rerank", "from"]


@pytest.mark.parametrize("number", range(len(CASES)), ids=CASES)
def test_a_killed_command_run_again_gives_what_an_uninterrupted_one_gives(
    number: int, stages: dict[str, Path], tiny_encoder: Path, tmp_path: Path
) -> None:
    case = cases(stages, tiny_encoder)[number]
    before = stages[case.name.split()[0]]
    expected, calls = uninterrupted(case, before, tmp_path / "whole")
    blocked = read_blocked(Store.open(tmp_path / "whole")).hashes.tolist()
    assert bool(blocked) == (case.purges != [] and case.name not in ("undo", "mirror"))
    assert calls > 10
    known = problems(before)
    draw = random.Random(SEED + number)
    fired = 0
    for attempt in range(KILLS):
        store = tmp_path / f"store-{attempt}"
        if before.exists():
            copy_store(before, store)
        killed, _ = in_child(lambda store=store: case.work(store), draw.randint(1, calls))  # type: ignore[misc]
        fired += killed
        check_between(store, before, known, expected)
        in_child(lambda store=store: case.work(store), None)  # type: ignore[misc]
        check_after(store, case, expected)
        assert read_blocked(Store.open(store)).hashes.tolist() == blocked
        shutil.rmtree(store)
    assert fired == KILLS, "every kill must have hit"


def test_a_plan_whose_finishing_was_killed_is_finished_when_it_is_run_again(tiny_encoder: Path, tmp_path: Path) -> None:
    rows = make_rows(20, words=20)
    write_jsonl(tmp_path / "rows.jsonl", [*rows, *rows[:6], *({**row, "id": f"again {row['id']}"} for row in rows[6:])])
    inputs = [str(tmp_path / "rows.jsonl")]

    def finish(store: Path) -> None:
        opened = Store.open(store)
        with writing(opened) as run, pytest.MonkeyPatch.context() as few:
            few.setattr(hash_partitions, "ROWS", 4)
            finish_plans(opened, run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunk_run, "finish_plans", lambda *_, **__: {})
        api.chunk(tmp_path / "before", inputs, tokenizer=str(tiny_encoder), part_size=8)
    case = Case("finish", finish, ("content", "ids", "tombstones", "documents", "chunks", "tokens"), [])
    expected, calls = uninterrupted(case, tmp_path / "before", tmp_path / "whole")
    assert expected.documents == 20
    assert calls > 5
    for fatal in range(1, calls + 1, max(1, calls // KILLS)):
        store = copy_store(tmp_path / "before", tmp_path / f"store-{fatal}")
        assert in_child(lambda store=store: finish(store), fatal)[0]  # type: ignore[misc]
        check_between(store, tmp_path / "before", set(), expected)
        in_child(lambda store=store: finish(store), None)  # type: ignore[misc]
        check_after(store, case, expected)


FEW = [
    pytest.param(i, id=name, marks=[] if name in ("chunk", "embed", "erase") else pytest.mark.nightly)
    for i, name in enumerate(CASES)
]


def waiting_for_nothing(work: Callable[[], object]) -> str:
    """Do some work; return after how many seconds it wrote anything but leases, and which claims it did not get."""
    refused: list[str] = []
    begun, written = time.monotonic(), list[float]()
    take = leases.take_claim

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == disk.EVENT and arguments[0] == "write" and "/leases/" not in arguments[1]:
            written.append(time.monotonic() - begun)

    def take_noted(storage: Storage, task: str, run: str) -> bool:
        taken = take(storage, task, run)
        refused.extend([] if taken else [task])
        return taken

    sys.addaudithook(note)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", lambda seconds: pytest.fail(f"it sleeps for {seconds} s"))
        patch.setattr(leases, "take_claim", take_noted)
        work()
    return json.dumps({"after": written[0] if written else None, "refused": refused})


@pytest.mark.parametrize("number", FEW)
def test_a_command_after_a_kill_does_not_wait_for_the_dead(
    number: int, stages: dict[str, Path], tiny_encoder: Path, tmp_path: Path
) -> None:
    """It finds the lease and the claims of the killed run, and goes on at once: it sleeps never, and gets all claims.

    How long that takes is printed (pytest -rP), and not asserted.
    """
    case = cases(stages, tiny_encoder)[number]
    before = stages[case.name.split()[0]]
    expected, calls = uninterrupted(case, before, tmp_path / "whole")
    draw, after, left = random.Random(SEED + 300 + number), [], 0
    for attempt in range(KILLS if "RETROTOOL_KILLS" in os.environ else 1):
        store = tmp_path / f"store-{attempt}"
        if before.exists():
            shutil.copytree(before, store)
        assert in_child(lambda store=store: case.work(store), draw.randint(calls // 4, calls))[0]  # type: ignore[misc]
        left += len(list((store / "leases").glob("*-*")))
        killed, reported = begin_child(lambda store=store: waiting_for_nothing(lambda: case.work(store))).end()  # type: ignore[misc]
        assert not killed
        found = json.loads(reported)
        assert found["refused"] == []
        assert list((store / "leases").iterdir()) == []
        after += [found["after"]] if found["after"] is not None else []
        check_after(store, case, expected)
        shutil.rmtree(store)
    assert left, "it left leases"
    if after:
        after.sort()
        print(
            f"{case.name}: goes on after {after[len(after) // 2]:.3f} s, at most {after[-1]:.3f} s ({len(after)} times)"
        )


def test_verify_finds_nothing_at_any_step_of_an_erase_that_is_killed_twice(
    stages: dict[str, Path], tiny_encoder: Path, tmp_path: Path
) -> None:
    """What was finished by the kill is committed without the rest: parts are erased then, and tables not yet."""
    case = cases(stages, tiny_encoder)[CASES.index("erase earlier")]
    expected, calls = uninterrupted(case, stages["earlier"], tmp_path / "whole")
    draw, looked_at = random.Random(SEED + 400), 0
    for attempt in range(KILLS):
        store = Path(shutil.copytree(stages["earlier"], tmp_path / f"store-{attempt}"))
        kills = draw.randint(calls // 5, 4 * calls // 5), draw.randint(calls // 5, 4 * calls // 5)
        for fatal in (*kills, None):
            said = begin_child(lambda store=store, fatal=fatal: looking(case, store, fatal)).end()[1]  # type: ignore[misc]
            assert problems(store) == set(), kills
            found = json.loads(said or "[]")
            assert {problem for problems in found for problem in problems} == set(), kills
            looked_at += len(found)
        check_after(store, case, expected)
        shutil.rmtree(store)
    assert looked_at > 0


def looking(case: Case, store: Path, fatal: int | None) -> str:
    """Do a command, and verify the store after each of its commits; return what was found each time."""
    found: list[list[str]] = []
    committed = False

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal committed
        if event == disk.EVENT:
            due, committed = committed, arguments[0] == "link" and arguments[1].startswith(f"{store}/log/")
            if due:  # verifying has steps, too, but makes no commit
                calls = Countdown.calls
                found.append(sorted(problems(store)))
                assert not found[-1]
                Countdown.calls = calls

    sys.addaudithook(look)
    Countdown.start(fatal)
    case.work(store)
    return json.dumps(found)


def uninterrupted(case: Case, before: Path, store: Path) -> tuple[Verification, int]:
    if before.exists():
        copy_store(before, store)
    killed, calls = in_child(lambda: case.work(store), None)
    assert not killed
    return verify(store), calls


def problems(store: Path) -> set[str]:
    """What verify finds, with paths in the store."""
    return found_in(store, verify(store)) if store.exists() else set()


def found_in(store: Path, verified: Verification) -> set[str]:
    return {problem.text.replace(f"{store}/", "") for problem in verified.problems}


@functools.cache
def content_of(store: Path) -> str:
    """The digest of a store that nothing changes."""
    return verify(store).content


def check_between(store: Path, before: Path, known: set[str], expected: Verification | None = None) -> None:
    """After the kill the store is as whole as it was: everything that was there before, and nothing half.

    Readers see all that the command adds or takes, as is ``expected``, or nothing of it.
    """
    if not (store / "store.json").exists():
        return
    found = verify(store)
    assert found_in(store, found) <= known
    if before.exists():
        assert Store.open(store).state.number >= Store.open(before).state.number
    if expected is not None:
        assert found.content == expected.content or (
            found.content == content_of(before) if before.exists() else found.documents == 0
        )


def check_after(store: Path, case: Case, expected: Verification) -> None:
    found = verify(store)
    assert found.ok, found.problems
    assert {name: getattr(found, name) for name in case.equal} == {name: getattr(expected, name) for name in case.equal}
    left = [path for path in store.rglob("*") if path.name.startswith(".tmp-")]
    left += [path for folder in ("staging", "leases") for path in (store / folder).glob("*")]
    assert not left
    live = {path for entry in Store.open(store).state.files() for path in with_sums(entry.path)}
    files = {path.relative_to(store).as_posix() for kind in DATA_KINDS for path in (store / kind).rglob("*.*")}
    assert files == live, "no file is left that no commit names"
    shown = info(store)
    assert shown.unfinished == 0
    assert [purge["erased"] for purge in shown.purges.values()] == case.purges
    assert all(("undone" in purge) == (case.name == "undo") for purge in shown.purges.values())
    for name, purge in shown.purges.items():
        if purge["erased"]:
            receipt = api.verify_purge(store, name, out=store.parent).receipt
            assert receipt.ok, receipt.problems
            assert (receipt.files.unknown, receipt.files.in_progress) == ((), 0)


def test_a_killed_edit_of_neighbours_is_made_or_not(store_copy: Path, tmp_path: Path) -> None:
    """Either all lines of the file or none; the next command makes the edit."""
    file, reader = tmp_path / "edits.jsonl", retrotool.open(store_copy)
    far = [one for one in range(90) if reader.chunk(one).document != reader.chunk(2).document][-2:]
    file.write_text(f'{{"chunk": "0:2", "neighbours": ["0:{far[0]}"]}}\n')
    api.edit_neighbours(store_copy, file)
    file.write_text(f'{{"chunk": "0:2", "neighbours": ["0:{far[1]}"]}}\n{{"ban": ["0:9"]}}\n')
    spare = copy_store(store_copy, tmp_path / "spare")
    _, calls = in_child(lambda: api.edit_neighbours(spare, file), None)
    seen = set()
    for fatal in {1, calls // 2, *range(calls - 4, calls + 1)}:
        store = copy_store(store_copy, tmp_path / f"killed-{fatal}")
        assert in_child(lambda store=store: api.edit_neighbours(store, file), fatal)[0]  # type: ignore[misc]
        found = [one for one, _ in retrotool.open(store).neighbour_ids(2)]
        bans = api.info(store).neighbours["main"]["edits"]["bans"]
        assert found == [far[bans]]
        seen.add(bans)
        assert api.edit_neighbours(store, file).bans == 1
        assert verify(store).ok
    assert seen == {0, 1}
