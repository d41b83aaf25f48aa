"""Neighbour tables: ids and distances of the neighbours of every row of a part, nearest first.

A table that is re-ranked also has their scores, and the neighbours with the highest scores are first.

A table may also hold the tokens of each row's first neighbours and their continuations, for training to read
sequentially. These columns are read only on request; for two neighbours per row they cost 1 µs and 0.25 KB of
disk (uint16; 60 % of that with zstd). Chunks purged since are returned, too: readers mask them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrotool.errors import CorruptError
from retrotool.ranges import is_in
from retrotool.store import parts
from retrotool.store.leases import Run
from retrotool.store.log import Draft, FileEntry
from retrotool.store.parts import ROW_GROUP, Ids
from retrotool.store.paths import FileName
from retrotool.store.store import Store

NO_NEIGHBOUR = -1
NO_SCORE = -np.inf
OVERLAP = "overlap"  # what a table can be re-ranked by
ERASED = -2  # in place of the id of a neighbour whose tokens were erased
Contains = Callable[[Ids], npt.NDArray[np.bool_]]


@dataclass(frozen=True, slots=True)
class NeighbourTable:
    """``ids`` int64 and ``distances`` float32, both [n, saved], nearest first; −1 and +inf: none.

    If the table is re-ranked, neighbours are ordered by their ``scores``, float32 [n, saved], instead, the
    highest first; −inf: none.
    """

    ids: Ids
    distances: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32] | None = None

    def rows(self, some: slice) -> NeighbourTable:
        """Return some of the rows, without a copy."""
        scores = None if self.scores is None else self.scores[some]
        return NeighbourTable(self.ids[some], self.distances[some], scores)

    def taken(self, order: npt.NDArray[np.int64]) -> NeighbourTable:
        """Return the table with the neighbours of each row in another ``order`` [n, saved]."""
        scores = None if self.scores is None else np.take_along_axis(self.scores, order, 1)
        return NeighbourTable(
            np.take_along_axis(self.ids, order, 1), np.take_along_axis(self.distances, order, 1), scores
        )

    def by_distance(self) -> NeighbourTable:
        """Return the table nearest first; of equal distances the least id."""
        return self if self.scores is None else self.taken(np.lexsort((self.ids, self.distances), axis=1))

    def by_score(self) -> NeighbourTable:
        """Return the table with the highest scores first; of equal scores the nearest."""
        assert self.scores is not None, "it was scored"
        return self.taken(np.lexsort((self.ids, self.distances, -self.scores), axis=1))


@dataclass(frozen=True, slots=True)
class NeighbourText:
    """The first k neighbours of n chunks with their continuations, [N, F], at the time of writing."""

    ids: Ids  # [n, k]; −1: none, −2: erased since
    distances: npt.NDArray[np.float32]  # [n, k]
    n_tokens: npt.NDArray[np.int32]  # [n, k, 2], of N and F; 0: none
    tokens: npt.NDArray[Any]  # [n, k, 2, chunk_length], zero-padded

    def rows(self, some: slice) -> NeighbourText:
        """Return some of the rows, without a copy."""
        return NeighbourText(self.ids[some], self.distances[some], self.n_tokens[some], self.tokens[some])

    def nearest(self, k: int) -> NeighbourText:
        """Return the first k neighbours of each row, without a copy."""
        return NeighbourText(self.ids[:, :k], self.distances[:, :k], self.n_tokens[:, :k], self.tokens[:, :k])


def text_size(entry: FileEntry) -> int:
    """Return the number of neighbours per row that the table has tokens of, according to the log."""
    return int((entry.about or {}).get("text", 0))


def reranked_by(entry: FileEntry) -> str:
    """Return what the table is re-ranked by, according to the log: ``OVERLAP``, or "" if nearest first."""
    return str((entry.about or {}).get("rerank", ""))


def write_table(
    store: Store,
    name: FileName,
    table: NeighbourTable,
    *,
    database: str,
    commit: int,
    uri: str,
    about: dict[str, Any],
    text: Iterable[NeighbourText] | None = None,
) -> FileEntry:
    """Write a part's neighbours, found in commit ``commit`` of the store ``database`` (uuid) at ``uri``.

    ``text`` yields row groups with the tokens of ``about["text"]`` neighbours.
    """
    metadata = {"retrotool.database": database, "retrotool.commit": str(commit), "retrotool.uri": uri}
    saved = table.ids.shape[1]
    own = [("ids", pa.list_(pa.int64(), saved)), ("distances", pa.list_(pa.float32(), saved))]
    if table.scores is not None:
        own.append(("scores", pa.list_(pa.float32(), saved)))
    more = () if text is None else text_schema(store, int(about["text"]))
    schema = pa.schema([*own, *more], metadata=metadata)

    def groups() -> Iterator[pa.Table]:
        if text is None:
            yield to_arrow(table, None, schema)
            return
        start = 0
        for group in text:
            rows = slice(start, start + len(group.ids))
            yield to_arrow(table.rows(rows), group, schema)
            start = rows.stop

    return parts.write_batches(store, name, schema, groups(), row_group=ROW_GROUP, about=about)


def text_schema(store: Store, k: int) -> pa.Schema:
    """Return the additional columns of a table that has the tokens of k neighbours."""
    chunk_bytes = store.identity.chunk_length * store.identity.tokenizer.token_bytes
    ids, distances = pa.list_(pa.int64(), k), pa.list_(pa.float32(), k)
    n_tokens, tokens = pa.list_(pa.int32(), 2 * k), pa.binary(2 * k * chunk_bytes)
    columns = {"text_ids": ids, "text_distances": distances, "text_n_tokens": n_tokens, "text_tokens": tokens}
    return pa.schema(columns)


def to_arrow(table: NeighbourTable, text: NeighbourText | None, schema: pa.Schema) -> pa.Table:
    """Return rows with the types of ``schema``."""
    columns = {"ids": _list_array(table.ids), "distances": _list_array(table.distances)}
    if table.scores is not None:
        columns["scores"] = _list_array(table.scores)
    if text is not None:
        n = len(text.ids)
        columns |= {"text_ids": _list_array(text.ids), "text_distances": _list_array(text.distances)}
        columns["text_n_tokens"] = _list_array(text.n_tokens.reshape(n, -1))
        columns["text_tokens"] = parts.fixed_binary(text.tokens.reshape(n, -1))
    return pa.table([columns[field.name].cast(field.type) for field in schema], schema=schema)


def _list_array(values: npt.NDArray[Any]) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1])


def read_table(store: Store, entry: FileEntry, row_groups: Sequence[int] | None = None) -> NeighbourTable:
    """Read a part's neighbours as they are stored."""
    columns = ["ids", "distances", *(["scores"] if reranked_by(entry) else [])]
    arrow = parts.read_parquet(store, entry, columns, row_groups)
    return NeighbourTable(*(_lists(store, entry, arrow, column) for column in columns))


def read_ids(store: Store, entry: FileEntry, row_groups: Sequence[int] | None = None) -> Ids:
    """Read only the ids of a part's neighbours, int64 [n, saved]; a third cheaper than ``read_table``."""
    return _lists(store, entry, parts.read_parquet(store, entry, ["ids"], row_groups), "ids")


def read_text(
    store: Store, entry: FileEntry, row_groups: Sequence[int] | None = None, *, tokens: bool = True
) -> NeighbourText:
    """Read the tokens of a part's first neighbours as they are stored; [n, k, 2, 0] without ``tokens``."""
    own, k = store.identity, text_size(entry)
    form = text_schema(store, k)
    columns = form.names if tokens else form.names[:-1]
    arrow = parts.read_parquet(store, entry, columns, row_groups)
    if any(arrow.schema.field(column).type != form.field(column).type for column in columns):
        raise CorruptError(f"{store.where(entry.path)}: no tokens of {k} neighbours per row, the log says it has them")
    ids, distances, n_tokens = (_lists(store, entry, arrow, column) for column in form.names[:-1])
    n, dtype = arrow.num_rows, parts.token_dtype(own.tokenizer.token_bytes)
    if tokens:
        found = parts.from_fixed_binary(arrow["text_tokens"], dtype).reshape(n, k, 2, own.chunk_length)
    else:
        found = np.zeros((n, k, 2, 0), dtype)
    return NeighbourText(ids, distances, n_tokens.reshape(n, k, 2), found)


def erase_neighbours(table: NeighbourTable, rows: Ids, banned: Contains | None) -> NeighbourTable:
    """Return the neighbours with ``rows`` emptied and ``banned`` entries removed (None: no entry)."""
    drop = np.zeros(table.ids.shape, np.bool_) if banned is None else banned(table.ids)
    if not (len(rows) or drop.any()):
        return table
    drop[rows] = True
    hit = np.flatnonzero(drop.any(axis=1))
    order = np.argsort(drop[hit], axis=1, kind="stable")  # the others move up, in order

    def without(values: npt.NDArray[Any], none: float) -> npt.NDArray[Any]:
        left = np.where(drop, np.array(none, values.dtype), values)
        left[hit] = np.take_along_axis(left[hit], order, 1)
        return left

    scores = None if table.scores is None else without(table.scores, NO_SCORE)
    return NeighbourTable(without(table.ids, NO_NEIGHBOUR), without(table.distances, np.inf), scores)


def text_naming(text: NeighbourText, banned: Contains) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return which neighbours are ``banned``, and which have a banned continuation: bool [n, k] each."""
    there = text.ids > NO_NEIGHBOUR
    return there & banned(text.ids), there & banned(text.ids + 1) & (text.n_tokens[:, :, 1] > 0)


def erase_text(text: NeighbourText, rows: Ids, banned: Contains | None) -> NeighbourText:
    """Return the text with ``rows`` emptied and ``banned`` tokens zeroed; rows and places stay."""
    ids, distances, n_tokens, tokens = map(np.array, (text.ids, text.distances, text.n_tokens, text.tokens))
    whole = np.zeros(ids.shape, np.bool_)
    if banned is not None:
        whole, following = text_naming(text, banned)
        ids[whole] = ERASED
        n_tokens[:, :, 1][following], tokens[:, :, 1][following] = 0, 0
    ids[rows], whole[rows] = NO_NEIGHBOUR, True
    distances[whole], n_tokens[whole], tokens[whole] = np.inf, 0, 0
    return NeighbourText(ids, distances, n_tokens, tokens)


def _lists(store: Store, entry: FileEntry, arrow: pa.Table, name: str) -> npt.NDArray[Any]:
    try:
        flat = np.concatenate([chunk.flatten().to_numpy() for chunk in arrow[name].chunks])
        return flat.reshape(arrow.num_rows, -1)
    except (KeyError, ValueError, AttributeError) as error:  # lists with nulls are shorter
        raise CorruptError(f"{store.where(entry.path)} is not a neighbour table: {error}") from error


def is_within(store: Store, entry: FileEntry, metadata: Mapping[bytes, bytes] | None) -> bool:
    """Return whether a table's ids are chunks of this store; ``metadata`` is that of the table's file."""
    if (metadata or {}).get(b"retrotool.database", b"") != store.identity.uuid.encode():
        return False
    # A copy of a store has the same uuid, so the record says where the database was.
    record = store.state.records.get(f"neighbours:{entry.name}", {})
    return bool(record.get("within", True))


# Edits overlay tables. They ascend by chunk; those of a row that is set begin with NO_NEIGHBOUR and BANNED.
ENTRY = np.dtype([("chunk", np.int64), ("neighbour", np.int64), ("distance", np.float32)])
BANNED = -1.0  # the distance of a banned neighbour
EVERY = -1  # the chunk of entries that ban a neighbour from all rows


def read_edits(store: Store, table: str) -> npt.NDArray[Any]:
    """Read the edits of a table, of type ``ENTRY``."""
    entry = store.state.file("edits", "all", table)
    if entry is None:
        return np.zeros(0, ENTRY)
    columns = parts.read_parquet(store, entry, ["chunk", "neighbour", "distance"]).columns
    return np.rec.fromarrays([column.to_numpy() for column in columns], ENTRY)


def commit_edits(store: Store, run: Run, table: str, edits: npt.NDArray[Any], reads: Iterable[str] = ()) -> None:
    """Replace the edits of a table, which are those of ``store.state``."""
    old, name = store.state.file("edits", "all", table), FileName.new(run.id, "edits", "all", "parquet", table)
    begins, bans = edits["neighbour"] == NO_NEIGHBOUR, edits["distance"] == BANNED
    about = {"rows": int(begins.sum()), "bans": int((bans & ~begins).sum())}
    columns = {column: np.array(edits[column]) for column in ("chunk", "neighbour", "distance")}
    new = parts.write_parquet(store, name, pa.table(columns), about=about)
    draft = Draft("edit", {"name": table}, tuple(reads), (new,), (old.path,) if old else ())
    store.commit(run, lambda _: draft)


def edits_naming(store: Store, table: str, chunks: Contains) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Return the edits of a table, and which belong to ``chunks`` of the store or name one of them."""
    edits, within = read_edits(store, table), store.state.records[f"neighbours:{table}"]["within"]
    return edits, chunks(edits["chunk"]) | (within & chunks(edits["neighbour"]))


def edit_rows(
    edits: npt.NDArray[Any], table: NeighbourTable, part: int, row_groups: Sequence[int] | None, purged: Contains
) -> NeighbourTable:
    """Return the rows of a part, or of ascending row groups, as edited, without ``purged`` neighbours.

    In a table that is re-ranked, neighbours that an edit sets have the score +inf.
    """
    n, width = table.ids.shape
    groups = np.arange(-(-n // ROW_GROUP)) if row_groups is None else np.array(row_groups)
    at = (parts.chunk_ids(part, groups[:, None] * ROW_GROUP) + np.arange(ROW_GROUP)).reshape(-1)[:n]
    mine = edits[is_in(edits["chunk"], at)]
    row, ids, distances = np.searchsorted(at, mine["chunk"]), np.array(table.ids), np.array(table.distances)
    begins, bans = mine["neighbour"] == NO_NEIGHBOUR, mine["distance"] == BANNED
    ids[row[begins]], distances[row[begins]] = NO_NEIGHBOUR, np.inf
    rank = np.arange(len(row)) - np.searchsorted(row, row) - 1
    put = ~bans & (rank >= 0) & (rank < width)
    ids[row[put], rank[put]], distances[row[put], rank[put]] = mine["neighbour"][put], mine["distance"][put]
    scores = None if table.scores is None else np.array(table.scores)
    if scores is not None:
        scores[row[begins]], scores[row[put], rank[put]] = NO_SCORE, np.inf
    drop, pairs = purged(ids) | np.isin(ids, edits["neighbour"][edits["chunk"] == EVERY]), bans & ~begins
    np.logical_or.at(drop, row[pairs], ids[row[pairs]] == mine["neighbour"][pairs, None])
    return erase_neighbours(NeighbourTable(ids, distances, scores), np.zeros(0, np.int64), lambda _: drop)
