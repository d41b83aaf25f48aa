"""The block list: what was purged, so that it does not come back when its input is chunked again.

Each purge adds a sorted file of hashes: of the id of every document that is purged as a whole, and of the text hash and
the tokens of every document of which any chunk is purged. Texts that differ only in what the tokenizer drops, such as
case, have the same tokens. The hashes are keyed with the store's secret, so without ``store.json`` the list neither
gives a guess away nor matches another store's. It outlives an erase.

Cost: 16 bytes a hash in memory. Looking a document up takes about 2 µs for its id and text, and 1 µs and 1 ns a byte
for its tokens, most of it for the hashes. Tokens of stored documents have to be read: all row groups that hold any.
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
from retrotool.store.parts import HASH_BYTES, ROW_GROUP
from retrotool.store.paths import FileName
from retrotool.store.store import Store

HASH = np.dtype(f"S{HASH_BYTES}")
"""NumPy compares these byte by byte. Zeros at the end count as padding: of equal lengths that changes nothing."""

Hashes = npt.NDArray[np.bytes_]


@dataclass(frozen=True, slots=True)
class Blocked:
    """A set of hashes keyed with ``secret``; ``hashes`` is S16, sorted, without repeats. False if it is empty.

    ``slots`` are those of the files that it was read from.
    """

    secret: str = field(repr=False)
    hashes: Hashes
    slots: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.hashes)

    def holds(self, ids: Sequence[str], text_hashes: Sequence[bytes]) -> npt.NDArray[np.bool_]:
        """Which of n documents are blocked, by their ids or by their texts' BLAKE2b-128, 16 bytes each: bool [n]."""
        if not len(self.hashes):
            return np.zeros(len(ids), np.bool_)
        return self.contains(id_hashes(self.secret, ids)) | self.contains(keyed_texts(self.secret, text_hashes))

    def contains(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        """Which of n ``hashes`` are in the list, bool [n]."""
        return is_in(hashes, self.hashes)


def id_hashes(secret: str, ids: Iterable[str]) -> Hashes:
    """Hashes of document ids: BLAKE2b-128, keyed with the store's secret, of ``id:`` and the id in UTF-8."""
    return _keyed(secret, b"id:", (name.encode("utf-8", "surrogatepass") for name in ids))


def keyed_texts(secret: str, text_hashes: Iterable[bytes]) -> Hashes:
    """Hashes of texts: BLAKE2b-128, keyed with the store's secret, of ``text:`` and the BLAKE2b-128 of the text."""
    return _keyed(secret, b"text:", text_hashes)


def keyed_tokens(secret: str, tokens: npt.NDArray[Any], begin: npt.NDArray[Any], count: npt.NDArray[Any]) -> Hashes:
    """Hashes of the tokens of d documents of p pieces each (2 for a key-value record, else 1), S16 [d].

    BLAKE2b-128, keyed with the store's secret, of ``tokens:`` and, for each piece, how many tokens it has, as 8 bytes,
    and these, as the store keeps them; all little-endian. A piece is ``count`` [d, p] of ``tokens`` (flat, contiguous,
    of the store's token type) from ``begin`` [d, p] on.
    """
    data, width = tokens.view(np.uint8).data, tokens.dtype.itemsize
    copy = _state(secret, b"tokens:").copy
    digests = []
    begins, ends = (begin * width).tolist(), ((begin + count) * width).tolist()
    sizes = np.ascontiguousarray(count, "<i8").view("V8").tolist()
    for some in zip(begins, ends, sizes, strict=True):
        state = copy()
        for first, last, size in zip(*some, strict=True):
            state.update(size)
            state.update(data[first:last])
        digests.append(state.digest())
    return np.frombuffer(b"".join(digests), HASH)


def blocked_documents(store: Store, several: Blocked, chunks: FileEntry, documents: pa.Table) -> npt.NDArray[np.bool_]:
    """Which documents of one part are in a block list, by their id, text or tokens, bool [d].

    ``chunks`` is the file of the part's chunks. ``documents`` are rows of its documents, not erased, with ``id``,
    ``text_hash``, ``first_row`` and ``n_chunks``.
    """
    texts = documents["text_hash"].fill_null(bytes(HASH_BYTES)).to_pylist()
    named = several.holds(documents["id"].to_pylist(), texts)
    return named | several.contains(stored_tokens(store, chunks, documents))


def stored_tokens(store: Store, chunks: FileEntry, documents: pa.Table) -> Hashes:
    """Hashes of the tokens of documents of one part, S16 [d]; empty where something of the document is erased.

    ``chunks`` is the file of the part's chunks. ``documents`` are rows of its documents, with ``first_row`` and
    ``n_chunks``.
    """
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


def _sums(
    values: npt.NDArray[Any], first: npt.NDArray[np.int64], count: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Sums of ``count`` values each from ``first`` on."""
    before = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    sums: npt.NDArray[np.int64] = before[first + count] - before[first]
    return sums


def _state(secret: str, domain: bytes) -> hashlib.blake2b:
    return hashlib.blake2b(domain, digest_size=HASH_BYTES, key=bytes.fromhex(secret))


def _keyed(secret: str, domain: bytes, values: Iterable[bytes]) -> Hashes:
    copy = _state(secret, domain).copy  # costs half of a new state with its key
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


def read_blocked(store: Store) -> Blocked:
    """The block list of the store's view: empty if nothing was purged, or only before there were block lists."""
    group = store.state.group("blocked")
    found = [read_hashes(store, entry) for entry in group.entries()]
    hashes = np.unique(np.concatenate(found)) if found else np.zeros(0, HASH)
    return Blocked(store.identity.secret, hashes, tuple(group))


def read_hashes(store: Store, entry: FileEntry) -> Hashes:
    """The hashes of one file; ``CorruptError`` if they are not sorted."""
    column = parts.read_parquet(store, entry)["hash"]
    hashes = np.ascontiguousarray(parts.from_fixed_binary(column, np.dtype(np.uint8))).view(HASH).reshape(-1)
    if column.null_count or (hashes[1:] <= hashes[:-1]).any():
        raise store.corrupt(f"{entry.path}: its hashes are not sorted")
    return hashes
