"""A purge that is undone leaves what there was, as long as nothing of it is erased."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from conftest import make_rows, write_jsonl
from restore_help import back, near, once_before, purge, verified
from stored import stored_file, stored_files

import retrotool
from retrotool import api
from retrotool.errors import ConflictError, CorruptError, UsageError
from retrotool.purge import undo as undoing
from retrotool.purge.erase import EraseStage
from retrotool.purge.run import commit_purge
from retrotool.purge.undo import undo
from retrotool.store import folding, log, parts, staging
from retrotool.store.blocked import read_blocked
from retrotool.store.folding import writing
from retrotool.store.log import Draft
from retrotool.store.paths import FileName
from retrotool.store.storage import Storage
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones, undone_chunks, write_tombstones


def test_a_purge_that_is_taken_back_leaves_what_there_was(store_copy: Path) -> None:
    before, found = verified(store_copy), near(store_copy)
    totals = Store.open(store_copy).state.records["totals"]
    encoder = retrotool.open(store_copy).load_encoder()
    text = retrotool.open(store_copy).chunk(retrotool.open(store_copy).document("doc-7")[0]).text
    hits = [n.id for n in retrotool.open(store_copy).search(text, 20, encoder=encoder)]
    purged = purge(store_copy, "doc-7", "doc-30")
    assert verified(store_copy) != before and near(store_copy) != found
    result = back(store_copy, purged.purge)
    assert (result.chunks, result.documents, result.tokens) == (purged.chunks, purged.documents, purged.tokens)
    assert (result.still_purged, result.named_by, result.repeats) == (0, (), 0)
    assert not [command for command in result.next if "--queries" not in command], "its own neighbours have them"
    assert verified(store_copy) == before
    assert near(store_copy) == found
    assert [n.id for n in retrotool.open(store_copy).search(text, 20, encoder=encoder)] == hits
    state = Store.open(store_copy).state
    assert state.records["totals"] == totals
    record = state.records[f"purge:{purged.purge}"]
    assert record["undone"] == state.number == result.commit
    assert record["undone_reason"] == "it was another one" and record["undone_by"]
    assert not len(read_blocked(Store.open(store_copy)))
    assert [state.file(kind, purged.purge) for kind in ("tombstones", "blocked", "selectors")] == [None] * 3
    assert api.neighbours(store_copy).queries == 0 and verified(store_copy) == before
    assert api.info(store_copy).purges[purged.purge]["undone"] == result.commit


def test_appending_the_same_crawl_gives_what_it_gave_before(tmp_path: Path, tiny_encoder: Path) -> None:
    rows = make_rows(12, words=60)
    one = write_jsonl(tmp_path / "one.jsonl", rows)
    two = write_jsonl(tmp_path / "two.jsonl", [*rows, *make_rows(2, first=50, words=60)])
    plain, store = tmp_path / "plain", tmp_path / "store"
    for path in (plain, store):
        api.chunk(path, [str(one)], tokenizer=str(tiny_encoder), part_size=8)
    purged = purge(store, "doc-3", "doc-8").purge
    back(store, purged)
    for path in (plain, store):
        api.chunk(path, [str(two)], tokenizer=str(tiny_encoder), part_size=8)
    names = ("content", "ids", "tombstones", "documents", "chunks", "tokens")
    assert {n: verified(store)[n] for n in names} == {n: verified(plain)[n] for n in names}
    assert api.info(store).documents == 14


def test_what_another_purge_names_stays_purged(store_copy: Path) -> None:
    chunks = retrotool.open(store_copy).document("doc-7")
    assert len(chunks) > 2
    one = api.purge(store_copy, api.Selectors(chunk=tuple(chunks[:2])), reason="test").purge
    two = api.purge(store_copy, api.Selectors(chunk=tuple(chunks[1:])), reason="test").purge
    result = back(store_copy, one)
    assert (result.chunks, result.documents, result.still_purged, result.named_by) == (1, 1, 1, (two,))
    reader = retrotool.open(store_copy)
    assert reader.is_live(chunks).tolist() == [True, *[False] * (len(chunks) - 1)]
    assert verified(store_copy)
    result = back(store_copy, two)
    assert (result.chunks, result.documents) == (len(chunks) - 1, 0)
    assert retrotool.open(store_copy).is_live(chunks).all()
    assert verified(store_copy)


def test_what_a_chunk_set_aside_stays_so(tmp_path: Path, tiny_encoder: Path) -> None:
    rows = make_rows(8, words=60)
    write_jsonl(tmp_path / "rows.jsonl", [*rows, {**rows[3], "id": "again"}])
    store = tmp_path / "store"
    api.chunk(store, [str(tmp_path / "rows.jsonl")], tokenizer=str(tiny_encoder))
    before = verified(store)
    ids = np.flatnonzero(read_tombstones(Store.open(store)).ids >= 0)
    assert len(ids)
    purged = purge(store, "doc-3", "again").purge
    result = back(store, purged)
    assert result.still_purged > 0 and result.named_by == () and result.chunks > 0
    assert verified(store) == before


def test_it_is_refused_where_there_is_nothing_to_take_back(store_copy: Path) -> None:
    with pytest.raises(UsageError, match="no purge 'p0'; nothing was purged from it"):
        back(store_copy, "p0")
    one, two = purge(store_copy, "doc-7").purge, purge(store_copy, "doc-8", erase=True).purge
    with pytest.raises(UsageError, match="no purge 'p0'; it has: ") as error:
        back(store_copy, "p0")
    assert one in str(error.value) and two in str(error.value)
    with pytest.raises(UsageError, match="is erased"):
        back(store_copy, two)
    with pytest.raises(UsageError, match="--reason is empty"):
        undo(store_copy, one, reason=" ")
    done = back(store_copy, one)
    with pytest.raises(UsageError, match=f"was undone by commit {done.commit}"):
        back(store_copy, one)
    assert Store.open(store_copy).state.number == done.commit, "nothing was committed"


def test_an_erase_that_was_begun_can_only_be_finished(store_copy: Path) -> None:
    purged = purge(store_copy, "doc-7", "doc-100").purge  # of two parts
    store = Store.open(store_copy)
    stage = EraseStage(read_tombstones(store), (purged,))
    with writing(store) as run:
        task = stage.plan(store)[0]
        staging.stage(store.storage, stage.open(store)(task, run.id, lambda _: None))
        folding.fold(store, run)
    with pytest.raises(UsageError, match="was begun") as error:
        back(store_copy, purged)
    assert "retrotool erase" in error.value.advice
    purge(store_copy, "doc-7", "doc-100", erase=True)
    assert api.info(store_copy).purges[purged]["erased"]
    assert verified(store_copy)


def test_an_erase_that_a_restore_overtakes_changes_nothing(store_copy: Path) -> None:
    before = verified(store_copy)
    purged = purge(store_copy, "doc-7").purge
    store = Store.open(store_copy)
    stage = EraseStage(read_tombstones(store), (purged,))
    with writing(store) as run:
        (task,) = stage.plan(store)
        staging.stage(store.storage, stage.open(store)(task, run.id, lambda _: None))
        undoing.commit_undo(store, run, purged, "test", "me")
        assert "undone" in store.state.records[f"purge:{purged}"]
        assert len(folding.fold(store, run).refused) == 1
        with pytest.raises(ConflictError, match="undone"):
            stage.plan(store)
    assert verified(store_copy) == before


def test_an_erase_goes_on_with_a_purge_of_its_own_if_it_was_taken_back(
    store_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed: list[str] = []

    def overtaken(*arguments: Any) -> str:
        committed.append(commit_purge(*arguments))
        if len(committed) == 1:
            back(store_copy, committed[0])
        return committed[-1]

    monkeypatch.setattr("retrotool.purge.run.commit_purge", overtaken)
    result = purge(store_copy, "doc-7", erase=True)
    assert len(committed) == 2 and result.purge == committed[1]
    assert result.erased == result.chunks > 0
    shown = api.info(store_copy).purges
    assert [shown[one]["erased"] for one in committed] == [False, True]
    assert verified(store_copy)


def test_a_restore_that_an_erase_overtakes_is_refused(store_copy: Path) -> None:
    purged = purge(store_copy, "doc-7").purge
    with (
        once_before("finish", store_copy / "undone", lambda: purge(store_copy, "doc-7", erase=True)),
        pytest.raises(UsageError, match="is erased"),
    ):
        back(store_copy, purged)
    assert verified(store_copy)
    assert not stored_files(store_copy, "undone/*")


def test_a_restore_that_a_purge_overtakes_weighs_again(store_copy: Path) -> None:
    chunks = retrotool.open(store_copy).document("doc-7")
    purged = purge(store_copy, "doc-7").purge
    another = api.Selectors(chunk=(chunks[0], 0))
    with once_before("finish", store_copy / "undone", lambda: api.purge(store_copy, another, reason="test")):
        assert back(store_copy, purged).still_purged == 1
    assert retrotool.open(store_copy).is_live(chunks).tolist() == [False, *[True] * (len(chunks) - 1)]
    assert verified(store_copy)


@pytest.fixture
def with_repeat(tmp_path: Path, tiny_encoder: Path) -> Path:
    """A store in which ``again`` repeats the text of ``doc-3``."""
    rows = make_rows(8, words=60)
    write_jsonl(tmp_path / "rows.jsonl", [*rows, {**rows[3], "id": "again"}])
    api.chunk(tmp_path / "repeat", [str(tmp_path / "rows.jsonl")], tokenizer=str(tiny_encoder))
    return tmp_path / "repeat"


def documents_with_text(store: Path) -> int:
    """Documents of the parts that still have an id: an erase takes those of erased documents."""
    opened = Store.open(store)
    return sum(len(parts.read_documents(opened, p, ["id"])["id"].drop_null()) for p in opened.state.parts())


@pytest.mark.parametrize("others", [False, True], ids=["without_neighbours", "named by another purge, too"])
def test_an_erase_of_a_purge_that_is_undone_before_its_copies_are_named_is_refused(
    with_repeat: Path, others: bool
) -> None:
    purged, present = purge(with_repeat, "doc-3").purge, documents_with_text(with_repeat)
    if others:
        purge(with_repeat, "doc-3", "doc-4")
    with (
        once_before("finish", with_repeat / "tombstones", lambda: back(with_repeat, purged)),
        pytest.raises(UsageError, match="was undone"),
    ):
        api.erase(with_repeat, [purged])
    assert verified(with_repeat)
    assert documents_with_text(with_repeat) == present, "nothing was erased"
    again = purge(with_repeat, "doc-3", erase=True)
    assert again.erased > 0 and again.copies == 1 and documents_with_text(with_repeat) == present - 2
    assert verified(with_repeat)


def test_an_erase_of_a_purge_that_is_undone_leaves_what_another_purge_names(store_copy: Path) -> None:
    purged = purge(store_copy, "doc-7").purge
    other = purge(store_copy, "doc-7", "doc-8").purge
    present = documents_with_text(store_copy)
    with (
        once_before("finish", store_copy / "documents", lambda: back(store_copy, purged)),
        pytest.raises(UsageError, match="was undone"),
    ):
        api.erase(store_copy, [purged])
    assert documents_with_text(store_copy) == present
    assert back(store_copy, other).still_purged == 0, "nothing of it was erased"
    assert verified(store_copy)


def test_an_erase_of_several_purges_one_of_which_is_undone_erases_none(store_copy: Path) -> None:
    one, two = purge(store_copy, "doc-7").purge, purge(store_copy, "doc-8").purge
    present = documents_with_text(store_copy)
    with (
        once_before("finish", store_copy / "documents", lambda: back(store_copy, one)),
        pytest.raises(UsageError, match=f"{one}.*was undone"),
    ):
        api.erase(store_copy, [one, two])
    assert documents_with_text(store_copy) == present and verified(store_copy)
    assert api.erase(store_copy, [two]).erased > 0


def test_an_erase_by_age_leaves_a_purge_that_is_undone_concurrently(store_copy: Path) -> None:
    one, two = purge(store_copy, "doc-7").purge, purge(store_copy, "doc-8")
    with once_before("finish", store_copy / "documents", lambda: back(store_copy, one)):
        result = api.erase(store_copy, older_than=0)
    assert result.purges == (two.purge,) and result.erased == two.chunks
    assert verified(store_copy)


def test_the_same_purge_with_an_erase_is_made_again_if_it_is_undone_concurrently(store_copy: Path) -> None:
    """All its chunks are named by another purge, so they stay tombstones."""
    purged = purge(store_copy, "doc-7").purge
    purge(store_copy, "doc-7", "doc-8")
    with once_before("finish", store_copy / "documents", lambda: back(store_copy, purged)):
        result = purge(store_copy, "doc-7", erase=True)
    assert result.purge not in ("", purged) and result.erased > 0
    shown = api.info(store_copy).purges
    assert shown[result.purge]["erased"] and not shown[purged]["erased"]
    assert verified(store_copy)


def test_what_was_taken_back_can_be_purged_and_erased(store_copy: Path) -> None:
    first = purge(store_copy, "doc-7")
    back(store_copy, first.purge)
    second = purge(store_copy, "doc-7")
    assert second.purge not in ("", first.purge) and second.chunks == first.chunks
    assert len(read_blocked(Store.open(store_copy)))
    back(store_copy, second.purge)
    third = purge(store_copy, "doc-7", erase=True)
    assert third.erased == first.chunks
    shown = api.info(store_copy).purges
    assert [shown[one.purge]["erased"] for one in (first, second, third)] == [False, False, True]
    assert verified(store_copy)


def test_open_readers_keep_their_view(store_copy: Path) -> None:
    chunks = retrotool.open(store_copy).document("doc-7")
    purged = purge(store_copy, "doc-7").purge
    reader, view = retrotool.open(store_copy), Store.open(store_copy)
    back(store_copy, purged)
    assert not reader.is_live(chunks).any()
    assert read_tombstones(view).contains(np.array(chunks)).all(), "also when it is read only now"
    reader.refresh()
    assert reader.is_live(chunks).all()
    assert undone_chunks(Store.open(store_copy), purged).tolist() == chunks


def test_what_is_left_of_a_purge_that_was_taken_back_is_damage(store_copy: Path) -> None:
    purged = purge(store_copy, "doc-7").purge
    store = Store.open(store_copy)
    undone = {"undone": 99, "undone_by": "me", "undone_reason": "", "parts": [[0, 0]], "repeats": 0}
    record = {**store.state.records[f"purge:{purged}"], **undone}
    with writing(store) as run:
        store.commit(run, lambda _: Draft("undo", records={f"purge:{purged}": {**record, "erased": True}}))
        name = FileName.new(run.id, "undone", "p0", "parquet")
        kept = write_tombstones(store, name, np.array([1 << 40]))
        store.commit(run, lambda _: Draft("undo", add=(kept,)))
    problems = [problem.text for problem in api.verify(store_copy).problems]
    left = [f"purge {purged} was undone, but still has a file in {k}/" for k in ("tombstones", "blocked", "selectors")]
    assert {*left, f"purge {purged} was undone, but is recorded as erased"} <= set(problems)
    assert "undone/p0: it does not belong to an undone purge" in problems


def test_what_is_committed_keeps_its_files_where_the_log_is_damaged_after_it(store_copy: Path) -> None:
    purged = purge(store_copy, "doc-7").purge
    append, damaged = log.append, list[Path]()

    def append_before_damage(storage: Storage, run: str, number: int, parent: str, draft: Draft) -> bool:
        won = append(storage, run, number, parent, draft)
        damaged.append(stored_file(store_copy, log.commit_path(number + 1)))
        damaged[-1].write_bytes(b"no commit")
        return won

    with patch.object(log, "append", append_before_damage), pytest.raises(CorruptError):
        back(store_copy, purged)
    damaged[0].unlink()
    assert "undone" in Store.open(store_copy).state.records[f"purge:{purged}"]
    assert verified(store_copy)
