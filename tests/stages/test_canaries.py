"""Canaries, hundreds or in nightly runs a thousand, in every kind of file: all found before an erase, and none after.

The scan knows the canaries from outside, not from the store: strings, hashes, token runs and vectors are made here, by
the tokenizer and from the files as numpy reads them. It looks at every byte of every file, and at what the bytes stand
for: columns of Parquet files, compressed frames, unescaped JSON, ids in lists of faiss files. It must find the canaries
before the erase, or finding none after would say nothing.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import string
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest
import zstandard
from conftest import make_rows, times, write_jsonl
from tokenizers import Tokenizer

import retrotool
from retrotool import api
from retrotool.sources import Fields
from retrotool.store.paths import DATA_KINDS, FileName
from retrotool.store.sums import with_sums

CANARIES, BROKEN, LEFT_OVER = times(300, 1000), 10, 10
HEAD = 8
Fingerprints = dict[str, dict[bytes, int]]
"""By what they are: bytes, and which canary has them."""


def letters(seed: int, n: int) -> str:
    return "".join(random.Random(seed).choices(string.ascii_lowercase, k=n))


def text_of(number: int) -> str:
    return "canary " + " ".join(letters(5 * number + i, 12) for i in range(4))


def id_of(number: int) -> str:
    return "id" + letters(10_000 + number, 14)


def kept_of(number: int) -> str:
    return "kept" + letters(20_000 + number, 14)


def corpus(folder: Path, *, records: bool) -> Path:
    """Documents, or key-value records, of a canary each, others between them, and rows that can't be read."""
    rows: list[dict[str, object]] = []
    for number, row in enumerate(make_rows(CANARIES, words=40)):
        content = {"key": letters(number, 9), "value": text_of(number)} if records else {"text": text_of(number)}
        other = {**row, "key": str(row["text"])[:40], "value": row["text"]} if records else row
        rows += [{**content, "id": id_of(number), "note": kept_of(number), "source": "s"}, other]
    rows += [{"id": f"broken-{number}", "text": 3, "key": 3, "note": text_of(number)} for number in range(BROKEN)]
    return write_jsonl(folder / "c.jsonl", rows)


def hashed(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def fingerprints_of(tokenizer: Path, vectors: list[np.ndarray]) -> Fingerprints:
    """Of each canary a word, its id and kept column, hashes of id and text, 8 tokens, and 8 numbers of its vector."""
    encode = Tokenizer.from_file(str(tokenizer))
    encode.no_padding()
    encode.no_truncation()
    found: Fingerprints = defaultdict(dict)
    for number in range(CANARIES):
        text = text_of(number)
        found["text"][text.split()[2].encode()] = number
        found["id"][id_of(number).encode()] = number
        found["kept"][kept_of(number).encode()] = number
        found["hash of id"][hashed(id_of(number))] = number
        found["hash of text"][hashed(text)] = number
        ids = encode.encode(text, add_special_tokens=False).ids
        found["tokens"][np.array(ids[8:16], "<u2").tobytes()] = number
    for number, vector in enumerate(vectors):
        found["vector"][vector[:8].astype("<f2").tobytes()] = number
        found["vector"][vector[:8].astype("<f4").tobytes()] = number
    return found


def contents(path: Path) -> Iterator[bytes]:
    """The bytes of a file, and what they stand for."""
    data = path.read_bytes()
    yield data
    if path.suffix == ".json":
        yield data.decode("unicode_escape", "replace").encode("latin-1", "replace")
    if data.startswith(b"\x28\xb5\x2f\xfd"):
        yield zstandard.ZstdDecompressor().decompressobj().decompress(data)
    if data.startswith(b"PAR1"):
        for column in pq.read_table(path).columns:
            for chunk in column.chunks:
                yield from (buffer.to_pybytes() for buffer in chunk.buffers() if buffer is not None)


def listed(path: Path) -> np.ndarray:
    """Chunk ids in the lists of a faiss file."""
    index = faiss.read_index(str(path))
    if isinstance(index, faiss.IndexIDMap2):
        return np.asarray(faiss.vector_to_array(index.id_map))
    lists = faiss.extract_index_ivf(index).invlists
    every = [faiss.rev_swig_ptr(lists.get_ids(i), lists.list_size(i)) for i in range(lists.nlist) if lists.list_size(i)]
    return np.concatenate([np.zeros(0, np.int64), *every])


def find(data: bytes, fingerprints: Fingerprints) -> Iterator[tuple[str, int]]:
    """Which fingerprints are in some bytes, at any place: by their first 8 bytes at each alignment, and then by all."""
    by_head: dict[int, list[tuple[str, bytes, int]]] = defaultdict(list)
    for kind, some in fingerprints.items():
        for fingerprint, number in some.items():
            by_head[int.from_bytes(fingerprint[:HEAD], "little")].append((kind, fingerprint, number))
    heads = np.array(sorted(by_head), np.uint64)
    may_begin = np.zeros(1 << 16, np.bool_)
    may_begin[heads & 0xFFFF] = True
    data += bytes(2 * HEAD)
    for offset in range(HEAD):
        words = np.frombuffer(data, "<u8", (len(data) - offset) // HEAD, offset)
        places = np.flatnonzero(may_begin[words & 0xFFFF])
        known = heads[np.minimum(np.searchsorted(heads, words[places]), len(heads) - 1)] == words[places]
        for place in places[known].tolist():
            for kind, fingerprint, number in by_head[int(words[place])]:
                if data.startswith(fingerprint, offset + HEAD * place):
                    yield kind, number


def scan(store: Path, fingerprints: Fingerprints, chunks: list[int]) -> dict[tuple[str, str], set[int]]:
    """Which canaries are in each kind of file: by folder, and by what was found of them."""
    found: dict[tuple[str, str], set[int]] = defaultdict(set)
    for path in sorted(store.rglob("*")):
        if not path.is_file() or path.name.startswith("tokenizer-"):
            continue
        folder = path.relative_to(store).parts[0]
        for data in contents(path):
            for kind, number in find(data, fingerprints):
                found[folder, kind].add(number)
        if path.name.startswith("shard-") and path.suffix == ".faiss":
            found[folder, "chunk"].update(np.flatnonzero(np.isin(chunks, listed(path))).tolist())
    return {place: numbers for place, numbers in found.items() if numbers}


def leave_behind(store: Path, number: int) -> None:
    """Files of a run that was killed: temporary ones, and some with their final names."""
    dead = f"{number:08x}{'0' * 7}1"
    for kind in DATA_KINDS if not number else ():
        for whole in sorted(path for path in (store / kind).rglob("*") if path.is_file())[:1]:
            name = FileName.parse(whole.relative_to(store).as_posix())
            for i, path in enumerate(map(Path, with_sums(str(whole)))):
                shutil.copy(path, path.with_name(path.name.replace(name.token, f"{dead[:-1]}2")))
                shutil.copy(path, path.with_name(f".tmp-{dead[:-1]}{i}{number:08x}"))
    (store / "documents" / f"{dead}.parquet").write_bytes(text_of(number).encode())
    (store / f".tmp-{dead}{number:08x}").write_bytes(id_of(number).encode())


@pytest.mark.on_disk  # dead runs leave temporary files
@pytest.mark.parametrize("records", [False, True])
def test_a_thousand_canaries(
    records: bool, tmp_path: Path, tiny_encoder: Path, byte_level_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrotool.store.store.CHECKPOINT_EVERY", 2)
    store = tmp_path / "store"
    fields = Fields(keep=("note",), **({"key": "key", "value": "value"} if records else {}))
    tokenizer = byte_level_tokenizer if records else tiny_encoder / "tokenizer.json"
    source = corpus(tmp_path, records=records)
    api.chunk(
        store,
        [str(source)],
        tokenizer=str(tokenizer if records else tiny_encoder),
        part_size=2 * CANARIES,
        fields=fields,
    )
    if not records:  # the encoder reads its own tokens
        api.embed(store, encoder=str(tiny_encoder))
        api.index(store)
        api.neighbours(store, materialise=True)
    reader = retrotool.open(store)
    assert len(reader.parts()) > 1
    chunks = [reader.document(id_of(number))[-1] for number in range(CANARIES)]
    embeddings = {} if records else {part: reader.embeddings(part) for part in reader.parts()}
    vectors = [] if records else [embeddings[chunk >> 32][chunk & 0xFFFFFFFF] for chunk in chunks]
    fingerprints = fingerprints_of(tokenizer, vectors)
    named = write_ids(tmp_path)
    purge = api.purge(store, api.Selectors(document=Path(named)), reason="canaries")
    assert purge.documents == CANARIES
    for number in range(LEFT_OVER):
        leave_behind(store, number)
    before = scan(store, fingerprints, chunks)
    everyone = set(range(CANARIES))
    whole = {("documents", "id"), ("documents", "kept"), ("documents", "hash of id"), ("documents", "hash of text")}
    whole |= {("chunks", "tokens"), ("selectors", "id")}
    if records:
        whole -= {("documents", "hash of text")}
    else:
        whole |= {("embeddings", "vector"), ("index", "vector"), ("index", "chunk")}
        assert len(before["neighbours", "tokens"]) > CANARIES // 4
    assert {place: before.get(place) for place in whole} == dict.fromkeys(whole, everyone)
    assert len(before["quarantine", "text"]) == BROKEN
    assert len(before["documents", "text"]) == LEFT_OVER
    assert list((store / "checkpoints").iterdir())
    api.erase(store, [purge.purge])
    assert scan(store, fingerprints, chunks) == {}
    assert api.verify(store).ok
    receipt = api.verify_purge(store, purge.purge, out=tmp_path).receipt
    assert receipt.ok, receipt.problems
    assert (receipt.files.unknown, receipt.files.in_progress) == ((), 0)


def write_ids(folder: Path) -> Path:
    file = folder / "takedown.txt"
    file.write_text("".join(f"{id_of(number)}\n" for number in range(CANARIES)))
    return file
