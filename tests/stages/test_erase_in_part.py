"""What an erase of a part of a document leaves of it: no hash by which a guess at the whole of it can be tested."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from conftest import make_rows, make_text, write_jsonl
from test_purge import everything

import retrotool
from retrotool import api
from retrotool.errors import UsageError

TEXT = make_text(77, 200)
HASH = hashlib.blake2b(TEXT.encode(), digest_size=16).digest()


def purged(store: Path, chunk: int) -> str:
    return api.purge(store, api.Selectors(chunk=(str(chunk),)), reason="test", erase=True).purge


def test_a_document_named_by_its_text_gets_another_name(tmp_path: Path, tiny_encoder: Path) -> None:
    store = tmp_path / "store"
    source = str(write_jsonl(tmp_path / "c.jsonl", [*make_rows(5), {"text": TEXT}, {"text": make_text(78, 200)}]))
    api.chunk(store, [source], tokenizer=str(tiny_encoder))
    first, second, *rest = retrotool.open(store).document(HASH.hex())
    assert rest
    other = retrotool.open(store).chunk(rest[-1] + 1).document
    purge = purged(store, first)
    name = retrotool.open(store).chunk(second).document
    assert name != HASH.hex()
    assert len(name) == len(HASH.hex())
    assert retrotool.open(store).document(name) == [second, *rest]
    assert retrotool.open(store).chunk(rest[-1] + 1).document == other, "of which all is there"
    left = everything(store)
    for trace in (HASH, HASH.hex().encode(), hashlib.blake2b(HASH.hex().encode(), digest_size=16).digest()):
        assert trace not in left
    with pytest.raises(UsageError, match="no document"):
        retrotool.open(store).document(HASH.hex())
    assert api.chunk(store, [source, str(write_jsonl(tmp_path / "d.jsonl", [{"text": TEXT}]))]).blocked == 1
    purged(store, second)
    assert retrotool.open(store).document(name) == rest, "its name stays"
    assert api.verify(store).problems == []
    found = api.verify_purge(store, purge, out=tmp_path).receipt
    assert found.ok, found.problems
