"""Standard input again and again: streams share a place, as numbers of processes and files return."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from conftest import make_text

import retrotool
from retrotool import api
from retrotool.engine import task


def piped(store: Path, word: str, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> api.ChunkResult:
    """Chunk a stream of five documents; streams of words of one length have one size."""
    rows = [{"id": f"{word}{i}", "text": f"{word} {make_text(i, 30)}"} for i in range(5)]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    return api.chunk(store, ["-"], tokenizer=str(tiny_encoder))


def is_there(store: Path, word: str) -> bool:
    return all(len(retrotool.open(store).document(f"{word}{i}")) for i in range(5))


def test_streams_one_after_another_are_all_read(
    tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    for word in ("river", "ocean", "river"):
        result = piped(store, word, tiny_encoder, monkeypatch)
        assert result.set_aside == 0
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
