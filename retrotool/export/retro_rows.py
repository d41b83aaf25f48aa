"""Which row each chunk has in files that are addressed by row, where the next row is taken for the continuation.

Rows are: the living chunks of the query store, by id; then, of each other database, the chunks that are anybody's
neighbour, and what follows each. In the query store a full chunk without a continuation is followed by a row for
the end token alone, as there is no room for it in the chunk.

Cost: the chunks files without their tokens, and the tables if there are other databases. Memory: two to three bits a
row of the stores (``chunk_sets``), and 20 bytes a row of one part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from retrotool.engine.task import Report
from retrotool.errors import UsageError
from retrotool.export.chunk_sets import ChunkSet
from retrotool.export.handover import Handover, row_slices
from retrotool.neighbours.retrieved import may_follow
from retrotool.store import parts
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones, read_tombstones

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

LIMIT = (1 << 31) - 1
"""The highest int32."""


@dataclass(frozen=True, slots=True)
class PartRows:
    """The rows of a part, all [n]: tokens, documents, which are living, and which have a continuation in the next."""

    n_tokens: npt.NDArray[np.int32]
    doc: npt.NDArray[np.int32]
    alive: Mask
    follows: Mask

    def begins(self, every: int) -> Mask:
        """Living rows that a sequence of ``every`` rows begins with: a text's first, and each ``every``-th after."""
        first = np.ones(len(self.doc), np.bool_)
        first[1:] = ~self.follows[:-1]
        rows = np.arange(len(self.doc))
        place = rows - np.maximum.accumulate(np.where(first, rows, 0))
        begins: Mask = self.alive & (place % every == 0)
        return begins


def read_part_rows(store: Store, part: int, tombstones: Tombstones) -> PartRows:
    """What is known of a part's rows without their tokens."""
    table = parts.read_parquet(store, parts.part_entry(store, "chunks", part), ["doc", "index", "n_tokens"])
    doc, index, n_tokens = (table[name].to_numpy() for name in ("doc", "index", "n_tokens"))
    alive = n_tokens > 0
    alive[tombstones.rows(part)] = False
    ids = parts.chunk_ids(part, np.arange(len(doc)))
    may = may_follow(tombstones, ids, index.astype(np.int64), parts.read_key(store, part))
    follows = np.zeros(len(doc), np.bool_)
    follows[:-1] = alive[:-1] & alive[1:] & may[1:] & (doc[:-1] == doc[1:])
    return PartRows(n_tokens, doc, alive, follows)


@dataclass(slots=True)
class Section:
    """The rows of one store: from ``first``, ``rows`` of chunks (``kept``) and of end tokens alone (``ends``)."""

    store: Store
    tombstones: Tombstones
    kept: ChunkSet
    ends: ChunkSet
    first: int = 0
    chunks: int = 0
    rows: int = 0

    @classmethod
    def of(cls, store: Store, tombstones: Tombstones) -> Section:
        """One with nothing in it."""
        return cls(store, tombstones, ChunkSet(store), ChunkSet(store))

    def number(self, ids: Ids) -> Ids:
        """The rows of chunk ids [n] that are kept."""
        return self.first + self.kept.rank(ids) + self.ends.rank(ids)

    def seal(self, first: int) -> int:
        """Put the section at a row; return the row behind it."""
        self.first, self.chunks = first, self.kept.seal()
        self.rows = self.chunks + self.ends.seal()
        return first + self.rows


@dataclass(frozen=True, slots=True)
class Layout:
    """Every chunk's row. ``sections``: the query store, then others; ``of_database``: those of the reader's numbers."""

    sections: tuple[Section, ...]
    of_database: tuple[Section, ...]

    @property
    def queries(self) -> Section:
        """The section of the query store."""
        return self.sections[0]

    @property
    def rows(self) -> int:
        """All rows."""
        return sum(section.rows for section in self.sections)


def lay_out(handover: Handover, padding: int, report: Report) -> Layout:
    """Give every chunk its row; reports living chunks of the query store.

    ``UsageError`` if int32 has not enough numbers for the rows, and ``padding`` more.
    """
    store, length = handover.store, handover.store.identity.chunk_length
    queries = Section.of(store, handover.tombstones)
    of_database = tuple(
        queries if database is store else Section.of(database, read_tombstones(database))
        for database in handover.reader.databases
    )
    others = tuple(section for section in of_database if section is not queries)
    for part in store.state.parts():
        rows = read_part_rows(store, part, handover.tombstones)
        queries.kept.put(part, rows.alive)
        queries.ends.put(part, rows.alive & ~rows.follows & (rows.n_tokens == length))
        if others and part in handover.tabled:
            for groups, some in row_slices(len(rows.doc)):
                found = handover.found(part, groups, some.stop - some.start).take(np.flatnonzero(rows.alive[some]))
                for number, section in enumerate(of_database):
                    if section is not queries:
                        section.kept.add(found.ids[found.is_of(number)])
        report(int(rows.alive.sum()))
    for section in others:
        _keep_continuations(handover, section)
    row = 0
    for section in (queries, *others):
        row = section.seal(row)
    if row + padding > LIMIT:
        raise UsageError(
            f"{row:,} chunks are more than int32 can number, and RETRO-pytorch has no wider type",
            "Export as parquet or huggingface, or a smaller store.",
        )
    return Layout((queries, *others), of_database)


def _keep_continuations(handover: Handover, section: Section) -> None:
    """Keep, besides the chunks that are neighbours, what follows each of them."""
    for part in section.store.state.parts():
        kept = section.kept.of_part(part)
        if kept.any():
            rows = read_part_rows(section.store, part, section.tombstones)
            if (kept & ~rows.alive).any():
                wrong = int(np.flatnonzero(kept & ~rows.alive)[0])
                raise handover.foreign(section.store, (part << parts.PART_SHIFT) + wrong)
            kept[1:] |= (kept & rows.follows)[:-1]
            section.kept.put(part, kept)
