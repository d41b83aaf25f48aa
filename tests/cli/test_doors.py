"""Nothing but ``retrotool.store`` touches the files of a store.

``test_every_example_works`` runs every command while an audit hook looks at what Python opens, lists, renames and
removes; what faiss, numpy and pyarrow open by themselves has no event, so their calls are looked for in the code. That
everything works on a storage that has no files, ``tests/memory_storage.py``, shows the same from the other side.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from watching import PACKAGE, outside, watching

from retrotool import api

BY_THEMSELVES = re.compile(r"faiss\.(read|write)_index|memory_map|mmap_mode|np\.memmap|np\.load\(|read_metadata\(")
"""Calls by which libraries open files."""


@pytest.mark.on_disk
def test_the_hook_sees_what_goes_round_the_storage(built_store: Path) -> None:
    with watching(built_store) as seen:
        api.info(built_store)
        assert seen
        assert outside(seen) == []
        source = "open(path).close()"
        exec(compile(source, str(PACKAGE / "info" / "run.py"), "exec"), {"path": built_store / "store.json"})
    assert len(outside(seen)) == 1


def test_libraries_open_no_file_by_themselves() -> None:
    found = {}
    for file in PACKAGE.rglob("*.py"):
        name = file.relative_to(PACKAGE).as_posix()
        if not name.startswith("store/") and (calls := len(BY_THEMSELVES.findall(file.read_text()))):
            found[name] = calls
    assert found.pop("embed/foreign_vectors.py") == 2, "which reads files outside of stores"
    assert found == {"ann/lists.py": 2}, "which reads a path that the storage gives, and writes to what it is given"
