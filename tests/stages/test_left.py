"""What ``embed``, ``index`` and ``neighbours`` say of work that is not done, or not to be counted."""

from __future__ import annotations

import gc
import json
import shlex
import weakref
from pathlib import Path

import pytest
from conftest import Cli, make_rows, write_jsonl
from stored import stored_file

import retrotool
from retrotool import api
from retrotool import app as command_line
from retrotool.errors import CorruptError, UsageError
from retrotool.index import recall
from retrotool.store.store import Store


def purge(store: Path, *documents: str, erase: bool = False) -> None:
    names = store.parent / "names"
    names.write_text("".join(f"{name}\n" for name in documents))
    api.purge(store, api.Selectors(document=Path(names)), reason="test", erase=erase)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[dict[str, object], str]:
    """A command with ``--json``, in this process: its result and what it said on stderr."""
    with pytest.raises(SystemExit) as ended, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["retrotool", *map(str, arguments), "--json"])
        command_line.main()
    assert ended.value.code in (0, None)
    shown = capsys.readouterr()
    return json.loads(shown.out), shown.err


def test_parts_that_are_not_embedded_or_not_indexed_are_reported_with_the_next_commands(
    store_copy: Path, tmp_path: Path, tiny_encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = store_copy
    api.chunk(store, [str(write_jsonl(tmp_path / "more.jsonl", make_rows(20, first=100_000)))])
    purge(store, "doc-100003")
    new = sum(len(ids) for ids in map(retrotool.open(store).chunk_ids, retrotool.open(store).parts()[4:]))
    result, reported = run(capsys, "index", store)
    embedding, indexing = (shlex.join(["retrotool", *words]) for words in (
        ["embed", str(store), "--encoder", str(tiny_encoder)], ["index", str(store)]
    ))  # fmt: skip
    assert (result["not_embedded"], result["next"]) == (new, [embedding, indexing])
    assert f"{new} chunks" in reported and embedding in reported and indexing in reported
    finding = shlex.join(["retrotool", "neighbours", str(store)])
    result, reported = run(capsys, "neighbours", store)
    assert (result["not_embedded"], result["not_indexed"]) == (new, new)
    assert result["next"] == [embedding, indexing, finding]
    assert all(command in reported for command in result["next"])
    run(capsys, "embed", store, "--encoder", tiny_encoder)
    result, reported = run(capsys, "neighbours", store)
    assert (result["not_embedded"], result["not_indexed"]) == (0, new)
    assert result["next"] == [indexing, finding]
    for command in result["next"]:
        result, reported = run(capsys, *shlex.split(command)[1:])
    assert (result["not_embedded"], result["not_indexed"], result["next"]) == (0, 0, [])
    assert "Next" not in reported
    reader = retrotool.open(store)
    ids = [j for part in reader.parts() for i in reader.chunk_ids(part) for j, _ in reader.neighbour_ids(int(i), k=20)]
    assert any(j >> 32 >= 4 for j in ids)


def test_the_next_command_of_two_stores_can_be_run_as_it_stands(
    built_store: Path, tmp_path: Path, tiny_encoder: Path
) -> None:
    queries = tmp_path / "my queries"
    for n in (5, 7):
        source = write_jsonl(tmp_path / f"{n}.jsonl", make_rows(n, first=100 * n))
        api.chunk(queries, [str(source)], tokenizer=str(tiny_encoder))
        if n == 5:
            api.embed(queries, encoder=str(tiny_encoder))
    result = api.neighbours(built_store, queries=queries, name="built", k=3, saved=7)
    assert result.not_embedded == len(retrotool.open(queries).chunk_ids(1))
    assert [shlex.split(command)[1:] for command in result.next] == [
        ["embed", str(queries), "--encoder", str(tiny_encoder)],
        ["neighbours", str(built_store), *shlex.split(f"--queries '{queries}' -k 3 --saved 7 --name built")],
    ]


@pytest.mark.parametrize("erase", [False, True])
def test_purged_chunks_are_not_counted(tmp_path: Path, corpus: Path, tiny_encoder: Path, erase: bool) -> None:
    store = tmp_path / "store"
    api.chunk(store, [str(corpus)], tokenizer=str(tiny_encoder), part_size=100)
    whole = api.info(store).chunks
    purge(store, "doc-3", "doc-50", erase=erase)
    live = api.info(store).chunks
    embedded = api.embed(store, encoder=str(tiny_encoder))
    assert (embedded.chunks, embedded.embedded) == (live, live)
    made = api.index(store)
    assert (made.vectors, made.not_embedded) == (live if erase else whole, 0)
    found = api.neighbours(store)
    assert (found.queries, found.rows) == (live, live)
    purge(store, "doc-7", erase=erase)
    assert api.embed(store, encoder=str(tiny_encoder)).embedded == api.info(store).chunks < live
    assert api.neighbours(store, name="again").queries == api.info(store).chunks


def test_an_erase_while_the_recall_is_measured_is_no_error(
    tmp_path: Path, corpus: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    api.chunk(store, [str(corpus)], tokenizer=str(tiny_encoder), part_size=100)
    api.embed(store, encoder=str(tiny_encoder))
    measure, beside = recall.find_truth, ["doc-9", "doc-70"]

    def erasing(*arguments: object, **options: object) -> object:
        if beside:
            purge(store, beside.pop(), erase=True)
        return measure(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(recall, "find_truth", erasing)
    result = api.index(store)
    assert not beside
    assert (result.vectors, result.recall_at_10) == (api.info(store).chunks, 1.0)
    assert Store.open(store).state.records["index:main"]["vectors"] == result.vectors
    assert api.verify(store).problems == []


def test_an_index_that_is_broken_is_an_error_and_not_measured_for_ever(store_copy: Path) -> None:
    path = stored_file(store_copy, api.info(store_copy).indexes["main"]["shards"][0])
    path.write_bytes(b"x" + path.read_bytes()[1:])
    with pytest.raises(CorruptError, match=path.name):
        api.index(store_copy, target_recall=0.5)


def test_ids_that_no_chunk_can_have_are_nobodys(built_store: Path) -> None:
    reader = retrotool.open(built_store)
    ids = [0, 2**63, 2**200, -1, -(2**70), 2**63 - 1]
    assert reader.is_live(ids).tolist() == reader.is_searchable(ids).tolist() == [True] + [False] * 5
    assert reader.tokens(ids).any(axis=1).tolist() == [True] + [False] * 5
    for wrong in ids[1:]:
        for ask in (reader.neighbour_ids, reader.neighbours, reader.chunk):
            with pytest.raises(UsageError, match="no chunk"):
                ask(wrong)
        assert reader.continuation(wrong) is None or wrong == -1


def test_readers_that_are_gone_leave_few_stores_in_memory(built_store: Path) -> None:
    opened = []
    for _ in range(20):
        reader = retrotool.open(built_store)
        assert reader.text(reader.tokens([0])[0])
        opened.append(weakref.ref(reader._store))
        del reader
    gc.collect()
    assert sum(store() is not None for store in opened) <= 8


def test_a_store_named_by_a_relative_path_is_so_named_in_every_next_command(
    store_copy: Path,
    tmp_path: Path,
    tiny_encoder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    api.chunk(store_copy, [str(write_jsonl(tmp_path / "more.jsonl", make_rows(3, first=100_000)))])
    monkeypatch.chdir(store_copy.parent)
    result, _ = run(capsys, "neighbours", store_copy.name)
    assert result["next"] == [
        shlex.join(["retrotool", "embed", store_copy.name, "--encoder", str(tiny_encoder)]),
        f"retrotool index {store_copy.name}",
        f"retrotool neighbours {store_copy.name}",
    ]


def test_the_notes_are_on_stderr_and_the_exit_code_is_0(store_copy: Path, tmp_path: Path, cli: Cli) -> None:
    api.chunk(store_copy, [str(write_jsonl(tmp_path / "more.jsonl", make_rows(3, first=100_000)))])
    for command in ("index", "neighbours"):
        result = cli(command, store_copy)
        assert result.returncode == 0
        assert "Next:" in result.stderr and "retrotool embed" in result.stderr and "Next:" not in result.stdout
