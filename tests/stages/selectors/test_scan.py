"""Selectors by content over a whole store, and how selectors go together."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_jsonl
from stored import contents_of, stored_files

import retrotool
from retrotool import api, engine
from retrotool.chunk.chunk_plan import ChunkOptions
from retrotool.engine.run import plan_tasks
from retrotool.errors import ConflictError, UsageError
from retrotool.purge.select import select
from retrotool.purge.selectors import scan
from retrotool.purge.selectors.patterns import Patterns
from retrotool.sources.records import Fields
from retrotool.store import leases
from retrotool.store.folding import writing
from retrotool.store.leases import Run
from retrotool.store.store import Store

SECRET = "SECRET-0123456789-abcdefghij"


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """Documents of which every third has the secret at some place, and one has it from end to end."""
    rng = np.random.default_rng(0)
    words = ["store", "chunk", "naïve", "日本語", "harbour", "42", "tide,"]
    made = {}
    for i in range(60):
        text = " ".join(rng.choice(words, 200))
        place = int(rng.integers(0, len(text)))
        made[f"doc-{i}"] = text[:place] + SECRET + text[place:] if i % 3 == 0 else text
    return made | {"all": SECRET * 80}


@pytest.fixture
def store(tmp_path: Path, texts: dict[str, str], byte_level_tokenizer: Path) -> Path:
    rows = [{"id": name, "text": text, "source": name[-1]} for name, text in texts.items()]
    api.chunk(
        tmp_path / "store", [str(write_jsonl(tmp_path / "rows.jsonl", rows))], tokenizer=str(byte_level_tokenizer),
        part_size=150,
    )  # fmt: skip
    return tmp_path / "store"


def touched(root: Path, texts: dict[str, str], pattern: str) -> set[int]:
    """The chunks that matches touch, by Python and the lengths of chunks alone."""
    reader = retrotool.open(root)
    found = set()
    for name, text in texts.items():
        data, start = text.encode(), 0
        spans = [(m.start(), m.end()) for m in re.finditer(pattern.encode(), data)]
        for chunk in reader.document(name):
            tokens = reader.chunk(chunk).tokens
            size = len(reader.tokenizer.decode(tokens[None], np.array([len(tokens)]))[0].as_py())
            if any(b < start + size and e > start for b, e in spans):
                found.add(chunk)
            start += size
        assert start == len(data)
    return found


def selected(root: Path, **selectors: object) -> set[int]:
    store = Store.open(root)
    asked = api.Selectors(**selectors).read(store)
    if asked.scan is not None:
        with writing(store) as run:
            engine.execute(asked.scan, store, run)
    return set(select(store, asked).chunks.tolist())


@pytest.mark.parametrize("pattern", [SECRET, "SECRET[^ ]*?abc", "naïve 日本語", "chunk (store )+chunk", "nowhere"])
def test_a_match_takes_all_chunks_that_it_touches(store: Path, texts: dict[str, str], pattern: str) -> None:
    assert selected(store, pattern=pattern) == touched(store, texts, pattern)


def test_selectors_are_joined_or_all_must_mean_a_chunk(store: Path, tmp_path: Path, texts: dict[str, str]) -> None:
    (tmp_path / "ids").write_text("doc-3\ndoc-4\n")
    (tmp_path / "patterns").write_text(f"{SECRET}\n\ntide, 42\n")
    reader = retrotool.open(store)
    named = set(reader.document("doc-3")) | set(reader.document("doc-4"))
    secret, tide = touched(store, texts, SECRET), touched(store, texts, "tide, 42")
    sevens = {chunk for name in texts if name.endswith("7") for chunk in reader.document(name)}
    assert selected(store, document=tmp_path / "ids", pattern=SECRET) == named | secret
    assert selected(store, document=tmp_path / "ids", pattern=SECRET, every=True) == named & secret
    assert selected(store, pattern=tmp_path / "patterns") == secret | tide
    assert selected(store, pattern=tmp_path / "patterns", where="source = '7'", every=True) == (secret | tide) & sevens
    whole = {chunk for name in texts if set(reader.document(name)) & secret for chunk in reader.document(name)}
    assert selected(store, pattern=SECRET, whole_documents=True) == whole
    first = min(secret)
    assert selected(store, chunk=(first,), document=("doc-4",)) == {first, *reader.document("doc-4")}


def test_matches_are_counted_by_selector_and_nothing_is_reported_of_what_was_looked_for(
    store: Path, tmp_path: Path
) -> None:
    (tmp_path / "patterns").write_text(f"{SECRET}\nnowhere\n")
    done = api.purge(store, api.Selectors(pattern=tmp_path / "patterns", document=("doc-4",)), reason="r")
    counts = {(match.selector, match.name): match.chunks for match in done.matches}
    assert set(counts) == {("document", ""), ("pattern", "pattern 1")}
    assert all(SECRET.encode() not in file.read_bytes() for file in stored_files(store, "log/*"))
    assert api.verify(store).ok


def test_a_part_is_scanned_once_until_it_is_rewritten(store: Path, texts: dict[str, str]) -> None:
    opened = Store.open(store)
    stage = scan.ScanStage((Patterns((SECRET,)),))
    tasks = stage.plan(opened)
    assert len(tasks) == len(opened.state.parts()) > 2
    with writing(opened) as run:
        worker = stage.open(opened)
        engine.perform(worker, opened.storage, tasks[0], run.id, lambda *_: None)  # and then it was killed
    with writing(opened):
        pass
    assert {task.key for task in stage.plan(opened.refresh() and opened)} == {task.key for task in tasks[1:]}
    with writing(opened) as run:
        engine.execute(stage, opened, run)
    opened.refresh()
    assert stage.plan(opened) == []
    found = touched(store, texts, SECRET)
    target = retrotool.open(store).document("doc-1")[0]
    api.purge(store, api.Selectors(chunk=(target,)), reason="test")
    opened.refresh()
    assert stage.plan(opened) == [], "a purge rewrites nothing"
    done = api.purge(store, api.Selectors(pattern=SECRET), reason="test", erase=True)
    assert done.erased == len(found)
    opened.refresh()
    assert opened.state.names(scan.KIND) == []
    assert not stored_files(store, "scans/*")
    assert SECRET.encode() not in b"".join(contents_of(store).values())
    assert selected(store, pattern=SECRET) == set()
    assert api.verify(store).ok


def test_what_a_killed_run_had_finished_is_not_missed(store: Path, texts: dict[str, str]) -> None:
    expected = touched(store, texts, SECRET)
    opened = Store.open(store)
    stage = scan.ScanStage((Patterns((SECRET,)),))
    with writing(opened) as run:  # it was killed after the last part, before that was committed
        worker = stage.open(opened)
        for task in stage.plan(opened):
            assert engine.perform(worker, opened.storage, task, run.id, lambda *_: None) is not None
    assert plan_tasks(stage, opened) == []
    assert stage.plan(opened)
    with pytest.raises(ConflictError, match="since the scan"):
        scan.read_scan(opened, stage)
    assert api.purge(store, api.Selectors(pattern=SECRET), reason="test").chunks == len(expected)


def test_runs_share_the_scan_of_a_purge(store: Path, texts: dict[str, str]) -> None:
    selectors = api.Selectors(pattern=SECRET)
    opened = Store.open(store)
    stage = scan.ScanStage((Patterns((SECRET,)),))
    tasks = stage.plan(opened)
    with Run(opened.storage) as other, ThreadPoolExecutor(1) as pool:  # another run, at one of the parts
        assert leases.take_claim(opened.storage, tasks[0].key, other.id)
        waiting = pool.submit(api.purge, store, selectors, dry_run=True)
        while [task.key for task in stage.plan(opened.refresh() and opened)] != [tasks[0].key]:
            time.sleep(0.05)
        assert not waiting.done(), "it has scanned the others"
        leases.release_claim(opened.storage, tasks[0].key, other.id)
        assert waiting.result().chunks == len(touched(store, texts, SECRET))
    assert api.info(store).purges == {}
    paths = set(stored_files(store, "scans/*"))
    assert len(paths) == len(tasks)
    names = {path.name for path in paths}
    added = [file for commit in _commits(store) for file in commit["add"] if file.startswith("scans/")]
    assert {file.rpartition("/")[2] for file in added} == names, "no part was scanned again"


def _commits(store: Path) -> list[dict[str, list[str]]]:
    """The paths that each commit added."""
    found = []
    for path in stored_files(store, "log/*"):
        text = path.read_text()
        found.append({"add": re.findall(r"scans/[0-9a-f]+/[0-9a-f-]+\.parquet", text)})
    return found


def test_a_match_is_where_it_is_said_to_be(store: Path) -> None:
    selected(store, pattern=SECRET)
    opened = Store.open(store)
    found = scan.read_scan(opened, scan.ScanStage((Patterns((SECRET,)),)))
    reader = retrotool.open(store)
    for chunk, begin, end in zip(*(found[name].to_pylist() for name in ("chunks", "begin", "end")), strict=True):
        tokens = reader.chunk(chunk).tokens
        text = reader.tokenizer.decode(tokens[None], np.array([len(tokens)]))[0].as_py()
        here = text[max(begin, 0) : end]
        assert here and here == SECRET.encode()[max(-begin, 0) : max(-begin, 0) + len(here)]
        assert end - begin == len(SECRET)


def test_where_text_was_lost_it_is_said(store_copy: Path) -> None:
    with pytest.raises(UsageError, match="loses case or spacing") as error:
        api.purge(store_copy, api.Selectors(pattern="x"), reason="test")
    assert "--allow-lossy" in error.value.advice
    with pytest.raises(UsageError, match="no selector was given"):
        api.purge(store_copy, api.Selectors(), reason="test")


@pytest.mark.parametrize(
    "selectors",
    [
        {"terms": ["Jane Roe"]}, {"pii": ("phone",)}, {"pii": ("payment-card",)}, {"pii": ("iban",)},
        {"pattern": r"\bJane"}, {"pattern": r"owner$"}, {"pattern": "^Jane"},
    ],
)  # fmt: skip
def test_a_value_begins_where_its_key_ends(tmp_path: Path, selectors: dict[str, Any]) -> None:
    """They are tokenised apart, without a border between their texts."""
    values = ["Jane Roe is.", "202-555-0143 is her number.", "4111 1111 1111 1111 is her card.",
              "GB82 WEST 1234 5698 7654 32 is her account."]  # fmt: skip
    rows = [{"id": f"q{n}", "key": "Who is the owner", "value": value} for n, value in enumerate(values)]
    options = ChunkOptions(fields=Fields(key="key", value="value"))
    api.chunk(tmp_path / "store", [str(write_jsonl(tmp_path / "rows.jsonl", rows))], options=options)
    if "terms" in selectors:
        (tmp_path / "terms").write_text("\n".join(selectors["terms"]))
        selectors = {"terms": tmp_path / "terms"}
    found = api.purge(tmp_path / "store", api.Selectors(**selectors), dry_run=True)
    assert found.chunks == (4 if selectors.get("pattern") == "owner$" else 1)
