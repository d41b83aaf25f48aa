"""Selectors that are looked up, without reading text: chunk ids, document ids, document columns, repeated chunks.

Cost: chunk ids read nothing, document ids the keys of all documents, an expression the columns of all documents, and
repeated chunks all tokens.

Repeated chunks (``--duplicates``) are those with exactly the same tokens as an earlier one, so that each text is
retrieved once. The first is the one of the lowest id. Purged and erased chunks are neither first nor a duplicate, nor
are the values of key-value records, which are not searched. Chunks of fewer than ``shortest`` tokens are left alone:
documents that have nothing to do with each other end in the same few tokens.

A chunk that begins one token later is another one; those are found with ``near-duplicates-of``.

Which of several is the first is known only when all were seen. So the store is read whole: for the hash of every
chunk's tokens, BLAKE2b of 128 bits, which ``chunk.hash_partitions`` compares. That two texts have one hash would need
2^64 chunks, or intent and as many attempts.

Their cost: reading, 0.6 to 1 µs a chunk, and the sort. Memory: about 80 bytes times ``rows``, 8,192 chunks, and 8 bytes
a duplicate. Scratch: 24 bytes a chunk beyond ``rows`` chunks, in the system's temporary folder.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retrotool.chunk import hash_partitions
from retrotool.errors import UsageError
from retrotool.purge.selectors.where import Where
from retrotool.store import parts
from retrotool.store.ids import split_id
from retrotool.store.parts import Chunks
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones

Ids = npt.NDArray[np.int64]
Report = Callable[[int], object]

SHORTEST = 8
"""Tokens that a chunk has at least to be called a duplicate."""


@dataclass(frozen=True, slots=True)
class Lookup:
    """A selector that is looked up.

    ``kind`` is "ids" or "documents", of which ``lines`` has one a line; "where", with one expression; or "duplicates",
    chunks that repeat one before them token by token, without lines.
    """

    kind: str
    lines: tuple[str, ...] = ()

    def literal(self) -> dict[str, Any]:
        """All that it was given, as JSON."""
        return {"lines": list(self.lines)}

    def select(self, store: Store, *, missing_ok: bool, report: Report) -> Ids:
        """Chunk ids, ascending; ``missing_ok``: what the store does not have is left out, else a ``UsageError``."""
        if self.kind == "ids":
            return select_ids(store, self.lines)
        if self.kind == "documents":
            return select_documents(store, self.lines, missing_ok=missing_ok, report=report)
        if self.kind == "duplicates":
            return select_duplicates(store, report)
        return select_where(store, self.lines[0], report)


def select_ids(store: Store, lines: Sequence[str]) -> Ids:
    """Return chunk ids given as text, one a line; ``UsageError`` names the first that is not a chunk of the store."""
    found = []
    sizes = {part: parts.part_entry(store, "chunks", part).rows for part in store.state.parts()}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        # What ``int`` takes besides plain digits (1_0, ٣) is more likely a mistake than an id.
        if re.fullmatch(r"[0-9]{1,19}", line.strip()) is None:
            raise UsageError(f"line {number}: {line.strip()[:40]!r} is not a chunk id", "Nothing was purged.")
        chunk = int(line)
        part, row = split_id(chunk)
        if row >= sizes.get(part, 0):
            raise UsageError(f"line {number}: the store has no chunk {chunk}", "Nothing was purged.")
        found.append(chunk)
    return np.unique(np.array(found, np.int64))


def select_documents(
    store: Store, names: Sequence[str], *, missing_ok: bool = False, report: Report = lambda _: None
) -> Ids:
    """Chunk ids of documents, given by their ids; ``UsageError`` names the first that is not in the store."""
    wanted = {name: number for number, name in reversed(list(enumerate(names, 1))) if name.strip()}
    hashes = [hashlib.blake2b(name.encode(), digest_size=parts.HASH_BYTES).digest() for name in wanted]
    keys = pa.array(hashes, pa.binary())
    seen = np.zeros(len(keys), np.bool_)
    found: list[Ids] = []
    for part in store.state.parts():
        place = pc.index_in(parts.read_documents(store, part, ["key"])["key"].cast(pa.binary()), value_set=keys)
        hit = place.is_valid()
        seen[place.filter(hit).to_numpy()] = True
        found.append(chunks_of(store, part, np.flatnonzero(hit.to_numpy())))
        report(1)
    if not (seen.all() or missing_ok):
        name, number = list(wanted.items())[int(np.argmin(seen))]
        raise UsageError(
            f"line {number}: the store has no document {name[:100]!r} ({int((~seen).sum()):,} such in all)",
            "Nothing was purged. Take those lines out and run it again.",
        )
    return np.sort(np.concatenate(found)) if found else np.zeros(0, np.int64)


def select_where(store: Store, expression: str, report: Report = lambda _: None) -> Ids:
    """Chunk ids of the documents for which an expression over their columns holds."""
    where = Where(expression)
    found: list[Ids] = []
    files = (parts.part_entry(store, "documents", part) for part in store.state.parts())
    names = (parts.read_parquet(store, entry, row_groups=[]).schema.names for entry in files)
    where.check(list(dict.fromkeys(itertools.chain.from_iterable(names))))
    for part in store.state.parts():
        table = parts.read_documents(store, part)
        for column in where.columns:
            if column not in table.schema.names:  # kept by other parts, not by this one
                table = table.append_column(column, pa.nulls(table.num_rows, pa.string()))
        known = table["id"].is_valid()  # the others are erased
        mask = pc.and_(where.mask(table), known)
        found.append(chunks_of(store, part, np.flatnonzero(mask.to_numpy())))
        report(1)
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def chunks_of(store: Store, part: int, docs: npt.NDArray[Any]) -> Ids:
    """Chunk ids of some documents of a part, ascending."""
    if not len(docs):
        return np.zeros(0, np.int64)
    table = parts.read_documents(store, part, ["first_row", "n_chunks"]).take(pa.array(np.sort(docs)))
    return parts.chunk_ids(part, parts.rows_of_documents(table["first_row"].to_numpy(), table["n_chunks"].to_numpy()))


def select_duplicates(
    store: Store,
    report: Callable[[int], object] = lambda _: None,
    *,
    shortest: int = SHORTEST,
    rows: int = hash_partitions.ROWS,
) -> Ids:
    """Chunk ids that repeat an earlier one, int64, sorted. ``report`` is told of each part that was read.

    ``rows``: how many hashes are held in memory. ``StorageError`` if the scratch file does not fit on the disk.
    """
    if shortest < 1:
        raise UsageError(f"chunks of {shortest} tokens: a chunk has 1 at least")
    tombstones = read_tombstones(store)
    sizes = {part: parts.part_entry(store, "chunks", part).rows for part in store.state.parts()}
    with hash_partitions.HashPartitions(sum(sizes.values()), rows) as partitions:
        for part, total in sizes.items():
            purged = tombstones.rows(part)
            for first in range(0, total, parts.ROW_GROUP):
                chunks = parts.read_chunks(store, part, [first // parts.ROW_GROUP])
                wanted = (chunks.n_tokens >= shortest) & chunks.key
                low, high = np.searchsorted(purged, [first, first + len(chunks)])
                wanted[purged[low:high] - first] = False
                of_block = np.flatnonzero(wanted)
                places = parts.chunk_ids(part, first + of_block)
                partitions.add(hash_partitions.records_of(token_hashes(chunks, of_block), places))
            report(1)
        found = list(partitions.repeats())
    return np.sort(np.concatenate(found)) if found else np.zeros(0, np.int64)


def token_hashes(chunks: Chunks, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """BLAKE2b-128 of the tokens of some rows [r], without their padding: [r, 2]."""
    data = chunks.tokens.tobytes()
    width = chunks.tokens.shape[1] * chunks.tokens.itemsize
    begin = rows * width
    end = begin + chunks.n_tokens[rows] * chunks.tokens.itemsize
    hashed = [
        hashlib.blake2b(data[low:high], digest_size=parts.HASH_BYTES).digest()
        for low, high in zip(begin.tolist(), end.tolist(), strict=True)
    ]
    return np.frombuffer(b"".join(hashed), ">u8").reshape(-1, 2).astype(np.uint64)
