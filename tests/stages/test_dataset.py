"""Training sequences hold what ``retrotool.open`` gives chunk by chunk, however they are packed and read."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_rows, write_jsonl
from dataset_help import check_items, chunk, flat, laid_out, make_large, purge, same, slots, two_stores
from key_values import LENGTH, Written, make_store
from stored import copy_store, stored_files
from torch.utils.data import DataLoader

import retrotool
from retrotool import RetroDataset, api
from retrotool.errors import CorruptError, UsageError
from retrotool.store import neighbour_tables
from retrotool.store.folding import writing
from retrotool.store.log import Draft
from retrotool.store.paths import FileName
from retrotool.store.store import Store


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> tuple[Path, Path]:
    """A database and a training store with materialised neighbours. Not to be changed."""
    return two_stores(tmp_path_factory.mktemp("two"), tiny_encoder)


@pytest.fixture
def copies(stores: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """The same, to be changed."""
    database, training = (copy_store(store, tmp_path / store.name) for store in stores)
    api.neighbours(database, queries=training)  # records in the training store where the database is now
    return database, training


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("k", [None, 5])
def test_sequences_hold_what_a_reader_gives_chunk_by_chunk(
    stores: tuple[Path, Path], packed: bool, k: int | None
) -> None:
    training = stores[1]
    dataset = RetroDataset(training, sequence_length=256, k=k, packed=packed, shuffle=False)
    items = list(dataset)
    assert [list(ids) for ids in slots(items)] == laid_out(training, 4, packed=packed)
    assert dataset.sequences == len(dataset) == len(items) > 20
    assert len(api.info(training).parts) > 1
    check_items(training, items, k or 2)
    for item in items:
        assert item["neighbours"].shape == (4, k or 2, 128)
        assert set(item["neighbour_databases"].flatten().tolist()) == {0}
    text = sum(int(item["loss_mask"].sum()) for item in items)
    assert dataset.padding == pytest.approx(1 - text / (256 * len(items)))
    assert dataset.databases == (str(stores[0]),)


@pytest.mark.parametrize("packed", [True, False])
def test_materialised_and_not_is_the_same_bit_for_bit(copies: tuple[Path, Path], packed: bool) -> None:
    database, training = copies
    options = {"sequence_length": 256, "packed": packed, "batch_size": 3}

    def read(k: int) -> list[dict[str, torch.Tensor]]:
        return list(RetroDataset(training, k=k, **options))

    assert RetroDataset(training, **options).materialised_parts() == (2, 2)
    assert RetroDataset(training, k=3, **options).materialised_parts() == (0, 2), "it has two neighbours a row"
    made = {k: read(k) for k in (1, 2)}
    plain = {k: read(k) for k in (3,)}
    for k in (1, 2):
        for batch, other in zip(made[k], plain[3], strict=True):
            for key, value in batch.items():
                assert torch.equal(value, other[key][:, :, :k] if key.startswith("neighbour") else other[key]), key
    target = retrotool.open(training)
    near = [n.chunk.document for i in target.chunk_ids(0)[:8].tolist() for n in target.neighbours(i)]
    purge(database, *near[:3])
    after = read(2)
    assert not same(flat(after), flat(made[2]))
    without_text(training)
    assert RetroDataset(training, **options).materialised_parts() == (0, 2)
    assert same(after, read(2), but=())


def without_text(store: Path) -> None:
    """Take the tokens of neighbours out of the tables of a store."""
    opened = Store.open(store)
    with writing(opened) as run:
        gone, add = [], []
        for table in opened.state.names("neighbours"):
            for entry in opened.state.group("neighbours", table).entries():
                name = FileName.parse(entry.path)
                about = {key: value for key, value in entry.about.items() if key != "text"}
                gone.append(entry.path)
                add.append(
                    neighbour_tables.write_table(
                        opened, FileName.new(run.id, name.kind, name.slot, name.extension, name.name),
                        neighbour_tables.read_table(opened, entry), database="", commit=0, uri="", about=about,
                    )
                )  # fmt: skip
        opened.commit(run, lambda _: Draft("test", add=tuple(add), remove=tuple(gone)))


@pytest.mark.parametrize("erase", [False, True])
def test_what_is_purged_in_the_database_is_no_neighbour_and_no_continuation(
    copies: tuple[Path, Path], tmp_path: Path, erase: bool
) -> None:
    database, training = copies
    reader = retrotool.open(training)
    options = {"sequence_length": 256, "shuffle": False}
    before = list(RetroDataset(training, **options))
    found = {n.id: n for i in reader.chunk_ids(0).tolist() for n in reader.neighbours(i)}
    first = next(iter(found.values()))
    follower = next(n.continuation.id for n in found.values() if n.continuation and n.id != first.id)
    (tmp_path / "ids").write_text(f"{first.id}\n{follower}\n")
    api.purge(database, api.Selectors(chunk=tmp_path / "ids"), reason="test", erase=erase)
    after = list(RetroDataset(training, **options))
    assert slots(before) == slots(after)
    assert not same(before, after)
    check_items(training, after)
    for item in after:
        assert not (item["neighbour_ids"] == first.id).any() and not (item["neighbour_ids"] == follower).any()
    short = [item for item in after if (item["neighbour_ids"] == follower - 1).any()]
    assert short
    for item in short:
        assert not item["neighbour_mask"][item["neighbour_ids"] == follower - 1][:, 64:].any()


def test_what_is_purged_before_an_epoch_is_left_out_and_what_is_purged_in_it_is_masked(
    copies: tuple[Path, Path],
) -> None:
    training = copies[1]
    purge(training, "doc-52", "doc-60")
    dataset = RetroDataset(training, sequence_length=256, shuffle=False)
    before = list(dataset)
    assert [list(ids) for ids in slots(before)] == laid_out(training, 4, packed=True)
    targets = retrotool.open(training).document("doc-71")
    state = dataset.state_dict(before[3])
    purge(training, "doc-71", erase=True)
    again = list(dataset_of(training, state))
    assert len(again) == len(before) - 4
    check_items(training, again)
    hit = 0
    for old, new in zip(before[4:], again, strict=True):
        gone = [i in targets for i in old["chunk_ids"].tolist()]
        hit += sum(gone)
        assert [-1 if g else i for g, i in zip(gone, old["chunk_ids"].tolist(), strict=True)] == new[
            "chunk_ids"
        ].tolist()
        for slot in np.flatnonzero(gone):
            assert not new["tokens"][64 * slot : 64 * slot + 64].any()
            assert not new["loss_mask"][64 * slot : 64 * slot + 64].any()
            assert not new["neighbour_mask"][slot].any() and (new["neighbour_ids"][slot] == -1).all()
    assert hit == len(targets)
    dataset.set_epoch(1)
    assert [list(ids) for ids in slots(dataset)] == laid_out(training, 4, packed=True), "the next epoch closes up"


def dataset_of(store: Path, state: dict[str, object], **options: object) -> RetroDataset:
    dataset = RetroDataset(store, sequence_length=256, shuffle=False, **options)
    dataset.load_state_dict(state)
    return dataset


@pytest.mark.parametrize("packed", [True, False])
def test_an_erase_in_the_middle_of_an_epoch_does_not_end_it(tmp_path: Path, tiny_encoder: Path, packed: bool) -> None:
    """The files that the epoch began with are gone by then."""
    store = make_large(tmp_path / "store", tiny_encoder, [9000, 9000])
    dataset = RetroDataset(store, packed=packed, shuffle=False)
    reading = iter(dataset)
    first = next(reading)
    last = int(retrotool.open(store).chunk_ids(1)[-1])
    (tmp_path / "ids").write_text(f"{last}\n{last - 100}\n")
    api.purge(store, api.Selectors(chunk=tmp_path / "ids"), reason="test", erase=True)
    found = [i for item in [first, *reading] for i in item["chunk_ids"].tolist() if i >= 0]
    assert set(found) >= set(retrotool.open(store).chunk_ids(1).tolist())
    assert found == sorted(set(found))


def test_an_erase_after_an_epoch_began_moves_no_slot_of_documents_that_are_not_packed(
    tmp_path: Path, tiny_encoder: Path
) -> None:
    store = make_large(tmp_path / "store", tiny_encoder, [3000])
    options = {"packed": False, "seed": 4}
    dataset = RetroDataset(store, **options)
    before = list(dataset)
    state = dataset.state_dict(before[9])
    purge(store, "0-3", "0-50", erase=True)
    again = RetroDataset(store, **options)
    again.load_state_dict(state)
    targets = {i for item in before for i in item["chunk_ids"].tolist()} - set(
        retrotool.open(store).chunk_ids(0).tolist()
    )
    assert targets >= {-1} and len(targets) > 2
    after = list(again)
    for old, new in zip(before[10:], after, strict=True):
        assert [-1 if i in targets else i for i in old["chunk_ids"].tolist()] == new["chunk_ids"].tolist()


def test_blocks_follow_one_another_over_borders_of_row_groups_and_parts(tmp_path: Path, tiny_encoder: Path) -> None:
    rows = [20_000, 100, 8192]
    store = make_large(tmp_path / "store", tiny_encoder, rows)
    purge(store, "0-7", "0-300")
    reader = retrotool.open(store)
    live = [i for part in reader.parts() for i in reader.chunk_ids(part).tolist()]
    for packed in (True, False):
        items = list(RetroDataset(store, packed=packed, shuffle=False))
        assert [i for item in items for i in item["chunk_ids"].tolist() if i >= 0] == live
        blocks = [{i >> 32 << 32 | (i & 0xFFFFFFFF) // 8192 for i in ids if i >= 0} for ids in slots(items)]
        assert all(len(block) == 1 for block in blocks)
        if not packed:
            assert all(len(set(item["documents"].tolist()) - {-1}) == 1 for item in items)
            begun = [item["documents"][0].item() for item in items]
            long = [a == b for a, b in itertools.pairwise(begun)]
            assert any(long), "documents of more than 32 chunks go on in the next sequence"
        check_items(store, items[:: len(items) // 7])
    shuffled = RetroDataset(store)
    assert sorted(i for ids in slots(shuffled) for i in ids if i >= 0) == live


def test_values_of_records_are_continuations_and_have_no_neighbours(tmp_path: Path, tiny_encoder: Path) -> None:
    rows = [
        Written(f"q{i}", f"store chunk {i}", f"token vector index query {'neighbour ' * (5 * i)}") for i in range(9)
    ]
    plain = [Written(f"d{i}", f"river mountain {'bridge tower ' * (7 * i)}") for i in range(6)]
    store = make_store(tmp_path / "store", tiny_encoder, rows, plain)
    api.embed(store, encoder=str(tiny_encoder))
    api.index(store)
    api.neighbours(store)
    purge(store, "q4")
    for materialise in (False, True):
        api.neighbours(store, materialise=materialise)
        dataset = RetroDataset(store, sequence_length=2 * LENGTH, packed=False, shuffle=False)
        assert dataset.materialised_parts() == ((2, 2) if materialise else (0, 2))
        items = list(dataset)
        assert [list(ids) for ids in slots(items)] == laid_out(store, 2, packed=False)
        reader = retrotool.open(store)
        values = 0
        check_items(store, items)
        for item in items:
            for slot, i in enumerate(item["chunk_ids"].tolist()):
                if i >= 0 and not reader.chunk(i).key:
                    values += 1
                    assert (item["neighbour_ids"][slot] == -1).all()
        assert values > 5
        assert any(item["neighbour_mask"][:, :, LENGTH:].any() for item in items)


def test_a_mixture_of_tables_is_read_and_materialised_like_a_table(copies: tuple[Path, Path]) -> None:
    database, training = copies
    api.index(training)
    api.neighbours(training, name="own")
    opened = Store.open(training)
    mix = [{"table": "main", "weight": 1.0}, {"table": "own", "weight": 2.0}]
    with writing(opened) as run:
        opened.commit(run, lambda _: Draft("test", records={"neighbours:both": {"mix": mix}}))
    plain = list(RetroDataset(training, "both", 256, batch_size=4))
    assert {number for batch in plain for number in batch["neighbour_databases"].flatten().tolist()} == {0, 1}
    assert RetroDataset(training, "both", 256, batch_size=4).materialised_parts() == (0, 2), "one table has no tokens"
    api.neighbours(training, name="own", materialise=True)
    dataset = RetroDataset(training, "both", 256, batch_size=4)
    assert dataset.materialised_parts() == (2, 2)
    assert same(plain, list(dataset), but=())
    mix = [{"table": "main", "weight": 1.0}, {"table": "own", "weight": 0.1}]
    with writing(opened) as run:
        opened.commit(run, lambda _: Draft("test", records={"neighbours:both": {"mix": mix}}))
    other = list(RetroDataset(training, "both", 256, batch_size=4))
    assert not same(plain, other)
    purge(database, "doc-3", "doc-9")
    purge(training, "doc-55", erase=True)
    after = list(RetroDataset(training, "both", 256, batch_size=4))
    without_text(training)
    assert same(after, list(RetroDataset(training, "both", 256, batch_size=4)), but=())


def test_a_loader_gives_batches_made_by_the_dataset_or_by_itself(stores: tuple[Path, Path]) -> None:
    one = list(DataLoader(RetroDataset(stores[1], sequence_length=256), batch_size=4))
    other = list(DataLoader(RetroDataset(stores[1], sequence_length=256, batch_size=4), batch_size=None))
    assert same(one, other, but=())
    assert one[0]["neighbours"].shape == (4, 4, 2, 128)
    left = RetroDataset(stores[1], sequence_length=256, batch_size=4, drop_last=True)
    assert same(one[: len(left)], list(left), but=())
    assert len(left) == left.sequences // 4


def test_seeds_and_epochs_are_orders_of_the_same(stores: tuple[Path, Path]) -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, ...]]:
        dataset = RetroDataset(stores[1], sequence_length=256, seed=seed)
        dataset.set_epoch(epoch)
        return slots(dataset)

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert order(1, 1) == orders[3]
    assert len({tuple(some) for some in orders}) == 4
    assert len({tuple(sorted(some)) for some in orders}) == 1


def test_an_epoch_that_is_read_twice_is_the_same_and_says_so(stores: tuple[Path, Path]) -> None:
    dataset = RetroDataset(stores[1], sequence_length=256)
    first = slots(dataset)
    with pytest.warns(UserWarning, match="set_epoch"):
        assert slots(dataset) == first
    dataset.set_epoch(1)
    assert slots(dataset) != first


def test_parts_without_a_table_are_an_error_that_names_the_command(
    copies: tuple[Path, Path], tiny_encoder: Path
) -> None:
    database, training = copies
    dataset = RetroDataset(training, sequence_length=256)
    chunk(training, tiny_encoder, make_rows(5, first=200))
    with pytest.raises(UsageError, match=r"part 2 \(of 3\) of .* has no neighbours 'main'") as error:
        RetroDataset(training, sequence_length=256)
    assert error.value.advice == f"Compute them: retrotool neighbours {database} --queries {training} --index main"
    assert len(list(dataset)) == dataset.sequences, "an epoch that had begun before goes on"
    with pytest.raises(UsageError, match=r"part 2 \(of 3\)"):
        dataset.set_epoch(1)
    api.neighbours(database, queries=training)
    assert len(RetroDataset(training, sequence_length=256)) > len(dataset)


def test_arguments_that_can_not_be(stores: tuple[Path, Path], tmp_path: Path, byte_level_tokenizer: Path) -> None:
    training = stores[1]
    for options, reported in (
        ({"sequence_length": 100}, "not a multiple of the chunk length, 64"),
        ({"sequence_length": 64 * 8193}, "more than a block has, 524,288"),
        ({"k": 21}, "between 1 and the 20"),
        ({"k": 0}, "between 1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"shuffle_blocks": 0}, "shuffle_blocks=0"),
        ({"rank": 0}, "only one"),
        ({"rank": 2, "world_size": 2}, "rank 2"),
        ({"name": "other"}, "has no neighbours 'other'"),
    ):
        with pytest.raises(UsageError, match=reported):
            RetroDataset(training, **options)
    with pytest.raises(UsageError, match="less than 0"):
        RetroDataset(training).set_epoch(-1)


def test_of_a_store_that_is_purged_altogether_nothing_is_read(copies: tuple[Path, Path]) -> None:
    training = copies[1]
    api.purge(training, api.Selectors(where="n_chunks >= 0"), reason="test")
    for packed in (True, False):
        dataset = RetroDataset(training, sequence_length=256, packed=packed, rank=1, world_size=2)
        assert (len(dataset), list(dataset), dataset.padding) == (0, [], 0.0)


def test_a_database_of_other_tokens_is_refused(tmp_path: Path, tiny_encoder: Path, byte_level_tokenizer: Path) -> None:
    database = tmp_path / "database"
    source = write_jsonl(tmp_path / "c.jsonl", make_rows(10))
    api.chunk(database, [str(source)], tokenizer=str(byte_level_tokenizer))
    api.embed(database, encoder=str(tiny_encoder))
    api.index(database)
    training = chunk(tmp_path / "training", tiny_encoder, make_rows(10, first=100))
    api.neighbours(database, queries=training)
    with pytest.raises(UsageError, match="one model can't read both"):
        RetroDataset(training)
    with pytest.raises(UsageError, match="one model can't read both"):
        api.neighbours(database, queries=training, materialise=True)


def test_a_broken_file_is_an_error_that_names_it(copies: tuple[Path, Path]) -> None:
    training = copies[1]
    path = stored_files(training, "neighbours/main/*")[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptError, match=path.name):
        list(RetroDataset(training, sequence_length=256))


def test_retrotool_is_imported_without_torch() -> None:
    code = (
        "import sys, retrotool; assert 'torch' not in sys.modules; assert 'RetroDataset' in retrotool.__all__;"
        "retrotool.RetroDataset; assert 'torch' in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
