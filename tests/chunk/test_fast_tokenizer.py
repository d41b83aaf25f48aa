"""``chunk`` with the fast tokenizer: the same as without it, and a stop once it is found wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from chunk_helpers import documents, run_chunk, verified, write_rows
from conftest import make_rows

from retrotool import api
from retrotool.chunk import chunk_plan
from retrotool.chunk.chunk_plan import ChunkOptions, commit_plan, use_exact_tokenizer
from retrotool.chunk.stage import ChunkStage
from retrotool.errors import AbortError, ErasedError, UsageError
from retrotool.sources import Fields, find_inputs
from retrotool.store.folding import fold
from retrotool.store.leases import Run
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


class Late:
    """Makes the fast tokenizer right for the first ``n`` texts, and wrong after them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
        seen = 0
        encode = FastTokenizer._encode

        def late(tokenizer, texts):
            nonlocal seen
            seen += len(texts)
            ids, lengths, sure = encode(tokenizer, texts)
            return (ids if seen <= n else ids ^ 1), lengths, sure

        monkeypatch.setattr(FastTokenizer, "_encode", late)


@pytest.mark.parametrize("seen_after", [0, 200])
def test_a_wrong_token_stops_the_run_and_is_never_committed(
    tmp_path, source, exact, byte_level_tokenizer, monkeypatch, seen_after
):
    store = tmp_path / "store"
    command = [store, source, "--tokenizer", byte_level_tokenizer, "--part-size", 1000]
    with monkeypatch.context() as patch:
        wrong = Wrong(patch, seen_after)
        with pytest.raises(AbortError, match="tokenizers differ at token 0") as error:
            api.chunk(store, [str(source)], tokenizer=str(byte_level_tokenizer), check=1, part_size=1000)
        assert wrong.texts > seen_after, "the fault has not fired"
        assert error.value.exit_code == 1
        assert "Run the same command again: it resumes with tokenizers alone" in error.value.advice
        assert verified(store).documents == 0, "units that were staged before are void, too"
        # The advice works, also with --exact-tokenizer.
        result = run_chunk(*command, *(["--exact-tokenizer"] if seen_after else []))
    assert result.exit_code == 0, result.output
    found = verified(store)
    assert (found.content, found.documents) == (exact.content, len(ROWS))
    assert (api.info(store).rejected, api.info(store).unfinished) == (0, 0)


def test_a_check_is_a_share(tmp_path, source):
    with pytest.raises(UsageError, match="check=2 is not a share between 0 and 1"):
        api.chunk(tmp_path / "store", [str(source)], check=2)


def test_units_that_were_committed_before_a_difference_stay(tmp_path, source, exact, byte_level_tokenizer, monkeypatch):
    from retrotool.engine import run as engine_run

    store = tmp_path / "store"
    with monkeypatch.context() as patch:
        Late(patch, 200)
        patch.setattr(engine_run, "FOLD_SECONDS", 0.0)  # commits after every unit
        with pytest.raises(AbortError):
            api.chunk(store, [str(source)], tokenizer=str(byte_level_tokenizer), check=1)
    assert verified(store).documents == 0, "they wait for the rest"
    assert 0 < len(documents(store)) < len(ROWS)
    result = run_chunk(store, source, "--exact-tokenizer", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["documents"] == len(ROWS)
    found = verified(store)
    assert (found.content, found.ids) == (exact.content, exact.ids)


def test_a_store_can_be_reported_to_use_tokenizers_alone(tmp_path, source, exact, byte_level_tokenizer):
    store = tmp_path / "store"
    result = run_chunk(store, source, "--tokenizer", byte_level_tokenizer, "--exact-tokenizer", "--json")
    assert json.loads(result.stdout)["compared"] == 0
    assert verified(store).content == exact.content
    more = write_rows(tmp_path / "more.jsonl", make_rows(50, first=900))
    assert json.loads(run_chunk(store, more, "--json").stdout)["compared"] == 0


def test_later_inputs_of_such_a_store_are_left_to_tokenizers(tmp_path, source, byte_level_tokenizer, monkeypatch):
    store = tmp_path / "store"
    with monkeypatch.context() as patch:
        Wrong(patch, 0)
        run_chunk(store, source, "--tokenizer", byte_level_tokenizer)
    more = write_rows(tmp_path / "more.jsonl", make_rows(50, first=900))
    assert json.loads(run_chunk(store, more, "--json").stdout)["compared"] == 0


def test_what_another_process_staged_with_the_fast_tokenizer_is_refused(tmp_path, source, exact, byte_level_tokenizer):
    store = tmp_path / "store"
    write_rows(tmp_path / "first.jsonl", ROWS[:1])
    run_chunk(store, tmp_path / "first.jsonl", "--tokenizer", byte_level_tokenizer)
    opened = Store.open(store)
    with Run(opened.storage) as run:
        commit_plan(opened, run, find_inputs([str(source)]), ChunkOptions(Fields(), 1 << 20))
        tasks = ChunkStage().plan(opened)
        worker = ChunkStage().open(opened)
        use_exact_tokenizer(Store.open(store), run, "for a test")
        with pytest.raises(ErasedError):
            worker(tasks[0], run.id, int)
        assert fold(opened, run).committed == frozenset()
    assert run_chunk(store, source).exit_code == 0
    assert verified(store).documents == len(ROWS)


def test_the_error_crosses_process_borders():
    import pickle

    error = TokensDiffer("0.1", 7, "'near'")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.summary) == (str(error), error.summary)
