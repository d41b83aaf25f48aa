"""The block list: hashes of purged documents, so that they stay out when their input is chunked again.

Each purge adds a sorted file of BLAKE2b-128 hashes: of the ids of documents purged as a whole, and of the
text hash and the tokens of documents of which any chunk is purged. Texts that differ only in what the
tokenizer drops, such as case, have the same tokens. The hashes are keyed with the store's secret, so without
``store.json`` the list neither confirms a guess nor matches another store's. An erase keeps it.

Cost: 16 bytes of memory per hash; about 2 µs to look up an id and a text, and 1 µs plus 1 ns per byte for
tokens. Checking stored documents reads all row groups that contain any of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrotool.ranges import expand_ranges, is_in
from retrotool.store import parts
from retrotool.store.log import FileEntry
from retrotool.store.parts import HASH_BYTES, ROW_GROUP, Ids
from retrotool.store.paths import FileName
from retrotool.store.store import Store

HASH = np.dtype(f"S{HASH_BYTES}")  # comparisons ignore trailing zeros: harmless, as all have the same length
Hashes = npt.NDArray[np.bytes_]


@dataclass(frozen=True, slots=True)
class Blocked:
    """A set of hashes keyed with ``secret``: S16, sorted, without repeats; from the files in ``slots``."""

    secret: str = field(repr=False)
    hashes: Hashes
    slots: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.hashes)

    def holds(self, ids: Sequence[str], text_hashes: Sequence[bytes]) -> npt.NDArray[np.bool_]:
        """Return which of n documents are blocked by their id or their text's BLAKE2b-128: bool [n]."""
        if not len(self.hashes):
            return np.zeros(len(ids), np.bool_)
        return self.contains(id_hashes(self.secret, ids)) | self.contains(keyed_texts(self.secret, text_hashes))

    def contains(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        """Return which of ``hashes`` [n] are in the list: bool [n]."""
        return is_in(hashes, self.hashes)


def id_hashes(secret: str, ids: Iterable[str]) -> Hashes:
    """Return the keyed hashes of document ids: of ``id:`` and the id in UTF-8."""
    return _keyed(secret, b"id:", (name.encode("utf-8", "surrogatepass") for name in ids))


def keyed_texts(secret: str, text_hashes: Iterable[bytes]) -> Hashes:
    """Return the keyed hashes of texts: of ``text:`` and the BLAKE2b-128 of the text."""
    return _keyed(secret, b"text:", text_hashes)


def keyed_tokens(secret: str, tokens: npt.NDArray[Any], begin: npt.NDArray[Any], count: npt.NDArray[Any]) -> Hashes:
    """Return the keyed hashes of the tokens of d documents of p pieces each: S16 [d].

    A key-value record has p = 2 pieces, any other document 1. A piece is ``count`` [d, p] of ``tokens``
    (flat, contiguous, of the store's token type) from ``begin`` [d, p] on. Hashed are ``tokens:`` and, for
    each piece, its number of tokens as 8 bytes and the tokens, all little-endian.
    """
    data, width = tokens.view(np.uint8).data, tokens.dtype.itemsize
    begins, ends = (begin * width).tolist(), ((begin + count) * width).tolist()
    sizes = np.ascontiguousarray(count, "<i8").view("V8").tolist()
    documents = (zip(*pieces, strict=True) for pieces in zip(sizes, begins, ends, strict=True))
    values = (b"".join(size + data[first:last] for size, first, last in pieces) for pieces in documents)
    return _keyed(secret, b"tokens:", values)


def blocked_documents(store: Store, blocked: Blocked, chunks: FileEntry, documents: pa.Table) -> npt.NDArray[np.bool_]:
    """Return which documents of a part a block list names, by id, text or tokens: bool [d].

    ``documents``, which are not erased, have ``id``, ``text_hash``, ``first_row`` and ``n_chunks``.
    """
    texts = documents["text_hash"].fill_null(bytes(HASH_BYTES)).to_pylist()
    return blocked.holds(documents["id"].to_pylist(), texts) | blocked.contains(stored_tokens(store, chunks, documents))


def stored_tokens(store: Store, chunks: FileEntry, documents: pa.Table) -> Hashes:
    """Return the keyed hashes of the tokens of a part's documents: S16 [d], empty if any chunk is erased."""
    first, rows = (documents[name].to_numpy().astype(np.int64) for name in ("first_row", "n_chunks"))
    hashes = np.zeros(len(first), HASH)
    if not len(first):
        return hashes
    low, high = first // ROW_GROUP, (first + rows - 1) // ROW_GROUP
    groups = np.unique(expand_ranges(low, high - low + 1))
    table = parts.read_parquet(store, chunks, ["n_tokens", "tokens"], groups.tolist(), optional=["key"])
    dtype = parts.token_dtype(store.identity.tokenizer.token_bytes)
    tokens = np.ascontiguousarray(parts.from_fixed_binary(table["tokens"], dtype))
    n_tokens = table["n_tokens"].to_numpy()
    place = np.searchsorted(groups, first // ROW_GROUP) * ROW_GROUP + first % ROW_GROUP
    total, left = (_sums(values, place, rows) for values in (n_tokens, n_tokens > 0))
    records = np.zeros(len(first), np.bool_)
    if "key" in table.schema.names:
        records[rows > 1] = ~table["key"].to_numpy()[place[rows > 1] + 1]
    begin = np.stack([place, place + 1], axis=1) * store.identity.chunk_length
    count = np.stack([n_tokens[place], total - n_tokens[place]], axis=1)
    count[~records, 0] = total[~records]
    for pieces, which in ((1, ~records), (2, records)):
        which &= left == rows
        hashes[which] = keyed_tokens(
            store.identity.secret, tokens.reshape(-1), begin[which, :pieces], count[which, :pieces]
        )
    return hashes


def _sums(values: npt.NDArray[Any], first: Ids, count: Ids) -> Ids:
    before = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return np.asarray(before[first + count] - before[first])


def _keyed(secret: str, domain: bytes, values: Iterable[bytes]) -> Hashes:
    copy = hashlib.blake2b(domain, digest_size=HASH_BYTES, key=bytes.fromhex(secret)).copy
    digests = []
    for value in values:
        state = copy()
        state.update(value)
        digests.append(state.digest())
    return np.frombuffer(b"".join(digests), HASH)


def write_blocked(store: Store, name: FileName, hashes: Hashes) -> FileEntry:
    """Write a purge's hashes, sorted and without repeats."""
    column = parts.fixed_binary(np.unique(hashes).view(np.uint8).reshape(-1, HASH_BYTES))
    return parts.write_parquet(store, name, pa.table([column], schema=parts.BLOCKED_SCHEMA))


def read_blocked(store: Store, but: Sequence[str] = ()) -> Blocked:
    """Read the block list of the store's view, ``but`` for some slots.

    Purges from before block lists existed are not in it.
    """
    files = {slot: entry for slot, entry in store.state.group("blocked").items() if slot not in but}
    found = [read_hashes(store, entry) for entry in files.values()]
    hashes = np.unique(np.concatenate(found)) if found else np.zeros(0, HASH)
    return Blocked(store.identity.secret, hashes, tuple(files))


def read_hashes(store: Store, entry: FileEntry) -> Hashes:
    """Read the hashes of one file; ``CorruptError`` if they are not sorted."""
    column = parts.read_parquet(store, entry)["hash"]
    hashes = np.ascontiguousarray(parts.from_fixed_binary(column, np.dtype(np.uint8))).view(HASH).reshape(-1)
    if column.null_count or (hashes[1:] <= hashes[:-1]).any():
        raise store.corrupt(f"{entry.path}: its hashes are not sorted")
    return hashes
