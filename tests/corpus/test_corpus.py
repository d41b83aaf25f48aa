"""Real text from end to end: whatever the workers, kills, order and format, every document with exactly its tokens.

``RETROTOOL_CORPUS`` names a folder of ``.jsonl.zst`` files to take instead of Python's own documentation, and
``RETROTOOL_CORPUS_KILLS`` how often a run is killed (``make corpus-test CORPUS=folder``).
"""

from __future__ import annotations

import hashlib
import json
import os
import pydoc_data.topics
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import zstandard
from stored import remove_store, stored_files
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from retrotool import api
from retrotool.sources import streams
from retrotool.store import parts
from retrotool.store.store import Store
from retrotool.tokenizers import Tokenizer, TokenizerFile, find_tokenizer

KILLS = int(os.environ.get("RETROTOOL_CORPUS_KILLS", "3"))
Row = dict[str, Any]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of JSON lines, compressed, with ids."""
    given = os.environ.get("RETROTOOL_CORPUS")
    if given:
        return sorted(Path(given).glob("*.jsonl.zst"))
    folder = tmp_path_factory.mktemp("corpus")
    topics = sorted(pydoc_data.topics.topics.items())
    paths = []
    for number in range(4):
        rows = [{"id": f"topic {name}", "text": text, "source": f"s{number % 2}"} for name, text in topics[number::4]]
        lines = [json.dumps(row, ensure_ascii=number % 2 == 0).encode() + b"\n" for row in rows]
        frames = (zstandard.compress(b"".join(lines[i : i + 5])) for i in range(0, len(lines), 5))
        paths.append(folder / f"{number}.jsonl.zst")
        paths[-1].write_bytes(b"".join(frames))
    return paths


def rows_of(path: Path) -> Iterator[Row]:
    rest = b""
    for block in streams.blocks(lambda: path.open("rb"), "zst"):
        *lines, rest = (rest + block).split(b"\n")
        yield from map(orjson.loads, lines)


def trained(kind: str, corpus: list[Path], path: Path) -> str:
    """A tokenizer of a kind, trained on every tenth document; ``minilm`` is WordPiece."""
    if kind == "minilm":
        return kind
    if kind == "bpe":
        tokenizer = Library(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=50_000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
    else:
        tokenizer = Library(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=4000, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
        )
    texts = (row["text"][:20_000] for file in corpus for n, row in enumerate(rows_of(file)) if n % 10 == 0)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def bpe(corpus: list[Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    return trained("bpe", corpus, tmp_path_factory.mktemp("bpe") / "tokenizer.json")


@pytest.fixture(scope="module")
def whole(corpus: list[Path], bpe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the corpus, made by two workers at once without interruption."""
    store = tmp_path_factory.mktemp("whole") / "store"
    chunk(store, corpus, bpe, 2)
    return store


def chunk(store: Path, inputs: list[Path], tokenizer: str, workers: int) -> None:
    api.chunk(store, list(map(str, inputs)), tokenizer=tokenizer, workers=workers, part_size=20_000)


def documents_of(store: Path) -> Iterator[tuple[Row, np.ndarray, np.ndarray]]:
    """Live documents with their tokens [n, 64] and tokens of each chunk [n]."""
    opened = Store.open(store)
    gone = {ids for slot in opened.state.group("tombstones") for ids in tombstones(opened, slot)}
    for part in opened.state.parts():
        chunks = parts.read_chunks(opened, part)
        for row in parts.read_documents(opened, part).to_pylist():
            place = slice(row["first_row"], row["first_row"] + row["n_chunks"])
            if (part << 32) + row["first_row"] not in gone:
                yield row, chunks.tokens[place], chunks.n_tokens[place]


def tombstones(store: Store, slot: str) -> list[int]:
    entry = store.state.file("tombstones", slot)
    assert entry is not None
    ids: list[int] = parts.read_parquet(store, entry)["chunk"].to_pylist()
    return ids


def same(one: Path, other: Path, *, ids: bool = True) -> None:
    found, expected = api.verify(one), api.verify(other)
    assert found.problems == expected.problems == []
    assert (found.content, found.documents, found.tokens) == (expected.content, expected.documents, expected.tokens)
    if ids:
        assert found.ids == expected.ids


@pytest.mark.parametrize("kind", ["bpe", "minilm", "unigram"])
def test_every_document_has_the_ids_that_tokenizers_gives(kind, corpus, bpe, whole, tmp_path):
    store, tokenizer = whole, bpe
    if kind != "bpe":
        store, tokenizer = tmp_path / "store", trained(kind, corpus, tmp_path / "tokenizer.json")
        chunk(store, corpus, tokenizer, 2)
    library = Library.from_str(find_tokenizer(tokenizer).content.decode())
    library.no_truncation()
    library.no_padding()
    # In the order of the inputs, which is that of the parts; repeats are left out on both sides.
    stored = documents_of(store)
    seen: set[bytes] = set()
    read = 0
    for batch in batches(row for file in corpus for row in rows_of(file)):
        read += len(batch)
        fresh = []
        for row in batch:
            digest = hashlib.blake2b(row["text"].encode(), digest_size=16).digest()
            if digest not in seen and row["text"].strip():
                fresh.append(row)
            seen.add(digest)
        encodings = library.encode_batch_fast([row["text"] for row in fresh], add_special_tokens=False)
        for row, encoding in zip(fresh, encodings, strict=True):
            document, tokens, n_tokens = next(stored)
            assert document["id"] == row["id"]
            flat = tokens[np.arange(tokens.shape[1]) < n_tokens[:, None]]
            assert np.array_equal(flat, np.array(encoding.ids)), row["id"]
    assert next(stored, None) is None
    assert read > 70


def batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Runs of about a megabyte of text."""
    size = 0

    def run(row: Row) -> int:
        nonlocal size
        size += len(row["text"])
        return size >> 20

    for _, some in groupby(rows, run):
        yield list(some)


def test_decoding_the_chunks_of_a_document_gives_its_text_back_byte_for_byte(whole):
    opened = Store.open(whole)
    tokenizer = Tokenizer(TokenizerFile(opened.identity.tokenizer.name, opened.tokenizer_json()))
    assert tokenizer.lossless
    n = 0
    for part in opened.state.parts():
        chunks = parts.read_chunks(opened, part)
        pieces = tokenizer.decode(chunks.tokens, chunks.n_tokens).to_pylist()
        for row in parts.read_documents(opened, part, ["first_row", "n_chunks", "text_hash"]).to_pylist():
            text = b"".join(pieces[row["first_row"] : row["first_row"] + row["n_chunks"]])
            assert hashlib.blake2b(text, digest_size=16).digest() == row["text_hash"]
            n += 1
    assert n >= 70


@pytest.mark.parametrize("workers", [1, 5])
def test_the_number_of_workers_changes_nothing(workers, corpus, bpe, whole, tmp_path):
    chunk(tmp_path / "store", corpus, bpe, workers)
    same(tmp_path / "store", whole)


def test_the_order_of_the_inputs_changes_no_document(corpus, bpe, whole, tmp_path):
    """Which of several equal texts stays does depend on it, so texts are compared, and what they come to."""
    assert len(corpus) > 1
    chunk(tmp_path / "store", corpus[::-1], bpe, 2)
    texts = [{document["text_hash"] for document, _, _ in documents_of(store)} for store in (tmp_path / "store", whole)]
    assert texts[0] == texts[1]
    found, expected = api.verify(tmp_path / "store"), api.verify(whole)
    assert (found.documents, found.chunks, found.tokens) == (expected.documents, expected.chunks, expected.tokens)
    assert found.ids != expected.ids


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_the_format_of_the_inputs_changes_no_document(kind, corpus, bpe, whole, tmp_path):
    inputs = []
    for file in corpus:
        table = pa.Table.from_pylist(list(rows_of(file)))
        inputs.append(tmp_path / f"{file.name.partition('.')[0]}.{kind}")
        if kind == "parquet":
            pq.write_table(table, inputs[-1], row_group_size=1000)
        else:
            pyarrow.feather.write_feather(table, inputs[-1], compression="zstd", chunksize=1000)
    chunk(tmp_path / "store", inputs, bpe, 2)
    same(tmp_path / "store", whole, ids=False)


def test_a_run_that_is_killed_again_and_again_gives_what_an_uninterrupted_one_gives(corpus, bpe, whole, tmp_path):
    store = tmp_path / "store"
    command = [sys.executable, "-m", "retrotool", "chunk", store, *corpus, "--tokenizer", bpe, "--part-size", "20000"]
    draw = random.Random(2026)
    killed, longest = 0, 4.0
    while killed < KILLS:
        process = subprocess.Popen([*command, "--workers", "2"], start_new_session=True, stdout=subprocess.PIPE)
        # From starting up to a good way into the work.
        end = time.monotonic() + draw.uniform(longest / 10, longest)
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        if process.poll() is not None:
            process.communicate()
            if killed:
                break  # it was done before the next kill came
            remove_store(store)
            longest /= 2
            continue
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        killed += 1
    assert killed > 0
    chunk(store, corpus, bpe, 2)
    same(store, whole)
    assert stored_files(store, "staging/*") == []
