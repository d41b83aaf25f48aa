"""Files in a store's folders that are not the store's: they stop nothing, are left alone, and are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Cli
from memory_storage import MemoryFile
from store_help import clean, make_store
from stored import write_stored

from retrotool import api
from retrotool.errors import CorruptError
from retrotool.store.store import Store

STRANGE = [
    "chunks/run-notes.json",
    "chunks/notes.txt",
    "documents/.tmp-a person's",
    "documents/run-0123abcd.json",
    "embeddings/run-notes.json",
    "checkpoints/00000001-copy.json",
    "leases/run-notes",
    "leases/run-0123abcd.json",
    f"leases/{'0' * 32}-1",
    "staging/notes.json",
    "staging/run-0123abcd.json",
    "staging/claims/notes",
    "documents/000000-0123abcd00000000.parquet",
    "tombstones/0123abcd00000000.parquet",
    "quarantine/000000-0123.parquet",
]


def put(store: Path, *names: str) -> dict[Path | MemoryFile, bytes]:
    files = {name: f"a person wrote {name}".encode() for name in names}
    return {write_stored(store, name, data): data for name, data in files.items()}


@pytest.mark.parametrize("name", STRANGE)
def test_a_stray_file_stops_no_writing_and_stays(tmp_path: Path, name: str) -> None:
    store = make_store(tmp_path / "store")
    files = put(Path(store.place), name)
    assert clean(store) == 0
    assert {path: path.read_bytes() for path in files} == files


def test_verify_names_stray_files_and_the_store_is_whole(store_copy: Path, cli: Cli) -> None:
    put(store_copy, *STRANGE)
    api.purge(store_copy, api.Selectors(document=("doc-1",)), reason="test")
    found = api.verify(store_copy)
    assert found.problems == []
    assert found.foreign == sorted(name for name in STRANGE if "/." not in name)
    shown = cli("verify", store_copy)
    assert shown.returncode == 0
    assert f"not checked: {len(found.foreign)} files that retrotool did not make" in shown.stdout
    assert "    chunks/run-notes.json" in shown.stdout
    assert json.loads(cli("verify", store_copy, "--json").stdout)["foreign"] == found.foreign


def test_a_broken_staged_task_is_named_and_done_again(store_copy: Path, tiny_encoder: Path) -> None:
    broken = put(store_copy, f"staging/{'0' * 32}.json")
    found = api.verify(store_copy)
    assert [problem.text for problem in found.problems] == [
        f"staging/{'0' * 32}.json is not a finished task: the next command that writes removes it and repeats the task"
    ]
    api.embed(store_copy, encoder=str(tiny_encoder), name="again")
    assert not any(path.exists() for path in broken)
    assert api.verify(store_copy).problems == []


def test_an_entry_far_past_the_end_of_the_log_is_named(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    put(Path(store.place), "log/99999999.json")
    with pytest.raises(CorruptError, match=r"00000000\.json is missing.*up to log/99999999\.json") as caught:
        Store.open(store.place)
    stray = Path(store.place) / "log" / "99999999.json"
    assert f"If {stray} is not a commit of this store, move that file elsewhere" in caught.value.advice
