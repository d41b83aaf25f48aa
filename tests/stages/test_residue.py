"""The scan that shows that nothing of a purge is left: it finds leftovers, and nothing that others have by right."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
import shutil
import string
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from conftest import make_rows, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from retrotool import api
from retrotool.errors import CorruptError
from retrotool.purge import needles as making
from retrotool.purge.decode import cells, folded, unescaped
from retrotool.purge.matching import KINDS, Matcher, Needles, head_words, sampled, siphash
from retrotool.purge.needles import hidden_by, make_needles, said_by_others
from retrotool.purge.proofs import hashed, joined_hashes, proofs_of, read_proofs, write_proofs
from retrotool.purge.residue import CHUNK, Finding, look, scan
from retrotool.store import parts, vectors
from retrotool.store.atomic import FileEntry
from retrotool.store.log import Draft
from retrotool.store.paths import FileName
from retrotool.store.runs import Run
from retrotool.store.store import Store

SECRET = "5a" * 32


def canary(seed: int) -> str:
    """Words that nobody else has."""
    draw = random.Random(seed)
    return " ".join("".join(draw.choices(string.ascii_lowercase, k=9)) for _ in range(25))


CANARIES = {f"canary-document-{i}": canary(i) for i in range(4)}
COMMON = "the harbour master wrote the same sentence into every single log book of the whole long winter"


@pytest.fixture(scope="module")
def canaried(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """A store of several parts, indexed, with neighbours and their texts; some documents hold canaries."""
    folder = tmp_path_factory.mktemp("canaried")
    rows = make_rows(60)
    for at, (name, text) in enumerate(CANARIES.items()):
        rows.insert(5 + 14 * at, {"id": name, "text": text + " " + COMMON, "source": "c", "year": 1})
    rows += [{"id": f"living-{i}", "text": f"{COMMON} number {i}", "source": "c", "year": 1} for i in range(3)]
    source = write_jsonl(folder / "c.jsonl", rows)
    with source.open("a") as file:
        file.write(json.dumps({"id": "canary-document-0", "note": CANARIES["canary-document-0"], "text": 3}) + "\n")
    api.chunk(folder / "store", [str(source)], tokenizer=str(tiny_encoder), part_size=60)
    api.embed(folder / "store", encoder=str(tiny_encoder))
    api.index(folder / "store")
    api.neighbours(folder / "store", materialise=True)
    return folder / "store"


@pytest.fixture
def store(canaried: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(canaried, tmp_path / "store"))


def victims_of(root: Path) -> np.ndarray:
    """Chunks of the canaries' documents."""
    opened = Store.open(root)
    found = []
    for part in opened.state.parts():
        for row in parts.read_documents(opened, part, ["id", "first_row", "n_chunks"]).to_pylist():
            if row["id"] in CANARIES:
                found += [part << 32 | row["first_row"] + i for i in range(row["n_chunks"])]
    return np.array(found, np.int64)


def needles_of(root: Path) -> Needles:
    return make_needles(Store.open(root), victims_of(root))


def left_of(root: Path, needles: Needles) -> tuple[Finding, ...]:
    return look(Store.open(root), needles).findings


def as_hashed(needles: Needles) -> Needles:
    return needles.hashed(SECRET, b"salt")


def folders(found: list[Finding]) -> dict[str, set[str]]:
    kinds: dict[str, set[str]] = {}
    for finding in found:
        kinds.setdefault(finding.path.split("/")[0], set()).add(finding.kind)
    return kinds


EVERYWHERE = {
    "chunks": {"tokens"},
    "documents": {"id", "key"},
    "embeddings": {"vector16"},
    "index": {"vector16", CHUNK},
    "materialised": {"tokens"},
    "quarantine": {"id", "text"},
    "selectors": {"id"},
}


@pytest.mark.parametrize("form", [lambda needles: needles, as_hashed], ids=["plain", "hashed"])
def test_all_that_holds_canaries_is_found_before_an_erase_and_nothing_after(
    store: Path, tmp_path: Path, form: Callable[[Needles], Needles]
) -> None:
    victims = victims_of(store)
    assert len(set((victims >> 32).tolist())) > 1
    listed = tmp_path / "takedown.txt"
    listed.write_text("\n".join(CANARIES))
    api.purge(store, api.Selectors(documents=str(listed)), reason="test")
    needles = form(needles_of(store))
    found = scan(store, needles)
    assert {kind: EVERYWHERE[kind] <= kinds for kind, kinds in folders(found).items()} == dict.fromkeys(
        EVERYWHERE, True
    )
    chunked = {finding.number for finding in found if finding.path.startswith("chunks/")}
    kind = KINDS.index("tokens")
    assert chunked == set(np.flatnonzero(needles.kinds == kind).tolist()), "each of the needles"
    api.purge(store, api.Selectors(documents=str(listed)), reason="test", erase=True)
    assert left_of(store, needles) == ()


def test_needles_are_nothing_that_others_have(canaried: Path) -> None:
    opened = Store.open(canaried)
    needles = needles_of(canaried)
    hidden = hidden_by(opened, victims_of(canaried))
    said = said_by_others(opened, needles, opened.state.parts(), hidden=hidden)
    assert said, "of chunks in another part than the victims"
    own = np.unique(victims_of(canaried) >> 32).tolist()
    for part in own:
        few = make_needles(opened, victims_of(canaried)[victims_of(canaried) >> 32 == part])
        assert not said_by_others(opened, few, [part], hidden=hidden), "their own part was asked already"
    texts = {needles.proofs[i] for i in np.flatnonzero(needles.kinds == KINDS.index("text")) if i not in said}
    assert texts
    for text in texts:
        assert text not in folded(COMMON.encode())
        assert text in b"|".join(folded((one + COMMON).encode()) for one in CANARIES.values())
    assert needles.lengths["tokens"] == 16
    assert needles.lacking["text"] < len(needles.chunks)


def test_what_is_said_again_later_is_no_finding_and_what_is_left_is_one(store: Path, tmp_path: Path) -> None:
    needles = as_hashed(needles_of(store))
    opened = Store.open(store)
    old = {p: (store / opened.state.part_file("chunks", p).path).read_bytes() for p in opened.state.parts()}  # type: ignore[union-attr]
    said_again = "canary-document-1"
    others = {
        part
        for part in old
        for name in parts.read_documents(opened, part, ["id"])["id"].to_pylist()
        if name in CANARIES and name != said_again
    }
    api.purge(store, api.Selectors(document=tuple(CANARIES)), reason="test", erase=True)
    again = [{"id": "quotes", "text": CANARIES[said_again] + " quoted", "source": "c", "year": 2}]
    api.chunk(store, [str(write_jsonl(tmp_path / "more.jsonl", again))])
    found = look(Store.open(store), needles)
    assert found.findings == ()
    assert found.said > 0
    for part, data in old.items():
        (store / "chunks" / f"left-{part}").write_bytes(data)
    assert {finding.path for finding in left_of(store, needles)} == {f"chunks/left-{part}" for part in others}


def test_of_a_victim_whose_text_is_elsewhere_too_nothing_is_left(tmp_path: Path, tiny_encoder: Path) -> None:
    text = canary(100)
    rows = [{"id": "first-copy", "text": text}, {"id": "second-copy", "text": text}, *make_rows(4)]
    source = write_jsonl(tmp_path / "c.jsonl", rows)
    api.chunk(tmp_path / "store", [str(source)], tokenizer=str(tiny_encoder), duplicates="keep")
    api.embed(tmp_path / "store", encoder=str(tiny_encoder))
    opened = Store.open(tmp_path / "store")
    row = parts.read_documents(opened, 0).to_pylist()[0]
    needles = make_needles(opened, np.arange(row["n_chunks"]))
    assert sorted(KINDS[kind] for kind in needles.kinds if KINDS[kind] != "whole") == ["id", "key"]
    n = row["n_chunks"]
    assert needles.lacking == {"tokens": n, "text": n, "vector16": n, "vector32": n, "id": 0, "key": 0}
    both = make_needles(opened, np.arange(2 * n))
    assert both.lacking["text"] < 2 * n


def text_of(needles: Needles) -> bytes:
    return next(needles.proofs[i] for i in np.flatnonzero(needles.kinds == KINDS.index("text")))


SAID = 'Zażółć gęślą jaźń; the "quoted" back\\slash\tof 7 ships, ' + canary(7)
PLANTS: dict[str, Callable[[Path, bytes], object]] = {
    "a temporary file": lambda folder, data: (folder / "chunks" / ".tmp-0123abcd01234567").write_bytes(data),
    "a hidden file": lambda folder, data: (folder / ".hidden").write_bytes(b"x" * 3_000_000 + data),
    "across blocks": lambda folder, data: (folder / "log" / "x").write_bytes(b"y" * ((1 << 20) - 20) + data),
    "a zst": lambda folder, data: (folder / "spool" / "stdin-0.jsonl.zst").write_bytes(zstandard.compress(data)),
    "two frames": lambda folder, data: (folder / "spool" / "a").write_bytes(
        zstandard.compress(b"first") + zstandard.compress(data)
    ),
    "a gz": lambda folder, data: (folder / "spool" / "a.gz").write_bytes(gzip.compress(data)),
    "a cut gz": lambda folder, data: (folder / "a.gz").write_bytes(
        gzip.compress(data + random.Random(0).randbytes(99_999))[:-500]
    ),
    "a bz2 in an xz": lambda folder, data: (folder / "a").write_bytes(lzma.compress(bz2.compress(data))),
    "a zip": lambda folder, data: zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED).writestr("x", data),
    "JSON": lambda folder, data: (folder / "a.json").write_text(json.dumps({"t": [data.decode()]})),
    "JSON in JSON": lambda folder, data: (folder / "a.json").write_text(json.dumps(json.dumps(data.decode()))),
    "a dictionary": lambda folder, data: pq.write_table(
        pa.table({"t": pa.array(["x", data.decode(), "x"]).dictionary_encode()}), folder / "a.parquet"
    ),
    "zstd and nested": lambda folder, data: pq.write_table(
        pa.table({"t": [[{"a": data.decode()}], [], None]}), folder / "a.parquet", compression="zstd"
    ),
    "a Parquet that breaks off": lambda folder, data: broken_off(folder / "a.parquet", data),
}  # fmt: skip


def broken_off(path: Path, data: bytes) -> None:
    pq.write_table(pa.table({"t": [data.decode() * 3] * 100}), path, compression="zstd")
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize("form", [lambda needles: needles, as_hashed], ids=["plain", "hashed"])
@pytest.mark.parametrize("plant", PLANTS)
def test_a_leftover_is_found_in_any_odd_place(tmp_path: Path, plant: str, form: Callable[[Needles], Needles]) -> None:
    for name in ("spool", "chunks", "log"):
        (tmp_path / name).mkdir()
    whole = folded(SAID.encode())
    runs = [whole[i : i + 24] for i in range(len(whole) - 23)]
    needles = form(Needles.plain([("text", run) for run in runs] + [("id", b"canary-1")]))
    assert scan(tmp_path, needles) == []
    PLANTS[plant](tmp_path, f"innocent {SAID}".encode())
    found = scan(tmp_path, needles)
    assert {finding.number for finding in found} == set(range(len(needles))) - {
        i for i in range(len(needles)) if KINDS[needles.kinds[i]] == "id"
    }
    assert {finding.kind for finding in found} == {"text"}
    (path,) = {finding.path for finding in found}
    assert (tmp_path / path).is_file()


def test_a_renamed_copy_and_the_bytes_of_vectors_are_found(store: Path) -> None:
    needles = needles_of(store)
    opened = Store.open(store)
    part = int(victims_of(store)[0] >> 32)
    entry = opened.state.part_file("embeddings", part, "tiny")
    matrix = vectors.read_vectors(opened, entry)
    shard = opened.state.file("index", "shard-0000", "main")
    shutil.copy(store / shard.path, store / "renamed")
    np.save(store / "as-float32.npy", np.asarray(matrix, np.float32))
    shutil.copy(store / opened.state.part_file("chunks", part).path, store / "staging" / ".copy")
    found = {(finding.path, finding.kind) for finding in scan(store, needles)}
    expected = {
        ("renamed", CHUNK),
        ("renamed", "vector16"),
        ("as-float32.npy", "vector32"),
        ("staging/.copy", "tokens"),
    }
    assert expected <= found


@pytest.mark.parametrize("form", [lambda needles: needles, as_hashed], ids=["plain", "hashed"])
def test_ids_are_found_as_whole_values_only(tmp_path: Path, form: Callable[[Needles], Needles]) -> None:
    needles = form(Needles.plain([("id", b"doc-3"), ("id", "Höhe 7/a".encode()), ("id", b"x" * 40)]))
    innocent = ["doc-30", "adoc-3", "see doc-3 there", "x" * 41, "x" * 39, "Höhe 7/b", "doc-", ""]
    pq.write_table(pa.table({"a": innocent}), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(innocent))
    (tmp_path / "a.csv").write_text("\n".join(innocent))
    assert scan(tmp_path, needles) == []
    wanted = ["doc-3", "Höhe 7/a", "x" * 40]
    pq.write_table(pa.table({"a": pa.array(wanted, pa.large_string())}), tmp_path / "b.parquet")
    (tmp_path / "b.json").write_text(json.dumps({"where": "id in ('doc-3', 'no')", "more": wanted[1:]}))
    (tmp_path / "c.json").write_text(json.dumps({"literal": "\n".join(wanted)}))
    (tmp_path / "b.csv").write_text("doc-3,1\nHöhe 7/a\t2\n" + "x" * 40)
    found = scan(tmp_path, needles)
    assert {(finding.path, finding.number) for finding in found} == {
        (path, number) for path in ("b.parquet", "b.json", "c.json", "b.csv") for number in range(3)
    }


def proofs_file(store: Store, run: str, slot: str, needles: Needles) -> FileEntry:
    kept = joined_hashes([hashed(store, slot.partition(".")[0], needles)])
    return write_proofs(store, run, slot, kept, np.arange(3))


PACKED = {
    "gzip": b"\x1f\x8b\x08", "zstd": b"\x28\xb5\x2f\xfd", "xz": b"\xfd7zXZ\0", "bzip2": b"BZh91AY&SY",
    "zip": b"PK\x03\x04", "parquet": b"PAR1\x15", "numpy": b"\x93NUMPY", "faiss": b"IwFl\x80\1\0\0\7\0\0\0\0\0\0\0",
    "numbers": b"\1\2\3" * 99,
}  # fmt: skip


@pytest.mark.parametrize("kind", PACKED)
def test_a_short_id_is_not_found_by_chance_in_what_is_no_text(tmp_path: Path, kind: str) -> None:
    needles = Needles.plain([("id", b"D")])
    data = PACKED[kind] + b"\xe9\xa5,D\n\xb7'D'" * 2000
    (tmp_path / "file").write_bytes(data)
    zipfile.ZipFile(tmp_path / "file.zip", "w", zipfile.ZIP_DEFLATED).writestr("file", data)
    (tmp_path / "file.zst").write_bytes(zstandard.compress(data))
    assert scan(tmp_path, needles) == []


@pytest.mark.parametrize("start", [b"BZhere", b"PAR1", b"PKunzip", b"IxMap", b"Iwan went to the town,D", b"\x1b[1m"])
def test_a_short_id_is_found_in_text_whatever_that_begins_like(tmp_path: Path, start: bytes) -> None:
    (tmp_path / "file").write_bytes(start + b"\nD\nand more\n")
    (tmp_path / "file.gz").write_bytes(gzip.compress(start + b"\nD\nand more\n"))
    assert {finding.path for finding in scan(tmp_path, Needles.plain([("id", b"D")]))} == {"file", "file.gz"}


def test_proofs_are_kept_without_text_and_found_by(store: Path) -> None:
    opened = Store.open(store)
    needles = needles_of(store)
    with Run(store) as run:
        entry = proofs_file(opened, run.id, "p0.000000", needles)
        opened.commit(run, lambda _: Draft("erase", add=(entry,)))
    data = (store / entry.path).read_bytes() + repr(pq.read_table(store / entry.path).to_pydict()).encode()
    assert not any(piece in data for piece in needles.proofs)
    kept = replace(read_proofs(opened, entry).needles, chunks=needles.chunks)
    assert 0.5 * len(needles) < len(kept) <= len(needles), "short ones have none that can be kept"
    assert kept.lacking.keys() == needles.lacking.keys()
    found = scan(store, kept)
    assert {kind for kinds in folders(found).values() for kind in kinds} >= {"tokens", "vector16", "id", "key", CHUNK}
    assert not [finding for finding in found if finding.path == entry.path]
    again = read_proofs(opened, proofs_file(opened, "0123abcd", "p1.000000", needles)).needles
    assert set(again.proofs).isdisjoint(kept.proofs), "each purge has keys of its own"
    broken = pa.table(
        {
            "kind": pa.array([9], pa.uint8()),
            "tag": pa.array([1], pa.uint32()),
            "hash": pa.array([b"x" * 16], pa.binary(16)),
        }
    )
    bad = parts.write_parquet(store, FileName.new("0123abcd", "proofs", "p2", "parquet"), broken)
    with pytest.raises(CorruptError, match="no proofs"):
        read_proofs(opened, bad)


def test_verify_reads_proofs_and_misses_their_purge(store: Path) -> None:
    needles = needles_of(store)
    purge = api.purge(store, api.Selectors(where="source = 'c' and id like 'canary%'"), reason="test").purge
    opened = Store.open(store)
    with Run(store) as run:
        for slot, problems in ((f"{purge}.000000", 0), ("p0.000000", 1)):
            entry = proofs_file(opened, run.id, slot, needles.of(np.arange(9).repeat(2)))
            opened.commit(run, lambda _: Draft("erase", add=(entry,)))  # noqa: B023
            assert len(api.verify(store).problems) == problems
    assert "there is no purge p0" in api.verify(store).problems[0]
    kept = proofs_of(opened, purge)
    assert kept is not None and kept.chunks.tolist() == victims_of(store).tolist()
    assert proofs_of(opened, "p1") is None


@pytest.mark.parametrize("name", ["doc-3", "doc-10", "doc-33", "doc-50"])
def test_what_living_text_has_in_common_with_a_victim_is_no_finding(store: Path, name: str) -> None:
    """The documents are made of seventy words."""
    opened = Store.open(store)
    victims = [
        part << 32 | row["first_row"] + i
        for part in opened.state.parts()
        for row in parts.read_documents(opened, part).to_pylist()
        for i in range(row["n_chunks"] * (row["id"] == name))
    ]
    needles = make_needles(opened, np.array(victims))
    found = scan(store, needles)
    assert {finding.kind for finding in found} >= {"tokens", "text", "vector16", "id", "key", CHUNK} - {"text"}
    parts_of = {f"{chunk >> 32:06d}" for chunk in victims}
    assert {f.path.split("/")[1][:6] for f in found if f.path.startswith(("chunks", "documents"))} == parts_of
    api.purge(store, api.Selectors(where=f"id = '{name}'"), reason="test", erase=True)
    for form in (needles, as_hashed(needles)):
        assert left_of(store, form) == ()
    assert len(make_needles(Store.open(store), np.array(victims))) == 0, "nothing is left to make them of"


def test_a_lossless_store_without_embeddings(tmp_path: Path, byte_level_tokenizer: Path) -> None:
    rows = [{"id": "the-victim", "text": "Ünïcode, " + canary(3) + "\n\tand TAIL " + canary(4)}, *make_rows(5)]
    source = write_jsonl(tmp_path / "c.jsonl", rows)
    api.chunk(tmp_path / "store", [str(source)], tokenizer=str(byte_level_tokenizer))
    opened = Store.open(tmp_path / "store")
    needles = make_needles(opened, np.arange(parts.read_documents(opened, 0)["n_chunks"][0].as_py()))
    assert {KINDS[kind] for kind in needles.kinds} == {"tokens", "text", "id", "key", "whole"}
    assert {finding.kind for finding in scan(tmp_path / "store", needles)} == {"tokens", "id", "key"}
    assert set(needles.lacking.values()) == {0}
    (tmp_path / "store" / "spool").mkdir()
    shutil.copy(source, tmp_path / "store" / "spool" / "stdin-1.jsonl")
    found = scan(tmp_path / "store", needles)
    spooled = {f.number for f in found if f.path == "spool/stdin-1.jsonl" and f.kind == "text"}
    assert spooled == set(np.flatnonzero(needles.kinds == KINDS.index("text")).tolist())
    api.purge(tmp_path / "store", api.Selectors(where="id = 'the-victim'"), reason="test", erase=True)
    assert left_of(tmp_path / "store", needles) == ()


def test_another_salt_makes_other_hashes() -> None:
    needles = Needles.plain([("id", b"some-id")])
    hashed, other = needles.hashed(SECRET, b"a"), needles.hashed(SECRET, b"b")
    assert hashed.proofs != other.proofs
    assert hashed.tags is not None and other.tags is not None and hashed.tags.tolist() != other.tags.tolist()


def test_siphash_is_siphash() -> None:
    assert int(siphash(np.frombuffer(bytes(range(8)), "<u8"), bytes(range(16)))[0]) == 0x93F5F5799A932462


PIECES = st.lists(
    st.sampled_from([b"\0" * 8, b"abcdefgh", b"abcdefgi", b"xyz", b"\xff\\u00", b"a", b"bcdefgha"]), max_size=30
)


@given(PIECES, st.lists(st.integers(0, 200), min_size=1, max_size=12), st.integers(8, 20), st.binary(max_size=40))
def test_the_matcher_finds_what_find_finds(pieces: list[bytes], starts: list[int], length: int, noise: bytes) -> None:
    data = noise + b"".join(pieces)
    runs = {data[s : s + length] for s in starts} | {bytes(length), b"abcdefgh" + b"z" * (length - 8)}
    wanted = sorted(run for run in runs if len(run) == length)
    needles = Needles.plain([("tokens", run) for run in wanted])
    expected = {
        (at, number) for number, run in enumerate(wanted) for at in range(len(data)) if data[at : at + length] == run
    }
    found = list(Matcher(needles, ["tokens"]).runs(data))
    assert len(found) == len(set(found))
    assert set(found) == expected
    hashed = needles.hashed(SECRET, b"s")
    kept = [run for run in wanted if sampled(head_words([run]), "tokens")[0]]
    assert len(hashed) == len(kept)
    known = {at for at, number in expected if wanted[number] in kept}
    assert {at for at, _ in Matcher(hashed, ["tokens"]).runs(data)} == known


@given(
    st.lists(st.text(st.sampled_from("ab,\"'\n \0\té"), max_size=6), max_size=12),
    st.lists(st.text(st.sampled_from("abé"), min_size=1, max_size=3), min_size=1, max_size=4, unique=True),
)
def test_cells_are_what_stands_between_borders(texts: list[str], names: list[str]) -> None:
    data = "\n".join(texts).encode()
    needles = Needles.plain([("id", name.encode()) for name in names])
    for form in (needles, needles.hashed(SECRET, b"s")):
        _, starts, ends = cells(data, begins=True, ends=True)
        found = {data[starts[place] : ends[place]] for place, _ in Matcher(form, ["id"]).cells(data, starts, ends)}
        if b"\0" in data:
            continue
        split = data
        for border in b"\"'\n\r\t,":
            split = split.replace(bytes([border]), b"\n")
        assert found == {name.encode() for name in names} & set(split.split(b"\n"))


@given(st.text(max_size=50), st.text(max_size=50))
def test_what_json_stands_for_is_seen(text: str, before: str) -> None:
    text = text.encode("utf-8", "replace").decode()
    data = json.dumps([before, text]).encode()
    views = [data, *unescaped(data)]
    assert any(text.encode() in view for view in views)


def test_what_python_escapes_is_seen() -> None:
    (view, *_) = unescaped("caf\xe9\tx".encode("unicode_escape"))
    assert view == "caf\xe9\tx".encode()


def test_what_can_not_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_bytes(b"a" * 24)
    original = os.scandir

    def refusing(path: Any) -> Any:
        if str(path).endswith("folder"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    needles = Needles.plain([("text", b"a" * 24)])
    assert [finding.path for finding in scan(tmp_path, needles)] == ["folder/x"]
    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError):
        scan(tmp_path, needles)


def test_bytes_are_reported_and_nothing_but_places_is_told(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_bytes(b"x" * 1_500_000 + b"0123456789abcdefghijklmn")
    reported: list[int] = []
    found = scan(tmp_path, Needles.plain([("text", b"0123456789abcdefghijklmn")]), reported.append)
    assert sum(reported) == 3 * 1_500_024
    assert found == [Finding(name, "text", 0) for name in "abc"]


def test_few_needles_of_long_runs_of_zeros_are_drawn(canaried: Path) -> None:
    assert all(len(set(piece)) >= making._VARIED for piece in needles_of(canaried).proofs if len(piece) > 12)


def test_files_that_go_meanwhile_and_links_are_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").write_text("x" * 100)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "PAR1").write_bytes(b"PAR1")
    (tmp_path / "Ix").write_bytes(b"IxF2 no index")
    (tmp_path / "zip").write_bytes(b"PK\x03\x04 no archive")
    original: Any = Path.open

    def opened(path: Path, *arguments: object, **options: object) -> object:
        if path.name == "gone":
            path.unlink(missing_ok=True)
        return original(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", opened)
    assert scan(tmp_path, Needles.plain([("text", b"a" * 24)], [1, 2])) == []


def test_archives_in_archives_and_broken_ones(tmp_path: Path) -> None:
    """Of a member that can't be read the others are searched all the same."""
    text = b"0123456789abcdefghijklmn"
    needles = Needles.plain([("text", text)])
    with zipfile.ZipFile(tmp_path / "inner.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", b"x" * 50 + text)
    with zipfile.ZipFile(tmp_path / "outer.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "inner.zip", "inner.zip")
    with zipfile.ZipFile(tmp_path / "packed.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.gz", gzip.compress(b"y" * 70 + text))
    with zipfile.ZipFile(tmp_path / "broken.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bad.txt", bytes(range(256)) * 40)
        archive.writestr("good.txt", b"z" * 70 + text)
    data = bytearray((tmp_path / "broken.zip").read_bytes())
    data[40:60] = b"\xff" * 20
    (tmp_path / "broken.zip").write_bytes(data)
    assert {finding.path for finding in scan(tmp_path, needles)} == {
        "inner.zip", "outer.zip", "packed.zip", "broken.zip",
    }  # fmt: skip
