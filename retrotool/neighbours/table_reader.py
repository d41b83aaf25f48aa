"""Read neighbour tables: the live neighbours of the rows of a part, nearest first, and their tokens.

The tables of a mixture are merged by squared distance divided by weight, or, if all are re-ranked, by score
times weight. Purged neighbours are masked by the
tombstones that the databases had when the reader opened them, so a row can have fewer than k neighbours.

``TextReader`` reads tokens from materialised tables, else from the database, with the same result. Cost: a
read per row group and table, and for rows that lost a neighbour since, reads of the database
(``neighbours.retrieved``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt

from retrotool.cli.command_lines import table_command
from retrotool.errors import UsageError
from retrotool.neighbours.retrieved import Pieces, read_pieces
from retrotool.neighbours.stage import check_table, database_of, members_of, pick_table, text_is_current
from retrotool.store import neighbour_tables, parts
from retrotool.store.log import FileEntry
from retrotool.store.neighbour_tables import ERASED, NO_NEIGHBOUR, NO_SCORE, edit_rows, read_edits
from retrotool.store.parts import ROW_GROUP, Ids
from retrotool.store.storage import each
from retrotool.store.store import Store, check_compatible
from retrotool.store.tombstones import Tombstones, read_tombstones

Columns = tuple[npt.NDArray[Any], ...]  # of a table, [n, m, ...] each
Block = tuple[int, int]  # a part, and the number of one of its row groups


@dataclass(frozen=True, slots=True)
class Found:
    """The neighbours of n chunks, nearest first or as re-ranked, all [n, k]."""

    ids: Ids  # −1: none
    distances: npt.NDArray[np.float32]  # squared L2; +inf: none
    databases: npt.NDArray[np.uint8]  # index of the database in the reader's ``databases``; 0 without a neighbour

    @classmethod
    def nothing(cls, n: int, k: int) -> Found:
        """Return no neighbours of n chunks."""
        ids = np.full((n, k), NO_NEIGHBOUR, np.int64)
        return cls(ids, np.full(ids.shape, np.inf, np.float32), np.zeros(ids.shape, np.uint8))

    def take(self, rows: Ids) -> Found:
        """Return the neighbours of some of the chunks."""
        return Found(self.ids[rows], self.distances[rows], self.databases[rows])

    @classmethod
    def joined(cls, some: Sequence[Found]) -> Found:
        """Concatenate the neighbours of several runs of chunks."""
        return cls(*(np.concatenate([getattr(one, name) for one in some]) for name in cls.__slots__))


@dataclass(frozen=True, slots=True)
class Member:
    """A table, and the database of its neighbours; ``within``: the database is the query store itself."""

    table: str
    weight: float
    store: Store
    tombstones: Tombstones
    within: bool
    edits: npt.NDArray[Any]  # entries
    rerank: str  # see ``neighbour_tables.reranked_by``


class NeighbourReader:
    """Reads a table or mixture of a query store through the newest commits of its databases.

    ``name`` is by default main, or the only one; "" stands for no table. Raises ``UsageError`` if the table
    or a database is missing, as tombstones can't be applied without the database. ``members`` are
    the tables, in the order of ``Found.databases``.
    """

    def __init__(self, store: Store, name: str | None = None) -> None:
        self.store, self.name = store, pick_table(store, name)
        self.members: tuple[Member, ...] = ()
        for table, weight in members_of(store, self.name) if self.name else ():
            database, record = database_of(store, table)
            view = read_tombstones(database), database is store, read_edits(store, table), record.get("rerank", "")
            self.members += (Member(table, weight, database, *view),)
        self.databases = tuple(member.store for member in self.members)
        records = [store.state.records[f"neighbours:{member.table}"] for member in self.members]
        self.k = int(records[0]["k"]) if records else 0  # neighbours per chunk by default
        self.by_score = len(records) > 1 and all(member.rerank for member in self.members)  # how members are merged
        self.saved = min((int(record["saved"]) for record in records), default=0)  # most neighbours per chunk

    def choose_k(self, k: int | None) -> int:
        """Return ``k``, by default the table's. Raises ``UsageError`` if it is not from 1 to ``saved``."""
        k = self.k if k is None else k
        if not 1 <= k <= self.saved:
            raise UsageError(
                f"-k {k} is not between 1 and the {self.saved:,} neighbours that table {self.name!r} has saved",
                "To save more, run retrotool neighbours again with a larger --saved.",
            )
        return k

    def entries(self, part: int) -> tuple[FileEntry, ...]:
        """Return a part's table of each member. Raises ``UsageError`` if one is missing or not valid."""
        if any(self.store.state.part_file("neighbours", part, one.table) is None for one in self.members):
            raise UsageError(f"part {part} of {self.store.place} has no neighbours {self.name!r} yet", self.advice())
        return tuple(check_table(self.store, part, member.table, member.store) for member in self.members)

    def parts(self) -> list[int]:
        """Return the parts that have tables of all members, ascending."""
        if not self.members:
            return self.store.state.parts()
        of_each = [set(self.store.state.group("neighbours", member.table)) for member in self.members]
        return sorted(int(slot) for slot in set.intersection(*of_each))

    def advice(self) -> str:
        """Return the advice of errors about missing tables: the commands that make them."""
        commands = (table_command(self.store, member.table, member.store) for member in self.members)
        return "\n".join(f"Compute them: {command}" for command in commands)

    def read(self, part: int, k: int, row_groups: Sequence[int] | None = None) -> Found:
        """Read at most k neighbours of each row of a part, or of some of its row groups (8,192 rows each).

        Rows of chunks that are not keys, or were not embedded, are empty. The caller has to skip purged rows.
        """
        columns = list[Columns]()
        for member, entry in zip(self.members, self.entries(part), strict=True):
            table = neighbour_tables.read_table(self.store, entry, row_groups)
            table = edit_rows(member.edits, table, part, row_groups, member.tombstones.contains)
            own = table.ids, table.distances
            columns.append((*own, table.scores) if self.by_score and table.scores is not None else own)
        databases, ids, distances, *_ = self.merged(columns, k)
        return Found(ids, distances, databases)

    def merged(self, columns: Sequence[Columns], k: int) -> list[npt.NDArray[Any]]:
        """Merge ids, distances and more [n, m, ...] of all members to the k nearest by distance / weight.

        ``by_score``: the third columns are scores, by which, times the weight, they are merged instead.
        Returns ``Found.databases``, then these columns.
        """
        of_each = []
        for number, (ids, *more) in enumerate(columns):
            of_each.append((np.where(ids == NO_NEIGHBOUR, 0, number).astype(np.uint8), ids, *more))
        if len(of_each) == 1:
            return [values[:, :k] for values in of_each[0]]
        joined = [np.concatenate(values, 1) for values in zip(*of_each, strict=True)]
        weights = np.array([member.weight for member in self.members], np.float32)[joined[0]]
        keys = -joined[3] * weights if self.by_score else joined[2] / weights
        order = np.argsort(keys, axis=1, kind="stable")[:, :k]
        return [values[np.arange(len(order))[:, None], order] for values in joined]

    def pieces(self, found: Found, into: Pieces | None = None) -> Pieces:
        """Read [N, F] of neighbours [n, k]: tokens [n · k, 2, chunk_length] and lengths [n · k, 2].

        ``into``: as for ``read_pieces``.
        """
        ids, which = found.ids.ravel(), found.databases.ravel()
        into = Pieces.none(self.members[0].store, len(ids)) if into is None else into  # the same in all
        for number, member in enumerate(self.members):
            own = np.where(which == number, ids, NO_NEIGHBOUR) if len(self.members) > 1 else ids
            read_pieces(member.store, member.tombstones, own, into)
        return into

    def tokens(self, found: Found) -> NeighbourTokens:
        """Read the tokens of neighbours [n, k]."""
        pieces, shape = self.pieces(found), found.ids.shape
        n_tokens = pieces.n_tokens.reshape(*shape, 2).astype(np.int32)
        return NeighbourTokens(
            found.ids, found.databases, n_tokens, pieces.tokens.reshape(*shape, *pieces.tokens.shape[1:])
        )


@dataclass(frozen=True, slots=True)
class NeighbourTokens:
    """The k neighbours of n chunks with their continuations, [N, F]; see also ``Found``."""

    ids: Ids  # [n, k]
    databases: npt.NDArray[np.uint8]  # [n, k]
    n_tokens: npt.NDArray[np.int32]  # [n, k, 2]
    tokens: npt.NDArray[Any]  # [n, k, 2, chunk_length], zero-padded

    def rows(self, some: slice) -> NeighbourTokens:
        """Return a view of some of the rows."""
        return NeighbourTokens(self.ids[some], self.databases[some], self.n_tokens[some], self.tokens[some])

    def nearest(self, k: int) -> NeighbourTokens:
        """Return a view of the first k neighbours of each chunk."""
        return NeighbourTokens(self.ids[:, :k], self.databases[:, :k], self.n_tokens[:, :k], self.tokens[:, :k])

    def clear(self, rows: npt.NDArray[Any]) -> None:
        """Remove the neighbours of ``rows`` (numbers, or bool [n])."""
        self.ids[rows], self.databases[rows], self.n_tokens[rows], self.tokens[rows] = NO_NEIGHBOUR, 0, 0, 0


def check_same_tokens(store: Store, databases: Sequence[Store]) -> None:
    """Raise ``UsageError`` unless the databases have the tokenizer and the chunk length of the store."""
    for database in databases:
        advice = "Chunk one of them again with the tokenizer and the chunk length of the other."
        check_compatible(store, database, "one model can't read both", advice)


class TextReader:
    """Reads the first k neighbours of rows, with tokens, at the reader's view of databases and store."""

    def __init__(self, reader: NeighbourReader, k: int) -> None:
        check_same_tokens(reader.store, reader.databases)
        self.reader, self.k = reader, k
        self._entries: dict[int, tuple[FileEntry, ...]] = {}

    def with_text(self, part: int) -> tuple[FileEntry, ...]:
        """Return the part's tables of all members if all have the tokens to read, else an empty tuple."""
        if part not in self._entries:
            entries, reader = self.reader.entries(part), self.reader
            current = map(text_is_current, entries, reader.databases, repeat(self.k))
            # Of a re-ranked table that is merged by distance, others than its first k may come first.
            is_mixed = len(reader.members) > 1 and not reader.by_score and any(one.rerank for one in reader.members)
            self._entries[part] = entries if all(current) and not is_mixed else ()
        return self._entries[part]

    def read(self, blocks: Sequence[Block], spare: int = 0) -> NeighbourTokens:
        """Read all rows of some blocks in order, followed by ``spare`` empty rows."""
        store, k = self.reader.store, self.k
        starts = np.cumsum([0, *(block_rows(store, block) for block in blocks)])
        n, own = int(starts[-1]) + spare, store.identity
        out = NeighbourTokens(
            np.full((n, k), NO_NEIGHBOUR, np.int64), np.zeros((n, k), np.uint8), np.zeros((n, k, 2), np.int32),
            np.zeros((n, k, 2, own.chunk_length), parts.token_dtype(own.tokenizer.token_bytes)),
        )  # fmt: skip
        lost = np.zeros(len(out.ids), np.bool_)
        places = map(slice, starts[:-1].tolist(), starts[1:].tolist())

        def begin(item: tuple[Block, slice]) -> None:
            block, some = item
            lost[some] = self._begin(out.rows(some), block)

        list(each(store.storage, begin, zip(blocks, places, strict=True)))
        if lost.any():
            wanted = np.where(lost[:, None], out.ids, NO_NEIGHBOUR)
            no_distances = np.broadcast_to(np.float32(0), wanted.shape)
            into = Pieces(out.tokens.reshape(wanted.size, 2, -1), out.n_tokens.reshape(wanted.size, 2))
            self.reader.pieces(Found(wanted, no_distances, out.databases), into)
        return out

    def _begin(self, out: NeighbourTokens, block: Block) -> npt.NDArray[np.bool_]:
        """Copy what the tables have of a block; return the rows that get ids, but no tokens."""
        part, group = block
        lost = np.ones(len(out.ids), np.bool_)
        if entries := self.with_text(part):
            lost = self._copy_text(out, entries, group)
        if lost.any() or any(len(member.edits) for member in self.reader.members):
            found = self.reader.read(part, self.k, [group])
            width = found.ids.shape[1]
            if entries:  # of edited rows, the tables have the text of other neighbours
                lost |= ((out.ids[:, :width] != found.ids) | (out.databases[:, :width] != found.databases)).any(axis=1)
                out.clear(lost)
            out.ids[lost, :width], out.databases[lost, :width] = found.ids[lost], found.databases[lost]
        return lost

    def _copy_text(self, out: NeighbourTokens, entries: tuple[FileEntry, ...], group: int) -> npt.NDArray[np.bool_]:
        """Copy stored tokens; return the rows that have lost a neighbour since."""
        columns, lost = list[Columns](), np.zeros(len(out.ids), np.bool_)
        for entry, member in zip(entries, self.reader.members, strict=True):
            text = neighbour_tables.read_text(self.reader.store, entry, [group]).nearest(self.k)
            purged, short = neighbour_tables.text_naming(text, member.tombstones.contains)
            if (purged | short).any():
                text = neighbour_tables.erase_text(text, np.zeros(0, np.int64), member.tombstones.contains)
            lost |= (text.ids == ERASED).any(axis=1)
            scores = [self._scores_of(text.ids, entry, group)] if self.reader.by_score else []
            columns.append((text.ids, text.distances, *scores, text.n_tokens, text.tokens))
        out.databases[:], out.ids[:], *_, out.n_tokens[:], out.tokens[:] = self.reader.merged(columns, self.k)
        return lost

    def _scores_of(self, ids: Ids, entry: FileEntry, group: int) -> npt.NDArray[np.float32]:
        """Return the scores that a table has of some ids [n, k] in its rows."""
        table = neighbour_tables.read_table(self.reader.store, entry, [group])
        assert table.scores is not None, "entries() checked the order"
        scores = np.full(ids.shape, NO_SCORE, np.float32)
        for i, column in enumerate(ids.T):
            named = (table.ids == column[:, None]) & (table.ids >= 0)
            scores[:, i] = np.where(named, table.scores, NO_SCORE).max(axis=1)
        return scores


def block_rows(store: Store, block: Block) -> int:
    """Return the number of rows of a block."""
    part, group = block
    return min(ROW_GROUP, parts.part_entry(store, "chunks", part).rows - group * ROW_GROUP)
