"""``verify``: check a store against its log, and compute hashes by which stores can be compared.

Checks, reporting every problem:

* the chain and the fold of the log, and the size and SHA-256 of every file;
* here: rows, documents and their chunks, keys, padding, tombstones, totals;
* in ``verify_references``: embeddings, indexes, neighbours and their tokens, block lists, records.

If another process removes files concurrently, it starts again on the newest commit. Cost: every byte is read
once for SHA-256, and Parquet files and embeddings a second time. Memory: one part, or the ids of one shard.

Digests of documents do not depend on how a store is split into files: they are sums of one BLAKE2b-256 per
document, about 1.5 µs per document and 1 GB/s of tokens.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from retrotool.chunk.chunker import id_hash
from retrotool.engine.task import Report
from retrotool.errors import CorruptError, ErasedError, RetrotoolError
from retrotool.index.index_records import RECALL
from retrotool.info import verify_references as references
from retrotool.info.problems import Problem, problem_with
from retrotool.info.verify_references import Checked, check_chunk_ids, lines_digest
from retrotool.store import parts, paths, staging
from retrotool.store.gc import foreign_files, unnamed_files
from retrotool.store.log import Commit
from retrotool.store.parts import Chunks, chunk_ids
from retrotool.store.store import Store, retry_overtaken
from retrotool.store.tombstones import read_tombstones
from retrotool.store.verify_log import check_log, same_state

_DIGESTS = {  # by kind of files, the digests that can't be trusted if one of them has a problem
    "tombstones": ("tombstones",), "embeddings": ("embeddings",), "index": ("indexes",),
    "neighbours": ("neighbours", "materialised"), "chunks": ("content", "ids"), "documents": ("content", "ids"),
}  # fmt: skip
_LOGGED = re.compile(r"(log|checkpoints)/[0-9a-f-]+\.json")


@dataclass(slots=True)
class Verification:
    """Result of ``verify``, see ``docs/json.md``. Digests are empty where a problem prevents them."""

    ok: bool
    commit: int
    problems: list[Problem] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    unnamed: int = 0
    content: str = ""
    ids: str = ""
    tombstones: str = ""
    embeddings: str = ""
    indexes: str = ""
    neighbours: str = ""
    materialised: str = ""
    documents: int = 0
    chunks: int = 0
    tokens: int = 0
    files: int = 0
    bytes: int = 0


def check_store(store: Store, report: Report = lambda _: None) -> Verification:
    """Check the store at its view. Raises ``ErasedError`` if a newer commit removes one of its files."""
    result = Verification(True, store.state.number)
    checked = Checked(store, result.problems)
    _check_log(checked)
    references.check_records(checked)
    links = (path for path in store.storage.irregular() if not path.endswith("/"))
    links = (path for path in links if "/" in path or path in paths.FOLDERS)  # links elsewhere are harmless
    checked.problems += [
        problem_with(store, path, f"{path} is a symbolic link", is_link=True) for path in sorted(links)
    ]
    broken = "is not a finished task: the next command that writes removes it and repeats the task"
    for path in staging.broken(store.storage):
        checked.add(path, f"{path} {broken}")
    result.foreign, result.unnamed = foreign_files(store), len(unnamed_files(store))
    _check_files(checked, result, report)
    with checked.noting("", "tombstones"):
        checked.tombstones = read_tombstones(store)
        result.tombstones = hashlib.blake2b(checked.tombstones.ids.astype("<i8").tobytes(), digest_size=32).hexdigest()
    total = PartDigest()
    for part in store.state.all_parts():
        entries = [store.state.part_file(kind, part) for kind in ("documents", "chunks")]
        if any(entry is None for entry in entries):
            checked.add("", f"part {part} has no documents file or no chunks file")
        elif checked.broken.isdisjoint(entry.path for entry in entries if entry is not None):
            with checked.noting(parts.part_entry(store, "chunks", part).path, f"part {part}"):
                digest = _check_part(checked, part)
                total += digest if store.state.is_live(part) else PartDigest()
    check_chunk_ids(checked, checked.tombstones.ids, "", "tombstones")
    references.check_blocked(checked)
    references.check_undone(checked)
    result.embeddings = _digest_files(store, "embeddings")
    result.indexes = _digest_files(store, "index")
    result.neighbours, result.materialised = references.check_neighbours(checked)
    for name in store.state.names("index"):
        references.check_index(checked, name)
    if not checked.broken:
        result.content, result.ids = hexadecimal(total.content), hexadecimal(total.ids)
        for name in ("documents", "chunks", "tokens"):
            setattr(result, name, found := getattr(total, name))
            logged = store.state.records.get("totals", {}).get(name, 0)
            if found != logged:
                checked.add("", f"found {found:,} live {name}, but the log says {logged:,}")
    for kind in {problem.kind for problem in result.problems}:
        for name in _DIGESTS.get(kind, ()):
            setattr(result, name, "")
    if not all(problem.repairable for problem in result.problems):  # sound files may look wrong without the others
        result.problems = [one if one.path in checked.broken else one.doubtful() for one in result.problems]
    result.ok = not result.problems
    return result


def _check_log(checked: Checked) -> None:
    """Fold the log, compare the result with the open state, and collect the keys of all records ever set."""
    store = checked.store

    def note(commit: Commit) -> None:
        checked.recorded.update(commit.records)
        # A dropped index may be started again.
        removed = (key for key, value in commit.records.items() if value is None)
        checked.recorded.difference_update(key for key in removed if key.startswith("index:"))

    with checked.noting("", "log"):
        found = check_log(store.storage, store.genesis, store.state.number, note)
        for problem in found.problems:
            named = _LOGGED.search(problem)
            checked.add(named[0] if named else "", problem)
        if not found.problems and not same_state(found.state, store.state):
            checked.add("", "the open state differs from the fold of the log: commits are missing")


def _check_files(checked: Checked, result: Verification, report: Report) -> None:
    """Check sizes and sums, and add the paths of broken files to ``checked.broken``."""
    store = checked.store
    with checked.noting(store.identity.tokenizer.file):
        store.tokenizer_json()
    for entry in store.state.files():
        result.files += 1
        result.bytes += entry.bytes
        try:
            store.check_sum(entry)
        except ErasedError:
            raise
        except (RetrotoolError, OSError) as error:
            checked.add(entry.path, str(error).removeprefix(f"{store.place}/"))
            checked.broken.add(entry.path)
        report(entry.bytes)


def _check_part(checked: Checked, part: int) -> PartDigest:
    store = checked.store
    chunks = parts.read_chunks(store, part)
    documents = parts.read_documents(store, part, ["id", "key", "first_row", "n_chunks", "n_tokens"])
    n, docs = len(chunks), documents.num_rows
    first, count, n_tokens = (documents[name].to_numpy() for name in ("first_row", "n_chunks", "n_tokens"))
    if count.sum() != n or (count < 0).any() or not ((chunks.doc >= 0) & (chunks.doc < docs)).all():
        path = parts.part_entry(store, "chunks", part).path
        checked.add(path, f"part {part}: its {docs:,} documents don't match its {n:,} chunks")
        return PartDigest()
    entry = parts.part_entry(store, "chunks", part)
    row = parts.read_parquet(store, entry, ["row"])["row"].to_numpy()
    doc, index = np.repeat(np.arange(docs), count), np.arange(n) - np.repeat(first, count)
    tokens = np.bincount(chunks.doc, chunks.n_tokens, minlength=docs).astype(np.int64)
    keys = [None if name is None else id_hash(name) for name in documents["id"].to_pylist()]
    padding = np.arange(chunks.tokens.shape[1]) >= chunks.n_tokens[:, None]
    wrong = {
        "rows are not numbered from 0": (row != np.arange(n)).any(),
        "documents are not contiguous": (first != np.cumsum(count) - count).any(),
        "documents and chunks disagree about which belong together": (chunks.doc != doc).any(),
        "chunks have wrong positions in their documents": (chunks.index != index).any(),
        "documents and chunks have different numbers of tokens": (tokens != n_tokens).any(),
        "padding is not zero": (chunks.tokens * padding).any(),
        "keys are not the hashes of the documents' ids": documents["key"].to_pylist() != keys,
        "the first chunk of a document is not a key": not chunks.key[chunks.index == 0].all(),
        "the log has a different number of keys": chunks.key.sum() != parts.n_keys(entry),
    }
    checked.note(entry.path, wrong, f"part {part}")
    references.check_embeddings(checked, part, chunks.embedded)
    alive = chunks.n_tokens > 0
    purged = checked.tombstones.rows(part)
    alive[purged[purged < n]] = False
    return part_digest(chunks, documents["key"].to_pylist(), alive)


def _digest_files(store: Store, kind: str) -> str:
    lines, names = list[str](), store.state.names(kind)
    for name in names:
        entries = store.state.group(kind, name).items()
        lines += [f"{kind}/{name}/{slot} {entry.sha256}" for slot, entry in entries if slot != RECALL]
    return lines_digest(lines) if names else ""


@dataclass(frozen=True, slots=True)
class PartDigest:
    """Sums of hashes over the live documents of a part, and its live documents, chunks and tokens."""

    content: int = 0
    ids: int = 0
    documents: int = 0
    chunks: int = 0
    tokens: int = 0

    def __add__(self, other: PartDigest) -> PartDigest:
        return PartDigest(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))


def hexadecimal(number: int) -> str:
    """Return a sum of 256-bit numbers, modulo 2^256, as 64 digits."""
    return f"{number % (1 << 256):064x}"


def part_digest(chunks: Chunks, keys: list[bytes | None], live: npt.NDArray[np.bool_]) -> PartDigest:
    """Compute the digest of the ``live`` (bool [n]) chunks of a part, whose documents have ``keys``."""
    rows = np.flatnonzero(live)
    if not len(rows):
        return PartDigest()
    length = chunks.tokens.shape[1]
    # One structured record per chunk, so that a document's bytes are one slice.
    record = np.dtype([("index", "<i4"), ("n_tokens", "<i4"), ("tokens", chunks.tokens.dtype, (length,))])
    named = np.dtype([("id", "<i8"), ("index", "<i4")])
    contents = np.empty(len(rows), record)
    for column in ("index", "n_tokens", "tokens"):
        contents[column] = getattr(chunks, column)[rows]
    names = np.empty(len(rows), named)
    names["id"], names["index"] = chunk_ids(chunks.part, rows), chunks.index[rows]
    doc = chunks.doc[rows]
    starts = np.flatnonzero(np.diff(doc, prepend=doc[0] - 1))
    ends = np.append(starts[1:], len(rows))
    content_bytes, name_bytes = contents.view(np.uint8), names.view(np.uint8)
    content = ids = 0
    for start, end, document in zip(starts.tolist(), ends.tolist(), doc[starts].tolist(), strict=True):
        key = keys[document] or b""
        content += _hash(key, content_bytes[start * record.itemsize : end * record.itemsize])
        ids += _hash(key, name_bytes[start * named.itemsize : end * named.itemsize])
    tokens = int(chunks.n_tokens[rows].sum())
    return PartDigest(content, ids, len(starts), len(rows), tokens)


def _hash(key: bytes, data: Any) -> int:
    state = hashlib.blake2b(key, digest_size=32)
    state.update(data)
    return int.from_bytes(state.digest(), "little")


def verify(root: str | Path, report: Report = lambda _: None) -> Verification:
    """Check every file of a store, and compute the hashes by which stores are compared.

    A store that is too damaged to open is reported as a problem. Raises ``ErasedError`` if other processes
    keep removing files.
    """
    reported = 0

    def counted(n: int) -> None:
        nonlocal reported
        reported += n
        report(n)

    try:
        return retry_overtaken(lambda: check_store(Store.open(root), counted), lambda: counted(-reported))
    except CorruptError as error:
        advice = error.advice or "Restore the store from a backup."
        return Verification(False, -1, [Problem("store", "", str(error), advice)])


def bytes_to_verify(root: str | Path) -> int:
    """Return the number of bytes that ``verify`` will check, 0 if the store is too damaged to open."""
    try:
        return Store.open(root).state.bytes()
    except CorruptError:
        return 0
