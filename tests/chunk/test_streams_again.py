"""Standard input again and again: streams share a place, as numbers of processes and files return."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
from conftest import make_text

import retrotool
from retrotool import api, engine
from retrotool.chunk.chunk_plan import ChunkOptions, commit_plan
from retrotool.chunk.stage import ChunkStage
from retrotool.engine import task
from retrotool.errors import HeldError
from retrotool.sources import Fields
from retrotool.sources.inputs import spool
from retrotool.store.folding import writing
from retrotool.store.store import Store


def stream(word: str) -> io.BytesIO:
    """Five documents; streams of words of one length have one size."""
    rows = [{"id": f"{word}{i}", "text": f"{word} {make_text(i, 30)}"} for i in range(5)]
    return io.BytesIO("".join(json.dumps(row) + "\n" for row in rows).encode())


def piped(store: Path, word: str, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> api.ChunkResult:
    """Chunk a stream."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(stream(word)))
    return api.chunk(store, ["-"], tokenizer=str(tiny_encoder))


def is_there(store: Path, word: str) -> bool:
    return all(len(retrotool.open(store).document(f"{word}{i}")) for i in range(5))


def test_streams_one_after_another_are_all_read(
    tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    for word in ("river", "ocean", "river"):
        result = piped(store, word, tiny_encoder, monkeypatch)
        assert result.rejected == 0
    assert is_there(store, "river") and is_there(store, "ocean")
    assert api.info(store).documents == 10


@pytest.mark.parametrize("second", ["river", "ocean"])
def test_what_was_interrupted_is_read_when_it_is_piped_again(
    second: str, tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"

    def interrupted(*_: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(task.staging, "stage", interrupted)
        with pytest.raises(KeyboardInterrupt):
            piped(store, "river", tiny_encoder, monkeypatch)
    piped(store, second, tiny_encoder, monkeypatch)
    assert is_there(store, second)
    piped(store, "river", tiny_encoder, monkeypatch)
    assert is_there(store, "river")
    assert api.verify(store).problems == []


@pytest.mark.parametrize("is_lost", [False, True])
def test_the_stream_of_a_running_chunk_is_waited_for(
    is_lost: bool, tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It need not be readable here: the other may be on another machine."""
    root, file = tmp_path / "store", tmp_path / "file.jsonl"
    (tmp_path / "first.jsonl").write_bytes(stream("first").getvalue())
    api.chunk(root, [str(tmp_path / "first.jsonl")], tokenizer=str(tiny_encoder))
    file.write_bytes(stream("ocean").getvalue())
    with writing(opened := Store.open(root)) as other:
        with spool(stream("river")) as spooled:
            commit_plan(opened, other, [spooled], ChunkOptions(Fields(), 1 << 20))
            if not is_lost:

                def go_on(_: float) -> None:
                    assert api.info(root).documents == 5, "ids come in the order of the plans"
                    monkeypatch.undo()
                    engine.execute(ChunkStage(run=other.id), opened, other)

                monkeypatch.setattr(time, "sleep", go_on)
                assert api.chunk(root, [str(file)]).rejected == 0
        if is_lost:
            with pytest.raises(HeldError, match=f"held by run {other.id}") as error:
                api.chunk(root, [str(file)], wait=False)
            assert error.value.exit_code == 14
    if is_lost:  # with its run, which has ended
        assert api.chunk(root, []).rejected == 1
    assert is_there(root, "ocean") and api.info(root).documents == (10 if is_lost else 15)
    assert api.verify(root).problems == []
