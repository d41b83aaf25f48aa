"""Neighbours with their tokens, by row groups: from materialised files where these are current, else put together.

A materialised file is current if it is of the tables as they are, of their weights, and of as many neighbours as are
asked for. What was purged since it was made is seen by its ids: a row that lost a neighbour is read from the tables,
where the next one saved takes the place, and a continuation that was purged is left out. A file that was made while
chunks were purged which were taken back since is not current. So both ways give the same.

Cost: current, one read a row group; rows that lost something, and all rows of files that are not current, cost their
row group of the table, and the row groups of the database that their neighbours lie in (``stages.pieces``). Of all
blocks that are asked for at once these are read together, in the order of ids, so the more blocks the cheaper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from retrotool.embed.search_scope import purges
from retrotool.errors import UsageError
from retrotool.neighbours.retrieved import Pieces
from retrotool.neighbours.stage import members_of
from retrotool.neighbours.table_reader import Found, NeighbourReader
from retrotool.store import materialised, parts, tables
from retrotool.store.atomic import FileEntry
from retrotool.store.materialised import ERASED, Materialised
from retrotool.store.parts import ROW_GROUP
from retrotool.store.restored import missed_parts
from retrotool.store.store import Store
from retrotool.store.tables import NO_NEIGHBOUR

HEAD_DIGITS = 16
Block = tuple[int, int]
"""A part, and the number of one of its row groups."""


def about_of(reader: NeighbourReader, part: int, k: int) -> dict[str, Any]:
    """What the log is to say of a part's materialised file that is made now."""
    databases = [
        {
            "uuid": member.store.identity.uuid, "within": member.within, "commit": member.store.state.number,
            "head": member.store.state.head[:HEAD_DIGITS], "purges": purges(member.store),
        }
        for member in reader.members
    ]  # fmt: skip
    return {"k": k, **_source(reader.store, reader.name, part), "databases": databases}


def _source(store: Store, name: str, part: int) -> dict[str, Any]:
    """The tables, and their weights, that a part's neighbours ``name`` are of now."""
    members = members_of(store, name)
    found = [store.state.part_file("neighbours", part, table) for table, _ in members]
    made = [entry if entry is None else tables.made_as(entry) for entry in found]
    return {"tables": made, "weights": [weight for _, weight in members]}


def current_file(store: Store, name: str, part: int, k: int = 1) -> FileEntry | None:
    """The file of a part's tables as they are, of k neighbours or more; None if there is none. The log knows."""
    entry = store.state.part_file("materialised", part, name)
    about = (entry.about if entry is not None else None) or {}
    if any(about.get(key) != value for key, value in _source(store, name, part).items()) or about.get("k", 0) < k:
        return None
    return entry


def misses_restored(entry: FileEntry, databases: Sequence[Store]) -> bool:
    """Whether a file was made while chunks of its databases, in their order, were purged that were taken back since.

    The tables have them, or will have: then rows of the file are not what the tables give.
    """
    told = (entry.about or {})["databases"]
    return any(missed_parts(one.state, int(of["commit"])) for one, of in zip(databases, told, strict=True))


def check_tokenizers(reader: NeighbourReader) -> None:
    """``UsageError`` unless the databases have the tokens and the chunk length of the store."""
    own = reader.store.identity
    for database in reader.databases:
        theirs = database.identity
        if (own.tokenizer.sha256, own.chunk_length) != (theirs.tokenizer.sha256, theirs.chunk_length):
            raise UsageError(
                f"{database.root} has chunks of {theirs.chunk_length} tokens of {theirs.tokenizer.name}, "
                f"{reader.store.root} of {own.chunk_length} of {own.tokenizer.name}: one model can't read both",
                "Chunk one of them again with the tokenizer of the other.",
            )


def lost_rows(reader: NeighbourReader, stored: Materialised) -> npt.NDArray[np.bool_]:
    """Which rows have a neighbour that was purged, or erased, since they were stored, bool [n]."""
    lost: npt.NDArray[np.bool_] = np.any(_are_purged(reader, stored.ids, stored.databases) | (stored.ids == ERASED), 1)
    return lost


def lost_continuations(reader: NeighbourReader, stored: Materialised) -> npt.NDArray[np.bool_]:
    """Which neighbours have a continuation that was purged since it was stored, bool [n, k]."""
    # Neighbours are keys; of a record that is the first chunk, without which its value is nobody's.
    return (stored.n_tokens[:, :, 1] > 0) & _are_purged(reader, stored.ids + 1, stored.databases)


def _are_purged(
    reader: NeighbourReader, ids: npt.NDArray[np.int64], databases: npt.NDArray[np.uint8]
) -> npt.NDArray[np.bool_]:
    gone = np.zeros(ids.shape, np.bool_)
    for number, member in enumerate(reader.members):
        gone |= (databases == number) & member.tombstones.contains(ids)
    gone &= ids > NO_NEIGHBOUR
    return gone


class MaterialisedReader:
    """The first k neighbours of rows, with tokens, as they are at the reader's view of databases and store."""

    def __init__(self, reader: NeighbourReader, k: int) -> None:
        check_tokenizers(reader)
        self.reader, self.k = reader, k
        self._files: dict[int, FileEntry | None] = {}

    def is_materialised(self, part: int) -> bool:
        """Whether a part's file is current."""
        return self._file(part) is not None

    def _file(self, part: int) -> FileEntry | None:
        if part not in self._files:
            self.reader.entries(part)  # ids mean what they meant
            entry = current_file(self.reader.store, self.reader.name, part, self.k)
            stale = entry is not None and misses_restored(entry, self.reader.databases)
            self._files[part] = None if stale else entry
        return self._files[part]

    def read(self, blocks: Sequence[Block], spare: int = 0) -> Materialised:
        """Of all rows of some blocks, one block after the other; then ``spare`` empty rows."""
        store, k = self.reader.store, self.k
        starts = np.cumsum([0, *(block_rows(store, block) for block in blocks)])
        out = empty(store, int(starts[-1]) + spare, k)
        lost = np.zeros(len(out), np.bool_)
        for block, start, stop in zip(blocks, starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            lost[start:stop] = self._begin(out, block, slice(start, stop))
        if lost.any():
            wanted = Found(np.where(lost[:, None], out.ids, NO_NEIGHBOUR), _no_distances(out), out.databases)
            places = len(out) * k
            into = Pieces(out.tokens.reshape(places, 2, -1), out.n_tokens.reshape(places, 2))
            self.reader.pieces(wanted, into)
        return out

    def _begin(self, out: Materialised, block: Block, rows: slice) -> npt.NDArray[np.bool_]:
        """Fill in what the file of a block has; ids alone of the rows that the tables are asked for, which are told."""
        part, group = block
        entry = self._file(part)
        if entry is None:
            lost = np.ones(rows.stop - rows.start, np.bool_)
        else:
            stored = materialised.read_materialised(self.reader.store, entry, [group]).nearest(self.k)
            lost = lost_rows(self.reader, stored)
            out.ids[rows], out.databases[rows] = stored.ids, stored.databases
            out.n_tokens[rows], out.tokens[rows] = stored.n_tokens, stored.tokens
            out.n_tokens[rows][lost], out.tokens[rows][lost] = 0, 0
            short = lost_continuations(self.reader, stored)
            if short.any():
                out.n_tokens[rows, :, 1][short] = 0
                out.tokens[rows, :, 1][short] = 0
        if lost.any():
            found = self.reader.read(part, self.k, [group])
            width = found.ids.shape[1]
            out.ids[rows][lost] = NO_NEIGHBOUR
            out.ids[rows][lost, :width], out.databases[rows][lost, :width] = found.ids[lost], found.databases[lost]
        return lost


def block_rows(store: Store, block: Block) -> int:
    """How many rows a block has."""
    part, group = block
    return min(ROW_GROUP, parts.part_entry(store, "chunks", part).rows - group * ROW_GROUP)


def empty(store: Store, n: int, k: int) -> Materialised:
    """So many rows without neighbours."""
    own = store.identity
    return Materialised(
        np.full((n, k), NO_NEIGHBOUR, np.int64), np.zeros((n, k), np.uint8), np.zeros((n, k, 2), np.int32),
        np.zeros((n, k, 2, own.chunk_length), parts.token_dtype(own.tokenizer.token_bytes)),
    )  # fmt: skip


def _no_distances(rows: Materialised) -> npt.NDArray[np.float32]:
    return np.broadcast_to(np.float32(0), rows.ids.shape)
