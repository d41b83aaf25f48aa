"""The block list: what was purged, so that it does not come back when its input is chunked again.

Each purge adds a sorted file of hashes: of the id of every document that is purged as a whole, and of the text hash of
every document of which any chunk is purged. They are keyed with the store's secret, so without ``store.json`` the
list neither gives a guess away nor matches another store's. It outlives an erase.

Cost: 16 bytes a hash in memory; looking documents up takes about 2 µs each, most of it for two hashes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrotool.errors import CorruptError
from retrotool.store import parts, schemas
from retrotool.store.atomic import FileEntry
from retrotool.store.paths import FileName
from retrotool.store.schemas import HASH_BYTES
from retrotool.store.store import Store

HASH = np.dtype(f"S{HASH_BYTES}")
"""NumPy compares these byte by byte. Zeros at the end count as padding: of equal lengths that changes nothing."""

Hashes = npt.NDArray[np.bytes_]


class Blocked:
    """A set of keyed hashes; ``hashes`` is S16, sorted, without repeats. False if it is empty.

    ``slots`` are those of the files that it was read from.
    """

    def __init__(self, secret: str, hashes: Hashes, slots: tuple[str, ...] = ()) -> None:
        self._secret = secret
        self.hashes = hashes
        self.slots = slots

    def __len__(self) -> int:
        return len(self.hashes)

    def holds(self, ids: Sequence[str], text_hashes: Sequence[bytes] | npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Which of n documents are blocked, by their id or by their text, bool [n].

        Args:
            ids: their ids.
            text_hashes: BLAKE2b-128 of their texts, 16 bytes each: a sequence, or an array of n × 16 bytes.

        """
        blocked = np.zeros(len(ids), np.bool_)
        if not len(self.hashes) or not len(ids):
            return blocked
        if isinstance(text_hashes, np.ndarray):
            data = text_hashes.tobytes()
            text_hashes = [data[i : i + HASH_BYTES] for i in range(0, len(data), HASH_BYTES)]
        if len(text_hashes) != len(ids):
            raise ValueError(f"{len(text_hashes):,} text hashes for {len(ids):,} ids")
        return self._contains(id_hashes(self._secret, ids)) | self._contains(keyed_texts(self._secret, text_hashes))

    def lacks(self, hashes: Hashes) -> Hashes:
        """Those of ``hashes`` that are not in the list."""
        return hashes[~self._contains(hashes)]

    def _contains(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        if not len(self.hashes):
            return np.zeros(len(hashes), np.bool_)
        place = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        found: npt.NDArray[np.bool_] = self.hashes[place] == hashes
        return found


def id_hashes(secret: str, ids: Iterable[str]) -> Hashes:
    """Hashes of document ids: BLAKE2b-128, keyed with the store's secret, of ``id:`` and the id in UTF-8."""
    return _keyed(secret, b"id:", (name.encode("utf-8", "surrogatepass") for name in ids))


def keyed_texts(secret: str, text_hashes: Iterable[bytes]) -> Hashes:
    """Hashes of texts: BLAKE2b-128, keyed with the store's secret, of ``text:`` and the BLAKE2b-128 of the text."""
    return _keyed(secret, b"text:", text_hashes)


def _keyed(secret: str, domain: bytes, values: Iterable[bytes]) -> Hashes:
    keyed = hashlib.blake2b(domain, digest_size=HASH_BYTES, key=bytes.fromhex(secret))
    copy = keyed.copy  # costs half of a new state with its key
    digests = []
    for value in values:
        state = copy()
        state.update(value)
        digests.append(state.digest())
    return np.frombuffer(b"".join(digests), HASH)


def write_blocked(root: Path, name: FileName, hashes: Hashes) -> FileEntry:
    """Write a purge's hashes, sorted and without repeats."""
    column = parts.fixed_binary(np.unique(hashes).view(np.uint8).reshape(-1, HASH_BYTES))
    return parts.write_parquet(root, name, pa.table([column], schema=schemas.BLOCKED_SCHEMA))


def read_blocked(store: Store) -> Blocked:
    """The block list of the store's view: empty if nothing was purged, or only before there were block lists."""
    group = store.state.group("blocked")
    found = [read_hashes(store, entry) for slot in group if (entry := group.get(slot)) is not None]
    hashes = np.unique(np.concatenate(found)) if found else np.zeros(0, HASH)
    return Blocked(store.identity.secret, hashes, tuple(group))


def read_hashes(store: Store, entry: FileEntry) -> Hashes:
    """The hashes of one file; ``CorruptError`` if they are not sorted."""
    column = parts.read_parquet(store, entry)["hash"]
    hashes = np.ascontiguousarray(parts.from_fixed_binary(column, np.dtype(np.uint8))).view(HASH).reshape(-1)
    if column.null_count or (hashes[1:] <= hashes[:-1]).any():
        raise CorruptError(
            f"{entry.path}: its hashes are not sorted", f"See what else is wrong: retrotool verify {store.root}"
        )
    return hashes
