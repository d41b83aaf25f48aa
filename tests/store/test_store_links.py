"""Symbolic links in a store: none is followed, by what removes files or by what reads them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from store_help import assert_whole, clean, commit, files_in, make_store, write

from retrotool import api
from retrotool.errors import CorruptError
from retrotool.store import leases
from retrotool.store.leases import Run
from retrotool.store.paths import FOLDERS, NAMED_KINDS
from retrotool.store.store import Store

pytestmark = pytest.mark.on_disk

DEAD = "0123abcd"


def store_like(folder: Path) -> set[Path]:
    """Files in a folder whose names say that a dead run of a store wrote them, also one level down."""
    names = [f".tmp-{DEAD}" + "0" * 16, f"000000-{DEAD}00000000.parquet", f"{DEAD}00000000.parquet"]
    names += [f"run-{DEAD}", f"{'0' * 32}-00000000", f"{'0' * 32}.json"]
    made = {place / name for place in (folder, folder / "name") for name in names}
    for path in made:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"a person's")
    return made


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_is_removed_through_a_linked_folder(tmp_path: Path, folder: str) -> None:
    store, outside = make_store(tmp_path / "store"), store_like(tmp_path / "outside")
    shutil.rmtree(Path(store.place) / folder, ignore_errors=True)
    (Path(store.place) / folder).symlink_to(tmp_path / "outside")
    if folder in ("staging", "leases", "log", "checkpoints"):
        with pytest.raises(CorruptError, match=f"{folder} is a symbolic link") as caught:
            clean(Store.open(store.place))
        assert "Replace the link with the file or folder it points to" in caught.value.advice
    else:
        assert clean(store) == 0
    assert all(path.exists() for path in outside)


@pytest.mark.parametrize("kind", NAMED_KINDS)
def test_nothing_is_removed_through_a_link_in_a_folder(tmp_path: Path, kind: str) -> None:
    store, outside = make_store(tmp_path / "store"), store_like(tmp_path / "outside")
    (Path(store.place) / kind).mkdir()
    (Path(store.place) / kind / "name").symlink_to(tmp_path / "outside")
    assert clean(store) == 0
    with Run(store.storage) as run, pytest.raises(CorruptError, match="is a symbolic link"):
        write(Path(store.place), run.id, kind, "000000", name="name")
    assert all(path.exists() for path in outside)


def test_a_purge_in_a_store_with_links_leaves_another_store_whole(store_copy: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(store_copy, tmp_path / "other"))
    for link, target in (("undone", "chunks"), ("scans", "embeddings")):
        shutil.rmtree(store_copy / link, ignore_errors=True)
        (store_copy / link).symlink_to(other / target)
    before = files_in(other)
    api.purge(store_copy, api.Selectors(document=("doc-1",)), reason="test")
    assert files_in(other) == before
    assert api.verify(other).problems == []
    problems = [problem.text for problem in api.verify(store_copy).problems]
    assert problems == ["scans is a symbolic link", "undone is a symbolic link"]


def linked(store: Path, file: Path, outside: Path) -> Path:
    """Move a file of a store elsewhere, and put a link in its place."""
    target = outside / file.name
    outside.mkdir(exist_ok=True)
    file.rename(target)
    file.symlink_to(target)
    return target


def test_a_linked_file_is_a_problem_and_is_not_erased(store_copy: Path, tmp_path: Path) -> None:
    purge = api.purge(store_copy, api.Selectors(document=("doc-1",)), reason="test").purge
    store = Store.open(store_copy)
    (part,) = {part for part in store.state.parts() if part == 0}
    entry = store.state.part_file("chunks", part)
    assert entry is not None
    file = store_copy / entry.path
    target = linked(store_copy, file, tmp_path / "outside")
    problems = [problem.text for problem in api.verify(store_copy).problems]
    assert f"{entry.path} is a symbolic link" in problems
    with pytest.raises(CorruptError, match=f"{file.name} is a symbolic link"):
        api.erase(store_copy, [purge])
    assert file.is_symlink() and target.exists()
    assert not Store.open(store_copy).state.records[f"purge:{purge}"]["erased"]
    file.unlink()
    target.rename(file)
    assert api.erase(store_copy, [purge]).erased > 0
    assert not file.exists()
    assert api.verify(store_copy).problems == []


def test_a_commit_that_removes_a_linked_file_is_not_made(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    with Run(store.storage) as run:
        entry = write(Path(store.place), run.id, "selectors", "p")
        commit(store, run, entry)
        target = linked(Path(store.place), Path(store.place) / entry.path, tmp_path / "outside")
        with pytest.raises(CorruptError, match="is a symbolic link"):
            commit(store, run, remove=(entry.path,))
    assert Store.open(store.place).state.number == 0
    assert target.exists()


def test_a_linked_file_of_a_dead_run_is_left_alone(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    entry = write(Path(store.place), DEAD, "chunks", "000000")
    target = linked(Path(store.place), Path(store.place) / entry.path, tmp_path / "outside")
    assert clean(store) == 0
    assert target.exists() and (Path(store.place) / entry.path).is_symlink()


def test_a_store_may_be_reached_by_a_link(tmp_path: Path) -> None:
    make_store(tmp_path / "real" / "store")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    store = Store.open(tmp_path / "link" / "store")
    with Run(store.storage) as run:
        commit(store, run, write(Path(store.place), run.id, "chunks", "000000"))
        left = write(Path(store.place), DEAD, "chunks", "000001")
        assert clean(store) == 1
        assert not (tmp_path / "real" / "store" / left.path).exists()
        assert leases.renew(store.storage, run.id)
    assert_whole(store)
