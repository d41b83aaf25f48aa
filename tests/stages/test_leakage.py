"""Leakage against a naive computation by the API, and pieces against the API's chunks."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import Cli, make_rows, make_text, write_jsonl
from oracle import read_plain
from test_overlap import by_table

import retrotool
from retrotool import api
from retrotool.errors import UsageError
from retrotool.neighbours.retrieved import read_pieces
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones


def pieces_by_hand(store: Path, ids: np.ndarray) -> list[tuple[list[int], list[int]]]:
    reader = retrotool.open(store)
    found = []
    for chunk_id in ids.tolist():
        if chunk_id < 0 or not reader.is_live([chunk_id])[0]:
            found.append(([], []))
            continue
        following = reader.continuation(chunk_id)
        found.append((reader.chunk(chunk_id).tokens.tolist(), following.tokens.tolist() if following else []))
    return found


def check_pieces(store: Path, ids: np.ndarray) -> None:
    opened = Store.open(store)
    pieces = read_pieces(opened, read_tombstones(opened), ids)
    joined, counts = pieces.joined()
    for i, (one, other) in enumerate(pieces_by_hand(store, ids)):
        assert pieces.n_tokens[i].tolist() == [len(one), len(other)]
        assert pieces.tokens[i, 0, : len(one)].tolist() == one and not pieces.tokens[i, 0, len(one) :].any()
        assert pieces.tokens[i, 1, : len(other)].tolist() == other and not pieces.tokens[i, 1, len(other) :].any()
        assert joined[i, : counts[i]].tolist() == one + other and not joined[i, counts[i] :].any()


@pytest.mark.parametrize("erase", [False, True])
def test_pieces_are_the_chunks_and_continuations_of_the_api(store_copy: Path, tmp_path: Path, erase: bool) -> None:
    everything = read_plain(store_copy).ids
    draw = random.Random(4)
    (tmp_path / "ids").write_text("".join(f"{i}\n" for i in draw.sample(everything.tolist(), 40)))
    api.purge(store_copy, api.Selectors(chunk=tmp_path / "ids"), reason="test", erase=erase)
    some = [*draw.choices(everything.tolist(), k=300), -1, int(everything[-1]) + 1, 77 << 32, (1 << 62) + 5]
    check_pieces(store_copy, np.array(some))
    check_pieces(store_copy, everything)
    check_pieces(store_copy, everything[:0])


def test_of_records_the_value_is_the_continuation_while_the_key_lives(tmp_path: Path, tiny_encoder: Path) -> None:
    from key_values import Written, make_store

    rows = [Written(f"r{i}", make_text(i, 20), make_text(100 + i, 90)) for i in range(12)]
    store = make_store(tmp_path / "store", tiny_encoder, rows)
    ids = np.arange(sum(part["chunks"]["rows"] for part in api.info(store).parts))
    check_pieces(store, ids)
    (tmp_path / "ids").write_text("0\n")
    api.purge(store, api.Selectors(chunk=tmp_path / "ids"), reason="test")
    check_pieces(store, ids)


@pytest.fixture
def evaluation(tmp_path: Path, tiny_encoder: Path) -> Path:
    """Documents of the database, some with every tenth word another one, and others."""
    rows = [{**row, "source": "same"} for row in make_rows(120)[5:12]]
    for row in make_rows(120)[20:27]:
        words = row["text"].split()
        words[::10] = ["other"] * len(words[::10])
        rows.append({"id": f"like {row['id']}", "text": " ".join(words), "source": "like"})
    rows += [{"id": f"new-{i}", "text": make_text(7000 + i, 100), "source": "new"} for i in range(8)]
    store = tmp_path / "evaluation"
    api.chunk(store, [str(write_jsonl(tmp_path / "evaluation.jsonl", rows))], tokenizer=str(tiny_encoder))
    api.embed(store, encoder=str(tiny_encoder))
    return store


def test_r_is_that_of_a_naive_computation(built_store: Path, evaluation: Path, tmp_path: Path) -> None:
    found = api.leakage(built_store, queries=evaluation, out=tmp_path / "r.parquet")
    table = pq.read_table(tmp_path / "r.parquet").to_pydict()
    reader, plain, database = retrotool.open(evaluation), read_plain(evaluation), read_plain(built_store)
    distances = ((plain.vectors[:, None] - database.vectors[None]) ** 2).sum(-1)
    order = np.argsort(distances, axis=1)[:, :10]
    pieces = {int(i): a + b for i, (a, b) in zip(database.ids, pieces_by_hand(built_store, database.ids), strict=True)}
    of = dict(zip(database.ids.tolist(), database.documents, strict=True))
    assert table["chunk"] == plain.ids.tolist()
    for row, chunk_id in enumerate(plain.ids.tolist()):
        tokens = reader.chunk(chunk_id).tokens.tolist()
        common = max(by_table(tokens, pieces[int(database.ids[i])]) for i in order[row])
        assert table["common"][row] == common
        assert table["r"][row] == pytest.approx(common / 64)
        assert table["distance"][row] == pytest.approx(distances[row].min(), abs=1e-3)
        if common:
            assert by_table(tokens, pieces[table["neighbour"][row]]) == common
        assert (table["document"][row], table["n_tokens"][row]) == (plain.documents[row], len(tokens))
        assert table["copied"][row] == pytest.approx(common / len(tokens))
        assert table["neighbour_document"][row] == of[table["neighbour"][row]]
    r, copied = np.array(table["r"]), np.array(table["copied"])
    assert (copied == 1).sum() > (r == 1).sum() and (copied < 1).any(), "whole chunks that are short are copied too"
    assert found.copied == pytest.approx(copied.mean(), abs=1e-4)
    assert (found.copied_half, found.copied_whole) == pytest.approx(
        ((copied >= 0.5).mean(), (copied == 1).mean()), abs=1e-4
    )
    for alpha, share in found.copied_up_to.items():
        assert share == pytest.approx((copied <= float(alpha)).mean(), abs=1e-4)
    assert found.chunks == len(r) == sum(found.histogram)
    assert found.mean == pytest.approx(r.mean(), abs=1e-4)
    for alpha, share in found.up_to.items():
        assert share == pytest.approx((r <= float(alpha)).mean(), abs=1e-4)
    for i, n in enumerate(found.histogram):
        assert n == ((r >= i / 8) & ((r < (i + 1) / 8) | (i == 7))).sum()
    by_source = {source.source: source for source in found.sources}
    assert by_source["same"].mean > by_source["like"].mean > by_source["new"].mean
    assert by_source["same"].copied_whole == 1.0 > by_source["same"].whole


def test_a_store_against_itself_leaves_out_own_documents_and_purged_ones(store_copy: Path, tmp_path: Path) -> None:
    before = api.leakage(store_copy, queries=store_copy, out=tmp_path / "r.parquet")
    table = pq.read_table(tmp_path / "r.parquet").to_pydict()
    plain = read_plain(store_copy)
    of = dict(zip(plain.ids.tolist(), plain.documents, strict=True))
    assert all(of[a] != of[b] for a, b in zip(table["chunk"], table["neighbour"], strict=True) if b >= 0)
    api.purge(store_copy, api.Selectors(where="source = 'a'"), reason="test")
    after = api.leakage(store_copy, queries=store_copy, out=tmp_path / "r.parquet")
    table = pq.read_table(tmp_path / "r.parquet").to_pydict()
    assert after.chunks < before.chunks and set(table["source"]) == {"b"}
    live = set(table["chunk"])
    assert all(n in live or n == -1 for n in table["neighbour"])


def test_what_cannot_be_compared_is_refused(
    built_store: Path, tmp_path: Path, byte_level_tokenizer: Path, tiny_encoder: Path, cli: Cli
) -> None:
    other = tmp_path / "other"
    api.chunk(other, [str(write_jsonl(tmp_path / "o.jsonl", make_rows(3)))], tokenizer=str(byte_level_tokenizer))
    with pytest.raises(UsageError, match="different tokenizers"):
        api.leakage(built_store, queries=other)
    plain = tmp_path / "plain"
    api.chunk(plain, [str(write_jsonl(tmp_path / "p.jsonl", make_rows(3)))], tokenizer=str(tiny_encoder))
    with pytest.raises(UsageError, match="no embeddings") as error:
        api.leakage(built_store, queries=plain)
    assert "retrotool embed" in error.value.advice
    ended = cli("leakage", built_store, "--queries", built_store, "--out", tmp_path / "no" / "r.parquet")
    assert ended.returncode == 2 and "no does not exist" in ended.stderr
    ended = cli("leakage", built_store, "--queries", built_store, "--out", tmp_path)
    assert ended.returncode == 2 and "is a folder" in ended.stderr
    reported = cli("leakage", built_store, "--queries", built_store, "--json")
    assert json.loads(reported.stdout)["chunks"] == api.info(built_store).chunks
