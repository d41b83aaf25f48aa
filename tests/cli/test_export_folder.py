"""An export is there as a whole or not at all, is refused where it would mislead, and is read by what it is for."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Cli, make_rows, write_jsonl
from stored import copy_store, stored_file
from typer.testing import CliRunner

import retrotool
from retrotool import api
from retrotool.app import app
from retrotool.cli import result_files
from retrotool.cli.result_files import check_place, new_folder
from retrotool.errors import CorruptError, ErasedError, UsageError
from retrotool.export import run as export_run
from retrotool.inspect.run import Choice
from retrotool.neighbours.run import SearchOptions
from retrotool.neighbours.table_reader import NeighbourReader
from retrotool.store import disk, leases, neighbour_tables
from retrotool.store.neighbour_tables import NeighbourTable
from retrotool.store.parts import format_id
from retrotool.store.store import Store

EXACT = SearchOptions(exact=True)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of an export; of the manifest what does not tell the time."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = json.loads(found["export.json"])
    return {**found, "export.json": json.dumps({**manifest, "created": ""}).encode()}


def killed_at(call: int, work: Callable[[], object]) -> bool:
    """Do ``work`` in a forked child that is killed at its n-th file operation; whether it came to that."""
    child = os.fork()
    if child == 0:
        code, calls = 1, 0

        def hear(event: str, _: tuple[object, ...]) -> None:
            nonlocal calls
            if event == disk.EVENT:
                calls += 1
                if calls == call:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(hear)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0, "it failed by itself"
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("empty_folder_there", [False, True])
def test_a_kill_leaves_nothing_under_the_name_and_the_next_run_takes_the_rest_away(
    built_store: Path, tmp_path: Path, empty_folder_there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is killed before it says that it is alive is taken away a minute later.
    monkeypatch.setattr(result_files, "_SETTLED_SECONDS", -1.0)
    (tmp_path / "there").mkdir()
    output = tmp_path / "there" / "out"
    store = copy_store(built_store, tmp_path / "store")  # other tests commit to that one: its neighbours are used
    api.export(store, tmp_path / "whole")
    due = contents(tmp_path / "whole")
    call, left = 0, 0
    if empty_folder_there:
        output.mkdir()
    while killed_at(call := call + 3, lambda: api.export(store, output)):
        if output.exists() and any(output.iterdir()):
            break  # killed behind the rename
        left += len(list(output.parent.glob(".out.export-*")))
        assert len(list(output.parent.glob(".out.export-*"))) <= 1, "what the kill before left is gone"
    assert left > 5, "kills fell into the work"
    assert contents(output) == due
    if any(output.parent.glob(".out.export-*")):
        shutil.rmtree(output)
        api.export(store, output)
    assert [path.name for path in output.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("code", [errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY])
def test_only_a_place_that_is_taken_was_made_by_another_process(tmp_path: Path, code: int) -> None:
    damaged = OSError(code, os.strerror(code), str(tmp_path / "store" / "chunks"))
    with pytest.raises(OSError, match="chunks") as error, new_folder(check_place("OUTPUT", tmp_path / "out")):
        raise damaged
    assert error.value is damaged
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_alive_is_left_alone(tmp_path: Path) -> None:
    target = check_place("OUTPUT", tmp_path / "out")
    with new_folder(target) as one:
        (one / "file").write_text("one")
        with pytest.raises(UsageError, match="was made by another process"), new_folder(target) as other:
            (other / "file").write_text("other")
            assert one.exists()
            target.mkdir()
            (target / "third").write_text("third")
        assert not other.exists()
        (target / "third").unlink()
    assert (target / "file").read_text() == "one"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("state", ["silent", "no run", "just made", "another name"])
def test_only_folders_of_dead_runs_are_taken_away(tmp_path: Path, state: str) -> None:
    name = ".out.export-0123abcd" if state != "another name" else ".out.export-notes"
    left = tmp_path / name
    (left / "leases").mkdir(parents=True)
    (left / "part-000000.parquet").write_text("half")
    if state in ("silent", "another name"):
        run = left / leases.run_path("0123abcd")
        run.write_text(json.dumps({"host": "another", "process": 1, "started": "1"}))
        os.utime(run, (1, 1))
    if state == "no run":
        os.utime(left, (1, 1))
    with new_folder(check_place("OUTPUT", tmp_path / "out")) as folder:
        (folder / "file").write_text("x")
    assert left.exists() == (state in ("just made", "another name"))


def test_where_nothing_can_be_put_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"OUTPUT \. can't be replaced"):
        check_place("OUTPUT", ".")
    (tmp_path / "link").symlink_to(tmp_path / "far")
    assert check_place("OUTPUT", "link") == tmp_path / "far"


def test_a_file_system_without_hard_links_will_do(
    built_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links")

    monkeypatch.setattr(disk, "link", refuse)
    assert api.export(built_store, tmp_path / "out").chunks


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "{}: no space left; nothing of it was kept"),
        (errno.EFBIG, "{} can't be written: File too large; nothing of it was kept"),
    ],
)
def test_a_full_disk_is_reported_and_leaves_nothing(
    built_store: Path, tmp_path: Path, number: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = disk.announce

    def announce(operation: str, path: Path) -> None:
        if operation == "write" and path.name.startswith("part"):
            raise OSError(number, "in other words")
        written(operation, path)

    monkeypatch.setattr(disk, "announce", announce)
    done = CliRunner().invoke(app, ["export", str(built_store), str(tmp_path / "out")])
    assert (done.exit_code, done.stdout) == (1, "")
    assert f"error: {said.format(tmp_path / 'out')}\n" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_parts_without_tables_are_refused_with_the_commands_that_make_them(
    tmp_path: Path, tiny_encoder: Path, cli: Cli
) -> None:
    stores = {}
    for name, first in (("database", 0), ("queries", 50)):
        stores[name] = tmp_path / name
        source = write_jsonl(tmp_path / f"{name}.jsonl", make_rows(10, first=first))
        api.chunk(stores[name], [str(source)], tokenizer=str(tiny_encoder))
        api.embed(stores[name], encoder=str(tiny_encoder))
    api.neighbours(stores["database"], queries=stores["queries"], name="t", saved=7, k=3, search=EXACT)
    more = write_jsonl(tmp_path / "more.jsonl", make_rows(4, first=90))
    api.chunk(stores["queries"], [str(more)])
    missing = api.info(stores["queries"]).parts[-1]["chunks"]["rows"]
    with pytest.raises(UsageError, match=rf"{missing} chunks of .* have no neighbours 't' yet \(part 1\)") as error:
        api.export(stores["queries"], tmp_path / "out", table="t")
    for line in error.value.advice.splitlines()[1:]:
        done = cli(*shlex.split(line)[1:])
        assert done.returncode == 0, done.stderr
    result = api.export(stores["queries"], tmp_path / "out", table="t")
    assert (result.k, result.chunks) == (3, api.info(stores["queries"]).chunks)
    assert api.info(stores["queries"]).neighbours["t"]["saved"] == 7


def test_a_part_with_nothing_to_search_for_needs_no_table(store_copy: Path, tmp_path: Path) -> None:
    store_rows = write_jsonl(tmp_path / "more.jsonl", [{"id": "late", "text": "store chunk token"}])
    api.chunk(store_copy, [str(store_rows)])
    api.purge(store_copy, api.Selectors(where="id = 'late'"), reason="test")
    before = api.info(store_copy).chunks
    assert api.export(store_copy, tmp_path / "out").chunks == before


def test_more_neighbours_than_are_saved_are_refused_by_all_that_read_them(built_store: Path, tmp_path: Path) -> None:
    reader = retrotool.open(built_store)
    k = api.info(built_store).neighbours["main"]["saved"] + 1
    reading: tuple[Callable[[], object], ...] = (
        lambda: api.export(built_store, tmp_path / "out", k=k),
        lambda: api.inspect(built_store, Choice(), k=k),
        lambda: retrotool.RetroDataset(built_store, k=k),
        lambda: reader.neighbours(0, k=k),
        lambda: reader.neighbour_ids(0, k=k),
        lambda: reader.neighbour_places(0, k=k),
    )
    for read in reading:
        with pytest.raises(UsageError, match=f"-k {k} is not between 1 and the {k - 1} neighbours"):
            read()
    assert not (tmp_path / "out").exists()


def test_other_tokenizers_are_refused(
    tmp_path: Path, tiny_encoder: Path, byte_level_tokenizer: Path, built_store: Path
) -> None:
    queries = tmp_path / "queries"
    source = write_jsonl(tmp_path / "q.jsonl", make_rows(3, first=500))
    api.chunk(queries, [str(source)], tokenizer=str(byte_level_tokenizer))
    api.embed(queries, encoder=str(tiny_encoder))
    api.neighbours(built_store, queries=queries)
    with pytest.raises(UsageError, match="one model can't read both"):
        api.export(queries, tmp_path / "out")


def test_an_empty_store_is_refused(store_copy: Path, tmp_path: Path) -> None:
    api.purge(store_copy, api.Selectors(where="id != 'x'"), reason="test")
    with pytest.raises(UsageError, match="no live chunks to export"):
        api.export(store_copy, tmp_path / "out")


@pytest.mark.parametrize("kind", ["chunks", "neighbours"])
def test_a_flipped_bit_ends_it(store_copy: Path, tmp_path: Path, kind: str, cli: Cli) -> None:
    entry = Store.open(store_copy).state.part_file(kind, 1, "main" if kind == "neighbours" else "")
    assert entry is not None
    broken = stored_file(store_copy, entry.path)
    data = bytearray(broken.read_bytes())
    data[len(data) // 2] ^= 1
    broken.write_bytes(data)
    done = CliRunner().invoke(app, ["export", str(store_copy), str(tmp_path / "out")])
    assert (done.exit_code, done.stdout, broken.name in done.stderr) == (12, "", True), done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"store"}


@pytest.mark.parametrize("chunk", [(77 << 32) + 5, (1 << 32) - 1])
def test_a_table_that_names_no_chunk_of_its_database_ends_it(
    built_store: Path, tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = neighbour_tables.read_table

    def lie(*arguments: object) -> NeighbourTable:
        table = true(*arguments)
        ids = np.array(table.ids)
        ids[3, 1] = chunk
        return NeighbourTable(ids, table.distances)

    monkeypatch.setattr(neighbour_tables, "read_table", lie)
    with pytest.raises(CorruptError, match=f"chunk {format_id(chunk)}, which is not in "):
        api.export(built_store, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_erase_meanwhile_ends_it(store_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = export_run.open_tables

    def open_then_erase(*arguments: object) -> tuple[NeighbourReader, int]:
        found = opened(*arguments)
        api.purge(store_copy, api.Selectors(where="source = 'a'"), reason="test", erase=True)
        return found

    monkeypatch.setattr(export_run, "open_tables", open_then_erase)
    with pytest.raises(ErasedError):
        api.export(store_copy, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} <= {"store"}


def test_what_is_exported_is_one_view(store_copy: Path, tmp_path: Path) -> None:
    """A purge that comes later is reported by the commit."""
    before = api.export(store_copy, tmp_path / "before")
    api.purge(store_copy, api.Selectors(where="source = 'a'"), reason="test")
    after = api.export(store_copy, tmp_path / "after")
    assert after.chunks < before.chunks and after.commit > before.commit
    assert [database.commit for database in after.databases] == [after.commit]


def test_duckdb_polars_and_datasets_read_the_parquet_files(built_store: Path, tmp_path: Path) -> None:
    duckdb, polars = pytest.importorskip("duckdb"), pytest.importorskip("polars")
    datasets = pytest.importorskip("datasets")
    result = api.export(built_store, tmp_path / "out", k=3)
    files = str(tmp_path / "out" / "*.parquet")
    reader = retrotool.open(built_store)
    chunk = int(reader.chunk_ids(1)[2])
    near = reader.neighbours(chunk, k=3)
    tokens = near[0].chunk.tokens.tolist()
    following = [one.continuation and one.continuation.text for one in near]
    row = duckdb.sql(
        "SELECT neighbours, neighbour_tokens[1][1:neighbour_lengths[1]], len(neighbour_tokens[1]), neighbour_text[1], "
        f"continuation_text FROM '{files}' WHERE chunk = {chunk}"
    ).fetchall()
    assert row == [([one.id for one in near], tokens, 64, near[0].chunk.text, following)]
    frame = polars.scan_parquet(files).filter(polars.col("chunk") == chunk).collect()
    assert frame["neighbour_tokens"].to_numpy().shape == (1, 3, 64)
    assert frame["neighbours"].to_list() == [[one.id for one in near]]
    assert frame["neighbour_documents"].to_list() == [[one.chunk.document for one in near]]
    assert frame["continuation_text"].to_list() == [following]
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == result.chunks
    assert loaded.filter(lambda row: row["chunk"] == chunk)[0]["continuation_text"] == following
    assert np.array(loaded[5]["neighbour_tokens"]).shape == (3, 64)


def test_what_is_printed_opens_it(built_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.dataset  # noqa: F401

    known = {name: pytest.importorskip(name) for name in ("duckdb", "polars", "pyarrow", "datasets")}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    done = CliRunner().invoke(app, ["export", str(built_store), "out"])
    assert done.exit_code == 0, done.stderr
    first, _, code = done.stdout.partition("Open it with one of:\n")
    chunks = api.info(built_store).chunks
    assert first.startswith(f"{chunks} chunks of 120 documents with ")
    relation, frame, arrow, dataset = (eval(line, known) for line in code.splitlines())
    assert len(relation) == frame.collect().height == arrow.to_table().num_rows == len(dataset) == chunks
