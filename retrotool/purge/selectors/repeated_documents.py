"""``--duplicates``: of chunks with exactly the same tokens all but the first, so that each text is retrieved once.

The first is the one of the lowest id. Purged and erased chunks are neither first nor a duplicate, nor are the values of
key-value records, which nobody searches for. Chunks of fewer than ``shortest`` tokens are left alone: documents that
have nothing to do with each other end in the same few tokens, and what is lost with these is the end of one.

A chunk that begins one token later is another one; those are found with ``near-duplicates-of``.

Which of several is the first is known only when all were seen. So the store is read whole: for the hash of every
chunk's tokens, BLAKE2b of 128 bits, which ``chunk.hash_partitions`` compares. That two texts have one hash would need
2^64 chunks, or intent and as many attempts.

Cost: reading, 0.6 to 1 µs a chunk, and the sort. Memory: about 80 bytes times ``rows``, 8,192 chunks, and 8 bytes a
duplicate. Scratch: 24 bytes a chunk beyond ``rows`` chunks, in the system's temporary folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from retrotool.chunk import hash_partitions
from retrotool.errors import UsageError
from retrotool.store import parts, schemas
from retrotool.store.parts import Chunks
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones

Ids = npt.NDArray[np.int64]

SHORTEST = 8
"""Tokens that a chunk has at least to be called a duplicate."""


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
        hashlib.blake2b(data[low:high], digest_size=schemas.HASH_BYTES).digest()
        for low, high in zip(begin.tolist(), end.tolist(), strict=True)
    ]
    return np.frombuffer(b"".join(hashed), ">u8").reshape(-1, 2).astype(np.uint64)
