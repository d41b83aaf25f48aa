"""Documents of one id that were all kept: none is a neighbour of another, within a store and across stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_rows, make_text, write_jsonl
from oracle import brute_force, read_plain, saved_neighbours

import retrotool
from retrotool import api
from retrotool.ann.choice import IndexOptions
from retrotool.embed import search_scope
from retrotool.errors import RetrotoolError, UsageError
from retrotool.index.run import Options
from retrotool.store.parts import format_id

TEXT = make_text(999, 150)


def build(root: Path, model: Path, *inputs: list[dict[str, Any]], index: bool = True) -> Path:
    sources = [write_jsonl(root.parent / f"{root.name}-{i}.jsonl", rows) for i, rows in enumerate(inputs)]
    api.chunk(root, list(map(str, sources)), tokenizer=str(model), part_size=60, duplicates="keep")
    api.embed(root, encoder=str(model))
    if index:
        api.index(root, target_recall=1, options=Options(IndexOptions(nlist=4, code="float16", shard_rows=100)))
    return root


def copies(*words: str) -> list[dict[str, Any]]:
    """Several versions of one document."""
    return [{"id": "same", "text": f"{TEXT} {word}"} for word in words]


@pytest.fixture
def kept(tmp_path: Path, tiny_encoder: Path) -> Path:
    """The same id twice in one part, in other parts, and in another input; another id three times."""
    other = [{"id": "doc-3", "text": make_text(7, 90) + end} for end in (" one", " two")]
    first = [*copies("one", "two"), *make_rows(40), *copies("three"), *other]
    return build(tmp_path / "kept", tiny_encoder, first, [*copies("four"), *make_rows(10, first=60)])


def assert_true(queries: Path, theirs: Path, name: str) -> None:
    ids, distances = saved_neighbours(queries, name)
    assert np.array_equal(ids == -1, np.isinf(distances))
    _, true_distances = brute_force(read_plain(queries), read_plain(theirs), ids.shape[1])
    assert np.array_equal(np.isinf(distances), np.isinf(true_distances))
    assert np.allclose(np.nan_to_num(distances, posinf=0), np.nan_to_num(true_distances, posinf=0), atol=1e-4)


def test_within_a_store_and_its_recall(kept: Path) -> None:
    api.neighbours(kept)
    assert_true(kept, kept, "main")
    assert api.index(kept, target_recall=1).recall_at_10 == 1.0
    reader = retrotool.open(kept)
    chunks = [
        int(i) for part in reader.parts() for i in reader.chunk_ids(part) if reader.chunk(int(i)).document == "same"
    ]
    assert len(chunks) > 8
    assert all(n.chunk.document != "same" for chunk in chunks for n in reader.neighbours(chunk, k=20))


def test_across_stores(kept: Path, tmp_path: Path, tiny_encoder: Path) -> None:
    rows = [*copies("five", "six"), *make_rows(4, first=2), {"id": "new", "text": TEXT}]
    queries = build(tmp_path / "queries", tiny_encoder, rows, index=False)
    api.neighbours(kept, queries=queries, name="kept")
    assert_true(queries, kept, "kept")


def test_of_a_document_the_first_copy_that_is_living_is_read(kept: Path, tmp_path: Path) -> None:
    reader = retrotool.open(kept)
    texts = []
    for _ in range(4):
        chunks = reader.document("same")
        texts.append("".join(reader.chunk(i).text for i in chunks)[-5:])
        (tmp_path / "ids").write_text("".join(f"{i}\n" for i in chunks))
        api.purge(kept, api.Selectors(chunk=tmp_path / "ids"), reason="test")
        reader.refresh()
    assert [text.split()[-1] for text in texts] == ["one", "two", "three", "four"]
    with pytest.raises(UsageError, match="no document"):
        reader.document("same")


def test_without_repeats_no_keys_are_read(store_copy: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RetrotoolError("reads all keys")

    monkeypatch.setattr(search_scope, "find_documents", refuse)
    assert api.neighbours(store_copy, name="new").queries > 0
    with pytest.raises(RetrotoolError, match="reads all keys"):
        api.neighbours(kept)


def test_no_copy_can_be_made_a_neighbour_by_hand(kept: Path, tmp_path: Path) -> None:
    api.neighbours(kept)
    reader = retrotool.open(kept)
    every = [int(i) for part in reader.parts() for i in reader.chunk_ids(part)]
    same = [i for i in every if reader.chunk(i).document == "same"]
    file = tmp_path / "edits.jsonl"
    for other in same[1:]:
        file.write_text(f'{{"chunk": "0:{same[0]}", "neighbours": ["{format_id(other)}"]}}\n')
        with pytest.raises(UsageError, match="is in the same document as"):
            api.edit_neighbours(kept, file)
