"""``info``: documents by length and by source are those that live."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from conftest import make_rows, write_jsonl

from retrotool import api
from retrotool.info.run import shape_of
from retrotool.store import parts
from retrotool.store.store import Store


@pytest.fixture
def store(tmp_path: Path, byte_level_tokenizer: Path) -> Store:
    rows = make_rows(60)
    api.chunk(
        tmp_path / "store",
        [str(write_jsonl(tmp_path / "a.jsonl", rows))],
        tokenizer=str(byte_level_tokenizer),
        part_size=20,
    )
    return Store.open(tmp_path / "store")


def expected(store: Store, without: frozenset[str] = frozenset()) -> tuple[dict[int, int], dict[str, tuple[int, int]]]:
    lengths: Counter[int] = Counter()
    sources: dict[str, tuple[int, int]] = {}
    for part in store.state.parts():
        for row in parts.read_documents(store, part).to_pylist():
            if row["id"] is not None and row["id"] not in without:
                lengths[1 << (row["n_tokens"].bit_length() - 1)] += 1
                documents, tokens = sources.get(row["source"], (0, 0))
                sources[row["source"]] = (documents + 1, tokens + row["n_tokens"])
    return dict(lengths), sources


def found(store: Store) -> tuple[dict[int, int], dict[str, tuple[int, int]]]:
    shape = api.info(store.place, documents=True).shape
    assert shape.share == 1
    lengths = {row["tokens"]: row["documents"] for row in shape.lengths}
    return lengths, {row["source"]: (row["documents"], row["tokens"]) for row in shape.sources}


def test_documents_are_counted_by_length_and_source(store):
    assert found(store) == expected(store)


@pytest.mark.parametrize("erase", [False, True])
def test_purged_documents_are_not_counted(store, tmp_path, erase):
    gone = frozenset({"doc-3", "doc-4", "doc-50"})
    (tmp_path / "ids").write_text("\n".join(gone))
    api.purge(store.place, api.Selectors(document=tmp_path / "ids"), reason="test", erase=erase)
    assert found(store) == expected(Store.open(store.place), gone)


def test_of_a_large_store_parts_spread_over_it_are_read_and_scaled(store):
    shape = shape_of(store, read_documents=20)
    assert 0 < shape.share < 0.6
    total = sum(row["documents"] for row in shape.lengths)
    assert abs(total - 60) <= len(shape.lengths)
