"""A purged document does not come back as a text that differs only in what the tokenizer drops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from chunk_helpers import run_chunk, run_cli, verified, write_rows
from conftest import make_rows, make_text
from test_copies_of_purged import names
from test_purged_concurrently import stage_units

import retrotool
from retrotool import api
from retrotool.store import parts
from retrotool.store.blocked import keyed_tokens, read_blocked, stored_tokens
from retrotool.store.store import Store

TEXT = "Jane Doe lives in a house by the lake, and has seen nobody who lives there with her, nor for how long she will."
LOUD = TEXT.upper().replace(" ", "  ")
JANE, COPY = {"id": "jane", "text": TEXT}, {"id": "copy", "text": LOUD}
OTHERS = make_rows(6, words=30)
PAIR = {"id": "pair", "question": "Where does Jane live?", "answer": f"By the lake. {TEXT} {TEXT}"}
FIELDS = ("--key-field", "question", "--value-field", "answer")
DROPS = ("--tokenizer", "minilm")
"""Drops case and spacing."""


def purge(store: Path, *arguments: object) -> None:
    result = run_cli("purge", store, *arguments, "--reason", "request 17", "--yes")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("erase", [[], ["--erase"]], ids=["purged", "erased"])
def test_the_same_tokens_are_left_out_and_others_are_as_they_would_be_without(erase, tmp_path):
    store, alone = tmp_path / "store", tmp_path / "without_neighbours"
    run_chunk(store, write_rows(tmp_path / "first.jsonl", [JANE]), *DROPS)
    purge(store, "--document", "jane", *erase)
    rows = [OTHERS[0], COPY, OTHERS[1], {"id": "empty", "text": " "}, *OTHERS[2:], {"id": "jane", "text": "Other."}]
    result = run_chunk(store, write_rows(tmp_path / "rows.jsonl", rows))
    assert result.exit_code == 3, "a row has no token"
    assert "2 documents skipped: purged before" in result.stdout
    run_chunk(alone, write_rows(tmp_path / "alone.jsonl", OTHERS), *DROPS)
    assert names(store) == names(alone) == [row["id"] for row in OTHERS]
    found, due = retrotool.open(store), retrotool.open(alone)
    for name in names(store):
        texts = [[reader.chunk(i).text for i in reader.document(name)] for reader in (found, due)]
        assert texts[0] == texts[1]
    # Each has its own text's hash: the same text under another name repeats it, whatever was left out before it.
    again = write_rows(tmp_path / "again.jsonl", [{**row, "id": f"{row['id']} again"} for row in OTHERS])
    run_chunk(store, again)
    assert names(store) == names(alone)
    assert verified(store).documents == len(OTHERS)


def test_a_document_that_was_purged_in_part_does_not_come_back_whole(tmp_path):
    store = tmp_path / "store"
    long = [{**row, "text": " ".join([row["text"]] * 6)} for row in (JANE, COPY)]
    run_chunk(store, write_rows(tmp_path / "first.jsonl", long[:1]), *DROPS)
    chunks = retrotool.open(store).document("jane")
    assert len(chunks) > 1
    purge(store, "--chunk", chunks[1], "--erase")
    purge(store, "--chunk", chunks[0])
    assert "1 document skipped" in run_chunk(store, write_rows(tmp_path / "again.jsonl", long[1:])).stdout
    assert names(store) == ["jane"] * (len(chunks) > 2)
    assert verified(store)


def test_it_is_let_in_on_request_and_after_the_purge_is_undone(tmp_path):
    store, again = tmp_path / "store", write_rows(tmp_path / "again.jsonl", [COPY])
    run_chunk(store, write_rows(tmp_path / "first.jsonl", [JANE]), *DROPS)
    purge(store, "--document", "jane")
    assert "1 document skipped" in run_chunk(store, again).stdout
    assert names(store) == []
    assert run_chunk(store, again, "--allow-purged").exit_code == 0
    assert names(store) == ["copy"]
    (purged,) = api.info(store).purges
    assert run_cli("undo", store, purged, "--reason", "kept after all").exit_code == 0
    assert not len(read_blocked(Store.open(store)))
    assert verified(store).documents == 2


def test_a_pair_is_kept_back_by_the_tokens_of_key_and_value(tmp_path):
    store = tmp_path / "store"
    run_chunk(store, write_rows(tmp_path / "first.jsonl", [PAIR]), *DROPS, *FIELDS)
    purge(store, "--document", "pair")
    loud = {"id": "loud", "question": PAIR["question"].upper(), "answer": PAIR["answer"].upper()}
    long = {"id": "long", "question": make_text(1, 200), "answer": "Cut."}
    others = [{**loud, "id": "other", "answer": "In town."}, {**loud, "id": "another", "question": "Who?"}, long]
    result = run_chunk(store, write_rows(tmp_path / "again.jsonl", [others[0], loud, *others[1:]]), *FIELDS)
    assert "1 document skipped" in result.stdout and "1 key cut" in result.stdout
    assert names(store) == ["other", "another", "long"]
    # The same tokens in a row as a text: another document, as it is one chunk after another.
    text = {"id": "text", "text": f"{PAIR['question']} {PAIR['answer']}"}
    run_chunk(store, write_rows(tmp_path / "text.jsonl", [text]))
    assert "text" in names(store)
    # A key that differs only in what is cut off gives the same record.
    purge(store, "--document", "long", "--erase")
    longer = {**long, "id": "longer", "question": f"{long['question']} and more"}
    result = run_chunk(store, write_rows(tmp_path / "longer.jsonl", [longer]), *FIELDS)
    assert "1 document skipped" in result.stdout and "cut" not in result.stdout
    assert verified(store).documents == 3


def test_tokens_that_are_different_are_let_in(tmp_path, byte_level_tokenizer):
    store = tmp_path / "store"
    run_chunk(store, write_rows(tmp_path / "first.jsonl", [JANE]), "--tokenizer", byte_level_tokenizer)
    purge(store, "--document", "jane")
    run_chunk(store, write_rows(tmp_path / "again.jsonl", [COPY, {"id": "half", "text": TEXT[:60]}]))
    assert names(store) == ["copy", "half"]


def test_a_unit_that_was_staged_before_the_purge_is_read_again_without_it(tmp_path, monkeypatch):
    store = tmp_path / "store"
    run_chunk(store, write_rows(tmp_path / "first.jsonl", [JANE]), *DROPS)
    paths = [write_rows(tmp_path / "a.jsonl", OTHERS[:3]), write_rows(tmp_path / "b.jsonl", [*OTHERS[3:], COPY])]
    stage_units(store, paths, [1], monkeypatch)
    purge(store, "--document", "jane", "--erase")
    result = run_chunk(store, *paths)
    assert "1 document skipped: purged before" in result.stdout
    assert names(store) == [row["id"] for row in OTHERS]
    assert verified(store)


@pytest.mark.parametrize("erase", [[], ["--erase"]], ids=["purged", "erased"])
def test_a_purge_takes_it_from_a_plan_that_is_not_finished(erase, tmp_path):
    store, path = tmp_path / "store", write_rows(tmp_path / "rows.jsonl", [JANE, *OTHERS, OTHERS[0], COPY])
    assert run_chunk(store, path, "--duplicates", "fail", "--part-size", 3, *DROPS).exit_code == 1
    purge(store, "--document", "jane", *erase)
    assert "copy" not in names(store)
    assert run_chunk(store, path, "--duplicates", "skip").exit_code == 0
    assert names(store) == [row["id"] for row in OTHERS]
    ((first, record),) = api.info(store).purges.items()
    assert (record["documents"], record["erased"]) == (2, bool(erase))
    erased = run_cli("erase", store, first, "--yes")
    assert erased.exit_code == 0, erased.output
    assert all(record["erased"] for record in api.info(store).purges.values())
    assert verified(store).documents == len(OTHERS)


def test_stored_tokens_are_those_of_whole_documents_over_row_groups(tmp_path, byte_level_tokenizer):
    """As the format says: of any of the documents, whichever row groups their chunks are in."""
    store = tmp_path / "store"
    rows = make_rows(60, words=1500)
    run_chunk(
        store, write_rows(tmp_path / "rows.jsonl", rows), "--tokenizer", byte_level_tokenizer, "--chunk-length", 4
    )
    opened = Store.open(store)
    chunks, documents = parts.read_chunks(opened, 0), parts.read_documents(opened, 0)
    assert len(chunks.n_tokens) > 2 * parts.ROW_GROUP
    secret, tokens = opened.identity.secret, [chunks.tokens[chunks.doc == doc].ravel() for doc in range(60)]
    sizes = [int(chunks.n_tokens[chunks.doc == doc].sum()) for doc in range(60)]
    due = np.concatenate(
        [keyed_tokens(secret, t, np.array([[0]]), np.array([[size]])) for t, size in zip(tokens, sizes, strict=True)]
    )
    assert len(np.unique(due)) == 60
    entry = parts.part_entry(opened, "chunks", 0)
    for some in (np.arange(60), np.array([0, 59]), np.array([31]), np.arange(3, 60, 17), np.zeros(0, np.int64)):
        assert stored_tokens(opened, entry, documents.take(some)).tolist() == due[some].tolist()
