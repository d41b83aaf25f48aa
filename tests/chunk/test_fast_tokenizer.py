"""``chunk`` with the fast tokenizer: the same as without it, and everything done again once it is found wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from chunk_helpers import run_chunk, verified, write_rows
from conftest import make_rows

from retrotool import api
from retrotool.chunk import chunk_plan
from retrotool.store.folding import fold
from retrotool.store.store import Store
from retrotool.tokenizers import FastTokenizer, TokensDiffer

ROWS = make_rows(400, words=60)


@pytest.fixture(autouse=True)
def no_plan_is_small(monkeypatch):
    monkeypatch.setattr(chunk_plan, "SMALL_PLAN", 0)
    monkeypatch.setattr(chunk_plan, "_LEAST_UNIT_BYTES", 1 << 14)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def exact(tmp_path, source, byte_level_tokenizer, monkeypatch):
    """Verification of a store that only ``tokenizers`` made."""
    with monkeypatch.context() as patch:
        patch.setattr(chunk_plan, "SMALL_PLAN", 1 << 40)
        result = run_chunk(tmp_path / "exact", source, "--tokenizer", byte_level_tokenizer, "--json")
    assert json.loads(result.stdout)["compared"] == 0
    return verified(tmp_path / "exact")


def test_the_result_is_that_of_tokenizers(tmp_path, source, exact, byte_level_tokenizer):
    result = run_chunk(tmp_path / "fast", source, "--tokenizer", byte_level_tokenizer, "--json")
    counts = json.loads(result.stdout)
    assert counts["compared"] > 0
    assert counts["exact"] < counts["documents"]
    found = verified(tmp_path / "fast")
    assert (found.content, found.ids) == (exact.content, exact.ids)


class Wrong:
    """Makes the fast tokenizer's first token of every text wrong, and counts texts until the judge is to see one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seen_after: int) -> None:
        self.texts = 0
        encode, compare = FastTokenizer._encode, FastTokenizer._compare

        def wrong(tokenizer, texts):
            self.texts += len(texts)
            ids, lengths, sure = encode(tokenizer, texts)
            ids = ids.copy()
            ids[np.cumsum(lengths) - lengths] ^= 1
            return ids, lengths, sure

        def late(tokenizer, *arguments):
            if self.texts > seen_after:
                compare(tokenizer, *arguments)

        monkeypatch.setattr(FastTokenizer, "_encode", wrong)
        monkeypatch.setattr(FastTokenizer, "_compare", late)


@pytest.mark.parametrize("seen_after", [0, 200])
def test_a_wrong_token_has_everything_done_again_by_tokenizers(
    tmp_path, source, exact, byte_level_tokenizer, monkeypatch, seen_after
):
    wrong = Wrong(monkeypatch, seen_after)
    store = tmp_path / "store"
    result = run_chunk(store, source, "--tokenizer", byte_level_tokenizer, "--check", 1, "--part-size", 1000)
    assert wrong.texts > seen_after, "the fault has not fired"
    assert result.exit_code == 0, result.output
    assert "Going on with tokenizers" in result.stderr
    found = verified(store)
    assert found.content == exact.content
    assert "tokenizers" in Store.open(store).state.records


def test_parts_that_were_committed_are_taken_back_and_their_ids_not_given_again(
    tmp_path, source, exact, byte_level_tokenizer, monkeypatch
):
    from retrotool import engine

    store = tmp_path / "store"
    Wrong(monkeypatch, 200)
    monkeypatch.setattr(engine, "FOLD_SECONDS", 0.0)  # commits after every unit
    result = run_chunk(store, source, "--tokenizer", byte_level_tokenizer, "--check", 1)
    assert result.exit_code == 0, result.output
    opened = Store.open(store)
    (plan,) = opened.state.with_prefix("plan:").values()
    assert plan["withdrawn"] > 0
    assert min(opened.state.parts()) == plan["withdrawn"]
    assert verified(store).content == exact.content
    found = api.info(store)
    assert (found.documents, found.set_aside) == (len(ROWS), 0)


def test_later_inputs_of_such_a_store_are_left_to_tokenizers(tmp_path, source, byte_level_tokenizer, monkeypatch):
    store = tmp_path / "store"
    with monkeypatch.context() as patch:
        Wrong(patch, 0)
        run_chunk(store, source, "--tokenizer", byte_level_tokenizer)
    more = write_rows(tmp_path / "more.jsonl", make_rows(50, first=900))
    assert json.loads(run_chunk(store, more, "--json").stdout)["compared"] == 0


def test_what_another_process_staged_with_the_fast_tokenizer_is_refused(
    tmp_path, source, exact, byte_level_tokenizer, monkeypatch
):
    from retrotool.chunk.stage import ChunkStage
    from retrotool.store.runs import Run

    store = tmp_path / "store"
    plan = ChunkStage.plan
    stale = []

    def plan_and_remember(stage, opened):
        tasks = plan(stage, opened)
        stale.extend(tasks)
        return tasks

    with monkeypatch.context() as patch:
        patch.setattr(ChunkStage, "plan", plan_and_remember)
        Wrong(patch, 0)
        run_chunk(store, source, "--tokenizer", byte_level_tokenizer)
    opened = Store.open(store)
    before = verified(store)
    with Run(opened.root) as run, pytest.raises(Exception, match="finished or changed"):
        ChunkStage().open(opened)(stale[0], run.id, int)
        fold(opened, run)
    assert verified(store).content == before.content == exact.content


def test_the_error_crosses_process_borders():
    import pickle

    error = TokensDiffer("0.1", 7, "'near'")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.position) == (str(error), 7)
