"""Selectors without a scan of text: ids, expressions over document columns, repeated chunks.

Ids: chunk ids read nothing, document ids the keys of all documents.

Expressions (``store.expressions``) read the columns that they name of all documents.

Repeated chunks (``--duplicates``) have exactly the same tokens as a chunk with a lower id.

- Not compared: purged and erased chunks, values of key-value records, and chunks of fewer than ``SHORTEST``
  tokens, because unrelated documents end in the same few tokens.
- Cost: all tokens are read and hashed (BLAKE2b-128), and ``chunk.hash_partitions`` compares the hashes: 0.6
  to 1 µs per chunk, and the sort. Memory: about 80 bytes times ``rows``, 8,192 chunks, and 8 bytes per
  duplicate. Scratch: 24 bytes per chunk beyond ``rows`` chunks, in the system's temporary folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retrotool.chunk import hash_partitions
from retrotool.chunk.chunk_plan import chunks_of
from retrotool.chunk.chunker import id_hash
from retrotool.engine.task import Report
from retrotool.purge.selectors.selector import GivenValue
from retrotool.reader import Reader
from retrotool.store import parts
from retrotool.store.expressions import Where
from retrotool.store.parts import Chunks, Ids, parse_id, split_id
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones

SHORTEST = 8  # the least number of tokens of a duplicate


@dataclass(frozen=True, slots=True)
class Lookup:
    """A selector that is looked up.

    ``kind`` is "chunk" or "document", with ids as ``values``; "where", with one expression; or "duplicates",
    without values.
    """

    kind: str
    values: tuple[GivenValue, ...] = ()

    def literal(self) -> dict[str, Any]:
        """Return its values, as JSON."""
        return {"values": [value.text for value in self.values]}

    def select(self, store: Store, *, missing_ok: bool, report: Report) -> Ids:
        """Return chunk ids, ascending; ``UsageError`` for unknown ids, but of documents if ``missing_ok``."""
        if self.kind == "chunk":
            return select_ids(store, self.values)
        if self.kind == "document":
            return select_documents(store, self.values, missing_ok, report)
        if self.kind == "duplicates":
            return select_duplicates(store, report)
        where = Where.checked(store, self.values[0].text)
        return _chunks_where(store, partial(where.rows, store), report)


def select_ids(store: Store, values: Sequence[GivenValue]) -> Ids:
    """Parse chunk ids; ``UsageError`` names the first that is not a chunk of the store."""
    found = []
    sizes = {part: parts.part_entry(store, "chunks", part).rows for part in store.state.all_parts()}
    for value in values:
        text = value.text.strip()
        if (chunk := parse_id(text)) is None:
            raise value.error(f"{text[:40]!r} is not a chunk id")
        part, row = split_id(chunk)
        if row >= sizes.get(part, 0):
            raise value.error(f"the store has no chunk {text}")
        found.append(chunk)
    return np.unique(np.array(found, np.int64))


def select_documents(store: Store, names: Sequence[GivenValue], missing_ok: bool, report: Report) -> Ids:
    """Return the chunks of documents, given by id; ``UsageError`` names the first unknown one."""
    wanted = {name.text: name for name in reversed(names)}
    keys = pa.array(map(id_hash, wanted), pa.binary())
    seen = np.zeros(len(keys), np.bool_)

    def has_key(part: int) -> npt.NDArray[np.bool_]:
        place = pc.index_in(parts.read_documents(store, part, ["key"])["key"].cast(pa.binary()), value_set=keys)
        seen[place.drop_null().to_numpy()] = True
        return np.asarray(place.is_valid())

    found = _chunks_where(store, has_key, report)
    if not (seen.all() or missing_ok):
        unknown = {text for text, is_known in zip(wanted, seen, strict=True) if not is_known}
        name = next(name for name in names if name.text in unknown)
        others = f", nor {len(unknown) - 1:,} more of these" if len(unknown) > 1 else ""
        near = Reader(store).did_you_mean(name.text)
        advice = f"{near} Nothing was purged. Leave out unknown ids and run the command again.".lstrip()
        raise name.error(f"the store has no document {name.text[:100]!r}{others}", advice)
    return found


def _chunks_where(store: Store, match: Callable[[int], npt.NDArray[np.bool_]], report: Report) -> Ids:
    """Return the chunks of the documents that ``match`` selects in a part."""
    found = [np.zeros(0, np.int64)]
    for part in store.state.all_parts():
        found.append(chunks_of(store, part, np.flatnonzero(match(part))))
        report(1)
    return np.concatenate(found)


def select_duplicates(store: Store, report: Report = lambda _: None, *, rows: int = hash_partitions.ROWS) -> Ids:
    """Return the chunks that repeat an earlier one, int64, ascending; calls ``report`` with 1 per part.

    ``rows``: how many hashes are held in memory. ``StorageError`` if the scratch file does not fit on the
    disk.
    """
    tombstones = read_tombstones(store)
    sizes = {part: parts.part_entry(store, "chunks", part).rows for part in store.state.all_parts()}

    def records() -> Iterator[hash_partitions.Records]:
        for part, total in sizes.items():
            purged = tombstones.rows(part)
            for first in range(0, total, parts.ROW_GROUP):
                chunks = parts.read_chunks(store, part, [first // parts.ROW_GROUP])
                wanted = (chunks.n_tokens >= SHORTEST) & chunks.key
                low, high = np.searchsorted(purged, [first, first + len(chunks)])
                wanted[purged[low:high] - first] = False
                of_block = np.flatnonzero(wanted)
                places = parts.chunk_ids(part, first + of_block)
                yield hash_partitions.records_of(token_hashes(chunks, of_block), places)
            report(1)

    return np.sort(np.concatenate(list(hash_partitions.repeats_among(records(), sum(sizes.values()), rows))))


def token_hashes(chunks: Chunks, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Hash the tokens of some rows [r], without padding, with BLAKE2b-128: [r, 2]."""
    data = chunks.tokens.tobytes()
    width = chunks.tokens.shape[1] * chunks.tokens.itemsize
    sizes = chunks.n_tokens[rows] * chunks.tokens.itemsize
    hashed = [
        hashlib.blake2b(data[at : at + size], digest_size=parts.HASH_BYTES).digest()
        for at, size in zip((rows * width).tolist(), sizes.tolist(), strict=True)
    ]
    return np.frombuffer(b"".join(hashed), ">u8").reshape(-1, 2).astype(np.uint64)
