"""Distances, their order and the recall, where float32 products and absolute tolerances would be wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import make_rows, write_jsonl
from oracle import brute_force, read_plain, saved_neighbours

from retrotool import api
from retrotool.ann.choice import IndexOptions
from retrotool.ann.codes import Whole
from retrotool.ann.excluded import Excluded, Intervals, Queries
from retrotool.ann.lists import InvertedLists, Trained, VectorLists, fill, to_faiss
from retrotool.ann.ranking import rerank
from retrotool.ann.search import SPARE, Search, nothing_banned
from retrotool.embed.search_scope import embedded_parts, own_documents, read_part_vectors
from retrotool.encoder import Encoder, Rows
from retrotool.index.run import Options
from retrotool.index.searching import Database
from retrotool.store.store import Store

Build = Callable[..., Path]


@pytest.fixture
def build(tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """A chunked and embedded store whose vectors are made by a function of (generator, rows), not by the encoder."""

    def made(vectors: Callable[[np.random.Generator, int], np.ndarray]) -> Path:
        rng = np.random.default_rng(0)

        def made_up(
            _: Encoder, blocks: Iterable[Rows], report: Callable[[int], object] = lambda _: None
        ) -> Iterator[np.ndarray]:
            for rows in blocks:
                report(len(rows))
                yield vectors(rng, len(rows)).astype(np.float16)

        monkeypatch.setattr(Encoder, "vectors", made_up)
        monkeypatch.setattr(Encoder, "verify", lambda encoder, _: setattr(encoder, "cosine", 1.0))
        store = tmp_path / "store"
        source = write_jsonl(tmp_path / "c.jsonl", make_rows(120))
        api.chunk(store, [str(source)], tokenizer=str(tiny_encoder), part_size=200)
        api.embed(store, encoder=str(tiny_encoder))
        return store

    return made


def far(rng: np.random.Generator, n: int) -> np.ndarray:
    """Vectors that differ by less than a thousandth of what they have in common."""
    vectors = rng.normal(size=(n, 32)) * 0.05
    vectors[:, 0] = 1000
    return vectors


@pytest.mark.parametrize("nlist", [0, 8])
def test_a_large_common_component_changes_no_distance_and_no_order(build: Build, nlist: int) -> None:
    store = build(far)
    api.index(store, target_recall=1, options=Options(IndexOptions(nlist=nlist, code="float16", shard_rows=250)))
    api.neighbours(store)
    plain = read_plain(store)
    plain.vectors[:, 0] = 0
    ids, distances = saved_neighbours(store)
    true_ids, true_distances = brute_force(plain, plain, 20)
    assert np.allclose(distances, true_distances, rtol=1e-5)
    assert (ids == true_ids).mean() > 0.999


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_recall_does_not_depend_on_the_length_of_vectors(build: Build, scale: float) -> None:
    store = build(lambda rng, n: rng.normal(size=(n, 32)) * scale)
    result = api.index(store, target_recall=0.5, options=Options(IndexOptions(nlist=8, code="float16")))
    assert 1 < result.nprobe <= result.nlist
    assert result.curve[0].recall_at_10 < 0.5, "one list of eight holds few of the true nearest"
    plain = read_plain(store)
    opened = Store.open(store)
    database = Database(opened)
    found = []
    for part in embedded_parts(opened, database.encoder):
        vectors = np.asarray(read_part_vectors(opened, database.encoder, part), np.float32)
        own = own_documents(opened, part, opened, database.tombstones, within=True)
        found += database.search(Queries(vectors, own), 10).ids.tolist()
    plain.vectors[:] = plain.vectors / scale
    true = brute_force(plain, plain, 10)[0]
    hits = np.mean([len(set(a[:10]) & set(b)) / 10 for a, b in zip(found, true, strict=True)])
    assert result.recall_at_10 == pytest.approx(hits, abs=0.005)


def test_near_ties_come_in_their_true_order() -> None:
    """Products in float32 can't tell these apart, at a distance that is a hundred thousandth of the lengths."""
    rng = np.random.default_rng(0)
    query = rng.normal(size=(1, 64)).astype(np.float16)
    vectors = np.repeat(query, 40, axis=0)
    for row in range(40):
        vectors[row, row] += np.float16(2**-9 * (1 + row))
    everything = np.concatenate([vectors[rng.permutation(40)], -20 * rng.normal(size=(400, 64)).astype(np.float16)])
    asked, one = Queries.plain(query.astype(np.float32)), VectorLists(np.arange(len(everything)), everything)
    search = Search(one.trained, asked, 1, 33 + SPARE, nothing_banned)
    search.add(one)
    best = rerank(asked.vectors, search.candidates, lambda ids: everything[ids], 33)
    true = np.sort(((everything.astype(np.float64) - query.astype(np.float64)) ** 2).sum(1))[:33]
    assert np.allclose(best.distances[0], true, rtol=1e-6)


def test_further_documents_of_the_same_id_are_left_out_and_nothing_else() -> None:
    rng = np.random.default_rng(1)
    n, q, per = 600, 50, 6
    vectors = rng.normal(size=(n, 8)).astype(np.float16)
    document = np.repeat(rng.integers(0, 12, n // per), per)  # twelve documents, each in many places
    starts = np.arange(0, n, per)
    first = np.array([starts[document[starts] == d][0] for d in range(12)])
    further = np.setdiff1d(starts, first)
    repeats = Intervals(further, further + per - 1, document[further])
    own = rng.integers(-1, 12, q)
    excluded = Excluded(np.where(own < 0, 0, first[own]), np.where(own < 0, -1, first[own] + per - 1), own, repeats)
    queries = vectors[:q].astype(np.float32)
    half = n // 2
    trained = Trained(8, Whole(8), np.array([[-9.0] * 8, [9.0] * 8], np.float32), nlist=2)
    index = to_faiss(trained)
    fill(index, np.arange(n) % 2, np.arange(n), vectors.view(np.uint8))
    search = Search(trained, Queries(queries, excluded), 2, half, lambda ids: ids % 7 == 0)
    search.add(InvertedLists(index, trained))
    best = rerank(queries, search.candidates, lambda ids: vectors[ids], half)
    exact = ((queries[:, None] - vectors[None].astype(np.float32)) ** 2).sum(-1)
    exact[own[:, None] == document[None]] = np.inf
    exact[:, np.arange(n) % 7 == 0] = np.inf
    assert np.allclose(best.distances, np.sort(exact, axis=1)[:, :half], rtol=1e-5)
