"""After a purge no way of reading gives a purged chunk; after an erase no file holds it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import make_rows, write_jsonl
from oracle import read_plain
from stored import remove_stored, stored_file, stored_files

import retrotool
from retrotool import api
from retrotool.embed.stage import EmbedStage
from retrotool.errors import ConflictError, ErasedError, StorageError, UsageError
from retrotool.purge.run import commit_purge
from retrotool.purge.select import select
from retrotool.purge.selectors.lookup import Lookup, select_ids
from retrotool.purge.selectors.selector import GivenValue
from retrotool.reader import Reader
from retrotool.store import folding, staging
from retrotool.store.folding import writing
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones

CANARY = "zqxjkv"


def lines(path: Path, values: list[object]) -> Path:
    path.write_text("".join(f"{value}\n" for value in values))
    return path


def returned(reader: Reader, k: int = 20) -> Iterator[int]:
    """Ids of every chunk that any way of reading gives: chunks, ``k`` neighbours, continuations."""
    for part in reader.parts():
        for chunk in reader.chunk_ids(part):
            yield int(chunk)
            if (following := reader.continuation(int(chunk))) is not None:
                yield following.id
            for neighbour in reader.neighbours(int(chunk), k=k):
                yield neighbour.id
                if neighbour.continuation is not None:
                    yield neighbour.continuation.id


def test_a_purged_document_is_never_returned_again(store_copy: Path, tmp_path: Path) -> None:
    before = retrotool.open(store_copy)
    targets = set(before.document("doc-7") + before.document("doc-30"))
    texts = [before.chunk(chunk).text for chunk in sorted(targets)]
    assert targets <= set(returned(before, 2)), "they were there"
    result = api.purge(store_copy, api.Selectors(document=lines(tmp_path / "ids", ["doc-7", "doc-30"])), reason="test")
    assert (result.chunks, result.documents, result.erased) == (len(targets), 2, 0)
    after = retrotool.open(store_copy)
    assert targets.isdisjoint(returned(after))
    encoder = after.load_encoder()
    for text in texts:
        assert targets.isdisjoint(n.id for n in after.search(text, 20, encoder=encoder))
    for part in after.parts():
        vectors = after.embeddings(part)
        assert not vectors[[v & 0xFFFFFFFF for v in targets if v >> 32 == part]].any()
    with pytest.raises(UsageError, match="purged"):
        after.chunk(min(targets))
    with pytest.raises(UsageError, match="purged"):
        after.document("doc-7")
    assert not after.tokens(sorted(targets)).any()
    shown = api.info(store_copy)
    assert (shown.documents, shown.chunks) == (118, 366 - len(targets))
    assert api.verify(store_copy).ok


def test_a_reader_that_was_open_keeps_its_view_until_it_refreshes(store_copy: Path, tmp_path: Path) -> None:
    reader = retrotool.open(store_copy)
    target = reader.document("doc-7")[0]
    api.purge(store_copy, api.Selectors(chunk=lines(tmp_path / "ids", [target])), reason="test")
    assert reader.chunk(target).document == "doc-7"
    reader.refresh()
    with pytest.raises(UsageError):
        reader.chunk(target)


def test_a_reader_that_fails_to_refresh_keeps_its_whole_view(store_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the new commit with the old tombstones: what is purged at a commit is not in it."""
    reader = retrotool.open(store_copy)
    before, target = reader.commit, reader.document("doc-7")[0]
    api.purge(store_copy, api.Selectors(document="doc-7"), reason="test")
    with monkeypatch.context() as patch:
        patch.setattr("retrotool.reader.read_tombstones", Mock(side_effect=StorageError("the server is busy")))
        with pytest.raises(StorageError):
            reader.refresh()
    assert (reader.commit, reader.chunk(target).document) == (before, "doc-7")
    assert reader.refresh() > before
    with pytest.raises(UsageError):
        reader.chunk(target)


def test_a_reader_whose_files_are_erased_says_so(store_copy: Path, tmp_path: Path) -> None:
    reader = retrotool.open(store_copy)
    target = reader.document("doc-7")[0]
    view = retrotool.open(store_copy)
    api.purge(store_copy, api.Selectors(chunk=lines(tmp_path / "ids", [target])), reason="test", erase=True)
    with pytest.raises(ErasedError, match="erased") as error:
        view.chunk(target)
    assert "open the store again" in error.value.advice


def everything(root: Path) -> bytes:
    """Every byte under a store, with Parquet, npy and compressed content decoded as well."""
    out = io.BytesIO()
    for path in stored_files(root):
        out.write(path.read_bytes())
        if path.suffix == ".parquet":
            for column in pq.read_table(path).columns:
                for chunk in column.chunks:
                    for buffer in chunk.buffers():
                        out.write(b"" if buffer is None else buffer.to_pybytes())
    return out.getvalue()


@pytest.fixture
def canary_store(tmp_path: Path, tiny_encoder: Path) -> tuple[Path, list[str]]:
    """A store with two canary documents, built to the end, and an IVF beside the flat index."""
    rows = make_rows(60)
    names = []
    for i in (10, 41):
        text = " ".join(f"{CANARY}{i} {row['text']}" for row in make_rows(3, first=700 + i))
        rows.insert(i, {"id": f"{CANARY}-{i}", "text": text, "source": "secret source", "note": f"{CANARY} kept"})
        names.append(f"{CANARY}-{i}")
    store = tmp_path / "store"
    api.chunk(
        store, [str(write_jsonl(tmp_path / "c.jsonl", rows))], tokenizer=str(tiny_encoder), part_size=60,
        fields=retrotool_fields("note"),
    )  # fmt: skip
    api.embed(store, encoder=str(tiny_encoder))
    api.index(store)
    from retrotool.ann.choice import IndexOptions
    from retrotool.index.run import Options

    api.index(store, name="ivf", options=Options(IndexOptions(nlist=4, code="float16", shard_rows=100)))
    api.neighbours(store)
    return store, names


def retrotool_fields(*keep: str) -> object:
    from retrotool.sources import Fields

    return Fields(keep=keep)


def traces(store: Path, names: list[str]) -> dict[str, list[bytes]]:
    """What the canaries leave behind: id, kept text, hashes, token rows, vectors as float16 and float32."""
    import hashlib

    reader = retrotool.open(store)
    chunks = [chunk for name in names for chunk in reader.document(name)]
    plain = read_plain(store)
    vectors = plain.vectors[np.isin(plain.ids, chunks)]
    return {
        "id": [name.encode() for name in names],
        "key": [hashlib.blake2b(name.encode(), digest_size=16).digest() for name in names],
        "kept": [f"{CANARY} kept".encode(), b"secret source"],
        "tokens": [reader.chunk(chunk).tokens.tobytes() for chunk in chunks],
        "float16": [vector.astype(np.float16).tobytes() for vector in vectors],
    }


def test_after_an_erase_no_byte_is_left(canary_store: tuple[Path, list[str]], tmp_path: Path) -> None:
    store, names = canary_store
    wanted = traces(store, names)
    haystack = everything(store)
    assert all(trace in haystack for kind in wanted.values() for trace in kind), "the scan sees what is there"
    digests = api.verify(store)
    api.purge(store, api.Selectors(document=lines(tmp_path / "ids", names)), reason="request 17", erase=True)
    haystack = everything(store)
    assert {kind: [t for t in found if t in haystack] for kind, found in wanted.items()} == {
        kind: [] for kind in wanted
    }
    assert CANARY.encode() not in haystack
    after = api.verify(store)
    assert after.ok, after.problems
    assert after.content != digests.content
    assert api.info(store).purges.popitem()[1]["erased"]
    assert stored_files(store, "selectors/*") == []


def test_ids_stay_what_they_are_when_others_are_erased(canary_store: tuple[Path, list[str]], tmp_path: Path) -> None:
    store, names = canary_store
    reader = retrotool.open(store)
    targets = {chunk for name in names for chunk in reader.document(name)}
    before = {int(i): reader.chunk(int(i)).text for part in reader.parts() for i in reader.chunk_ids(part)}
    api.purge(store, api.Selectors(document=lines(tmp_path / "ids", names)), reason="test", erase=True)
    reader = retrotool.open(store)
    after = {int(i): reader.chunk(int(i)).text for part in reader.parts() for i in reader.chunk_ids(part)}
    assert after == {i: text for i, text in before.items() if i not in targets}
    assert targets.isdisjoint(returned(reader))


def test_an_erase_rewrites_only_what_holds_targets(store_copy: Path, tmp_path: Path) -> None:
    state = Store.open(store_copy).state
    target = retrotool.open(store_copy).document("doc-1")[0]
    tables = {
        entry.path
        for entry in state.files()
        if entry.path.startswith("neighbours/")
        and target in pq.read_table(stored_file(store_copy, entry.path))["ids"].combine_chunks().flatten().to_pylist()
    }
    part = {entry.path for entry in state.files() if entry.slot == f"{target >> 32:06d}"}
    shards = {entry.path for entry in state.files() if entry.path.startswith("index/main/shard")}
    assert (len(part), len(shards)) == (4, 1), "documents, chunks, embeddings and neighbours"
    measured = {entry.path for entry in state.files() if entry.path.startswith("index/main/recall")}
    assert len(measured) == 1, "the curve, which names sources"
    result = api.purge(store_copy, api.Selectors(chunk=lines(tmp_path / "ids", [target])), reason="test", erase=True)
    left = {entry.path for entry in Store.open(store_copy).state.files()}
    assert {entry.path for entry in state.files()} - left == part | shards | tables | measured
    assert result.files_rewritten == len(part | shards | tables)


def test_an_embed_that_began_before_the_erase_does_not_bring_the_vector_back(
    corpus: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    from retrotool.encoder import find_encoder

    store_path = tmp_path / "store"
    api.chunk(store_path, [str(corpus)], tokenizer=str(tiny_encoder))
    store = Store.open(store_path)
    stage = EmbedStage(str(tiny_encoder), find_encoder(str(tiny_encoder))[1], ("cpu",))
    target = retrotool.open(store_path).document("doc-9")[0]
    with writing(store) as run:
        (task,) = stage.plan(store)
        late = stage.open(store)(task, run.id, lambda _: None)  # finished, not yet committed
        vector = np.load(stored_file(store_path, late.add[0].path))[target & 0xFFFFFFFF].tobytes()
        assert vector in everything(store_path)
        api.purge(store_path, api.Selectors(chunk=lines(tmp_path / "ids", [target])), reason="test", erase=True)
        assert staging.stage(store.storage, late)
        folded = folding.fold(store, run)
        assert list(folded.refused) == [task.key]
    assert vector not in everything(store_path)
    api.embed(store_path, encoder=str(tiny_encoder))
    assert vector not in everything(store_path)
    assert not retrotool.open(store_path).embeddings(0)[target & 0xFFFFFFFF].any()
    assert api.verify(store_path).ok


def test_selectors_find_what_they_say(store_copy: Path, tmp_path: Path) -> None:
    store = Store.open(store_copy)
    reader = retrotool.open(store_copy)
    chunks = {int(i): reader.chunk(int(i)) for part in reader.parts() for i in reader.chunk_ids(part)}
    odd = {i for i, chunk in chunks.items() if int(chunk.document.removeprefix("doc-")) % 2}
    where = Lookup("where", (GivenValue("source = 'b'"),))
    assert set(where.select(store, missing_ok=False, report=lambda _: None).tolist()) == odd
    with_words = {i for i, chunk in chunks.items() if "store chunk" in chunk.text}
    assert with_words
    found = api.purge(
        store_copy,
        api.Selectors(pattern=r"\bstore chunk\b", allow_lossy=True),
        reason="test",
        confirm=lambda _: True,
    )
    inside = {int(i) for i in store.refresh() and read_tombstones(store, found.purge).ids}
    assert with_words <= inside, "and what matches touch across a border"
    for chunk in inside - with_words:
        beside = [i for i in (chunk - 1, chunk + 1) if i in chunks and chunks[i].document == chunks[chunk].document]
        text = chunks[chunk].text
        assert text.startswith("chunk") or text.endswith("store")
        assert beside
    assert select_ids(store, [GivenValue(one) for one in ("5", "0:5", str(1 << 32), "1:0")]).tolist() == [5, 1 << 32]


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("chunk", "12\nseven", "line 2: 'seven' is not a chunk id"),
        ("chunk", "99999999999999", "no chunk 99999999999999"),
        ("chunk", "-1", "'-1' is not a chunk id"),
        ("chunk", "1_0", "'1_0' is not a chunk id"),
        ("chunk", "٣", "'٣' is not a chunk id"),
        ("chunk", "9" * 5000, "is not a chunk id"),
        ("where", "source = '\udcff'", "--where \"source = '\\udcff'\" is not UTF-8"),
        ("pattern", "\udcff", "--pattern '\\udcff' is not UTF-8"),
        ("document", "doc-1\nmissing", "line 2: the store has no document 'missing'"),
        ("where", "nothing = 'x'", "no column 'nothing'"),
        ("pattern", "(", "can't be compiled"),
    ],
)
def test_a_wrong_selector_is_refused_and_nothing_is_done(
    store_copy: Path, tmp_path: Path, kind: str, value: str, message: str
) -> None:
    before = Store.open(store_copy).state.number
    given = lines(tmp_path / "ids", [value]) if kind in ("chunk", "document") else value
    with pytest.raises(UsageError) as error:
        api.purge(store_copy, api.Selectors(**{kind: given}, allow_lossy=True), reason="test")
    assert message in str(error.value)
    assert Store.open(store_copy).state.number == before


def test_a_dry_run_purges_nothing_and_counts_right(store_copy: Path) -> None:
    before = api.verify(store_copy)
    planned = api.purge(store_copy, api.Selectors(where="source = 'a'"), reason="test", dry_run=True)
    looked = api.verify(store_copy)
    assert (looked.content, looked.tombstones, looked.chunks) == (before.content, before.tombstones, before.chunks)
    done = api.purge(store_copy, api.Selectors(where="source = 'a'"), reason="test")
    assert (done.chunks, done.documents, done.tokens) == (planned.chunks, planned.documents, planned.tokens)
    after = api.verify(store_copy)
    assert after.ok
    assert (after.chunks, after.tokens) == (before.chunks - done.chunks, before.tokens - done.tokens)


def test_purging_what_is_purged_does_nothing_and_says_so(store_copy: Path) -> None:
    first = api.purge(store_copy, api.Selectors(where="source = 'a'"), reason="test")
    again = api.purge(store_copy, api.Selectors(where="source = 'a'"), reason="test")
    assert (again.purge, again.chunks, again.already_purged) == ("", 0, first.chunks)
    assert again.commit == first.commit


def test_everything_can_be_purged(store_copy: Path, tmp_path: Path) -> None:
    api.purge(store_copy, api.Selectors(where="source is not null"), reason="test", erase=True)
    shown = api.info(store_copy)
    assert (shown.documents, shown.chunks, shown.tokens) == (0, 0, 0)
    assert retrotool.open(store_copy).search("anything") == []
    assert api.verify(store_copy).ok


def test_of_two_purges_at_once_the_later_is_reported(store_copy: Path) -> None:
    store = Store.open(store_copy)
    chosen = select(store, api.Selectors(where="source = 'a'").read(store))
    api.purge(store_copy, api.Selectors(where="source = 'b'"), reason="test")
    with writing(store) as run:
        before = stored_files(store_copy)
        with pytest.raises(ConflictError, match="another purge"):
            commit_purge(store, run, chosen, "late", "somebody")
        assert stored_files(store_copy) == before, "what it selected by does not stay on the disk"
    assert api.verify(store_copy).ok


def test_a_purge_that_another_overtook_selects_again(store_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def overtaken(*arguments: object) -> str:
        monkeypatch.undo()
        assert api.purge(store_copy, api.Selectors(where="id in ('doc-3', 'doc-4')"), reason="first").documents == 2
        return commit_purge(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("retrotool.purge.run.commit_purge", overtaken)
    result = api.purge(
        store_copy,
        api.Selectors(where="source = 'a'"),
        reason="test",
        confirm=lambda planned: bool(asked.append(planned)) or True,
    )
    assert (result.documents, [planned.documents for planned in asked]) == (59, [60]), (
        "it takes less than was agreed to"
    )
    assert api.verify(store_copy).ok


def test_what_is_declined_is_not_done(store_copy: Path) -> None:
    before = Store.open(store_copy).state.number
    result = api.purge(store_copy, api.Selectors(where="source = 'a'"), reason="test", confirm=lambda _: False)
    assert (result.purge, result.documents, Store.open(store_copy).state.number) == ("", 60, before)
    api.purge(store_copy, api.Selectors(where="source = 'a'"), reason="test")
    purged = Store.open(store_copy).state.number
    asked: list[api.PurgeResult] = []
    api.purge(
        store_copy,
        api.Selectors(where="source = 'a'"),
        reason="test",
        confirm=lambda _: pytest.fail("nothing to ask"),
    )
    api.purge(store_copy, api.Selectors(where="source = 'a'"), reason="test", erase=True,
        confirm=lambda planned: bool(asked.append(planned)),
    )  # fmt: skip
    assert (asked[0].chunks, asked[0].unerased) == (0, result.chunks), "an erase of what is purged is asked about too"
    assert asked[0].unerased_share == pytest.approx(result.chunks / 366)
    assert Store.open(store_copy).state.number == purged


def test_a_purge_of_a_part_of_a_document_leaves_the_rest(store_copy: Path, tmp_path: Path) -> None:
    reader = retrotool.open(store_copy)
    name = next(f"doc-{i}" for i in range(120) if len(reader.document(f"doc-{i}")) >= 3)
    first, target, last = reader.document(name)[:3]
    result = api.purge(store_copy, api.Selectors(chunk=lines(tmp_path / "ids", [target])), reason="test", erase=True)
    assert (result.chunks, result.documents) == (1, 0)
    reader = retrotool.open(store_copy)
    assert reader.document(name)[:2] == [first, last]
    assert reader.continuation(first) is None
    assert api.verify(store_copy).ok


def test_no_text_stands_in_the_log(store_copy: Path, tmp_path: Path) -> None:
    api.purge(store_copy, api.Selectors(pattern="store chunk", allow_lossy=True), reason="request 17")
    log = b"".join(file.read_bytes() for file in stored_files(store_copy, "log/*"))
    assert b"store chunk" not in log
    remove_stored(store_copy, "checkpoints/*")
    assert api.info(store_copy).purges.popitem()[1]["reason"] == "request 17"


def test_who_purges_stays_in_the_log_also_where_a_user_has_no_name(
    store_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_a_name() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    named = api.purge(store_copy, api.Selectors(document=("doc-1",)), reason="r", who="the legal team").purge
    monkeypatch.setattr("getpass.getuser", without_a_name)
    nameless = api.purge(store_copy, api.Selectors(document=("doc-2",)), reason="r").purge
    records = Store.open(store_copy).state.records
    assert records[f"purge:{named}"]["who"] == "the legal team"
    assert records[f"purge:{nameless}"]["who"].startswith("user ")
