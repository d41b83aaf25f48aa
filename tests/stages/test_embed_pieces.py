"""An interrupted ``embed`` goes on where it stopped: no row is computed twice, and all are equal to the bit."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import INTERRUPTED, make_encoder, make_rows, write_jsonl
from forked import Forked
from stored import copy_store, stored_files

import retrotool
from retrotool import api
from retrotool.embed import stage as embed_stage
from retrotool.store import parts, staging
from retrotool.store.storage import storage_at
from retrotool.store.store import Store

AFTER, ROWS = 6, 62
"""Pieces that are staged when the signal comes, of a block each, and their rows."""
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]
STOP = """
import os
from retrotool.embed import stage
from retrotool.store import staging
stage._BLOCK_ROWS, stage.PIECE_SECONDS = (16, 16), 0.0
publish, published = staging.stage, []
def stage_and_stop(storage, task):
    done = publish(storage, task)
    published.append(task.piece)
    if len(published) == AFTER:
        os.kill(os.getpid(), SIGNAL)
    return done
staging.stage = stage_and_stop
"""


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed_stage, "_BLOCK_ROWS", (16, 16))


@pytest.fixture
def chunked(tmp_path: Path, tiny_encoder: Path) -> Path:
    """A store of two parts without embeddings, whose tokenizer is the encoder's."""
    source = write_jsonl(tmp_path / "c.jsonl", make_rows(80))
    api.chunk(tmp_path / "store", [str(source)], tokenizer=str(tiny_encoder), part_size=160)
    return tmp_path / "store"


def interrupt(store: Path, encoder: Path, number: int = signal.SIGINT) -> list[staging.Staged]:
    """Interrupt an ``embed``; return the pieces that it left."""
    before = f"AFTER, SIGNAL = {AFTER}, {int(number)}\n{STOP}"
    job = Forked(["embed", str(store), "--encoder", str(encoder)], before=lambda: exec(before, {}))
    out, errors = job.communicate(timeout=100)
    expected = (130, INTERRUPTED) if number == signal.SIGINT else (-number, "")
    assert (job.returncode, errors, out) == (*expected, "")
    return list(staging.read_staged(storage_at(store)).values())


def sums(store: Path) -> dict[str, str]:
    state = Store.open(store).state
    return {slot: state.file("embeddings", slot, "tiny").sha256 for slot in state.group("embeddings", "tiny")}


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.usefixtures("small_blocks")
def test_an_interrupted_embed_goes_on_where_it_stopped(
    number: int, chunked: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    whole = api.embed(copy_store(chunked, tmp_path / "whole"), encoder=str(tiny_encoder))
    left = interrupt(chunked, tiny_encoder, number)
    assert [one.piece for one in left] and sum(one.piece is not None for one in left) == len(left) == AFTER
    assert api.verify(chunked).ok
    assert api.info(chunked).encoders == {}, "no reader sees a part of a part"
    store = Store.open(chunked)
    rows = sorted(row for one in left for row in range(one.piece[0], one.piece[1] + 1))
    assert rows == list(range(ROWS))
    done = int((parts.read_chunks(store, 0).n_tokens[rows] + 2).sum())  # with two special tokens each
    resumed = api.embed(chunked, encoder=str(tiny_encoder))
    assert resumed.tokens == whole.tokens - done, "these rows were not computed again"
    assert sums(chunked) == sums(tmp_path / "whole")
    assert not stored_files(chunked, "staging/*")
    live = {entry.path for entry in Store.open(chunked).state.group("embeddings", "tiny").entries()}
    assert {f"embeddings/tiny/{path.name}" for path in stored_files(chunked, "embeddings/tiny/*.npy")} == live
    assert api.verify(chunked).ok


@pytest.mark.usefixtures("small_blocks")
def test_what_is_erased_between_does_not_come_back(chunked: Path, tiny_encoder: Path) -> None:
    assert len(interrupt(chunked, tiny_encoder)) == AFTER
    targets = np.array(retrotool.open(chunked).document("doc-3"))
    assert (targets < ROWS).all()
    purge = api.purge(chunked, api.Selectors(document=("doc-3",)), reason="test", erase=True).purge
    assert not stored_files(chunked, "staging/*") and not stored_files(chunked, "embeddings/**/*.npy")
    assert api.verify_purge(chunked, purge, out=chunked.parent).receipt.ok
    api.embed(chunked, encoder=str(tiny_encoder))
    assert not np.asarray(retrotool.open(chunked).embeddings(0))[targets].any()


@pytest.mark.usefixtures("small_blocks")
def test_pieces_of_another_encoder_or_number_type_or_that_are_damaged_are_not_used(
    chunked: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    whole = api.embed(copy_store(chunked, tmp_path / "whole"), encoder=str(tiny_encoder))
    interrupt(chunked, tiny_encoder)
    typed = api.embed(copy_store(chunked, tmp_path / "typed"), encoder=str(tiny_encoder), dtype="bfloat16")
    assert typed.tokens == whole.tokens
    other = make_encoder(tmp_path / "other", seed=5)
    assert api.embed(copy_store(chunked, tmp_path / "named"), encoder=str(other), name="tiny").tokens == whole.tokens
    for path in stored_files(chunked, "embeddings/tiny/*.npy"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    assert api.embed(chunked, encoder=str(tiny_encoder)).tokens == whole.tokens
    assert sums(chunked) == sums(tmp_path / "whole")


def test_a_piece_is_staged_each_minute(
    chunked: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch, small_blocks: None
) -> None:
    now, staged = [0.0], list[tuple[int, int]]()
    publish = staging.stage

    def note(storage: object, one: staging.Staged) -> bool:
        staged.extend([] if one.piece is None else [one.piece])
        return publish(storage, one)  # type: ignore[arg-type]

    def clock() -> float:
        now[0] += 25.0
        return now[0]

    monkeypatch.setattr(staging, "stage", note)
    monkeypatch.setattr(embed_stage.time, "monotonic", clock)
    api.embed(chunked, encoder=str(tiny_encoder))
    assert staged[:2] == [(0, 13), (14, 61)], "three blocks each, by this clock"
    assert not stored_files(chunked, "staging/*")
