"""``search`` for many queries, and within documents: exactly the nearest chunks that match, compared with numpy."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import make_rows, make_text, write_jsonl
from oracle import Plain, read_plain
from stored import copy_store
from typer.testing import CliRunner

import retrotool
from retrotool import api
from retrotool import reader as reading
from retrotool.app import app
from retrotool.index.searching import Database, ExactDatabase

TEXTS = [make_text(seed, 30) for seed in (200, 201, 202)]
FILTERS = {
    "source = 'a'": lambda row: row["source"] == "a",
    "source = 'b' and n_chunks > 2": lambda row: row["source"] == "b" and row["n_chunks"] > 2,
    "id in ('doc-7', 'doc-9', 'doc-30', 'nobody')": lambda row: row["id"] in ("doc-7", "doc-9", "doc-30"),
    "id = 'nobody'": lambda row: False,
    "not id like '%1%'": lambda row: "1" not in row["id"],
}


@pytest.fixture(scope="module")
def purged(built_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the store of which doc-7 is purged, and every tenth document erased."""
    store = copy_store(built_store, tmp_path_factory.mktemp("filtered") / "store")
    api.purge(store, api.Selectors(document="doc-7"), reason="r")
    api.purge(store, api.Selectors(document=[f"doc-{i}" for i in range(1, 120, 10)]), reason="r", erase=True)
    return store


@functools.cache
def read_once(store: Path) -> tuple[Plain, Any, list[int]]:
    """All of a store, the vectors of ``TEXTS``, and the ids of live chunks."""
    reader = retrotool.open(store)
    encoder = reader.load_encoder()
    vectors = [encoder.embed(encoder.tokenize_query(text)).astype(np.float32) for text in TEXTS]
    return read_plain(store), vectors, [int(i) for part in reader.parts() for i in reader.chunk_ids(part)]


def nearest(store: Path, text: str, where: Any, k: int) -> tuple[list[int], list[float]]:
    """Ids and distances of the k nearest live chunks of matching documents, by numpy over all vectors."""
    plain, vectors, live = read_once(store)
    counts = {name: list(plain.documents).count(name) for name in set(plain.documents)}
    match = {row["id"] for row in make_rows(120) if where({**row, "n_chunks": counts.get(row["id"], 0)})}
    wanted = plain.live & np.isin(plain.ids, live)
    wanted &= np.array([name in match for name in plain.documents])
    distances = ((plain.vectors[wanted] - vectors[TEXTS.index(text)]) ** 2).sum(1)
    order = np.argsort(distances, kind="stable")[:k]
    return plain.ids[wanted][order].tolist(), distances[order].tolist()


@pytest.mark.parametrize("where", FILTERS)
@pytest.mark.parametrize("way", ["all are compared", "the index is searched"])
def test_the_nearest_of_the_documents_that_match_are_found(
    purged: Path, where: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched = []
    for kind in (Database, ExactDatabase):
        plain = kind.search
        monkeypatch.setattr(kind, "search", lambda *a, _p=plain, **o: searched.append(type(a[0])) or _p(*a, **o))
    if way == "the index is searched":
        monkeypatch.setattr(reading, "_EXACT", -1)
    reader = retrotool.open(purged)
    found = reader.search_many(TEXTS, 7, where=where)
    assert searched == [ExactDatabase if way == "all are compared" else Database]
    for text, near in zip(TEXTS, found, strict=True):
        ids, distances = nearest(purged, text, FILTERS[where], 7)
        assert [one.id for one in near] == ids
        assert np.allclose([one.distance for one in near], distances, atol=1e-3)
        assert [one.id for one in reader.search(text, 7, where=where)] == ids


def test_an_operating_point_is_for_the_index(purged: Path) -> None:
    reader = retrotool.open(purged)
    found = reader.search(TEXTS[0], 5, where="source = 'a'", nprobe=1, rerank=100)
    assert [one.id for one in found] == nearest(purged, TEXTS[0], FILTERS["source = 'a'"], 5)[0]


def run(*arguments: object, stdin: str | None = None) -> SimpleNamespace:
    result = CliRunner().invoke(app, ["search", *map(str, arguments)], input=stdin)
    return SimpleNamespace(code=result.exit_code, out=result.stdout, err=result.stderr)


def test_the_command_takes_a_file_of_queries(purged: Path, tmp_path: Path) -> None:
    file = tmp_path / "queries.txt"
    file.write_text("\n\n".join(TEXTS) + "\r\n \n")
    printed = json.loads(run(purged, f"@{file}", "-k", 3, "--source", "b", "--json").out)
    assert printed["results"] is None
    assert [one["query"] for one in printed["queries"]] == TEXTS
    for one in printed["queries"]:
        alone = json.loads(run(purged, one["query"], "-k", 3, "--where", "source = 'b'", "--json").out)
        assert alone["queries"] is None and [n["id"] for n in alone["results"]] == [n["id"] for n in one["results"]]
    assert json.loads(run(purged, "@-", "-k", 3, "--source", "b", "--json", stdin=file.read_text()).out) == printed
    blocks = run(purged, f"@{file}", "-k", 1).out.split("\n\n")
    assert [block.splitlines()[0] for block in blocks] == TEXTS
    assert all(block.splitlines()[1].startswith("1. distance ") for block in blocks)
    assert "@ is what is meant" not in run(purged, "@@ is what is meant", "-k", 1).err


def test_more_queries_than_are_embedded_at_once(purged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = retrotool.open(purged)
    whole = reader.search_many(TEXTS, 2)
    monkeypatch.setattr(reading, "_QUERIES", 2)
    assert [[n.id for n in near] for near in reader.search_many(TEXTS, 2)] == [[n.id for n in near] for near in whole]
    assert reader.search_many([], 2) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x", "--where", "nope = 1"], "--where: documents have no column 'nope'; they have: "),
        (["x", "--where", "id ="], "--where: expected a number, or a text in '...' at character 5"),
        (["@FOLDER/none"], "TEXT FOLDER/none can't be read: No such file or directory"),
        (["@FOLDER/blank"], "TEXT FOLDER/blank has no query"),
        (["@FOLDER/latin"], "line 2 is not UTF-8"),
    ],
)
def test_wrong_queries_are_refused(purged: Path, tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "blank").write_text("\n \n")
    (tmp_path / "latin").write_bytes(b"fine\nna\xefve\n")
    found = run(purged, *(word.replace("FOLDER", str(tmp_path)) for word in words))
    assert (found.code, found.out) == (2, "") and message.replace("FOLDER", str(tmp_path)) in found.err


def test_fewer_than_asked_for_is_said(purged: Path) -> None:
    few = run(purged, "x", "-k", 5, "--where", "id = 'doc-9'")
    n = len(retrotool.open(purged).document("doc-9"))
    assert few.code == 0 and few.out.count(". distance") == n < 5
    assert few.err == f"Fewer than 5: --where and --source leave {n} live chunk{'s' * (n > 1)}.\n"
    none = run(purged, "x", "--where", "source = 'nobody'")
    assert (none.code, none.out) == (0, "Nothing found: no live chunk is in the index, or none matches.\n")
    with pytest.raises(retrotool.errors.UsageError, match="-k 99 is not between 1 and the 20"):
        reader = retrotool.open(purged)
        reader.neighbours(reader.document("doc-9")[0], k=99)


def test_an_encoder_is_loaded_once(purged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads, load = [], reading.load_encoder
    monkeypatch.setattr(reading, "load_encoder", lambda *arguments: loads.append(1) or load(*arguments))
    reader = retrotool.open(purged)
    for _ in range(3):
        reader.search("a river", 1)
        reader.refresh()
    assert len(loads) == 1


def test_chunks_that_are_not_in_the_index_are_not_found_with_a_filter_either(
    built_store: Path, tmp_path: Path, tiny_encoder: Path
) -> None:
    store = copy_store(built_store, tmp_path / "store")
    api.chunk(store, [str(write_jsonl(tmp_path / "new.jsonl", [{"id": "new", "text": TEXTS[0], "source": "a"}]))])
    api.embed(store, encoder=str(tiny_encoder))
    found = run(store, TEXTS[0], "--source", "a", "--json")
    assert json.loads(found.out)["not_indexed"] == 1 and "Not searched: 1 chunk" in found.err
    assert "new" not in {one["document"] for one in json.loads(found.out)["results"]}
    api.index(store)
    assert json.loads(run(store, TEXTS[0], "--source", "a", "--json").out)["results"][0]["document"] == "new"


def test_texts_and_vectors_can_be_mixed(purged: Path) -> None:
    _, vectors, _ = read_once(purged)
    reader = retrotool.open(purged)
    found = reader.search_many([TEXTS[0], vectors[1][0], TEXTS[2]], 3, where="source = 'a'")
    assert [[n.id for n in near] for near in found] == [
        nearest(purged, text, FILTERS["source = 'a'"], 3)[0] for text in TEXTS
    ]
