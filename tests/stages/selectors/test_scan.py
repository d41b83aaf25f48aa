"""Selectors by content over a whole store, and how selectors go together."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from conftest import write_jsonl

import retrotool
from retrotool import commands, engine
from retrotool.commands.writing import writing
from retrotool.errors import UsageError
from retrotool.stages.selection import choose
from retrotool.stages.selectors import scan
from retrotool.stages.selectors.patterns import Patterns
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
    commands.chunk(
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
    asked = commands.Selectors(**selectors).asked(store)
    if asked.scan is not None:
        with writing(store) as run:
            engine.execute(asked.scan, store, run)
    return set(choose(store, asked).chunks.tolist())


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
    assert selected(store, documents=tmp_path / "ids", pattern=SECRET) == named | secret
    assert selected(store, documents=tmp_path / "ids", pattern=SECRET, every=True) == named & secret
    assert selected(store, patterns=tmp_path / "patterns") == secret | tide
    assert selected(store, patterns=tmp_path / "patterns", where="source = '7'", every=True) == (secret | tide) & sevens
    whole = {chunk for name in texts if set(reader.document(name)) & secret for chunk in reader.document(name)}
    assert selected(store, pattern=SECRET, whole_documents=True) == whole
    first = min(secret)
    assert selected(store, chunk=(first,), document=("doc-4",)) == {first, *reader.document("doc-4")}


def test_matches_are_counted_by_selector_and_nothing_is_told_of_what_was_looked_for(
    store: Path, tmp_path: Path
) -> None:
    (tmp_path / "patterns").write_text(f"{SECRET}\nnowhere\n")
    done = commands.purge(store, commands.Selectors(patterns=tmp_path / "patterns", document=("doc-4",)), reason="r")
    told = {(match.selector, match.name): match.chunks for match in done.matches}
    assert set(told) == {("documents", ""), ("pattern", "pattern 1")}
    assert all(SECRET.encode() not in path.read_bytes() for path in (store / "log").iterdir())
    assert commands.verify(store).ok


def test_a_part_is_scanned_once_until_it_is_rewritten(store: Path, texts: dict[str, str]) -> None:
    opened = Store.open(store)
    stage = scan.ScanStage((Patterns((SECRET,)),))
    tasks = stage.plan(opened)
    assert len(tasks) == len(opened.state.parts()) > 2
    with writing(opened) as run:
        worker = stage.open(opened)
        engine.perform(worker, opened.root, tasks[0], run.id, lambda _: None)  # and then it was killed
    with writing(opened):
        pass
    assert {task.key for task in stage.plan(opened.refresh() and opened)} == {task.key for task in tasks[1:]}
    with writing(opened) as run:
        engine.execute(stage, opened, run)
    opened.refresh()
    assert stage.plan(opened) == []
    found = touched(store, texts, SECRET)
    victim = retrotool.open(store).document("doc-1")[0]
    commands.purge(store, commands.Selectors(chunk=(victim,)), reason="test")
    opened.refresh()
    assert stage.plan(opened) == [], "a purge rewrites nothing"
    done = commands.purge(store, commands.Selectors(pattern=SECRET), reason="test", erase=True)
    assert done.erased == len(found)
    opened.refresh()
    assert opened.state.names(scan.KIND) == []
    assert not list(store.glob("scans/*/*"))
    assert SECRET.encode() not in b"".join(path.read_bytes() for path in store.rglob("*") if path.is_file())
    assert selected(store, pattern=SECRET) == set()
    assert commands.verify(store).ok


def test_several_machines_share_a_scan(store: Path, texts: dict[str, str]) -> None:
    opened = Store.open(store)
    stages = [scan.ScanStage((Patterns((SECRET,)),), shard=(i, 2)) for i in range(2)]
    with writing(opened) as run:
        engine.execute(stages[0], opened, run)
    opened.refresh()
    assert stages[1].plan(opened) == []
    assert set(scan.read_scan(opened, stages[1])[0].chunks.tolist()) == touched(store, texts, SECRET)


def test_a_match_is_where_it_is_said_to_be(store: Path) -> None:
    selected(store, pattern=SECRET)
    opened = Store.open(store)
    found, _ = scan.read_scan(opened, scan.ScanStage((Patterns((SECRET,)),)))
    reader = retrotool.open(store)
    for chunk, begin, end in zip(found.chunks.tolist(), found.begin.tolist(), found.end.tolist(), strict=True):
        tokens = reader.chunk(chunk).tokens
        text = reader.tokenizer.decode(tokens[None], np.array([len(tokens)]))[0].as_py()
        here = text[max(begin, 0) : end]
        assert here and here == SECRET.encode()[max(-begin, 0) : max(-begin, 0) + len(here)]
        assert end - begin == len(SECRET)


def test_where_text_was_lost_it_is_said(store_copy: Path) -> None:
    with pytest.raises(UsageError, match="loses case or spacing") as error:
        commands.purge(store_copy, commands.Selectors(pattern="x"), reason="test")
    assert "--allow-lossy" in error.value.advice
    with pytest.raises(UsageError, match="nothing says what to purge"):
        commands.purge(store_copy, commands.Selectors(), reason="test")
