"""Which training chunks name what was purged, by brute force over the tables as they are stored."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import make_rows, write_jsonl
from oracle import Plain, read_plain, saved_neighbours
from stored import copy_store, move_store, stored_file
from test_key_values import build, key_column, records
from test_neighbour_filters import run

from retrotool import api
from retrotool.errors import StoreNotFoundError, UsageError
from retrotool.neighbours.run import SearchOptions
from retrotool.purge.affected import AffectedResult
from retrotool.store import parts
from retrotool.store.parts import parse_id

EXACT = SearchOptions(exact=True)
K, SAVED = 2, 8
Ranks = dict[int, tuple[int | None, int | None]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """A database and a store of queries, both with neighbours in the database; not to be changed."""
    folder = tmp_path_factory.mktemp("affected")
    grow(folder / "store", tiny_encoder, 70, 0)
    api.neighbours(folder / "store", k=K, saved=SAVED, search=EXACT)
    grow(folder / "training", tiny_encoder, 20, 800)
    api.neighbours(folder / "store", queries=folder / "training", k=K, saved=SAVED, search=EXACT)
    return folder


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    return copy_store(made / "store", tmp_path / "store")


def grow(store: Path, encoder: Path, n: int, first: int) -> None:
    inputs = [str(write_jsonl(store.parent / f"{store.name}-{first}.jsonl", make_rows(n, first=first, words=120)))]
    api.chunk(store, inputs, tokenizer=str(encoder), part_size=60)
    api.embed(store, encoder=str(encoder), devices="cpu")


@dataclass
class Timeline:
    """A database whose purges are kept in mind: what was purged when."""

    store: Path
    purged: dict[str, set[int]] = field(default_factory=dict)

    def purge(self, chunks: list[int], *, erase: bool = False) -> str:
        path = self.store.parent / "ids"
        path.write_text("".join(f"{i}\n" for i in chunks))
        name = api.purge(self.store, api.Selectors(chunk=Path(path)), reason="test", erase=erase).purge
        self.purged[name] = set(chunks)
        return name

    def undo(self, purge: str) -> None:
        api.undo(self.store, purge, reason="test")
        del self.purged[purge]

    def ranks(self, raw: np.ndarray, queries: Plain, purges: list[str] | None = None) -> Ranks:
        """By live training chunk: the best place of a purged chunk as a neighbour, and as what follows one."""
        plain = read_plain(self.store)
        document = dict(zip(plain.ids.tolist(), plain.documents.tolist(), strict=True))
        asked = set().union(*(self.purged[one] for one in purges or self.purged))
        found: Ranks = {}
        for row, ids in enumerate(raw.tolist()):
            if not queries.live[row]:
                continue
            near = [rank for rank, i in enumerate(ids, 1) if i in asked]
            behind = [
                rank
                for rank, i in enumerate(ids, 1)
                if i >= 0 and i + 1 in asked and document[i] == document.get(i + 1)
            ]
            if near or behind:
                found[int(queries.ids[row])] = (min(near, default=None), min(behind, default=None))
        return found


def written(file: Path) -> Ranks:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [one["chunk"] for one in lines] == sorted({one["chunk"] for one in lines})
    for one in lines:
        ranks = [rank for rank in (one["neighbour"], one["continuation"]) if rank is not None]
        assert one["used"] == (min(ranks) <= K)
    return {one["chunk"]: (one["neighbour"], one["continuation"]) for one in lines}


def assert_counts(result: AffectedResult, ranks: Ranks) -> None:
    of_parts = {part.part: {i: rank for i, rank in ranks.items() if i >> 32 == part.part} for part in result.parts}
    for counts, some in [(result, ranks), *((part, of_parts[part.part]) for part in result.parts)]:
        near = {i for i, (rank, _) in some.items() if rank is not None}
        near_k = {i for i, (rank, _) in some.items() if rank is not None and rank <= K}
        behind = {i for i, (_, rank) in some.items() if rank is not None}
        behind_k = {i for i, (_, rank) in some.items() if rank is not None and rank <= K}
        assert (counts.in_k, counts.in_saved) == (len(near_k), len(near))
        assert (counts.following_in_k, counts.following_in_saved) == (len(behind_k - near_k), len(behind - near))
    assert [one.chunk for one in result.examples] == sorted(ranks)[:10]


def in_groups_of(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written from now on has row groups of so many rows, and is looked through in these."""
    monkeypatch.setattr(parts.write_parquet, "__kwdefaults__", {"row_group": rows, "about": None})
    for module in ("purge.affected", "neighbours.stage", "store.neighbour_tables"):
        monkeypatch.setattr(f"retrotool.{module}.ROW_GROUP", rows)


def some(store: Path, n: int, seed: int) -> list[int]:
    """Chunks at random, wherever they are in their documents."""
    return sorted(np.random.default_rng(seed).choice(read_plain(store).ids, n, replace=False).tolist())


def test_each_affected_chunk_is_reported_with_its_places(store: Path, tmp_path: Path) -> None:
    raw = saved_neighbours(store)[0]
    time = Timeline(store)
    targets = some(store, 12, 0)
    time.purge(targets)
    queries = read_plain(store, purged=frozenset(targets))
    ranks = time.ranks(raw, queries)
    result = api.affected(store, out=tmp_path / "out.jsonl")
    assert written(tmp_path / "out.jsonl") == ranks
    assert_counts(result, ranks)
    assert 10 < result.in_k < result.in_saved < result.rows and result.following_in_k > 5
    assert result.rows == queries.live.sum() and (result.k, result.saved) == (K, SAVED)
    (asked,) = result.purges
    assert (asked.chunks, asked.erased, asked.since) == (12, False, 0)
    documents = dict(zip(queries.ids.tolist(), queries.documents.tolist(), strict=True))
    for line in (tmp_path / "out.jsonl").read_text().splitlines():
        one = json.loads(line)
        assert one["document"] == documents[one["chunk"]]
        assert one["source"] == "ab"[int(one["document"].removeprefix("doc-")) % 2]


def test_tables_of_several_row_groups_are_read_whole(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_groups_of(16, monkeypatch)
    api.neighbours(store, name="small", k=K, saved=SAVED, search=EXACT)
    files = [stored_file(store, part["neighbours"]["small"]["path"]) for part in api.info(store).parts]
    assert all(pq.read_metadata(file).num_row_groups >= 4 for file in files[:-1])
    raw = saved_neighbours(store, "small")[0]
    time = Timeline(store)
    targets = some(store, 12, 0)
    time.purge(targets)
    ranks = time.ranks(raw, read_plain(store, purged=frozenset(targets)))
    assert_counts(api.affected(store, "small", out=tmp_path / "out.jsonl"), ranks)
    assert written(tmp_path / "out.jsonl") == ranks


def test_of_several_purges_each_can_be_asked_about(store: Path, tmp_path: Path) -> None:
    raw = saved_neighbours(store)[0]
    time = Timeline(store)
    purges = [time.purge(some(store, 25, seed)) for seed in range(4)]
    queries = read_plain(store, purged=frozenset(set().union(*time.purged.values())))
    for number, asked in enumerate([[], purges[3:], purges[1:3], purges[:1]]):
        out = tmp_path / f"{number}.jsonl"
        ranks = time.ranks(raw, queries, asked)
        assert_counts(api.affected(store, "main", asked, out=out), ranks)
        assert written(out) == ranks


def test_a_purge_that_was_undone_is_not_looked_for(store: Path, tmp_path: Path) -> None:
    raw = saved_neighbours(store)[0]
    time = Timeline(store)
    first = time.purge(some(store, 60, 1))
    second = time.purge([chunk for chunk in some(store, 40, 2) if chunk not in time.purged[first]])
    time.undo(first)
    queries = read_plain(store, purged=frozenset(time.purged[second]))
    result = api.affected(store, out=tmp_path / "out.jsonl")
    assert written(tmp_path / "out.jsonl") == time.ranks(raw, queries, [second])
    assert [one.purge for one in result.purges] == [second]
    with pytest.raises(UsageError, match=r"was undone by commit \d+: its chunks"):
        api.affected(store, "main", [first])


def test_chunks_that_are_purged_themselves_are_counted_and_not_reported(store: Path, tmp_path: Path) -> None:
    raw, plain = saved_neighbours(store)[0], read_plain(store)
    names = np.unique(plain.documents.astype(str))[::3]
    targets = plain.ids[np.isin(plain.documents.astype(str), names)].tolist()
    Timeline(store).purge(targets)
    result = api.affected(store, out=tmp_path / "out.jsonl")
    hit = np.isin(raw, targets).any(axis=1)
    gone = np.isin(plain.ids, targets)
    assert result.purged == (hit & gone).sum() > 10
    assert result.in_saved == (hit & ~gone).sum() and result.rows == (~gone).sum()
    text = (tmp_path / "out.jsonl").read_text() + run("affected", store).stdout
    assert text.count("doc-") > 20
    for name in names:
        assert f'"{name}"' not in text and f"{name}," not in text
    assert not {json.loads(line)["chunk"] for line in (tmp_path / "out.jsonl").read_text().splitlines()} & set(targets)


def test_tables_of_another_store_are_asked_there(made: Path, store: Path, tmp_path: Path) -> None:
    training = copy_store(made / "training", tmp_path / "training")
    api.neighbours(store, queries=training, name="t", k=K, saved=SAVED, search=EXACT)
    raw, queries = saved_neighbours(training, "t")[0], read_plain(training)
    time = Timeline(store)
    purged = time.purge(some(store, 30, 0))
    ranks = time.ranks(raw, queries)
    result = api.affected(training, "t", out=tmp_path / "out.jsonl")
    assert written(tmp_path / "out.jsonl") == ranks and len(ranks) > 10
    assert_counts(result, ranks)
    assert result.purges[0].database == str(store)
    api.erase(store, [purged])
    after = api.affected(training, "t", [purged])
    assert (after.in_k, after.in_saved) == (result.in_k, result.in_saved), "an erase there does not reach these tables"
    assert "is not known" not in run("affected", training, "--table", "t").stdout
    api.neighbours(store, queries=training, name="t", k=K, saved=SAVED, search=EXACT)
    after = api.affected(training, "t")
    assert after.in_saved == 0 and after.purges[0].since == after.purges[0].parts == 1
    assert f"Purge {purged}: 1 of 1 part were searched after it" in (run("affected", training, "--table", "t").stdout)
    move_store(store, tmp_path / "away")
    with pytest.raises(StoreNotFoundError, match="is missing; it was at"):
        api.affected(training, "t")


def test_of_a_mixture_each_table_is_read(store: Path, tmp_path: Path, tiny_encoder: Path) -> None:
    grow(tmp_path / "books", tiny_encoder, 30, 400)
    api.neighbours(
        store, name="mix", databases=[(tmp_path / "books", 0.5)], k=K, saved=SAVED, search=EXACT
    )  # fmt: skip
    ours, theirs = Timeline(store), Timeline(tmp_path / "books")
    raw = {name: saved_neighbours(store, f"mix.{name}")[0] for name in ("store", "books")}
    purges = ours.purge(some(store, 15, 0)), theirs.purge(some(tmp_path / "books", 15, 0))
    queries = read_plain(store, purged=frozenset(ours.purged[purges[0]]))
    both = ours.ranks(raw["store"], queries), theirs.ranks(raw["books"], queries)
    best = {}
    for chunk in {*both[0], *both[1]}:
        pairs = zip(*(one.get(chunk, (None, None)) for one in both), strict=True)
        best[chunk] = tuple(min((rank for rank in pair if rank is not None), default=None) for pair in pairs)
    api.affected(store, "mix", out=tmp_path / "both.jsonl")
    assert written(tmp_path / "both.jsonl") == best
    api.affected(store, "mix", [purges[1]], out=tmp_path / "books.jsonl")
    assert written(tmp_path / "books.jsonl") == both[1]


def test_a_value_that_is_purged_was_read_behind_its_key(tmp_path: Path, tiny_encoder: Path) -> None:
    store = build(tmp_path / "store", tiny_encoder, records(0, 40))
    api.neighbours(store, k=K, saved=SAVED)
    raw, plain, keys = saved_neighbours(store)[0], read_plain(store), key_column(store)
    values = plain.ids[~keys & np.roll(keys, 1)][::3].tolist()
    time = Timeline(store)
    time.purge(values)
    ranks = time.ranks(raw, plain)
    result = api.affected(store, out=tmp_path / "out.jsonl")
    assert written(tmp_path / "out.jsonl") == ranks and len(ranks) > 20
    assert result.in_saved == 0 and result.following_in_saved == len(ranks)


def test_what_was_erased_or_searched_again_is_no_longer_known(store: Path) -> None:
    time = Timeline(store)
    plain = read_plain(store)
    names = plain.documents.astype(str)
    first = time.purge(plain.ids[np.isin(names, np.unique(names)[::2])].tolist())
    before = api.affected(store)
    assert before.in_saved > 50
    api.neighbours(store, k=K, saved=SAVED)
    after = api.affected(store)
    assert 0 < after.in_saved < before.in_saved and after.purges[0].since > 0
    assert "were searched after it; what their rows contained before is not known." in (run("affected", store).stdout)
    left = plain.ids[~np.isin(plain.ids, sorted(time.purged[first]))]
    second = time.purge(left[::9].tolist())
    both = api.affected(store)
    api.erase(store, [first])
    of_second = api.affected(store, "main", [second])
    assert not of_second.purges[0].erased and 0 < of_second.in_saved < both.in_saved
    with pytest.raises(UsageError, match=f"nothing is left of {first}") as error:
        api.affected(store, "main", [first])
    assert error.value.advice == "Affected chunks can be found only until a purge is erased."
    result = api.affected(store)
    assert {one.purge: one.erased for one in result.purges} == {first: True, second: False}
    assert result.in_saved == of_second.in_saved
    assert f"Purge {first} is erased, from these tables as well: which chunks it affected is not known." in (
        run("affected", store).stdout
    )


def test_the_command(store: Path, tmp_path: Path) -> None:
    ended = run("affected", store)
    assert ended.stdout == "Nothing was purged, so no chunk is affected.\n" and ended.stderr == ""
    with pytest.raises(UsageError, match="has no purge 'p0'; nothing was purged from it") as error:
        api.affected(store, "main", ["p0"])
    assert error.value.advice == "To see how to purge: retrotool purge --help"
    purged = Timeline(store).purge(some(store, 12, 0))
    result = api.affected(store)
    out = tmp_path / "out.jsonl"
    ended = run("affected", store, purged, "--out", out)
    assert ended.exit_code == 0 and ended.stderr == ""
    assert f"All of them: {out}" in ended.stdout and "--out FILE" not in ended.stdout
    lines = out.read_text().splitlines()
    assert len(lines) == result.in_saved + result.following_in_saved
    ended = run("affected", store, "--out", out)
    assert ended.exit_code == 2 and f"--out {out} exists already" in ended.stderr
    assert out.read_text().splitlines() == lines
    printed = run("affected", store).stdout.splitlines()
    assert printed[0].startswith(
        f"{result.in_k + result.following_in_k} chunks of {result.rows} have a purged chunk among"
    )
    first = printed.index("The first of them (--out FILE writes all):") + 1
    assert len(printed[first:]) == 10
    assert [parse_id(line.split()[0]) for line in printed[first:]] == [json.loads(line)["chunk"] for line in lines[:10]]
    as_json = json.loads(run("affected", store, "--json").stdout)
    assert as_json["in_k"] == result.in_k and len(as_json["examples"]) == 10 and as_json["out"] == ""
    assert run("affected", store, "--table", "other").exit_code == 2
    for wrong in (("--erase",), ("--reason", "x"), ("--name", "main"), ("--dry-run",)):
        assert run("affected", store, *wrong).exit_code == 2
    assert run("purge", store, "--chunk", "1", "--reason", "x", "--out", tmp_path / "new").exit_code == 2


@pytest.mark.on_disk
def test_a_file_in_the_store_is_refused(store: Path) -> None:
    Timeline(store).purge(some(store, 12, 0))
    ended = run("affected", store, "--out", store / "out.jsonl")
    assert ended.exit_code == 2 and "is in the store" in ended.stderr
