"""Chunks with their continuations, [N, F], as tokens: what a model is given of a neighbour.

F is the chunk that follows N in its own document; there is none at its end, and none once it is purged. Many ids are
read at once, row group by row group, each group once.

Cost: the row groups that hold any of the ids, so ids in ascending order of a whole block are cheap, and single ones
dear. Memory: the tokens asked for, and the touched row groups of one part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retrotool.store import parts
from retrotool.store.parts import PART_SHIFT, ROW_GROUP
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Pieces:
    """``tokens`` [n, 2, chunk_length] of chunks and what follows them, zero-padded; ``n_tokens`` int64 [n, 2], 0: none.

    Values stay without the token type of the store: uint16 or uint32.
    """

    tokens: npt.NDArray[Any]
    n_tokens: npt.NDArray[np.int64]

    def joined(self) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """[N, F] without the padding between them: tokens [n, 2 · chunk_length] and how many of these count, [n]."""
        length = self.tokens.shape[2]
        out = np.concatenate([self.tokens[:, 0], np.zeros_like(self.tokens[:, 0])], 1)
        place = self.n_tokens[:, :1] + np.arange(length)
        np.put_along_axis(out, place, self.tokens[:, 1], 1)
        return out, self.n_tokens.sum(axis=1)


def read_pieces(store: Store, tombstones: Tombstones, ids: Ids) -> Pieces:
    """The pieces of chunk ids [n], in any order, repeated or not; of −1, and of what is purged or not there, none."""
    own = store.identity
    tokens = np.zeros((len(ids), 2, own.chunk_length), parts.token_dtype(own.tokenizer.token_bytes))
    n_tokens = np.zeros((len(ids), 2), np.int64)
    living = (ids >= 0) & ~tombstones.contains(ids)
    order = np.flatnonzero(living)
    order = order[np.argsort(ids[order], kind="stable")]
    numbers = ids[order] >> PART_SHIFT
    known = set(store.state.parts())
    for some in np.split(order, np.flatnonzero(np.diff(numbers)) + 1):
        part = int(ids[some[0]]) >> PART_SHIFT if len(some) else -1
        if part in known:
            tokens[some], n_tokens[some] = _of_part(store, tombstones, part, ids[some] - (part << PART_SHIFT))
    return Pieces(tokens, n_tokens)


def _of_part(store: Store, tombstones: Tombstones, part: int, rows: Ids) -> tuple[npt.NDArray[Any], Ids]:
    """Tokens [n, 2, chunk_length] and lengths [n, 2] of ascending rows of a part, and of the rows that follow them."""
    total = parts.part_entry(store, "chunks", part).rows
    there = rows < total
    both = np.stack([np.where(there, rows, 0), np.where(there, np.minimum(rows + 1, total - 1), 0)], 1)
    groups = np.unique(both // ROW_GROUP)
    chunks = parts.read_chunks(store, part, groups.tolist())
    place = np.searchsorted(groups, both // ROW_GROUP) * ROW_GROUP + both % ROW_GROUP
    index, counts = chunks.index[place].astype(np.int64), chunks.n_tokens[place].astype(np.int64)
    counts[~there] = 0
    following = both[:, 1]
    same = (following > both[:, 0]) & (chunks.doc[place[:, 0]] == chunks.doc[place[:, 1]])
    ids = parts.chunk_ids(part, following)
    counts[~(same & may_follow(tombstones, ids, index[:, 1], chunks.key[place[:, 1]])), 1] = 0
    tokens = chunks.tokens[place]
    tokens[counts == 0] = 0
    return tokens, counts


def may_follow(
    tombstones: Tombstones, ids: Ids, index: npt.NDArray[Any], key: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """Which chunks (ids, places in their documents, keys or not; all [n]) are the continuation of the chunk before.

    Not the first of a document, none that is purged, and none of a value once its key is purged: that is nobody's.
    """
    heads = ids - index
    follow: npt.NDArray[np.bool_] = (index > 0) & (key | ~tombstones.contains(heads)) & ~tombstones.contains(ids)
    return follow
