"""What was purged is blocked, what was not is not, and the list gives nothing away by itself."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import make_rows, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from stored import copy_store, stored_file, stored_files

import retrotool
from retrotool import api
from retrotool.info.run import info
from retrotool.info.verify import verify
from retrotool.store import parts
from retrotool.store.blocked import HASH, Blocked, id_hashes, keyed_texts, read_blocked
from retrotool.store.store import Store

ROWS = make_rows(12, words=120)


def text_hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


TEXTS = {row["id"]: text_hash(row["text"]) for row in ROWS}
STRANGER = text_hash("never written")


@pytest.fixture(scope="module")
def chunked(tmp_path_factory: pytest.TempPathFactory, byte_level_tokenizer: Path) -> Path:
    folder = tmp_path_factory.mktemp("blocked")
    rows = write_jsonl(folder / "rows.jsonl", ROWS)
    options = {"tokenizer": str(byte_level_tokenizer), "chunk_length": 16, "part_size": 20}
    api.chunk(folder / "store", [str(rows)], **options)
    return folder / "store"


def chunks_of(store: Path) -> dict[str, list[int]]:
    reader = retrotool.open(store)
    return {row["id"]: reader.document(row["id"]) for row in ROWS}


def purge(store: Path, chunks: list[int], *, erase: bool = False) -> api.PurgeResult:
    ids = store.parent / f"{store.name}.ids"
    ids.write_text("".join(f"{chunk}\n" for chunk in chunks))
    return api.purge(store, api.Selectors(chunk=Path(ids)), reason="test", erase=erase)


def blocked_ids(store: Path) -> set[str]:
    return {row["id"] for row in ROWS if read_blocked(Store.open(store)).holds([row["id"]], [STRANGER])[0]}


def blocked_texts(store: Path) -> set[str]:
    blocked = read_blocked(Store.open(store))
    return {name for name, text in TEXTS.items() if blocked.holds(["a new id"], [text])[0]}


@given(data=st.data())
def test_whole_documents_are_blocked_by_id_and_touched_ones_by_text(
    chunked: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    store = copy_store(chunked, tmp_path_factory.mktemp("purges") / "store")
    of = chunks_of(store)
    everything = [chunk for chunks in of.values() for chunk in chunks]
    purged: set[int] = set()
    for _ in range(data.draw(st.integers(1, 3))):
        some = data.draw(st.lists(st.sampled_from(everything), min_size=1, max_size=8))
        whole = data.draw(st.lists(st.sampled_from(sorted(of)), max_size=2))
        targets = {*some, *(chunk for name in whole for chunk in of[name])}
        purge(store, sorted(targets), erase=data.draw(st.booleans()))
        purged |= targets
    assert blocked_ids(store) == {name for name, chunks in of.items() if purged.issuperset(chunks)}
    assert blocked_texts(store) == {name for name, chunks in of.items() if not purged.isdisjoint(chunks)}
    assert verify(store).problems == []


def test_a_batch_is_asked_at_once(chunked: Path, tmp_path: Path) -> None:
    store = copy_store(chunked, tmp_path / "store")
    of = chunks_of(store)
    purge(store, of["doc-3"] + of["doc-5"][:1])
    blocked = read_blocked(Store.open(store))
    assert len(blocked) == 5, "an id, two texts and their tokens"
    ids, texts = ["doc-3", "doc-5", "doc-7", "x"], [TEXTS["doc-4"], TEXTS["doc-6"], TEXTS["doc-5"], STRANGER]
    expected = [True, False, True, False]
    assert blocked.holds(ids, texts).tolist() == expected
    assert blocked.holds([], []).tolist() == []


def test_the_list_of_another_store_does_not_match(chunked: Path, tmp_path: Path) -> None:
    store = copy_store(chunked, tmp_path / "store")
    chunks = chunks_of(store)["doc-3"]
    purge(store, chunks)
    blocked = read_blocked(Store.open(store))
    assert blocked.holds(["doc-3"], [TEXTS["doc-3"]])[0]
    assert not Blocked("00" * 32, blocked.hashes).holds(["doc-3"], [TEXTS["doc-3"]])[0]
    entry = Store.open(store).state.file("blocked", next(iter(info(store).purges)))
    data = b"".join(pq.read_table(stored_file(store, entry.path))["hash"].to_pylist())
    unkeyed = [hashlib.blake2b(b, digest_size=16).digest() for b in (b"doc-3", b"id:doc-3", b"text:" + TEXTS["doc-3"])]
    assert all(trace not in data for trace in [b"doc-3", TEXTS["doc-3"], *unkeyed])
    key = bytes.fromhex(Store.open(store).identity.secret)
    opened = Store.open(store)
    part, rows = chunks[0] >> 32, [chunk & 0xFFFFFFFF for chunk in chunks]
    stored = parts.read_chunks(opened, part)
    tokens = b"".join(stored.tokens[row, : stored.n_tokens[row]].tobytes() for row in rows)
    whole = b"tokens:" + (len(tokens) // 2).to_bytes(8, "little") + tokens
    said = (b"id:doc-3", b"text:" + TEXTS["doc-3"], whole)
    due = [hashlib.blake2b(b, digest_size=16, key=key).digest() for b in said]
    assert data == b"".join(sorted(due)), "as the format says"


def test_documents_that_repeat_are_not_blocked(byte_level_tokenizer: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [*ROWS, *ROWS[:3], {**ROWS[4], "id": "other"}])
    made = api.chunk(tmp_path / "store", [str(rows)], tokenizer=str(byte_level_tokenizer))
    assert (made.documents, made.duplicate_ids) == (12, 3)
    assert not read_blocked(Store.open(tmp_path / "store"))
    purge(tmp_path / "store", chunks_of(tmp_path / "store")["doc-1"])
    assert blocked_ids(tmp_path / "store") == {"doc-1"}


def test_an_older_store_is_made_good_by_the_same_purge(chunked: Path, tmp_path: Path, monkeypatch) -> None:
    store = copy_store(chunked, tmp_path / "store")
    targets = chunks_of(store)["doc-3"]
    with monkeypatch.context() as patch:
        patch.setattr("retrotool.purge.select.hashes_to_block", lambda *_: (np.zeros(0, HASH), np.zeros(0, HASH)))
        purge(store, targets)
    assert not stored_files(store, "blocked/*")
    assert blocked_ids(store) == blocked_texts(store) == set()
    assert verify(store).problems == []
    again = purge(store, targets)
    assert (again.chunks, again.blocked, again.already_purged) == (0, 3, len(targets))
    assert blocked_ids(store) == blocked_texts(store) == {"doc-3"}
    assert verify(store).problems == []
    assert purge(store, targets).purge == ""


def test_files_are_listed_and_kept_after_an_erase(chunked: Path, tmp_path: Path) -> None:
    store = copy_store(chunked, tmp_path / "store")
    result = purge(store, chunks_of(store)["doc-3"], erase=True)
    assert result.blocked == 3
    (file,) = info(store).blocked
    assert file["rows"] == 3
    assert stored_file(store, file["path"]).exists()
    assert info(store).bytes["blocked"] > 0
    assert blocked_ids(store) == {"doc-3"}


@given(names=st.lists(st.text(st.characters(codec="utf-8")), unique=True), data=st.data())
def test_a_set_is_what_a_set_is(names: list[str], data: st.DataObject) -> None:
    secret = "ab" * 32
    held = data.draw(st.sets(st.sampled_from(names))) if names else set()
    blocked = Blocked(secret, np.unique(id_hashes(secret, held)))
    nothing = [STRANGER] * len(names)
    assert blocked.holds(names, nothing).tolist() == [name in held for name in names]
    assert int(blocked.contains(id_hashes(secret, names)).sum()) == len(held)
    assert not np.isin(keyed_texts(secret, [name.encode() for name in names]), blocked.hashes).any()


@given(st.sets(st.binary(min_size=16, max_size=16) | st.integers(0, 255).map(lambda i: bytes([i]) + bytes(15))))
def test_hashes_that_end_in_zeros_are_reported_apart(values: set[bytes]) -> None:
    hashes = np.frombuffer(b"".join(sorted(values)), HASH)
    assert len(np.unique(hashes)) == len(values)
    assert np.unique(hashes).tobytes() == hashes.tobytes(), "NumPy's order is that of bytes"
