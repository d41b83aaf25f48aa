"""``purge --verify``: that it finds what is left, wherever it is, and that its receipt says what happened."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import string
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import make_rows, write_jsonl

from retrotool import api
from retrotool.errors import CorruptError, StorageError, UsageError
from retrotool.neighbours import table_reader
from retrotool.purge import proving, verify_text
from retrotool.purge.purged_chunks import tombstones_of
from retrotool.store import parts, runs
from retrotool.store.store import Store

REASON = 'request <17> & "more"'


def canary(seed: int) -> str:
    draw = random.Random(seed)
    return " ".join("".join(draw.choices(string.ascii_lowercase, k=9)) for _ in range(25))


CANARIES = {f"canary-document-{i}": canary(i) for i in range(4)}


@pytest.fixture(scope="module")
def canaried(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    folder = tmp_path_factory.mktemp("canaried")
    rows = make_rows(60)
    for at, (name, text) in enumerate(CANARIES.items()):
        rows.insert(5 + 14 * at, {"id": name, "text": text, "source": "c", "year": 1})
    source = write_jsonl(folder / "c.jsonl", rows)
    api.chunk(folder / "store", [str(source)], tokenizer=str(tiny_encoder), part_size=60)
    api.embed(folder / "store", encoder=str(tiny_encoder))
    api.index(folder / "store")
    api.neighbours(folder / "store", materialise=True)
    return folder / "store"


@pytest.fixture
def store(canaried: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(canaried, tmp_path / "store"))


def purged(store: Path, *, erase: bool = False) -> str:
    selectors = api.Selectors(document=tuple(CANARIES))
    return api.purge(store, selectors, reason=REASON, who="somebody", erase=erase).purge


def checked(store: Path, purge: str, out: Path) -> api.VerifiedPurge:
    out.mkdir(exist_ok=True)
    return api.verify_purge(store, purge, out=out)


def erase_until_killed(store: Path, purge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An erase that ends when its proofs are committed and nothing is rewritten yet."""

    def killed(*_: object) -> None:
        raise OSError("killed")

    with monkeypatch.context() as patched:
        patched.setattr("retrotool.purge.erase_run.EraseStage.plan", killed)
        with pytest.raises(OSError, match="killed"):
            api.erase(store, [purge])


def test_a_receipt_of_an_erased_purge(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = Store.open(store)
    tokens: dict[int, bytes] = {}
    for part in opened.state.parts():
        chunks = parts.read_chunks(opened, part)
        tokens |= {
            part << 32 | row: chunks.tokens[row, : chunks.n_tokens[row]].tobytes() for row in range(len(chunks.tokens))
        }
    before = {path.relative_to(store).as_posix(): path.read_bytes() for path in store.rglob("*") if path.is_file()}
    purge = purged(store, erase=True)
    found = checked(store, purge, tmp_path / "out")
    receipt = found.receipt
    assert receipt.ok, receipt.problems
    assert (receipt.state, receipt.reason, receipt.who) == ("erased", REASON, "somebody")
    assert {view.name for view in receipt.views} == {
        "chunks", "documents", "embeddings tiny", "search main", "neighbours main", "dataset main", "export main",
    }  # fmt: skip
    assert all(view.rows and not view.found and not view.note for view in receipt.views)
    assert receipt.searched is not None
    assert receipt.searched.needles.keys() == {"tokens", "text", "vector16", "vector32", "key", "id"}
    victims = tombstones_of(Store.open(store), purge).tolist()
    assert Path(found.salt).stat().st_mode & 0o077 == 0, "it is for nobody else"
    salt = bytes.fromhex(Path(found.salt).read_text().strip())
    hashes = {hashlib.blake2b(tokens[chunk], digest_size=16, key=salt).hexdigest() for chunk in victims}
    assert set(receipt.salted_chunks) == hashes
    assert {file.before.split("/")[0] for file in receipt.files} >= {
        "documents", "chunks", "embeddings", "index", "neighbours", "materialised", "selectors",
    }  # fmt: skip
    for file in receipt.files:
        assert not (store / file.before).exists()
        if file.before in before:  # the selectors' came with the purge
            assert hashlib.sha256(before[file.before]).hexdigest() == file.before_sha256
        if file.after and (store / file.after).exists():
            assert hashlib.sha256((store / file.after).read_bytes()).hexdigest() == file.after_sha256
    data = Path(found.json).read_bytes()
    assert json.loads(data) == json.loads(json.dumps(asdict(receipt)))
    newest = next(iter(api.log_entries(store, 1)))
    assert found.commit == newest.number == receipt.log_commit + 1
    assert hashlib.sha256(data).hexdigest() == found.sha256
    assert found.sha256 in (store / f"log/{found.commit:08d}.json").read_text()
    assert api.verify_log(store, receipt.log_head).kept == receipt.log_commit
    assert api.verify(store).ok
    page = Path(found.page).read_text()
    ElementTree.fromstring(page.replace("<!DOCTYPE html>", ""))
    assert "<17>" not in page
    assert "Purged and erased." in page
    verify_text.show_verified(store, found, as_json=False)
    said = page + data.decode() + capsys.readouterr().out
    for name, text in CANARIES.items():
        assert name not in said
        assert not any(word in said for word in text.split())


def test_what_is_purged_and_not_erased_is_masked_only(store: Path, tmp_path: Path) -> None:
    purge = purged(store)
    found = checked(store, purge, tmp_path / "out").receipt
    assert (found.state, found.ok, found.searched, found.files) == ("purged", True, None, ())
    assert "not erased" in (tmp_path / "out" / f"receipt-{purge}.html").read_text()
    assert "Purged and erased" not in (tmp_path / "out" / f"receipt-{purge}.html").read_text()
    api.erase(store, [purge])
    assert checked(store, purge, tmp_path / "out").receipt.state == "erased"


def test_a_reader_that_does_not_look_through_the_tombstones_is_found(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    purge = purged(store)
    original = table_reader.read_tombstones

    class Blind(type(original(Store.open(store)))):  # type: ignore[misc]
        def contains(self, ids: np.ndarray) -> np.ndarray:
            return np.zeros(ids.shape, np.bool_)

    monkeypatch.setattr(table_reader, "read_tombstones", lambda of: Blind(original(of).ids))
    found = checked(store, purge, tmp_path / "out").receipt
    assert not found.ok
    assert {view.name for view in found.views if view.found} == {"neighbours main"}
    assert any("neighbours main" in problem for problem in found.problems)


def test_leftovers_and_files_that_are_not_what_the_log_says_are_found(store: Path, tmp_path: Path) -> None:
    opened = Store.open(store)
    part = next(p for p in opened.state.parts() if "canary" in str(parts.read_documents(opened, p, ["id"])["id"]))
    old = {kind: opened.state.part_file(kind, part) for kind in ("chunks", "documents")}
    kept = {kind: (store / entry.path).read_bytes() for kind, entry in old.items() if entry is not None}
    purge = purged(store, erase=True)
    (store / "chunks" / "backup").write_bytes(kept["chunks"])
    (store / ".notes.json").write_text(json.dumps({"subject": CANARIES["canary-document-2"]}))
    found = checked(store, purge, tmp_path / "out")
    assert not found.receipt.ok
    assert found.receipt.searched is not None
    assert {trace.path for trace in found.receipt.searched.left} == {"chunks/backup", ".notes.json"}
    assert "NOT well" in Path(found.page).read_text()
    (store / "chunks" / "backup").unlink()
    (store / ".notes.json").unlink()
    assert checked(store, purge, tmp_path / "out").receipt.ok
    assert old["documents"] is not None
    (store / old["documents"].path).write_bytes(kept["documents"])
    problems = checked(store, purge, tmp_path / "out").receipt.problems
    assert f"{old['documents'].path}: it was replaced, and is still there" in problems
    (store / old["documents"].path).unlink(missing_ok=True)
    new = Store.open(store).state.part_file("chunks", part)
    assert new is not None
    data = bytearray((store / new.path).read_bytes())
    data[len(data) // 2] ^= 1
    (store / new.path).write_bytes(data)
    problems = checked(store, purge, tmp_path / "out").receipt.problems
    assert any(new.path in problem and "can't be read" in problem for problem in problems)
    assert f"{new.path}: it is not what the log says, by SHA-256" in problems
    data[len(data) // 2] ^= 1
    (store / new.path).write_bytes(data)
    assert checked(store, purge, tmp_path / "out").receipt.ok
    embedded = Store.open(store).state.part_file("embeddings", part, "tiny")
    assert embedded is not None
    vectors = bytearray((store / embedded.path).read_bytes())
    vectors[-1] ^= 1
    (store / embedded.path).write_bytes(vectors)
    problems = checked(store, purge, tmp_path / "out").receipt.problems
    assert problems == (f"{embedded.path}: it is not what the log says, by SHA-256",)


def test_a_log_that_was_edited_is_no_proof(store: Path, tmp_path: Path) -> None:
    purge = purged(store, erase=True)
    path = next(p for p in sorted(store.glob("log/*.json")) if '"kind":"purge"' in p.read_text())
    path.write_text(path.read_text().replace("somebody", "nobody!!"))
    with pytest.raises(CorruptError, match="checksum"):
        checked(store, purge, tmp_path / "out")


def test_an_erase_that_was_begun(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    purge = purged(store)
    erase_until_killed(store, purge, monkeypatch)
    assert checked(store, purge, tmp_path / "out").receipt.state == "purged"
    proofs = sorted((store / "proofs").iterdir())
    assert proofs
    api.erase(store, [purge])
    assert proofs == sorted((store / "proofs").iterdir()), "they are made once"
    assert checked(store, purge, tmp_path / "out").receipt.state == "erased"


def test_proofs_go_when_a_purge_is_taken_back(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    purge = purged(store)
    erase_until_killed(store, purge, monkeypatch)
    api.restore(store, purge, reason="a mistake")
    assert not list(Store.open(store).state.group("proofs"))
    assert api.verify(store).ok
    with pytest.raises(UsageError, match="taken back"):
        checked(store, purge, tmp_path / "out")


def test_two_purges_of_one_chunk_both_keep_proofs(store: Path, tmp_path: Path) -> None:
    one = api.purge(store, api.Selectors(document=("canary-document-1", "canary-document-2")), reason="a").purge
    two = api.purge(
        store, api.Selectors(document=("canary-document-2", "canary-document-3")), reason="b", erase=True
    ).purge
    assert checked(store, two, tmp_path / "out").receipt.ok
    assert checked(store, one, tmp_path / "out").receipt.state == "partly erased"
    api.erase(store, [one])
    found = checked(store, one, tmp_path / "out").receipt
    assert (found.ok, found.state) == (True, "erased")
    (store / "left.txt").write_text(CANARIES["canary-document-2"])
    for purge in (one, two):
        assert not checked(store, purge, tmp_path / "out").receipt.ok, "both had it"


def test_a_store_that_can_not_be_written_has_a_receipt(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    purge = purged(store, erase=True)

    def refused(*_: object) -> Any:
        raise StorageError("read-only file system")

    monkeypatch.setattr(runs.Run, "__enter__", refused)
    found = checked(store, purge, tmp_path / "out")
    assert found.receipt.ok
    assert found.commit is None
    verify_text.show_verified(store, found, as_json=False)
    assert "does not name the receipt" in capsys.readouterr().out


def test_wrong_purges_and_places(store: Path, tmp_path: Path) -> None:
    purge = purged(store)
    with pytest.raises(UsageError, match="no purge 'p0'; it has: " + purge):
        checked(store, "p0", tmp_path / "out")
    with pytest.raises(UsageError, match="lies in the store"):
        checked(store, purge, store / "receipts")
    with pytest.raises(UsageError, match="no folder"):
        api.verify_purge(store, purge, out=tmp_path / "nowhere")


def test_what_was_erased_without_proofs_is_not_proven(store: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("retrotool.purge.erase_run.ProveStage.plan", lambda *_: [])
    purge = purged(store, erase=True)
    found = checked(store, purge, tmp_path / "out").receipt
    assert not found.ok
    assert "kept no proofs" in found.problems[0]
    assert found.limits == proving.LIMITS


def test_folders_that_are_linked_are_searched(store: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (store / "beside").symlink_to(tmp_path / "elsewhere")
    (store / "again").symlink_to(store)
    purge = purged(store, erase=True)
    assert checked(store, purge, tmp_path / "out").receipt.ok
    (tmp_path / "elsewhere" / "x.txt").write_text(CANARIES["canary-document-1"])
    found = checked(store, purge, tmp_path / "out").receipt
    assert found.searched is not None
    assert [trace.path for trace in found.searched.left] == ["beside/x.txt"]
    assert "remove it" in found.problems[0]


def test_what_waits_to_be_erased_says_nothing_by_right(tiny_encoder: Path, tmp_path: Path) -> None:
    text = canary(77)
    rows = [{"id": "one", "text": text}, {"id": "two", "text": text + " and more"}, *make_rows(4)]
    store = tmp_path / "store"
    api.chunk(store, [str(write_jsonl(tmp_path / "c.jsonl", rows))], tokenizer=str(tiny_encoder))
    api.purge(store, api.Selectors(document=("two",)), reason="later")
    purge = api.purge(store, api.Selectors(document=("one",)), reason="now", erase=True).purge
    found = checked(store, purge, tmp_path / "out").receipt
    assert not found.ok
    assert all("purged, or set aside, say it, too" in problem for problem in found.problems)
    api.purge(store, api.Selectors(document=("two",)), reason="later", erase=True)
    assert checked(store, purge, tmp_path / "out").receipt.ok


def test_a_way_that_can_not_be_gone_is_told(store: Path, tmp_path: Path) -> None:
    purge = purged(store)
    for path in (store / "index" / "main").glob("trained-*"):
        path.unlink()
    found = checked(store, purge, tmp_path / "out")
    assert not found.receipt.ok
    assert "search main: can't be read" in found.receipt.problems[0]


def test_a_way_whose_database_is_elsewhere_is_told(store: Path, tmp_path: Path, tiny_encoder: Path) -> None:
    other = tmp_path / "other"
    api.chunk(other, [str(write_jsonl(tmp_path / "o.jsonl", make_rows(20, first=200)))], tokenizer=str(tiny_encoder))
    api.embed(other, encoder=str(tiny_encoder))
    api.index(other)
    api.neighbours(other, queries=store, name="far")
    other.rename(tmp_path / "gone")
    purge = purged(store)
    found = checked(store, purge, tmp_path / "out")
    assert found.receipt.ok
    assert found.receipt.unread == ("neighbours far", "dataset far", "export far")
    assert "3 ways to read it could not be gone" in Path(found.page).read_text()


@pytest.mark.parametrize("name", ["5", "text", "tokens", "id", "tiny", "main", "root", "chunks"])
def test_an_id_that_is_a_word_of_the_stores_own_is_no_false_alarm(
    name: str, tmp_path: Path, tiny_encoder: Path
) -> None:
    rows = [{"id": name, "text": canary(5)}, *make_rows(60, first=100)]
    store = tmp_path / "store"
    api.chunk(store, [str(write_jsonl(tmp_path / "c.jsonl", rows))], tokenizer=str(tiny_encoder), part_size=20)
    api.embed(store, encoder=str(tiny_encoder))
    api.index(store)
    api.neighbours(store)
    assert len(Store.open(store).state.parts()) > 6
    purge = api.purge(store, api.Selectors(document=(name,)), reason="r", who="root", erase=True).purge
    found = checked(store, purge, tmp_path / "out").receipt
    assert found.problems == (() if name != "root" else found.problems)
    if name == "root":
        assert "it was given as a reason or a name, which stays" in found.problems[0]


def test_a_reason_that_names_the_document_stays_and_is_told(store: Path, tmp_path: Path) -> None:
    purge = api.purge(
        store, api.Selectors(document=("canary-document-1",)), reason="canary-document-1", erase=True
    ).purge
    problems = checked(store, purge, tmp_path / "out").receipt.problems
    assert problems
    assert all(problem.startswith(("log/", "checkpoints/")) and "which stays" in problem for problem in problems)


def test_controls_in_a_reason_are_shown_on_the_page_and_not_obeyed(store: Path, tmp_path: Path) -> None:
    purge = api.purge(
        store, api.Selectors(document=("canary-document-1",)), reason="a\x1b[31mb\u202ec", who="x\x07", erase=True
    ).purge
    page = Path(checked(store, purge, tmp_path / "out").page).read_text()
    ElementTree.fromstring(page.replace("<!DOCTYPE html>", ""))
    assert not set("\x1b\x07") & set(page)


def test_a_chunk_that_is_too_short_to_be_looked_for_is_told(
    tmp_path: Path, tiny_encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": "short", "text": "zq xv jk"}, *make_rows(4)]
    store = tmp_path / "store"
    api.chunk(store, [str(write_jsonl(tmp_path / "c.jsonl", rows))], tokenizer=str(tiny_encoder))
    purge = api.purge(store, api.Selectors(document=("short",)), reason="r", erase=True).purge
    found = checked(store, purge, tmp_path / "out")
    verify_text.show_verified(store, found, as_json=False)
    told = capsys.readouterr().out
    assert "Of its 1 chunk nothing could be looked for by the tokens of 1 and by the text of 1" in told
    assert "nothing could be looked for" in Path(found.page).read_text()
