"""What neighbours leave out, against brute force over chunks and continuations as the API gives them."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from conftest import make_rows, make_text, write_jsonl
from oracle import read_plain, saved_neighbours
from stored import copy_store, stored_files
from test_overlap import by_grams
from typer.testing import CliRunner

import retrotool
from retrotool import api
from retrotool.ann.choice import IndexOptions
from retrotool.app import app
from retrotool.errors import UsageError
from retrotool.index.run import Options
from retrotool.index.searching import Database, ExactDatabase
from retrotool.neighbours.filters import FilterOptions
from retrotool.neighbours.run import SearchOptions

EXACT = SearchOptions(exact=True)
Dropped = Callable[[list[int], list[int], list[int]], bool]
"""Whether a query chunk leaves out a neighbour N that F follows, all as tokens."""


def with_copies(n: int, *, first: int = 0) -> list[dict[str, Any]]:
    """Documents, every second of which is copied by another, with every so many words another one."""
    rows = make_rows(n, first=first, words=80)
    draw = random.Random(first)
    for row in rows[::2]:
        words = row["text"].split()
        for place in range(draw.randrange(3, 40), len(words), draw.randrange(4, 60)):
            words[place] = draw.choice("abcdefgh")
        rows.append({"id": f"copy of {row['id']}", "text": " ".join(words), "source": draw.choice("abc")})
    draw.shuffle(rows)
    return [*rows, {"id": f"short {first}", "text": "tiny text", "source": "c"}]


def grow(store: Path, encoder: Path, rows: list[dict[str, Any]]) -> Path:
    source = write_jsonl(store.parent / f"{store.name}-{len(list(store.parent.iterdir()))}.jsonl", rows)
    api.chunk(store, [str(source)], tokenizer=str(encoder), part_size=90)
    api.embed(store, encoder=str(encoder))
    return store


@pytest.fixture(scope="module")
def young(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """Embedded, without index. Not to be changed: copy it."""
    rows = [*with_copies(60), {"id": "as short", "text": "Tiny  text", "source": "a"}]
    return grow(tmp_path_factory.mktemp("filters") / "store", tiny_encoder, rows)


@pytest.fixture
def store(young: Path, tmp_path: Path) -> Path:
    return copy_store(young, tmp_path / "store")


def overlaps(most: float) -> Dropped:
    """By the shortest run that is too long: one is common where there is a longer one."""
    run = next(n for n in range(65) if n / 64 > most)

    @functools.cache
    def runs(piece: tuple[int, ...]) -> set[tuple[int, ...]]:
        return {piece[i : i + run] for i in range(len(piece) - run + 1)}

    return lambda query, n, f: not runs(tuple(query)).isdisjoint(runs((*n, *f)))


def is_copy(query: list[int], n: list[int], f: list[int]) -> bool:
    return by_grams(query, n + f) if len(query) >= 8 else query == n


def sources_of(store: Path) -> dict[int, str]:
    """The source of each live chunk."""
    reader = retrotool.open(store)
    of = {}
    for part in reader.parts():
        documents = retrotool.reader.parts.read_documents(reader._store, part).to_pylist()
        source = {row["id"]: row["source"] for row in documents}
        of |= {int(i): source[reader.chunk(int(i)).document] for i in reader.chunk_ids(part)}
    return of


def oracle(
    queries: Path, database: Path, saved: int, dropped: Dropped, allowed: frozenset[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and distances of what brute force keeps, [n, saved], rows of purged chunks empty."""
    ours, theirs = retrotool.open(queries), retrotool.open(database)
    one, other = read_plain(queries), read_plain(database)
    alive, there = ours.is_searchable(one.ids), theirs.is_searchable(other.ids)
    if allowed is not None:
        source = sources_of(database)
        there &= np.array([source.get(int(i)) in allowed for i in other.ids])
    pieces: dict[int, tuple[list[int], list[int]]] = {}
    for i in other.ids[there].tolist():
        following = theirs.continuation(i)
        pieces[i] = theirs.chunk(i).tokens.tolist(), following.tokens.tolist() if following else []
    distances = ((one.vectors[:, None, :] - other.vectors[None, :, :]) ** 2).sum(-1)
    distances[(one.documents[:, None] == other.documents[None, :]) | ~there] = np.inf
    found = np.full((len(one.ids), saved), -1), np.full((len(one.ids), saved), np.inf)
    for row in np.flatnonzero(alive):
        tokens = ours.chunk(int(one.ids[row])).tokens.tolist()
        kept = 0
        for place in np.argsort(distances[row], kind="stable"):
            if kept == saved or np.isinf(distances[row, place]):
                break
            if not dropped(tokens, *pieces[int(other.ids[place])]):
                found[0][row, kept], found[1][row, kept] = other.ids[place], distances[row, place]
                kept += 1
    return found


def assert_same(found: tuple[np.ndarray, np.ndarray], truth: tuple[np.ndarray, np.ndarray]) -> None:
    """Equal distances; equal ids but where distances tie, with the next one that is not saved perhaps."""
    assert np.array_equal(np.isinf(found[1]), np.isinf(truth[1])) and np.array_equal(found[0] < 0, truth[0] < 0)
    there = np.isfinite(truth[1])
    assert np.allclose(found[1][there], truth[1][there], atol=1e-3)
    near = np.diff(np.where(there, truth[1], 0), axis=1) < 1e-4
    tied = np.pad(near, ((0, 0), (1, 0))) | np.pad(near, ((0, 0), (0, 1)), constant_values=True)
    other = found[0] != truth[0]
    assert not (other & ~tied).any() and other.mean() < 0.1


def nothing(*_: list[int]) -> bool:
    return False


FILTERS: list[tuple[FilterOptions, Dropped]] = [
    (FilterOptions(max_overlap=0.125), overlaps(0.125)),
    (FilterOptions(max_overlap=0.5), overlaps(0.5)),
    (FilterOptions(near_copies=True), is_copy),
    (FilterOptions(0.05, True), lambda query, n, f: is_copy(query, n, f) or overlaps(0.05)(query, n, f)),
]


@functools.cache
def truth_of(young: Path, asked: int | None) -> tuple[np.ndarray, np.ndarray]:
    """What brute force keeps of the store that all begin with, by a filter or by none."""
    return oracle(young, young, 6, nothing if asked is None else FILTERS[asked][1])


@pytest.mark.parametrize("asked", range(len(FILTERS)))
@pytest.mark.parametrize("how", ["exact", "flat", "lists"])
def test_what_is_kept_is_what_brute_force_keeps(young: Path, store: Path, how: str, asked: int) -> None:
    filters = FILTERS[asked][0]
    if how != "exact":
        wanted = IndexOptions(nlist=6, code="float16") if how == "lists" else IndexOptions()
        api.index(store, target_recall=1, options=Options(replace(wanted, shard_rows=100)))
    found = api.neighbours(store, saved=6, filters=filters)
    assert found.filters == filters_in(filters)
    truth, unfiltered = truth_of(young, asked), truth_of(young, None)
    assert (truth[1] != unfiltered[1]).any(axis=1).mean() > 0.2, "there is something to leave out"
    assert_same(saved_neighbours(store), truth)
    assert api.verify(store).problems == []


def filters_in(asked: FilterOptions) -> dict[str, Any]:
    found = {"max_overlap": asked.max_overlap, "near_copies": asked.near_copies}
    return {name: value for name, value in found.items() if value}


def test_across_stores_and_in_little_memory(store: Path, tmp_path: Path, tiny_encoder: Path) -> None:
    rows = [{**row, "id": f"q {row['id']}"} for row in with_copies(20, first=30)]
    queries = grow(tmp_path / "queries", tiny_encoder, rows)
    filters = FilterOptions(0.3, True)
    found = api.neighbours(store, queries=queries, saved=4, filters=filters, name="x")
    assert found.queries == api.info(queries).keys
    truth = oracle(queries, store, 4, lambda query, n, f: is_copy(query, n, f) or overlaps(0.3)(query, n, f))
    assert_same(saved_neighbours(queries, "x"), truth)
    little = SearchOptions(exact=True, memory=1 << 14)
    api.neighbours(store, queries=queries, saved=4, filters=filters, name="little", search=little)
    assert np.array_equal(saved_neighbours(queries, "x")[1], saved_neighbours(queries, "little")[1])


def spied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(queries, k) of each search."""
    asked: list[tuple[int, int]] = []
    for kind in (Database, ExactDatabase):
        search = kind.search

        def spy(self, queries, k, *arguments, _search=search, **options):  # type: ignore[no-untyped-def]
            asked.append((len(queries), k))
            return _search(self, queries, k, *arguments, **options)

        monkeypatch.setattr(kind, "search", spy)
    return asked


@pytest.fixture
def many_copies(tmp_path: Path, tiny_encoder: Path) -> Path:
    """A page that forty others copy, among others."""
    text = make_text(1, 60)
    copies = [{"id": f"copy-{i}", "text": f"{text} {make_text(500 + i, 12)}", "source": "a"} for i in range(40)]
    return grow(tmp_path / "store", tiny_encoder, [*copies, *make_rows(20, words=60)])


def test_of_a_chunk_with_many_copies_more_and_more_are_searched(
    many_copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = spied(monkeypatch)
    api.neighbours(many_copies, saved=4, filters=FilterOptions(near_copies=True))
    assert_same(saved_neighbours(many_copies), oracle(many_copies, many_copies, 4, is_copy))
    assert len({k for _, k in asked}) > 3
    n = [sum(queries for queries, k in asked if k == wanted) for wanted in sorted({k for _, k in asked})]
    assert n[0] == len(read_plain(many_copies).ids) and n == sorted(n, reverse=True) and n[0] > n[1]


def test_up_to_a_bound(many_copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrotool.neighbours.filters.MOST", 16)
    api.neighbours(many_copies, saved=4, filters=FilterOptions(near_copies=True))
    ids = saved_neighbours(many_copies)[0]
    reader = retrotool.open(many_copies)
    first = reader.document("copy-3")[0]
    assert (ids[first] == -1).all(), "its nearest 16 are all copies"
    assert (ids >= 0).all(axis=1).sum() > 10


def test_what_cannot_be_compared_is_refused(
    store: Path, tmp_path: Path, byte_level_tokenizer: Path, tiny_encoder: Path
) -> None:
    other, long = tmp_path / "other", tmp_path / "long"
    for path, tokenizer, length in ((other, byte_level_tokenizer, 64), (long, tiny_encoder, 100)):
        source = str(write_jsonl(tmp_path / f"{path.name}.jsonl", make_rows(3)))
        api.chunk(path, [source], tokenizer=str(tokenizer), chunk_length=length)
        api.embed(path, encoder=str(tiny_encoder))
    with pytest.raises(UsageError, match="have different tokenizers"):
        api.neighbours(store, queries=other, filters=FilterOptions(near_copies=True), name="x")
    with pytest.raises(UsageError, match="chunks of 100 tokens; at most 64 can be compared"):
        api.neighbours(long, filters=FilterOptions(max_overlap=0.5))
    assert api.neighbours(store, queries=other, filters=FilterOptions(exclude_sources=("a",)), name="x").rows
    for share in (0.0, -1.0, 1.1, float("nan")):
        with pytest.raises(UsageError, match="is not above 0 and at most 1"):
            api.neighbours(store, filters=FilterOptions(max_overlap=share))


@pytest.mark.parametrize("how", ["exact", "flat", "lists"])
def test_only_chunks_of_allowed_sources_are_found(store: Path, how: str) -> None:
    if how != "exact":
        wanted = IndexOptions(nlist=6, code="float16") if how == "lists" else IndexOptions()
        api.index(store, target_recall=1, options=Options(replace(wanted, shard_rows=100)))
    for name, filters, allowed in (
        ("without", FilterOptions(exclude_sources=("a",)), "bc"),
        ("only", FilterOptions(only_sources=("c",)), "c"),
        ("both", FilterOptions(only_sources=("a", "b"), exclude_sources=("c",)), "ab"),
    ):
        found = api.neighbours(store, name=name, saved=8, filters=filters)
        assert found.queries == found.rows
        assert_same(saved_neighbours(store, name), oracle(store, store, 8, nothing, frozenset(allowed)))
    api.neighbours(store, name="all", saved=5, filters=FilterOptions(0.2, True, ("b",)))
    truth = oracle(store, store, 5, lambda q, n, f: is_copy(q, n, f) or overlaps(0.2)(q, n, f), frozenset("ac"))
    assert_same(saved_neighbours(store, "all"), truth)


def test_sources_that_are_nowhere_are_refused_with_those_that_there_are(store: Path) -> None:
    for filters in (FilterOptions(exclude_sources=("a", "d")), FilterOptions(only_sources=("d",))):
        with pytest.raises(UsageError, match="no document has the source 'd'") as error:
            api.neighbours(store, filters=filters)
        assert error.value.advice == "The sources are: a, b, c"
    with pytest.raises(UsageError, match="is given to --exclude-source and --only-source"):
        api.neighbours(store, filters=FilterOptions(exclude_sources=("a",), only_sources=("a", "b")))
    with pytest.raises(UsageError, match=r"the filters exclude all of .*: the sources a, b, c"):
        api.neighbours(store, filters=FilterOptions(exclude_sources=("a", "b", "c")))
    api.neighbours(store, filters=FilterOptions(only_sources=("a",)))
    with pytest.raises(UsageError, match="the source a; all sources but a") as error:
        api.neighbours(store, filters=FilterOptions(exclude_sources=("a",)))
    assert "--no-filters" in error.value.advice
    api.purge(store, api.Selectors(where="source = 'c'"), reason="test")
    with pytest.raises(UsageError, match="no document has the source 'c'"):
        api.neighbours(store, filters=FilterOptions(only_sources=("c",)))


def test_a_query_probes_until_it_has_seen_as_many_allowed_vectors(
    tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source that is left in is one document in twenty, and in few lists."""
    rows = [{**row, "source": "rare" if i % 20 == 0 else "common"} for i, row in enumerate(make_rows(400, words=40))]
    store = grow(tmp_path / "store", tiny_encoder, rows)
    api.index(store, options=Options(IndexOptions(nlist=32, code="float16")))
    opened = Database(retrotool.open(store)._store)
    probed: list[tuple[int, int]] = []
    probes = Database._probes

    def spy(self, queries, nprobe):  # type: ignore[no-untyped-def]
        for n, rows in probes(self, queries, nprobe):
            probed.append((len(rows), n))
            yield n, rows

    monkeypatch.setattr(Database, "_probes", spy)
    api.neighbours(store, saved=10, filters=FilterOptions(only_sources=("rare",)))
    truth = oracle(store, store, 10, nothing, frozenset(["rare"]))
    found = saved_neighbours(store)
    rows_of = zip(found[0].tolist(), truth[0].tolist(), strict=True)
    assert np.mean([len((set(a) & set(b)) - {-1}) / len(set(b) - {-1}) for a, b in rows_of]) > 0.97
    assert opened.point.nprobe < 16 and max(nprobe for _, nprobe in probed) == 32
    assert np.average([nprobe for _, nprobe in probed], weights=[n for n, _ in probed]) > 2 * opened.point.nprobe


def purge(store: Path, *documents: str, erase: bool = False) -> None:
    names = store.parent / "names"
    names.write_text("".join(f"{name}\n" for name in documents))
    api.purge(store, api.Selectors(document=Path(names)), reason="test", erase=erase)


@pytest.mark.parametrize("how", ["exact", "flat", "lists"])
@pytest.mark.parametrize("erase", [None, False, True])
def test_growth_and_refills_give_what_a_run_from_scratch_gives(
    store: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch, how: str, erase: bool | None
) -> None:
    def build() -> None:
        if how != "exact":
            api.index(store, target_recall=1, options=Options(replace(wanted, shard_rows=100)))

    wanted = IndexOptions(nlist=6, code="float16") if how == "lists" else IndexOptions()
    build()
    wanted = IndexOptions()
    filters = FilterOptions(0.3, True, ("b",))
    api.neighbours(store, saved=5, name="grown", filters=filters)
    if erase is not None:
        purge(store, "doc-6", "doc-10", "copy of doc-12", "doc-31", "doc-33", "copy of doc-40", erase=erase)
        api.neighbours(store, saved=5, name="grown")
    grow(store, tiny_encoder, with_copies(20, first=200))
    build()
    asked = spied(monkeypatch)
    grown = api.neighbours(store, saved=5, name="grown")
    assert grown.filters_kept and grown.filters == {"max_overlap": 0.3, "near_copies": True, "exclude_sources": ["b"]}
    assert min(n for n, _ in asked) < grown.rows
    api.neighbours(store, saved=5, name="at-once", filters=filters)
    ids, distances = saved_neighbours(store, "grown")
    other_ids, other = saved_neighbours(store, "at-once")
    truth = oracle(store, store, 5, lambda q, n, f: is_copy(q, n, f) or overlaps(0.3)(q, n, f), frozenset("ac"))
    assert_same((other_ids, other), truth)
    there = ids >= 0  # of rows that lost some as many as are known, and no fewer than are used
    assert np.array_equal(there[:, :2], other_ids[:, :2] >= 0) and (there <= (other_ids >= 0)).all()
    assert erase is not None or np.array_equal(there, other_ids >= 0)
    other_ids[~there], other[~there] = -1, np.inf
    assert_same((ids, distances), (other_ids, other))
    assert api.verify(store).problems == []
    assert api.neighbours(store, saved=5, name="grown").queries == 0


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), prog_name="retrotool")


def test_a_plain_run_keeps_what_was_asked_for_until_it_is_dropped(store: Path) -> None:
    reported = run("neighbours", store, "--max-overlap", 0.4, "--exclude-source", "a", "--saved", 5).stdout
    assert reported.endswith("Excluded: more than 0.4 of a chunk in common; the source a.\n")
    first = saved_neighbours(store)
    reported = run("neighbours", store, "--saved", 5).stdout
    assert reported.startswith("All embedded chunks have their neighbours")
    assert "the source a (as before; --no-filters drops this)." in reported
    found = api.neighbours(store, saved=5, filters=FilterOptions(near_copies=True))
    assert found.queries == found.rows and not found.filters_kept
    assert found.filters == {"max_overlap": 0.4, "near_copies": True, "exclude_sources": ["a"]}
    assert "excluded: more than 0.4 of a chunk in common; near copies; the source a" in run("info", store).stdout
    found = api.neighbours(store, saved=5, filters=FilterOptions(0.4, exclude_sources=("a",), drop=True))
    assert found.queries == found.rows and found.filters == {"max_overlap": 0.4, "exclude_sources": ["a"]}
    assert np.array_equal(saved_neighbours(store)[1], first[1])
    found = api.neighbours(store, saved=5, filters=FilterOptions(drop=True))
    assert found.queries == found.rows and found.filters == {}
    assert_same(saved_neighbours(store), oracle(store, store, 5, nothing))
    assert "filters" not in retrotool.open(store)._store.state.records["neighbours:main"]
    refused = run("neighbours", store, "--only-source", "nobody", "--json")
    assert refused.exit_code == 2 and json.loads(refused.stdout)["advice"] == "The sources are: a, b, c"


def test_names_of_sources_stay_out_of_the_log(tmp_path: Path, tiny_encoder: Path) -> None:
    rows = [{**row, "source": f"blog of jane {i % 2}"} for i, row in enumerate(make_rows(20, words=40))]
    store = grow(tmp_path / "store", tiny_encoder, rows)
    api.neighbours(store, filters=FilterOptions(exclude_sources=("blog of jane 1",)))
    assert api.info(store).neighbours["main"]["filters"] == {"exclude_sources": ["blog of jane 1"]}
    purge(store, *(row["id"] for row in rows[1::2]), erase=True)
    assert not any(b"jane" in file.read_bytes() for file in stored_files(store, "log/*"))
    assert api.info(store).neighbours["main"]["filters"] == {"exclude_sources": [], "unknown_sources": 1}
    assert api.neighbours(store).filters_kept, "what it named is gone, which is no reason to forget it"


def test_a_table_with_other_filters_is_not_read_under_the_name(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api.neighbours(store)
    opened = retrotool.open(store)
    chunk = int(opened.chunk_ids(0)[0])

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ExactDatabase, "search", killed)
        with pytest.raises(KeyboardInterrupt):
            api.neighbours(store, filters=FilterOptions(near_copies=True))
    opened.refresh()
    with pytest.raises(UsageError, match="has no neighbours 'main' yet"):
        opened.neighbours(chunk)
    assert api.neighbours(store).filters == {"near_copies": True}, "what was begun goes on"
    opened.refresh()
    assert opened.neighbours(chunk)
