"""The digests, against an implementation that follows docs/format.md line by line."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st
from stored import stored_file

from retrotool import api
from retrotool.info.verify import PartDigest, hexadecimal, part_digest
from retrotool.store.parts import Chunks
from retrotool.store.paths import FileName
from retrotool.store.store import Store

LENGTH = 4
"""Tokens a chunk."""


@dataclass
class Document:
    """Chunks of a document: index, tokens, and whether it lives."""

    key: bytes
    chunks: list[tuple[int, list[int], bool]]


def h(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=32).digest()


def total(hashes: list[bytes]) -> str:
    return f"{sum(int.from_bytes(x, 'little') for x in hashes) % 2**256:064x}"


def naive(parts: dict[int, list[Document]], length: int, token: str) -> tuple[str, str]:
    """``content`` and ``ids`` of some parts; ``token`` is how ``struct`` writes one."""
    content, ids = [], []
    for part, documents in parts.items():
        row = 0
        for document in documents:
            said = named = b""
            for index, tokens, lives in document.chunks:
                if lives:
                    padded = tokens + [0] * (length - len(tokens))
                    said += struct.pack(f"<ii{length}{token}", index, len(tokens), *padded)
                    named += struct.pack("<qi", part << 32 | row, index)
                row += 1
            if said:
                content.append(h(document.key + said))
                ids.append(h(document.key + named))
    return total(content), total(ids)


@st.composite
def documents(draw: st.DrawFn) -> Document:
    n = draw(st.integers(1, 4))
    pieces = st.tuples(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=LENGTH), st.booleans())
    drawn = draw(st.lists(pieces, min_size=n, max_size=n))
    return Document(draw(st.binary(min_size=16, max_size=16)), [(i, *piece) for i, piece in enumerate(drawn)])


parts_of_documents = st.dictionaries(st.integers(0, 2**31 - 1), st.lists(documents(), min_size=1, max_size=4))


def digest(part: int, documents: list[Document], dtype: str) -> PartDigest:
    rows = [(d, *chunk) for d, document in enumerate(documents) for chunk in document.chunks]
    tokens = np.zeros((len(rows), LENGTH), dtype)
    for row, (_, _, values, _) in enumerate(rows):
        tokens[row, : len(values)] = values
    doc, index = (np.array([row[i] for row in rows], np.int32) for i in (0, 1))
    n_tokens = np.array([len(row[2]) for row in rows], np.int32)
    keys = [d.key if any(lives for *_, lives in d.chunks) else None for d in documents]
    chunks = Chunks(part, doc, index, n_tokens, tokens, np.ones(len(rows), np.bool_))
    return part_digest(chunks, keys, np.array([row[3] for row in rows]))


@given(parts_of_documents, st.sampled_from([("H", "<u2"), ("I", "<u4")]), st.randoms())
def test_content_and_ids(parts: dict[int, list[Document]], token: tuple[str, str], random: object) -> None:
    letter, dtype = token
    order = list(parts)
    random.shuffle(order)
    found = PartDigest()
    for part in order:
        found += digest(part, parts[part], dtype)
    assert (hexadecimal(found.content), hexadecimal(found.ids)) == naive(parts, LENGTH, letter)
    live = [chunk for ds in parts.values() for d in ds for chunk in d.chunks if chunk[2]]
    assert (found.chunks, found.tokens) == (len(live), sum(len(tokens) for _, tokens, _ in live))
    assert found.documents == sum(any(lives for *_, lives in d.chunks) for ds in parts.values() for d in ds)


@given(st.lists(documents(), min_size=1, max_size=6), st.integers(0, 6))
def test_content_does_not_depend_on_parts_and_ids_do(drawn: list[Document], cut: int) -> None:
    whole = digest(0, drawn, "<u2")
    pieces = PartDigest()
    for part, piece in enumerate((drawn[:cut], drawn[cut:])):
        pieces += digest(part, piece, "<u2") if piece else PartDigest()
    assert pieces.content == whole.content
    moved = digest(1, drawn, "<u2")
    assert moved.content == whole.content
    assert (moved.ids != whole.ids) == bool(whole.chunks)


def slot(path: str) -> str:
    name = FileName.parse(path)
    return f"{name.kind}/{name.name}/{name.slot}"


def hash_lines(lines: list[str]) -> str:
    return h("".join(f"{line}\n" for line in sorted(lines)).encode()).hex()


def read_documents(store: Store, part: int, dead: set[int]) -> list[Document]:
    """The documents of a part, read with nothing but pyarrow."""
    documents, chunks = (
        pq.read_table(stored_file(store, store.state.part_file(kind, part).path)).to_pylist()
        for kind in ("documents", "chunks")
    )
    found = []
    for document in documents:
        first, n = document["first_row"], document["n_chunks"]
        pieces = []
        for row in chunks[first : first + n]:
            tokens = np.frombuffer(row["tokens"], "<u2")[: row["n_tokens"]].tolist()
            pieces.append((row["index"], tokens, row["n_tokens"] > 0 and part << 32 | row["row"] not in dead))
        found.append(Document(document["key"], pieces))
    return found


def test_verify_gives_the_digests_of_the_format(store_copy: Path, tmp_path: Path) -> None:
    purged = {3, 4, 5, 1 << 32, 2 << 32 | 7}
    (tmp_path / "ids").write_text("".join(f"{i}\n" for i in sorted(purged)))
    api.purge(store_copy, api.Selectors(chunk=tmp_path / "ids"), reason="test")
    store, found = Store.open(store_copy), api.verify(store_copy)
    assert found.problems == []

    parts = {part: read_documents(store, part, purged) for part in store.state.parts()}
    assert len(parts) > 2
    assert (found.content, found.ids) == naive(parts, 64, "H")
    assert found.tombstones == h(struct.pack(f"<{len(purged)}q", *sorted(purged))).hex()

    entries = {kind: [e for e in store.state.files() if e.path.startswith(kind)] for kind in ("embeddings", "index")}
    assert found.embeddings == hash_lines([f"{slot(e.path)} {e.sha256}" for e in entries["embeddings"]])
    assert found.indexes == hash_lines(
        [f"{slot(e.path)} {e.sha256}" for e in entries["index"] if "/recall" not in e.path]
    )

    lines = []
    for entry in (e for e in store.state.files() if e.path.startswith("neighbours")):
        table = pq.read_table(stored_file(store_copy, entry.path))
        values = [[x for row in table[name].to_pylist() for x in row] for name in ("ids", "distances")]
        data = struct.pack(f"<{len(values[0])}q", *values[0]) + struct.pack(f"<{len(values[1])}f", *values[1])
        lines.append(f"{slot(entry.path)} {h(data).hex()}")
    assert found.neighbours == hash_lines(lines)
