"""Chunks beside their neighbours: against the API, and against the textbook's longest common substring."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import make_rows, make_text, write_jsonl
from oracle import read_plain
from test_overlap import by_table

import retrotool
from retrotool import api
from retrotool.errors import ErasedError, UsageError
from retrotool.inspect import run as inspect_run
from retrotool.inspect.run import MARKED_FROM, Choice, InspectResult
from retrotool.store.folding import writing
from retrotool.store.log import Draft
from retrotool.store.parts import format_id
from retrotool.store.store import Store
from retrotool.tokenizers.tokenizer import Split

EVERYTHING = Choice(random=10**9)


def tokens_of(reader: retrotool.reader.Reader, chunk: int) -> tuple[list[int], list[int]]:
    following = reader.continuation(chunk)
    return reader.chunk(chunk).tokens.tolist(), following.tokens.tolist() if following else []


def split_by_hand(reader: retrotool.reader.Reader, tokens: list[int], start: int, stop: int) -> Split:
    """Of tokens of whole words: what is decoded up to the run, up to its end, and in all."""
    start, stop = max(start, 0), min(stop, len(tokens))
    texts = [reader.text(np.array(tokens[:n], np.uint16)) for n in (start, stop, len(tokens))]
    if start >= stop:
        return Split(texts[2], "", "")
    assert texts[2].startswith(texts[1]) and texts[1].startswith(texts[0])
    return Split(texts[0], texts[1][len(texts[0]) :], texts[2][len(texts[1]) :])


def check(store: Path, found: InspectResult, databases: dict[str, Path] | None = None) -> None:
    """All that is said of chunks and neighbours, by the API and a table of all pairs of tokens."""
    reader = retrotool.open(store)
    of = {name: retrotool.open(path) for name, path in (databases or {str(store): store}).items()}
    for chunk in found.chunks:
        plain = reader.chunk(chunk.id)
        assert (chunk.document, chunk.index, chunk.text) == (plain.document, plain.index, plain.text)
        assert (chunk.n_tokens, chunk.key) == (plain.n_tokens, plain.key)
        mine = plain.tokens.tolist()
        for near in chunk.neighbours:
            database = of[near.database]
            assert (near.document, near.index, near.text) == (
                database.chunk(near.id).document, database.chunk(near.id).index, database.chunk(near.id).text
            )  # fmt: skip
            following = database.continuation(near.id)
            assert near.continuation == (following.text if following else None)
            first, second = tokens_of(database, near.id)
            common = near.common
            assert common is not None
            assert common.tokens == by_table(mine, first + second)
            assert common.r == common.tokens / reader.chunk_length
            assert common.marked == (common.tokens >= MARKED_FROM)
            start, there, stop = common.start, common.start_in_neighbour, common.start_in_neighbour + common.tokens
            assert mine[start : start + common.tokens] == (first + second)[there:stop]
            assert common.chunk == split_by_hand(reader, mine, start, start + common.tokens)
            assert common.text == split_by_hand(database, first, there, stop)
            rest = split_by_hand(database, second, there - len(first), stop - len(first)) if following else None
            assert common.continuation == rest
        assert "".join(piece for piece, _ in chunk.segments()) == chunk.text


def test_all_is_as_the_api_and_the_textbook_have_it(built_store: Path) -> None:
    found = api.inspect(built_store, EVERYTHING, k=4)
    check(built_store, found)
    reader, plain = retrotool.open(built_store), read_plain(built_store)
    assert [chunk.id for chunk in found.chunks] == plain.ids[plain.live].tolist()
    for chunk in found.chunks:
        assert [(near.id, near.distance) for near in chunk.neighbours] == reader.neighbour_ids(chunk.id, k=4)
    sources = dict(zip([row["id"] for row in make_rows(120)], [row["source"] for row in make_rows(120)], strict=True))
    sizes = {name: int((plain.documents == name).sum()) for name in sources}
    for one in (*found.chunks, *(near for chunk in found.chunks for near in chunk.neighbours)):
        assert (one.source, one.of) == (sources[one.document], sizes[one.document])
    assert found.shown == len(found.chunks) == sum(found.histogram)
    assert found.neighbours == 4 * found.shown
    longest = [max(near.common.tokens for near in chunk.neighbours) for chunk in found.chunks]
    assert found.marked == sum(n >= MARKED_FROM for n in longest) > 0
    assert found.farthest == max(near.distance for chunk in found.chunks for near in chunk.neighbours)


def test_marks_in_a_chunk_are_the_runs_of_its_neighbours(built_store: Path) -> None:
    several = 0
    for chunk in api.inspect(built_store, EVERYTHING, k=5).chunks:
        for rank, near in enumerate(chunk.neighbours, 1):
            reported = "".join(piece for piece, ranks in chunk.segments() if rank in ranks)
            assert near.common is not None
            assert reported == (near.common.chunk.run.strip() if near.common.marked else "")
        several += any(len(ranks) > 1 for _, ranks in chunk.segments())
    assert several


def test_blocks_do_not_show(built_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = api.inspect(built_store, EVERYTHING, k=3)
    monkeypatch.setattr("retrotool.inspect.run._BLOCK", 21)
    assert api.inspect(built_store, EVERYTHING, k=3) == whole


def test_random_chunks_are_drawn_by_seed_from_all_parts(store_copy: Path, tmp_path: Path) -> None:
    def drawn(n: int, seed: int) -> list[int]:
        return [chunk.id for chunk in api.inspect(store_copy, Choice(random=n, seed=seed)).chunks]

    parts = {part["part"]: part["chunks"]["rows"] for part in api.info(store_copy).parts}
    total = sum(parts.values())
    some = drawn(60, 1)
    assert some == drawn(60, 1) == sorted(set(some)) != drawn(60, 2)
    for part, rows in parts.items():
        assert abs(sum(chunk >> 32 == part for chunk in some) - 60 * rows / total) <= 1
    assert {chunk >> 32 for chunk in drawn(len(parts), 3)} == set(parts)
    counts = np.zeros(total)
    order = {chunk: i for i, chunk in enumerate(drawn(total, 0))}
    for seed in range(20):
        counts[[order[chunk] for chunk in drawn(total // 4, seed)]] += 1
    assert counts.max() <= 15 and counts.mean() == pytest.approx(5, rel=0.02)
    api.purge(store_copy, api.Selectors(where="source = 'a'"), reason="test")
    left = api.inspect(store_copy, EVERYTHING)
    assert {chunk.source for chunk in left.chunks} == {"b"} and left.shown < total


@pytest.mark.parametrize("erase", [False, True])
def test_what_is_purged_is_not_shown(store_copy: Path, tmp_path: Path, erase: bool) -> None:
    before = api.inspect(store_copy, EVERYTHING, k=6)
    targets = [i for i in read_plain(store_copy).ids.tolist() if i % 3 == 1]
    (tmp_path / "ids").write_text("".join(f"{i}\n" for i in targets))
    api.purge(store_copy, api.Selectors(chunk=tmp_path / "ids"), reason="test", erase=erase)
    after = api.inspect(store_copy, EVERYTHING, k=6)
    check(store_copy, replace(after, chunks=after.chunks[::4]))
    assert {chunk.id for chunk in before.chunks} - {chunk.id for chunk in after.chunks} == set(targets)
    shown = [near for chunk in after.chunks for near in chunk.neighbours]
    assert not set(targets) & {near.id for near in shown}
    assert all(near.continuation is None for near in shown if near.id + 1 in targets)
    with pytest.raises(UsageError, match=f"chunk {format_id(targets[0])} is not live"):
        api.inspect(store_copy, Choice(chunk=targets[0]))


def test_a_chunk_without_neighbours_has_none(tmp_path: Path, tiny_encoder: Path) -> None:
    store = tmp_path / "store"
    rows = [{"id": f"d{i}", "text": make_text(i, 30)} for i in range(2)]
    api.chunk(store, [str(write_jsonl(tmp_path / "d.jsonl", rows))], tokenizer=str(tiny_encoder))
    api.embed(store, encoder=str(tiny_encoder))
    api.neighbours(store)
    (tmp_path / "ids").write_text("d1\n")
    api.purge(store, api.Selectors(document=tmp_path / "ids"), reason="test")
    found = api.inspect(store, Choice(chunk=0))
    assert (found.shown, found.without, found.neighbours, found.chunks[0].neighbours) == (1, 1, 0, ())


def test_of_a_record_the_key_is_shown_and_a_value_says_that_it_is_none(tmp_path: Path, tiny_encoder: Path) -> None:
    from key_values import Written, make_store

    rows = [Written(f"r{i}", make_text(i, 12), make_text(100 + i, 90)) for i in range(12)]
    store = make_store(tmp_path / "store", tiny_encoder, rows)
    api.embed(store, encoder=str(tiny_encoder))
    api.neighbours(store)
    found = api.inspect(store, Choice(document="r3"))
    (key,) = found.chunks
    assert (key.document, key.index, key.key, len(key.neighbours)) == ("r3", 0, True, 2)
    check(store, found)
    (value,) = api.inspect(store, Choice(chunk=key.id + 1)).chunks
    assert (value.document, value.index, value.key, value.neighbours) == ("r3", 1, False, ())
    assert value.text == retrotool.open(store).chunk(key.id + 1).text
    assert all(chunk.key for chunk in api.inspect(store, EVERYTHING).chunks)


@pytest.fixture
def mixed(tmp_path: Path, tiny_encoder: Path) -> tuple[Path, dict[str, Path]]:
    """A query store with tables of two databases, and the mixture ``both`` of them, one at twice the weight."""
    queries = tmp_path / "queries"
    stores = {"near": tmp_path / "near", "far": tmp_path / "far"}
    for store, first in ((queries, 300), (stores["near"], 0), (stores["far"], 40)):
        rows = [{**row, "id": f"{store.name}-{row['id']}"} for row in make_rows(30, first=first)]
        source = write_jsonl(tmp_path / f"{store.name}.jsonl", rows)
        api.chunk(store, [str(source)], tokenizer=str(tiny_encoder))
        api.embed(store, encoder=str(tiny_encoder))
    for name, database in stores.items():
        api.neighbours(database, queries=queries, name=name)
    mix(queries, {"near": 1.0, "far": 2.0})
    return queries, stores


def mix(queries: Path, weights: dict[str, float]) -> None:
    store = Store.open(queries)
    record = {"mix": [{"table": name, "weight": weight} for name, weight in weights.items()]}
    with writing(store) as run:
        store.commit(run, lambda _: Draft("neighbours", records={"neighbours:both": record}))


def test_in_a_mixture_every_neighbour_names_its_database(mixed: tuple[Path, dict[str, Path]]) -> None:
    queries, stores = mixed
    found = api.inspect(queries, EVERYTHING, table="both", k=6)
    some = replace(found, chunks=found.chunks[::3])
    check(queries, some, {str(path): path for path in stores.values()})
    assert [(table.name, table.weight, table.database) for table in found.tables] == [
        ("near", 1.0, str(stores["near"])), ("far", 2.0, str(stores["far"])),
    ]  # fmt: skip
    reader = retrotool.open(queries)
    seen = set()
    for chunk in found.chunks:
        both = [(d / w, i, d, str(stores[name])) for name, w in (("near", 1.0), ("far", 2.0))
                for i, d in reader.neighbour_ids(chunk.id, name, 6)]  # fmt: skip
        best = sorted(both, key=lambda one: one[0])[:6]
        assert [(n.id, n.distance, n.database) for n in chunk.neighbours] == [one[1:] for one in best]
        seen |= {near.database for near in chunk.neighbours}
    assert seen == {str(path) for path in stores.values()}


def test_tokens_of_another_tokenizer_are_not_compared(
    built_store: Path, tmp_path: Path, tiny_encoder: Path, byte_level_tokenizer: Path
) -> None:
    queries = tmp_path / "queries"
    rows = [{"id": f"q{i}", "text": make_text(i, 80)} for i in range(4)]
    source = str(write_jsonl(tmp_path / "q.jsonl", rows))
    api.chunk(queries, [source], tokenizer=str(byte_level_tokenizer))
    api.embed(queries, encoder=str(tiny_encoder))
    api.neighbours(built_store, queries=queries)
    found = api.inspect(queries, EVERYTHING)
    database = retrotool.open(built_store)
    assert [table.comparable for table in found.tables] == [False]
    for chunk in found.chunks:
        assert len(chunk.neighbours) == 2
        for near in chunk.neighbours:
            assert (near.common, near.text) == (None, database.chunk(near.id).text)
            following = database.continuation(near.id)
            assert near.continuation == (following.text if following else None)


def test_a_name_or_a_part_without_a_table_names_the_command(
    store_copy: Path, tmp_path: Path, tiny_encoder: Path
) -> None:
    with pytest.raises(UsageError, match="has no neighbours 'other'; it has: main") as error:
        api.inspect(store_copy, Choice(chunk=0), table="other")
    assert f"retrotool neighbours {store_copy} --name other\n" in error.value.advice
    rows = [{**row, "id": f"late-{row['id']}"} for row in make_rows(5, first=200)]
    api.chunk(store_copy, [str(write_jsonl(tmp_path / "late.jsonl", rows))], tokenizer=str(tiny_encoder))
    api.embed(store_copy, encoder=str(tiny_encoder))
    for choice in (
        Choice(document="late-doc-201"),
        Choice(chunk=retrotool.open(store_copy).document("late-doc-201")[0]),
    ):
        with pytest.raises(UsageError, match="has no neighbours 'main' yet") as error:
            api.inspect(store_copy, choice)
        assert error.value.advice == f"Compute them: retrotool neighbours {store_copy} --index main"
    assert "late" not in {chunk.document[:4] for chunk in api.inspect(store_copy, EVERYTHING).chunks}


@pytest.mark.parametrize(
    ("choice", "k", "message"),
    [
        (Choice(chunk=1, random=1), None, "give one of --chunk"),
        (Choice(random=0), None, "--random 0"),
        (Choice(chunk=1 << 40), None, "the store has no chunk"),
        (Choice(chunk=-1), None, "the store has no chunk -1"),
        (Choice(chunk=1 << 80), None, "the store has no chunk"),
        (Choice(document="nobody"), None, "no document 'nobody', or it was purged"),
        (Choice(chunk=0), 21, "-k 21 is not between 1 and the 20 neighbours that table 'main' has saved"),
        (Choice(chunk=0), 0, "-k 0"),
    ],
)
def test_what_is_not_there_is_said(built_store: Path, choice: Choice, k: int | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        api.inspect(built_store, choice, k=k)


def test_when_files_are_erased_meanwhile_it_begins_again(built_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, left = inspect_run._inspect, [2]

    def erased(*arguments: object) -> InspectResult:
        if left[0]:
            left[0] -= 1
            raise ErasedError("gone")
        return begin(*arguments)

    monkeypatch.setattr(inspect_run, "_inspect", erased)
    assert api.inspect(built_store, Choice(chunk=0)).shown == 1
    left[0] = 20
    with pytest.raises(ErasedError):
        api.inspect(built_store, Choice(chunk=0))
