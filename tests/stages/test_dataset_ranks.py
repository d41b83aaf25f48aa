"""Ranks, workers and resuming: every sequence once an epoch, in an order that neither workers nor a stop changes."""

from __future__ import annotations

import itertools
import os
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_rows
from dataset_help import Options, chunk, dataset_of, flat, make_large, purge, same, slots
from stored import copy_store
from torch.utils.data import DataLoader

from retrotool import RetroDataset, api
from retrotool.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on a machine of few cores


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """Four blocks in three parts, of 20 sequences of 1,024 tokens and more. Not to be changed."""
    return make_large(tmp_path_factory.mktemp("large") / "store", tiny_encoder, [9000, 400, 333])


@pytest.mark.parametrize(
    ("drop_last", "batch_size"),
    [
        (False, 2),
        (True, None),
        *(pytest.param(*case, marks=pytest.mark.nightly) for case in ((False, None), (True, 2))),
    ],
)
def test_two_epochs_of_four_ranks_and_two_workers_give_every_sequence_once_each(
    store: Path, batch_size: int | None, drop_last: bool
) -> None:
    """The first epoch without workers, the second with them."""
    everything = Counter(slots(dataset_of(store)))
    empty = (-1,) * 128
    orders = []
    for epoch in (0, 1):
        found: list[tuple[int, ...]] = []
        counts = set()
        for rank in range(4):
            dataset = dataset_of(store, rank=rank, world_size=4, batch_size=batch_size, drop_last=drop_last)
            dataset.set_epoch(epoch)
            batches = list(DataLoader(dataset, batch_size=None, num_workers=2 * epoch))
            items = batches if batch_size is None else flat(batches)
            assert len(batches) == len(dataset)
            found += slots(items)
            counts.add(len(items))
        assert len(counts) == 1, "ranks that read unequally many would wait for one another for ever"
        orders.append(found)
        read = Counter(ids for ids in found if ids != empty)
        if drop_last:
            assert read <= everything
            assert sum((everything - read).values()) < 4 * (batch_size or 1)
            assert empty not in found
        else:
            assert read == everything
            assert len(found) - sum(read.values()) == -len(everything) % 4
    assert orders[0] != orders[1]


def test_the_order_of_a_rank_depends_neither_on_workers_nor_on_the_size_of_batches(store: Path) -> None:
    rank: Options = {"rank": 1, "world_size": 3}
    plain = list(dataset_of(store, **rank))
    for workers, batch_size in [(0, 2), (1, 7), (2, 1), (2, 7), (3, 2)]:
        dataset = dataset_of(store, batch_size=batch_size, **rank)
        batches = list(DataLoader(dataset, batch_size=None, num_workers=workers))
        assert [len(batch["tokens"]) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
        assert same(flat(batches), plain)
    singles = flat(DataLoader(dataset_of(store, **rank), batch_size=4, num_workers=1))
    assert same(singles, plain)


@pytest.mark.parametrize("rank", [{}, {"rank": 1, "world_size": 2}])
@pytest.mark.parametrize("stop", [0, 1, 5, 13])
def test_without_workers_the_dataset_knows_where_it_is(store: Path, rank: Options, stop: int) -> None:
    whole = list(dataset_of(store, **rank))
    dataset = dataset_of(store, **rank)
    reading = iter(dataset)
    read = [next(reading) for _ in range(stop)]
    state = pickle.loads(pickle.dumps(dataset.state_dict()))
    assert same(read, whole[:stop])
    again = dataset_of(store, **rank)
    again.load_state_dict(state)
    again.set_epoch(0)
    assert again.state_dict() == state
    assert len(again) == len(whole)
    assert same(list(again), whole[stop:])
    again.set_epoch(1)
    assert len(list(again)) == len(whole), "the next epoch is whole"


@pytest.mark.parametrize(
    ("workers", "stop"),
    [
        (workers, stop)
        if (workers, stop) in ((1, 2), (2, 3), (2, 4), (3, 1))
        else pytest.param(workers, stop, marks=pytest.mark.nightly)
        for workers in (1, 2, 3)
        for stop in (1, 2, 3, 4)
    ],
)
def test_with_workers_the_last_batch_tells_where_a_rank_is(store: Path, stop: int, workers: int) -> None:
    options: Options = {"rank": 0, "world_size": 2, "batch_size": 3}
    whole = list(dataset_of(store, **options))
    dataset = dataset_of(store, **options)
    loader = DataLoader(dataset, batch_size=None, num_workers=workers)
    read = list(itertools.islice(loader, stop))
    with pytest.raises(UsageError, match="worker processes read this dataset"):
        dataset.state_dict()
    state = dataset.state_dict(read[-1])
    for others in (0, workers):
        again = dataset_of(store, **options)
        again.load_state_dict(state)
        rest = list(DataLoader(again, batch_size=None, num_workers=others))
        assert same(read + rest, whole)


def test_a_resumed_epoch_can_be_resumed(store: Path) -> None:
    options: Options = {"batch_size": 2}
    whole = list(dataset_of(store, **options))
    state, read = dataset_of(store, **options).state_dict(), []
    for _ in range(3):
        dataset = dataset_of(store, **options)
        dataset.load_state_dict(state)
        dataset.set_epoch(0)
        read += list(itertools.islice(DataLoader(dataset, batch_size=None, num_workers=2), 3))
        state = dataset.state_dict(read[-1])
    dataset = dataset_of(store, batch_size=5)
    dataset.load_state_dict(state)
    assert same(flat(read) + flat(dataset), flat(whole)), "with batches of another size, too"


def test_another_number_of_ranks_goes_on_with_what_none_has_read(store: Path) -> None:
    everything = Counter(slots(dataset_of(store)))
    read: Counter[tuple[int, ...]] = Counter()
    states = []
    for rank in range(3):
        dataset = dataset_of(store, rank=rank, world_size=3, batch_size=2)
        dataset.set_epoch(1)
        batches = list(itertools.islice(dataset, 3))
        read.update(slots(flat(batches)))
        states.append(dataset.state_dict(batches[-1]))
    assert states[0] == states[1] == states[2]
    state = states[0]
    for ranks, batches_read in ((2, 2), (5, 100)):
        lengths = set()
        for rank in range(ranks):
            dataset = dataset_of(store, rank=rank, world_size=ranks, batch_size=2)
            dataset.load_state_dict(state)
            lengths.add(len(dataset))
            batches = list(itertools.islice(dataset, batches_read))
            read.update(slots(flat(batches)))
            after = dataset.state_dict(batches[-1])
        assert len(lengths) == 1
        state = after
    del read[(-1,) * 128]
    assert read == everything


def test_workers_that_stay_take_in_the_next_epoch(store: Path) -> None:
    dataset = dataset_of(store, batch_size=2)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, persistent_workers=True)
    orders = []
    for epoch in (0, 1, 4):
        dataset.set_epoch(epoch)
        found = list(loader)
        orders.append(slots(flat(found)))
        other = dataset_of(store, batch_size=2)
        other.set_epoch(epoch)
        assert same(found, list(other), but=("cursor",))
        assert {int(batch["cursor"][0, 0]) for batch in found} == {epoch}
    assert len({tuple(order) for order in orders}) == 3
    dataset.load_state_dict(dataset.state_dict(found[1]))
    with pytest.raises(UsageError, match="after the worker processes started"):
        list(loader)


def test_a_dataset_can_be_sent_to_spawned_workers(store: Path) -> None:
    """It is pickled for a process of a fork server as for one that is spawned."""
    dataset = dataset_of(store, batch_size=4)
    dataset.set_epoch(1)
    plain = list(dataset)
    loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="forkserver")
    assert same(list(loader), plain, but=("cursor",))


def test_states_that_do_not_go_with_a_dataset_are_refused(store: Path, tmp_path: Path, tiny_encoder: Path) -> None:
    dataset = dataset_of(store, batch_size=2, seed=1)
    state = dataset.state_dict(next(iter(dataset)))

    def refused(match: str, changed: Options | None = None, **options: Any) -> None:
        with pytest.raises(UsageError, match=match):
            dataset_of(store, **options).load_state_dict({**state, **(changed or {})})

    refused("seed=1")
    refused("packed=True", seed=1, packed=False)
    refused("shuffle=True", shuffle=False)
    refused("not a state", {"version": 7}, seed=1)
    refused("another store", {"store": "x"}, seed=1)
    refused("a diverged copy", {"head": "0" * 16}, seed=1)
    refused("worker process", {"worker": [0, 2]}, seed=1)
    refused("does not have the sequences", {"sequences": 1}, seed=1)
    for wrong in ({"spans": [[-1, 2]]}, {"spans": [[0, 10**6]]}, {"spans": [[2, 1]]}, {"consumed": -1}, {"epoch": -1}):
        refused("impossible numbers", wrong, seed=1)
    for key in set(state) - {"version"}:
        with pytest.raises(UsageError, match=key):
            dataset_of(store, seed=1).load_state_dict({other: state[other] for other in state if other != key})
    with pytest.raises(UsageError, match="sequence_length=8192"):
        RetroDataset(store, sequence_length=1024, seed=1, shuffle_blocks=2).load_state_dict(state)
    assert same(list(dataset_with(store, state, seed=1)), list(dataset_with(store, state, seed=1, k=2)), but=())


def dataset_with(store: Path, state: Options, **options: Any) -> RetroDataset:
    dataset = dataset_of(store, batch_size=2, **options)
    dataset.load_state_dict(state)
    return dataset


def test_batches_that_do_not_tell_where_a_rank_is_are_refused(store: Path) -> None:
    dataset = dataset_of(store)
    batch = next(iter(DataLoader(dataset, batch_size=2, num_workers=2)))
    with pytest.raises(UsageError, match="2 worker processes took turns"):
        dataset.state_dict(batch)
    single = next(iter(DataLoader(dataset, batch_size=2, num_workers=1)))
    assert dataset.state_dict(single)["consumed"] == 2
    dataset.set_epoch(1)
    with pytest.raises(UsageError, match="the batch is from epoch 0"):
        dataset.state_dict(single)


def test_positions_are_those_of_the_commit_that_the_epoch_began_on(
    store: Path, tmp_path: Path, tiny_encoder: Path
) -> None:
    mine = copy_store(store, tmp_path / "store")
    dataset = dataset_of(mine, batch_size=2)
    whole = slots(flat(dataset))
    first = next(iter(dataset_of(mine, batch_size=2)))
    state = dataset.state_dict(first)
    targets = whole[20]
    (tmp_path / "ids").write_text("".join(f"{i}\n" for i in targets if i >= 0))
    api.purge(mine, api.Selectors(chunk=tmp_path / "ids"), reason="test", erase=True)
    new = dataset_of(mine, batch_size=2)
    assert new.sequences == dataset.sequences - 1
    new.load_state_dict(state)
    assert new.sequences == dataset.sequences
    masked = [tuple(-1 if i in targets else i for i in ids) for ids in whole]
    assert slots(flat(new)) == masked[2:]


def test_ranks_are_those_of_the_environment(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    dataset = dataset_of(store)
    assert (dataset.rank, dataset.world_size) == (1, 2)
    assert slots(dataset) == slots(dataset_of(store, rank=1, world_size=2))
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(UsageError, match="RANK='first' is not a number"):
        dataset_of(store)


def _rank_of(rank: int, folder: Path, store: Path, results: Any) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    dataset = RetroDataset(store, sequence_length=1024)
    begun = dataset.state_dict()["commit"]
    torch.distributed.barrier()
    if rank == 0:
        purge(store, "0-3")
    torch.distributed.barrier()
    dataset.set_epoch(1)
    results.put((dataset.rank, dataset.world_size, begun, dataset.state_dict()["commit"], len(dataset), slots(dataset)))
    torch.distributed.destroy_process_group()


def test_ranks_of_torch_distributed_agree_on_a_commit(tmp_path: Path, store: Path) -> None:
    mine = copy_store(store, tmp_path / "store")
    context = torch.multiprocessing.get_context("forkserver")  # as separate as spawned, without its imports
    results = context.Queue()
    os.environ.pop("RANK", None)
    processes = [context.Process(target=_rank_of, args=(rank, tmp_path, mine, results)) for rank in (0, 1)]
    for process in processes:
        process.start()
    found = sorted(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    assert [some[:2] for some in found] == [(0, 2), (1, 2)]
    assert found[0][2:5] == found[1][2:5]
    assert found[0][3] > found[0][2]
    both = Counter(itertools.chain(found[0][5], found[1][5]))
    del both[(-1,) * 16]
    other = RetroDataset(mine, sequence_length=1024)
    other.set_epoch(1)
    assert both == Counter(slots(other))


def test_a_rank_agrees_on_a_commit_that_is_older_than_the_newest(
    tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the other rank sees already is taken in with the next epoch."""
    mine = chunk(tmp_path / "store", tiny_encoder, make_rows(20))
    api.index(mine)
    api.neighbours(mine)
    old = RetroDataset(mine, sequence_length=128)
    purge(mine, "doc-3")
    commit = old.state_dict()["commit"]
    monkeypatch.setattr(RetroDataset, "_agreed", lambda *_: commit)
    dataset = RetroDataset(mine, sequence_length=128)
    assert len(dataset) == len(old)
    assert same(list(dataset), list(old), but=())
