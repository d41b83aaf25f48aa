"""Documents whose id the store has with another text: left out, replaced, refused, or mirrored."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from chunk_helpers import quarantine, run_chunk, run_cli, verified, write_rows
from conftest import make_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from stored import copy_store

import retrotool
from retrotool import api
from retrotool.chunk.chunk_plan import Existing
from retrotool.chunk.deduplicate import BY_ID, DIFFERING
from retrotool.purge.undo import undo
from retrotool.store.store import Store

ROWS = make_rows(12, words=30)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store of twelve documents, of ``rows.jsonl`` beside it."""
    assert run_chunk(tmp_path / "store", write_rows(tmp_path / "rows.jsonl", ROWS)).exit_code == 0
    return tmp_path / "store"


def edited(*numbers: int, text: str = "A corrected text.") -> list[dict[str, Any]]:
    return [{**row, "text": f"{text} {i}"} if i in numbers else row for i, row in enumerate(ROWS)]


def chunk(store: Path, *arguments: object, exit_code: int = 0) -> dict[str, Any]:
    result = run_chunk(store, *arguments, "--json")
    assert result.exit_code == exit_code, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def rewrite(store: Path, rows: list[dict[str, Any]]) -> Path:
    return write_rows(store.parent / "rows.jsonl", rows)


def texts(store: Path) -> dict[str, str]:
    reader = retrotool.open(store)
    found: dict[str, str] = {}
    for chunk in (reader.chunk(int(i)) for part in reader.parts() for i in reader.chunk_ids(part)):
        found[chunk.document] = found.get(chunk.document, "") + chunk.text
    return found


def check_same(store: Path, rows: list[dict[str, Any]]) -> None:
    """Check that the store has the content of a new one with these rows."""
    new = store.parent / "new"
    number = len(list(store.parent.glob("new*")))
    new = new.with_name(f"new-{number}")
    run_chunk(new, write_rows(store.parent / f"new-{number}.jsonl", rows))
    found = verified(store)
    assert found.ok, found.problems
    assert found.content == verified(new).content


def test_another_text_is_left_out_and_said_so_and_the_printed_advice_replaces_it(store: Path) -> None:
    path = rewrite(store, edited(3))
    result = run_chunk(store, path)
    assert result.exit_code == 0
    assert "11 documents unchanged.\n1 document skipped: the store has another text under the same id (doc-3)" in (
        result.stdout
    )
    assert (str(path), 4, DIFFERING) in quarantine(store)
    check_same(store, ROWS)
    assert "--existing replace" in result.stdout
    result = run_chunk(store, path, "--existing", "replace")  # the input has not changed since
    assert "11 documents unchanged.\n1 document replaced by a new text.\n" in result.stdout
    for verb in ("undo", "erase"):
        (command,) = [line for line in result.stdout.splitlines() if line.startswith(f"  retrotool {verb}")]
        copy = copy_store(store, store.parent / verb)
        assert (
            run_cli(
                *shlex.split(command.replace(str(store), str(copy)))[1:], *(["--yes"] if verb == "erase" else [])
            ).exit_code
            == 0
        )
        check_same(copy, ROWS if verb == "undo" else edited(3))
    check_same(store, edited(3))
    assert chunk(store, path, "--existing", "replace")["known_inputs"] == 1


def test_a_text_is_replaced_and_replaced_by_the_first_again(store: Path) -> None:
    chunk(store, rewrite(store, edited(3)), "--existing", "replace")
    back = chunk(store, rewrite(store, ROWS), "--existing", "replace")
    assert (back["documents"], back["unchanged"], back["replaced"], back["blocked"]) == (1, 11, 1, 0)
    check_same(store, ROWS)
    # The same bytes are another version of the input now.
    assert chunk(store, rewrite(store, edited(3)), "--existing", "replace")["replaced"] == 1
    check_same(store, edited(3))


def test_two_texts_are_exchanged(store: Path) -> None:
    rows = [dict(row) for row in ROWS]
    rows[0]["text"], rows[1]["text"] = rows[1]["text"], rows[0]["text"]
    assert chunk(store, rewrite(store, rows), "--existing", "replace")["replaced"] == 2
    check_same(store, rows)


def test_a_replaced_text_is_erased_with_a_receipt(store: Path) -> None:
    (purge,) = chunk(store, rewrite(store, edited(3, 5)), "--existing", "replace")["purges"]
    assert [(one.purge, one.selector, one.documents) for one in api.list_purges(store).purges] == [
        (purge, "replaced", 2)
    ]
    assert run_cli("erase", store, purge, "--yes").exit_code == 0
    result = run_cli("receipt", store, purge, "--out", store.parent)
    assert result.exit_code == 0, result.output
    check_same(store, edited(3, 5))
    secret = ROWS[3]["text"].encode()
    assert not [path for path in store.rglob("*") if path.is_file() and secret in path.read_bytes()]
    result = run_cli("undo", store, purge, "--reason", "test")
    assert result.exit_code == 2
    (advice,) = [line for line in result.stderr.splitlines() if "retrotool chunk" in line]
    assert "--allow-purged" in advice


def test_a_replacement_is_undone_in_one_commit_and_that_too(store: Path) -> None:
    new = edited(3, 5)
    (purge,) = chunk(store, rewrite(store, new), "--existing", "replace")["purges"]
    commits = Store.open(store).state.number
    result = run_cli("undo", store, purge, "--reason", "wrong file", "--json")
    undone = json.loads(result.stdout)
    assert (undone["documents"], undone["outdated"], undone["repeats"]) == (2, 2, 0)
    assert Store.open(store).state.number == commits + 1
    check_same(store, ROWS)
    copy = copy_store(store, store.parent / "copy")
    assert chunk(copy, store.parent / "rows.jsonl", "--existing", "replace")["replaced"] == 2  # the same input again
    check_same(copy, new)
    result = run_cli("undo", store, undone["outdated_purge"], "--reason", "it was right")
    assert result.exit_code == 0
    assert "Purged instead: 2 documents with a newer text (purge p" in result.stdout
    check_same(store, new)
    (line,) = [line for line in result.stdout.splitlines() if "To undo this" in line]
    command = shlex.split(line.rpartition(": ")[2])
    assert run_cli(*command[1:]).exit_code == 0
    check_same(store, ROWS)


def test_what_was_undone_is_read_again_whichever_run_found_it_unchanged_before(store: Path) -> None:
    new = edited(3, 5)
    source = rewrite(store, new)
    (purge,) = chunk(store, source, "--existing", "replace")["purges"]
    assert chunk(store, source, "--existing", "mirror")["unchanged"] == len(new)
    assert run_cli("undo", store, purge, "--reason", "wrong file").exit_code == 0
    check_same(store, ROWS)
    assert chunk(store, source, "--existing", "mirror")["replaced"] == 2
    check_same(store, new)
    assert chunk(store, source, "--existing", "mirror")["known_inputs"] == 1


def test_fail_changes_nothing_and_its_advice_works(store: Path) -> None:
    result = run_chunk(store, rewrite(store, [*edited(3), {"id": "new", "text": "A new one."}]), "--existing", "fail")
    assert result.exit_code == 1
    assert "1 document with another text than the stored documents of the same ids, such as doc-3" in result.stderr
    check_same(store, ROWS)
    again = run_chunk(store, store.parent / "rows.jsonl", "--existing", "mirror")
    assert again.exit_code == 2
    assert "Finish it with skip or replace first" in again.stderr
    copy = copy_store(store, store.parent / "copy")
    assert chunk(copy)["differing"] == 1  # the default of the next run
    check_same(copy, [*ROWS, {"id": "new", "text": "A new one."}])
    chunk(store, store.parent / "rows.jsonl", "--existing", "replace")
    check_same(store, [*edited(3), {"id": "new", "text": "A new one."}])


def test_without_another_text_fail_succeeds(store: Path) -> None:
    rows = [*ROWS, {"id": "new", "text": "A new one."}]
    assert chunk(store, rewrite(store, rows), "--existing", "fail")["documents"] == 1
    check_same(store, rows)


def test_mirror_removes_what_the_input_does_not_have_any_more(store: Path) -> None:
    rows = [row for i, row in enumerate(edited(3)) if i not in (0, 7)] + [{"id": "new", "text": "A new one."}]
    found = chunk(store, rewrite(store, rows), "--existing", "mirror")
    assert (found["documents"], found["unchanged"], found["replaced"], found["removed"]) == (2, 9, 1, 2)
    check_same(store, rows)
    (purge,) = found["purges"]
    assert run_cli("undo", store, purge, "--reason", "test").exit_code == 0
    check_same(store, [*ROWS, {"id": "new", "text": "A new one."}])


def test_mirror_removes_what_an_earlier_run_left(store: Path) -> None:
    path = rewrite(store, ROWS[4:])
    assert chunk(store, path)["unchanged"] == 8
    found = chunk(store, path, "--existing", "mirror")  # the same bytes
    assert (found["unchanged"], found["removed"]) == (8, 4)
    check_same(store, ROWS[4:])
    assert chunk(store, path, "--existing", "mirror")["known_inputs"] == 1


def test_mirror_removes_nothing_of_an_input_with_rejected_rows(store: Path) -> None:
    path = rewrite(store, ROWS[4:])
    path.write_bytes(path.read_bytes() + b'{"id": "doc-0", "te\n')
    result = run_chunk(store, path, "--existing", "mirror")
    assert result.exit_code == 3
    assert f"Nothing was removed of {path.name}" in result.stdout.replace(str(path.parent).strip("/") + "/", "")
    check_same(store, ROWS)


@pytest.mark.parametrize("order", [("a.jsonl", "b.jsonl"), ("b.jsonl", "a.jsonl")])
def test_mirror_keeps_what_moved_to_another_input(order: tuple[str, str], tmp_path: Path) -> None:
    store, paths = tmp_path / "store", [tmp_path / name for name in order]
    for path, rows in zip(paths, (ROWS[:6], ROWS[6:]), strict=True):
        write_rows(path, rows)
    run_chunk(store, *paths)
    write_rows(paths[0], ROWS[1:6])
    write_rows(paths[1], [*ROWS[6:], ROWS[0]])
    found = chunk(store, *paths, "--existing", "mirror")
    assert (found["unchanged"], found["removed"]) == (12, 0)
    check_same(store, ROWS)


def test_mirror_keeps_what_another_input_has_too(tmp_path: Path) -> None:
    store, paths = tmp_path / "store", [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    write_rows(paths[0], ROWS[:6])
    write_rows(paths[1], ROWS[5:])
    run_chunk(store, *paths)
    assert [reason for _, _, reason in quarantine(store)] == [BY_ID]
    write_rows(paths[0], ROWS[:5])
    assert chunk(store, *paths, "--existing", "mirror")["removed"] == 0
    check_same(store, ROWS)


def test_what_was_purged_stays_out_whatever_its_text_and_comes_back_as_the_advice_says(store: Path) -> None:
    api.purge(store, api.Selectors(document=("doc-3",)), reason="test")
    path = rewrite(store, edited(3, 5))
    result = run_chunk(store, path, "--existing", "replace")
    assert "1 document skipped: purged before (--allow-purged adds them)." in result.stdout
    check_same(store, [row for row in edited(5) if row["id"] != "doc-3"])
    assert chunk(store, path, "--allow-purged")["documents"] == 1
    check_same(store, edited(3, 5))


@pytest.mark.parametrize("erase", [False, True])
def test_an_unchanged_input_gives_back_what_was_purged(store: Path, erase: bool) -> None:
    path = store.parent / "rows.jsonl"
    api.purge(store, api.Selectors(document=("doc-3",)), reason="test", erase=erase)
    assert chunk(store, path)["known_inputs"] == 1
    found = chunk(store, path, "--allow-purged")
    assert (found["documents"], found["unchanged"]) == (1, 11)
    check_same(store, ROWS)


def test_what_was_purged_comes_back_whichever_run_read_it(store: Path) -> None:
    new = [*edited(3), {"id": "new", "text": "A new one."}]
    path = rewrite(store, new)
    chunk(store, path)
    chunk(store, path, "--existing", "replace")  # it knew the new document from the run before
    api.purge(store, api.Selectors(document=("new",)), reason="test", erase=True)
    assert chunk(store, path, "--allow-purged")["documents"] == 1
    check_same(store, new)


def test_a_takedown_by_id_reaches_the_texts_that_were_replaced(store: Path) -> None:
    chunk(store, rewrite(store, edited(3, text="Second.")), "--existing", "replace")
    chunk(store, rewrite(store, edited(3, text="Third.")), "--existing", "replace")
    api.purge(store, api.Selectors(document=("doc-3",)), reason="test", erase=True)
    for text in (str(ROWS[3]["text"]), "Second.", "Third."):
        assert not [path for path in store.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]
    # None of its texts comes back.
    for rows in (edited(3, text="Second."), ROWS, edited(3, text="Fourth.")):
        chunk(store, rewrite(store, rows), "--existing", "replace")
        check_same(store, [row for row in ROWS if row["id"] != "doc-3"])


VERSIONS = st.lists(
    st.tuples(
        st.sampled_from(["skip", "replace", "mirror"]), st.dictionaries(st.sampled_from("abcde"), st.integers(0, 2))
    ),
    min_size=2,
    max_size=5,
)


@settings(max_examples=12, derandomize=True, deadline=None)
@given(versions=VERSIONS)
def test_versions_of_an_input_one_after_the_other(
    versions: list[tuple[Existing, dict[str, int]]],
    byte_level_tokenizer: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """The store has what a dictionary of ids and texts has, and an undo puts back what the last version took."""
    folder = tmp_path_factory.mktemp("versions")
    store, path = folder / "store", folder / "rows.jsonl"
    live: dict[str, str] = {}
    for existing, version in [("skip", {"always": 0}), *versions]:
        rows = {name: f"The text of {name} number {number}." for name, number in {"always": 0, **version}.items()}
        write_rows(path, [{"id": name, "text": text} for name, text in rows.items()])
        before = dict(live)
        found = api.chunk(store, [str(path)], tokenizer=str(byte_level_tokenizer), existing=existing)
        live = rows if existing == "mirror" else {**live, **rows} if existing == "replace" else {**rows, **live}
        gone = {name: text for name, text in before.items() if live.get(name) != text}
        assert (found.replaced + found.removed, len(found.purges)) == (len(gone), bool(gone))
        assert texts(store) == live
        assert api.verify(store).problems == []
    for purge in found.purges:
        undo(store, purge, reason="test")
        assert texts(store) == {**live, **gone}
        assert api.verify(store).problems == []


def test_interrupted_work_goes_on_as_it_was_begun(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = rewrite(store, edited(3)[2:])
    with monkeypatch.context() as patch:
        patch.setattr("retrotool.chunk.run.finish_plans", _interrupt)
        assert run_chunk(store, path, "--existing", "mirror").exit_code == 130
    check_same(store, ROWS)
    found = chunk(store)
    assert (found["replaced"], found["removed"]) == (1, 2)
    check_same(store, edited(3)[2:])


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_mirrored_folder_keeps_documents_of_files_that_are_gone_until_the_printed_command_removes_them(
    store: Path,
) -> None:
    folder = store.parent / "days"
    folder.mkdir()
    new = [{**row, "id": f"new-{i}", "text": f"{row['text']} {i}"} for i, row in enumerate(ROWS)]
    for i in range(3):
        write_rows(folder / f"{i}.jsonl", new[4 * i : 4 * i + 4])
    chunk(store, folder, "--existing", "mirror")
    (folder / "1.jsonl").unlink()
    (folder / "2.jsonl").rename(folder / "two.jsonl")
    result = run_chunk(store, folder, "--existing", "mirror")
    assert (result.exit_code, result.stdout) == (0, "2 inputs skipped: already in the store.\n")
    assert "Documents of files that were deleted or renamed stay. To remove them: " in result.stderr
    check_same(store, [*ROWS, *new])
    command = result.stderr.partition("To remove them: ")[2].splitlines()[0].replace("NAME", "days/1.jsonl")
    assert run_cli(*shlex.split(command)[1:], "--yes").exit_code == 0
    check_same(store, [*ROWS, *new[:4], *new[8:]])
