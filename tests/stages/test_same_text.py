"""A purge of a document that was rejected says under which names its text is live."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import make_rows, write_jsonl
from stored import stored_files

from retrotool import api
from retrotool.errors import RetrotoolError
from retrotool.purge import command, purged_chunks

TEXT = "said by several, and by none of them first"


@pytest.fixture
def store(tmp_path: Path, byte_level_tokenizer: Path) -> Path:
    """Kept in two plans: x, x2, x3 and x4 with one text; then y rejected as it has this text, too."""
    kept = [{"id": name, "text": TEXT} for name in ("x", "x2", "x3", "it's x4")]
    plans = [("keep", [*kept[:3], *make_rows(3)]), ("keep", kept[3:]), ("skip", [{"id": "y", "text": TEXT}])]
    for number, (duplicates, rows) in enumerate(plans):
        path = write_jsonl(tmp_path / f"{number}.jsonl", rows)
        options = {"tokenizer": str(byte_level_tokenizer), "chunk_length": 4, "part_size": 20}
        api.chunk(tmp_path / "store", [str(path)], duplicates=duplicates, **options)
    return tmp_path / "store"


def purge(store: Path, *names: str, **options: bool) -> api.PurgeResult:
    return api.purge(store, api.Selectors(document=names), reason="test", **options)


def last_line(store: Path, result: api.PurgeResult) -> str:
    return command._text(str(store), api.Selectors(), result, False).splitlines()[-1]


@pytest.mark.parametrize("erase", [False, True])
def test_it_is_reported_by_a_dry_run_and_by_the_purge(store: Path, erase: bool) -> None:
    planned = purge(store, "y", dry_run=True, erase=erase)
    done = purge(store, "y", erase=erase)
    for result in (planned, done):
        assert (result.chunks, result.same_text) == (0, purged_chunks.SameText(4, ("x", "x2", "x3")))
        assert last_line(store, result) == (
            f"The same text is still live in x, x2, x3 and 1 more. To purge it there: retrotool purge {store} "
            "--document x --document x2 --document x3 --reason ..."
        )
    log = b"".join(file.read_bytes() for file in stored_files(store, "log/*"))
    assert b"x2" not in log


def test_what_is_selected_too_or_purged_is_not_reported(store: Path) -> None:
    purge(store, "x", "x2")
    result = purge(store, "y", "x3", dry_run=True)
    assert result.same_text == purged_chunks.SameText(1, ("it's x4",))
    line = last_line(store, result)
    assert line.startswith("The same text is still live in it's x4. ")
    assert line.endswith("""--document 'it'"'"'s x4' --reason ...""")
    purge(store, "it's x4", "x3")
    assert purge(store, "y", dry_run=True).same_text.documents == 0


def test_keys_are_read_only_if_something_rejected_is_selected(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RetrotoolError("looks at parts")

    monkeypatch.setattr(purged_chunks.pc, "is_in", refuse)
    assert purge(store, "doc-1", "x", dry_run=True).same_text.documents == 0
    with pytest.raises(RetrotoolError, match="looks at parts"):
        purge(store, "y", dry_run=True)
