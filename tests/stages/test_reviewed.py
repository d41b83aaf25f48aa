"""Looking at a selection before it is purged, and purging just what was looked at."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import make_rows, write_jsonl

import retrotool
from retrotool import api
from retrotool.errors import UsageError
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones


def test_a_dry_run_tells_what_it_is_and_purges_nothing(store_copy: Path) -> None:
    before = api.verify(store_copy)
    selectors = api.Selectors(pattern="store", where="source = 'a'", every=True, allow_lossy=True)
    planned = api.purge(store_copy, selectors, reason="r", dry_run=True)
    reader = retrotool.open(store_copy)
    assert planned.review is not None and planned.chunks > 10
    chunks = read_selection(store_copy, planned.selection)
    assert len(chunks) == planned.chunks
    assert [(one.name, one.chunks) for one in planned.review.sources] == [("a", planned.chunks)]
    of = [reader.chunk(chunk).document for chunk in chunks]
    most = sorted(set(of), key=lambda name: (-of.count(name), name))[:10]
    assert [(one.name, one.chunks) for one in planned.review.documents] == [(name, of.count(name)) for name in most]
    assert len(planned.review.examples) == 10
    for example in planned.review.examples:
        assert example.chunk in chunks and example.source == "a"
        assert example.document == reader.chunk(example.chunk).document
        marked = example.text[example.begin : example.end]
        assert marked == "store", "here no match lies across a border"
    assert not list(store_copy.glob("scans/*/*")), "what was scanned for it is not needed any more"
    after = api.verify(store_copy)
    assert (after.content, after.ids, after.tombstones) == (before.content, before.ids, before.tombstones)
    assert after.ok


def read_selection(root: Path, name: str) -> list[int]:
    from retrotool.purge import reviewed

    asked = reviewed.read_selection(Store.open(root), name)
    assert asked.reviewed is not None
    return asked.reviewed.chunks.tolist()


def test_just_what_was_reviewed_is_purged(store_copy: Path, tmp_path: Path, tiny_encoder: Path) -> None:
    selectors = api.Selectors(where="source = 'a'")
    planned = api.purge(store_copy, selectors, reason="r", dry_run=True)
    reviewed = read_selection(store_copy, planned.selection)
    more = write_jsonl(tmp_path / "more.jsonl", make_rows(6, first=1000))
    api.chunk(store_copy, [str(more)], tokenizer=str(tiny_encoder))  # of source a are some of these, too
    api.purge(store_copy, api.Selectors(chunk=(reviewed[0],)), reason="another")
    done = api.purge(store_copy, api.Selectors(), apply=planned.selection, reason="reviewed")
    assert (done.chunks, done.already_purged) == (len(reviewed) - 1, 1)
    assert read_tombstones(Store.open(store_copy), done.purge).ids.tolist() == reviewed
    assert np.array_equal(np.sort(reviewed), reviewed)
    with pytest.raises(UsageError, match=f"no selection '{planned.selection}'; it has: none"):
        api.purge(store_copy, api.Selectors(), apply=planned.selection, reason="again")
    # It is the same purge as by the selectors: these go on with its erase.
    again = api.purge(store_copy, selectors, reason="r", erase=True)
    assert again.erased > done.chunks and api.verify(store_copy).ok


def test_an_erase_of_what_was_reviewed_leaves_an_earlier_purge_waiting(
    store_copy: Path, tmp_path: Path, tiny_encoder: Path
) -> None:
    selectors = api.Selectors(where="source = 'a'")
    waiting = api.purge(store_copy, selectors, reason="until it is settled")
    more = write_jsonl(tmp_path / "more.jsonl", make_rows(6, first=1000))
    api.chunk(store_copy, [str(more)], tokenizer=str(tiny_encoder))
    planned = api.purge(store_copy, selectors, reason="r", dry_run=True)
    done = api.purge(store_copy, api.Selectors(), apply=planned.selection, reason="r", erase=True)
    assert done.erased == planned.chunks > 0
    assert api.restore(store_copy, waiting.purge, reason="settled").chunks == waiting.chunks
    assert api.verify(store_copy).ok


def test_what_can_not_be_what_was_reviewed_is_refused(store_copy: Path, tmp_path: Path) -> None:
    selectors = api.Selectors(where="id in ('doc-3', 'doc-5')")
    planned = api.purge(store_copy, selectors, reason="r", dry_run=True)
    other = tmp_path / "other"
    rows = write_jsonl(tmp_path / "rows.jsonl", make_rows(8))
    api.chunk(other, [str(rows)], tokenizer="minilm")
    with pytest.raises(UsageError, match="no selection"):
        api.purge(other, api.Selectors(), apply=planned.selection, reason="r")
    kept = Path(shutil.copytree(store_copy, tmp_path / "kept"))
    api.purge(store_copy, api.Selectors(document=("doc-3",)), reason="r", erase=True)
    with pytest.raises(UsageError, match="no selection"):  # it said what was looked for: it went with the erase
        api.purge(store_copy, api.Selectors(), apply=planned.selection, reason="r")
    assert list((store_copy / "selections").glob("*")) == []
    assert api.purge(kept, api.Selectors(), apply=planned.selection, reason="r").documents == 2


def test_an_empty_selection_is_not_written_down(store_copy: Path) -> None:
    before = Store.open(store_copy).state.number
    planned = api.purge(store_copy, api.Selectors(where="source = 'nobody'"), reason="r", dry_run=True)
    assert (planned.selection, planned.chunks) == ("", 0)
    assert Store.open(store_copy).state.number == before


def test_a_dry_run_tells_what_an_erase_has_to_rewrite(built_store: Path, store_copy: Path) -> None:
    planned = api.purge(store_copy, api.Selectors(document=("doc-3",)), reason="r", dry_run=True)
    assert planned.review is not None
    touched = planned.review.touched
    done = api.purge(store_copy, api.Selectors(document=("doc-3",)), reason="r", erase=True)
    group = Store.open(built_store).state.group("neighbours", "main")
    tables = [entry for slot in group if (entry := group.get(slot)) is not None]
    assert touched.rows == sum(entry.rows for entry in tables)
    assert touched.tables == len(tables)
    # A part has documents, keys, chunks and embeddings.
    assert done.files_rewritten <= 4 * touched.parts + touched.shards + touched.tables + touched.materialised
    assert touched.bytes >= sum(entry.bytes for entry in tables)
    assert 0 < touched.seconds < 60
    nothing = api.purge(store_copy, api.Selectors(document=("doc-3",)), reason="r", dry_run=True)
    assert nothing.review is not None
    assert nothing.review.touched.seconds == 0
