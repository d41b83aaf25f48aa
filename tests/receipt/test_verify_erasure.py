"""Attacks on the check of an erase: something of it is put back in each kind of file, and the file is named."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Shared, make_rows, rewrite_sums, write_jsonl
from receipt_help import NAMES, build, purge, receipt
from stored import copy_store, stored_file, stored_files

import retrotool
from retrotool import api
from retrotool.ann import lists
from retrotool.index.searching import write_index
from retrotool.receipt.verify_erasure import CHECKS
from retrotool.store import disk, leases, parts
from retrotool.store.folding import writing
from retrotool.store.leases import Run
from retrotool.store.log import Draft, FileEntry
from retrotool.store.paths import DATA_KINDS, FileName
from retrotool.store.storage import storage_at
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones
from retrotool.store.vectors import write_vectors


@pytest.fixture(scope="module")
def secret_store(shared: Shared[Path], tiny_encoder: Path) -> Path:
    """Not to be changed: copy it."""
    return shared("secret", lambda folder: build(folder, tiny_encoder))


@pytest.fixture(scope="module")
def erased_store(shared: Shared[tuple[Path, str]], secret_store: Path) -> tuple[Path, str]:
    """The same after an erase, and the id of the purge. Not to be changed: copy it."""

    def erase(folder: Path) -> tuple[Path, str]:
        store = copy_store(secret_store, folder / "store")
        return store, purge(store, erase=True)

    return shared("secret erased", erase)


@pytest.fixture
def store(secret_store: Path, tmp_path: Path) -> Path:
    return copy_store(secret_store, tmp_path / "store")


def test_every_kind_of_file_has_a_check() -> None:
    assert set(CHECKS) == set(DATA_KINDS)


@pytest.fixture
def erased(erased_store: tuple[Path, str], secret_store: Path, tmp_path: Path) -> tuple[Path, str, Store]:
    """A store with an erased purge, its id, and the store as it was before."""
    store = copy_store(erased_store[0], tmp_path / "store")
    return store, erased_store[1], Store.open(secret_store)


Forge = Callable[[Store, FileEntry, FileEntry, Store, int], "pa.Table | np.ndarray | Any"]
"""Makes the content of a file that has something of the purged chunk again, from the file as it is and as it was."""


def put_back(store: Path, before: Store, kind: str, name: str, chunk: int, forge: Forge) -> str:
    """Replace the file of a chunk by a forged one, through a commit that the log is whole with; the forged path."""
    opened = Store.open(store)
    slot = "shard-0000" if kind == "index" else f"{chunk >> 32:06d}"
    now, then = opened.state.file(kind, slot, name), before.state.file(kind, slot, name)
    assert now is not None and then is not None
    forged = forge(opened, now, then, before, chunk & 0xFFFFFFFF)
    with writing(opened) as run:
        new = FileName.new(run.id, kind, slot, FileName.parse(now.path).extension, name)
        if isinstance(forged, pa.Table):
            row_group = parts.ROW_GROUP
            entry = parts.write_batches(opened, new, forged.schema, [forged], row_group=row_group, about=now.about)
        elif isinstance(forged, np.ndarray):
            entry = write_vectors(opened, new, forged)
        else:
            entry = write_index(opened, forged, new, now.about)
        opened.commit(run, lambda _: Draft("erase", add=(entry,), remove=(now.path,)))
    return entry.path


def row_again(now: Store, entry: FileEntry, then: FileEntry, before: Store, row: int) -> pa.Table:
    """The table with one row as it was."""
    new, old = pq.read_table(now.storage.local(entry.path)), pq.read_table(before.storage.local(then.path))
    return pa.concat_tables([new.slice(0, row), old.slice(row, 1), new.slice(row + 1)]).combine_chunks()


def column_again(column: str) -> Forge:
    """The documents with a column as it was."""

    def forge(now: Store, entry: FileEntry, then: FileEntry, before: Store, _: int) -> pa.Table:
        new, old = pq.read_table(now.storage.local(entry.path)), pq.read_table(before.storage.local(then.path))
        at = new.schema.get_field_index(column)
        return new.set_column(at, new.schema.field(at), old[column])

    return forge


def tokens_again(now: Store, entry: FileEntry, then: FileEntry, before: Store, row: int) -> pa.Table:
    """The chunks with the tokens of a row, which still counts none."""
    table = row_again(now, entry, then, before, row)
    counts = table["n_tokens"].to_numpy().copy()
    counts[row] = 0
    at = table.schema.get_field_index("n_tokens")
    return table.set_column(at, table.schema.field(at), pa.array(counts, pa.int32()))


def vector_again(now: Store, entry: FileEntry, then: FileEntry, before: Store, row: int) -> np.ndarray:
    matrix = np.load(now.storage.local(entry.path))
    matrix[row] = np.load(before.storage.local(then.path))[row]
    return matrix


def neighbour_again(now: Store, entry: FileEntry, _: FileEntry, __: Store, row: int) -> pa.Table:
    """The table of neighbours in which the first row that has any names a purged chunk."""
    table = pq.read_table(now.storage.local(entry.path))
    ids = table["ids"].to_pylist()
    other = next(i for i, near in enumerate(ids) if near[0] >= 0)
    ids[other][0] = entry.part << 32 | row
    at = table.schema.get_field_index("ids")
    return table.set_column(at, table.schema.field(at), pa.array(ids, table.schema.field(at).type))


def distance_again(now: Store, entry: FileEntry, then: FileEntry, before: Store, row: int) -> pa.Table:
    """The table of neighbours with the distances of a purged chunk, but no ids."""
    new, old = pq.read_table(now.storage.local(entry.path)), row_again(now, entry, then, before, row)
    at = new.schema.get_field_index("distances")
    return new.set_column(at, new.schema.field(at), old["distances"])


def text_again(now: Store, entry: FileEntry, then: FileEntry, before: Store, row: int) -> pa.Table:
    """The table of neighbours with the text that the row of a purged chunk had, but no ids."""
    new, old = pq.read_table(now.storage.local(entry.path)), row_again(now, entry, then, before, row)
    for column in ("text_ids", "text_n_tokens", "text_tokens"):
        at = new.schema.get_field_index(column)
        new = new.set_column(at, new.schema.field(at), old[column])
    return new


def tokens_without_an_id(now: Store, entry: FileEntry, then: FileEntry, before: Store, row: int) -> pa.Table:
    """The table of neighbours with these tokens alone."""
    new, old = pq.read_table(now.storage.local(entry.path)), row_again(now, entry, then, before, row)
    at = new.schema.get_field_index("text_tokens")
    return new.set_column(at, new.schema.field(at), old["text_tokens"])


def shard_again(now: Store, _: FileEntry, then: FileEntry, before: Store, row: int) -> Any:
    """The shard as it was, without the purged chunks but one."""
    (name,) = now.state.with_prefix("purge:")
    others = np.setdiff1d(read_tombstones(now, name).ids, [row])
    return lists.without(lists.read_lists(before.storage.local(then.path)), lambda ids: np.isin(ids, others))


FORGED = {
    "documents by their id": ("documents", "", column_again("id")),
    "documents by a hash": ("documents", "", column_again("text_hash")),
    "documents by a kept column": ("documents", "", column_again("year")),
    "documents by their input": ("documents", "", column_again("input")),
    "documents by their lengths": ("documents", "", column_again("n_tokens")),
    "chunks": ("chunks", "", row_again),
    "chunks without a count": ("chunks", "", tokens_again),
    "embeddings": ("embeddings", "tiny", vector_again),
    "index": ("index", "main", shard_again),
    "neighbours of it": ("neighbours", "main", row_again),
    "neighbours to it": ("neighbours", "main", neighbour_again),
    "distances": ("neighbours", "main", distance_again),
    "text of its neighbours": ("neighbours", "main", text_again),
    "tokens without an id": ("neighbours", "main", tokens_without_an_id),
}


@pytest.mark.parametrize("case", FORGED)
def test_what_is_put_back_with_a_forged_log_is_found(erased: tuple[Path, str, Store], case: str) -> None:
    store, name, before = erased
    kind, of, forge = FORGED[case]
    chunk = int(read_tombstones(Store.open(store), name).ids[0])
    path = put_back(store, before, kind, of, chunk, forge)
    found = receipt(store, name)
    assert not found.ok and found.state == "erased"
    assert [problem.split(":")[0] for problem in found.problems if "is left" in problem] == [path]
    assert {one.kind for one in found.files.kinds if one.left} == {kind}
    assert found.log_whole


def add_file(store: Path, kind: str, slot: str, extension: str, source: Path, rows: int, name: str = "") -> str:
    """Commit a copy of a file under a new name."""
    opened = Store.open(store)
    with writing(opened) as run:
        new = FileName.new(run.id, kind, slot, extension, name)
        entry = replace(opened.write(new, lambda sink: sink.write(source.read_bytes())), rows=rows)
        now = opened.state.file(kind, slot, name)
        opened.commit(run, lambda _: Draft("erase", add=(entry,), remove=(now.path,) if now else ()))
    return entry.path


def test_an_erase_leaves_nothing(erased: tuple[Path, str, Store]) -> None:
    found = receipt(*erased[:2])
    assert found.ok, found.problems
    assert found.state == "erased" and not any(one.left for one in found.files.kinds)


def test_what_was_asked_for_and_excerpts_of_inputs_are_found(erased: tuple[Path, str, Store], tmp_path: Path) -> None:
    store, name, before = erased
    (quoted,) = (entry for entry in before.state.files() if entry.path.startswith("quarantine/"))
    slot = quoted.slot
    paths = [add_file(store, "quarantine", slot, "parquet", before.storage.local(quoted.path), quoted.rows)]
    literal = tmp_path / "literal.json"
    literal.write_text("{}")
    paths.append(add_file(store, "selectors", name, "json", literal, 1))
    found = receipt(store, name)
    assert {problem.split(":")[0] for problem in found.problems} == set(paths)


def test_files_that_come_after_an_erase_are_not_taken_for_its_own(store: Path, tmp_path: Path) -> None:
    name = purge(store, erase=True)
    more = write_jsonl(tmp_path / "more.jsonl", [*make_rows(3, first=300), {"id": "broken too", "text": 4}])
    api.chunk(store, [str(more)])
    api.purge(store, api.Selectors(document=("doc-300",)), reason="later")
    found = receipt(store, name)
    assert found.ok, found.problems


@pytest.mark.parametrize("kind", ["documents", "chunks", "embeddings", "index", "neighbours"])
def test_a_file_that_was_replaced_and_is_there_again_is_found(erased: tuple[Path, str, Store], kind: str) -> None:
    store, name, before = erased
    state = Store.open(store).state
    path = next(e.path for e in before.state.files() if e.path.split("/")[0] == kind and not state.has(e.path))
    stored_file(store, path).write_bytes(before.storage.local(path).read_bytes())
    found = receipt(store, name)
    assert [problem.split(":")[0] for problem in found.problems] == [path]
    assert found.files.present == (path,)
    assert found.files.unknown == (), "the log knows it"
    assert receipt(store, name).ok, "the commit of the receipt cleaned up"


def test_a_file_that_is_not_what_the_log_says_is_found(erased: tuple[Path, str, Store]) -> None:
    store, name, _ = erased
    state = Store.open(store).state
    vectors, table = (
        next(entry.path for entry in state.files() if entry.path.startswith(f"{kind}/"))
        for kind in ("embeddings", "neighbours")
    )
    for path in (stored_file(store, vectors), stored_file(store, table)):
        data = bytearray(path.read_bytes())
        data[len(data) - 1 if path == stored_file(store, vectors) else len(data) // 2] ^= 1
        path.write_bytes(data)
    problems = receipt(store, name).problems
    assert f"{vectors}: the block at byte 0 does not match its checksum" in problems
    assert any(problem.startswith(f"{table}: ") for problem in problems)
    rewrite_sums(stored_file(store, vectors))
    assert f"{vectors}: its SHA-256 is not what the log says" in receipt(store, name).problems
    lost = stored_file(store, next(entry.path for entry in state.files() if entry.path.startswith("chunks/")))
    lost.unlink()
    assert any("is missing" in problem for problem in receipt(store, name).problems)


def test_tombstones_that_are_not_what_the_log_says_are_found(erased: tuple[Path, str, Store]) -> None:
    store, name, _ = erased
    (path,) = stored_files(store, f"tombstones/{name}-*")
    data = bytearray(path.read_bytes())
    at = data.rindex(b"parquet-cpp-arrow")  # who wrote it: no reader checks that
    data[at : at + 7] = b"PARQUET"
    path.write_bytes(data)
    (problem,) = receipt(store, name).problems
    assert "the wrong chunks may have been checked" in problem


@pytest.mark.on_disk  # symbolic links, and names that no storage gives
def test_what_no_commit_names_is_listed_and_not_checked(erased: tuple[Path, str, Store], tmp_path: Path) -> None:
    store, name, _ = erased
    token = secrets.token_hex(8)
    strange = {
        "notes.txt": b"", ".hidden/deep/file": b"abc", f"documents/{token}.parquet": b"12345",
        "chunks/backup": b"x" * 1000, "staging/odd.json": b"{", f"chunks/.tmp-{token}": b"half",
        next(entry.path for entry in Store.open(store).state.files() if entry.kind == "chunks") + ".xxh3": b"1234",
        f"leases/{token * 2}-00000000": b'{"run":"%s"}' % token[:8].encode(),
    }  # fmt: skip
    for path, data in strange.items():
        (store / path).parent.mkdir(parents=True, exist_ok=True)
        (store / path).write_bytes(data)
    (store / "loop").symlink_to(store)
    (store / "elsewhere").symlink_to(tmp_path / "not there")
    found = receipt_of_a_view(store, name)
    assert found.ok, found.problems
    assert {one.path: one.bytes for one in found.files.unknown if not one.link} == {
        k: len(v) for k, v in strange.items()
    }
    assert {one.path for one in found.files.unknown if one.link} == {"loop", "elsewhere"}
    assert found.files.in_progress == 0


def receipt_of_a_view(store: Path, name: str) -> Any:
    """A receipt of a store that is not written to: the commit of the receipt would clean up what dead runs left."""
    with pytest.MonkeyPatch.context() as patch:

        def refused(_: Run) -> Run:
            raise PermissionError("read-only")

        patch.setattr(Run, "__enter__", refused)
        return receipt(store, name)


@pytest.mark.on_disk  # temporary files
def test_files_of_commands_that_run_are_counted(erased: tuple[Path, str, Store]) -> None:
    store, name, _ = erased
    with Run(storage_at(store)) as run:
        (store / FileName.new(run.id, "chunks", "", "parquet").path).write_bytes(b"half")
        (store / "chunks" / f".tmp-{run.id}{'0' * 8}").write_bytes(b"half")
        assert leases.take_claim(run.storage, "0" * 32, run.id)
        found = receipt_of_a_view(store, name)
    assert (found.files.unknown, found.files.in_progress) == ((), 4), "and the lease"


@pytest.mark.on_disk
def test_a_folder_that_is_a_link_is_listed_and_refused(erased: tuple[Path, str, Store], tmp_path: Path) -> None:
    store, name, _ = erased
    (store / "chunks").rename(tmp_path / "elsewhere")
    (store / "chunks").symlink_to(tmp_path / "elsewhere")
    found = receipt_of_a_view(store, name)
    assert not found.ok and any("is a symbolic link" in problem for problem in found.problems)
    assert [(one.path, one.link) for one in found.files.unknown] == [("chunks", True)]


@pytest.mark.on_disk
def test_a_folder_of_removed_files_that_is_a_link_is_refused(erased: tuple[Path, str, Store], tmp_path: Path) -> None:
    """Links are not followed, so the absence of these files is not proved."""
    store, name, _ = erased
    assert not list((store / "selectors").iterdir()), "it was removed"
    (store / "selectors").rename(tmp_path / "elsewhere")
    (store / "selectors").symlink_to(tmp_path / "elsewhere")
    found = receipt_of_a_view(store, name)
    assert found.problems == ("selectors is a symbolic link: the files of a store must be in its own folders",)
    assert found.files.present == ()


_synced: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _synced is not None and event == disk.EVENT and arguments[0] == "fsync_directory":
        _synced.append(os.fspath(arguments[1]))


sys.addaudithook(_note)


@pytest.mark.on_disk
def test_the_absence_of_files_is_synced(erased: tuple[Path, str, Store], monkeypatch: pytest.MonkeyPatch) -> None:
    global _synced
    store, name, _ = erased
    _synced = []
    assert receipt_of_a_view(store, name).files.synced
    synced, _synced = {os.path.relpath(path, store) for path in _synced}, None
    assert synced >= {"documents", "chunks", "embeddings/tiny", "index/main", "neighbours/main", "selectors"}

    def failing(_: Path) -> None:
        raise OSError("read-only file system")

    monkeypatch.setattr(disk, "fsync_directory", failing)
    found = receipt_of_a_view(store, name)
    assert found.ok and not found.files.synced


def test_a_document_that_is_erased_in_part_keeps_no_hash(store: Path, secret_store: Path) -> None:
    first, *_ = retrotool.open(store).document("doc-9")
    name = api.purge(store, api.Selectors(chunk=(str(first),)), reason="test", erase=True).purge
    found = receipt(store, name)
    assert found.ok, found.problems
    forge = column_again("text_hash")
    path = put_back(store, Store.open(secret_store), "documents", "", first, forge)
    assert [problem.split(":")[0] for problem in receipt(store, name).problems] == [path]


def test_ids_of_another_store_are_not_taken_for_ones_own(store: Path, tmp_path: Path, tiny_encoder: Path) -> None:
    other = tmp_path / "other"
    api.chunk(other, [str(write_jsonl(tmp_path / "o.jsonl", make_rows(90, first=200)))], tokenizer=str(tiny_encoder))
    api.embed(other, encoder=str(tiny_encoder))
    api.index(other)
    api.neighbours(other, queries=store, name="far", materialise=True)
    found = receipt(store, purge(store, erase=True))
    assert found.ok, found.problems
    assert {path.name for path in found.read_paths} >= {"neighbours far", "dataset far", "export far", "inspect far"}


def test_of_a_purge_that_is_not_erased_is_counted_what_is_left(store: Path) -> None:
    name = purge(store)
    found = receipt(store, name)
    assert found.problems == (f"the purge is not erased: its data is left in {len(found.files.left)} files",)
    left = {one.kind: one.left for one in found.files.kinds if one.left}
    chunks = len(read_tombstones(Store.open(store), name))
    assert left["documents"] == len(NAMES)
    assert left["chunks"] == left["embeddings"] == chunks
    assert left.keys() == {
        "documents", "chunks", "embeddings", "index", "neighbours", "quarantine", "selectors",
    }  # fmt: skip
    api.erase(store, [name])
    assert not any(one.left for one in receipt(store, name).files.kinds)
