"""What a training loop reads, window by window: chunks with their neighbours, as arrays to gather sequences from.

Everything is masked here: rows that are purged by now have no tokens and no neighbours, whatever the layout that they
got their slots by. Tokens stay in the store's type until sequences are gathered, 0.7 KB a row of two neighbours.

The workers of a rank take turns of ``unit`` sequences, counted from the place ``first`` of what the rank reads. So the
sequences of all workers, turn by turn, are in the rank's order for any number of workers. Each worker reads all windows
of its rank, one ahead. Cost: 0.4 µs a row for chunks, and that of ``neighbours.table_reader`` for neighbours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retrotool.cli.command_lines import table_command
from retrotool.errors import UsageError
from retrotool.neighbours.table_reader import NeighbourReader, NeighbourTokens, TextReader, block_rows
from retrotool.store import parts
from retrotool.store.parts import ROW_GROUP, Ids
from retrotool.store.store import Store, retry_overtaken
from retrotool.store.tombstones import read_tombstones
from retrotool.train.order import EMPTY, Order, SequenceLayout, Share


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """n chunks, and last a row that is empty, for slots that are.

    ``ids`` int64 [n + 1], −1: empty, or purged; ``documents`` int64 [n + 1], of purged rows too; ``n_tokens`` uint16
    [n + 1]; ``tokens`` [n + 1, chunk_length]; ``neighbours`` has n + 1 rows.
    """

    ids: Ids
    documents: Ids
    n_tokens: npt.NDArray[np.uint16]
    tokens: npt.NDArray[Any]
    neighbours: NeighbourTokens

    def gathered(self, rows: Ids) -> dict[str, npt.NDArray[Any]]:
        """The sequences of ``rows`` [b, slots] (−1: an empty slot), as ``RetroDataset`` gives them."""
        b, slots = rows.shape
        near, ids = self.neighbours, _taken(self.ids, rows)
        k, length = near.ids.shape[1], self.tokens.shape[1]
        return {
            "tokens": _taken(self.tokens, rows).astype(np.int64).reshape(b, slots * length),
            "loss_mask": _mask(_taken(self.n_tokens, rows), length).reshape(b, slots * length),
            "neighbours": _taken(near.tokens, rows).astype(np.int64).reshape(b, slots, k, 2 * length),
            "neighbour_mask": _mask(_taken(near.n_tokens, rows), length).reshape(b, slots, k, 2 * length),
            "chunk_ids": ids,
            "neighbour_ids": _taken(near.ids, rows),
            "neighbour_databases": _taken(near.databases, rows).astype(np.int64),
            "documents": np.where(ids == EMPTY, EMPTY, _taken(self.documents, rows)),
        }


def _taken(values: npt.NDArray[Any], rows: Ids) -> npt.NDArray[Any]:
    return values.take(rows, axis=0, mode="wrap")


def _mask(counts: npt.NDArray[Any], length: int) -> npt.NDArray[np.bool_]:
    """Which of ``length`` tokens count: the first ``counts`` [...] of them, bool [..., length]."""
    first: npt.NDArray[np.bool_] = np.tri(length + 1, length, -1, np.bool_)  # row n: n times True
    return first.take(counts, axis=0)


class TrainingReader:
    """A store and its neighbours ``name`` as they are now."""

    def __init__(self, path: str, name: str, k: int | None) -> None:
        self._path, self._name, self._k = path, name, k
        self._open()

    def _open(self) -> None:
        self.store = Store.open(self._path)
        reader = NeighbourReader(self.store, self._name)
        k = reader.k if self._k is None else self._k
        if not 1 <= k <= reader.saved:
            raise UsageError(f"k={k} is not between 1 and the {reader.saved} neighbours that {self._name!r} has saved")
        self.rows = TextReader(reader, k)
        self.tombstones = read_tombstones(self.store)

    @property
    def k(self) -> int:
        """Neighbours a chunk."""
        return self.rows.k

    def check_tables(self, layout: SequenceLayout) -> None:
        """``UsageError`` unless all parts of a layout have neighbours."""
        reader = self.rows.reader
        missing = sorted(set(layout.parts()) - set(reader.parts()))
        if not missing:
            return
        shown = ", ".join(map(str, missing[:5])) + (", …" if len(missing) > 5 else "")
        commands = [table_command(self.store, member.table, member.store) for member in reader.members]
        raise UsageError(
            f"{len(missing):,} of the {len(self.store.state.parts()):,} parts of {self.store.place} have no neighbours "
            f"{self._name!r}: {shown}",
            "Compute them: " + "; ".join(commands),
        )

    def read(self, layout: SequenceLayout, block: Ids, sequence: Ids) -> tuple[TrainingRows, Ids]:
        """Rows, and which of them stand in the slots of some sequences: ``sequence`` [n] of ``block`` [n].

        int64 [n, slots], −1: empty. Where a file was erased, or made anew, since the view was taken, a new one is.
        """

        def renew() -> None:
            self._open()
            self.check_tables(layout)

        return retry_overtaken(lambda: self._read(layout, block, sequence), renew)

    def _read(self, layout: SequenceLayout, block: Ids, sequence: Ids) -> tuple[TrainingRows, Ids]:
        wanted = np.unique(block)
        blocks = [(int(layout.part[i]), int(layout.group[i])) for i in wanted]
        rows = self.read_blocks(blocks)
        slots = np.full((len(block), layout.size), EMPTY, np.int64)
        start = 0
        for number, of in zip(wanted.tolist(), blocks, strict=True):
            n = block_rows(self.store, of)
            found = layout.slots(number, rows.documents[start : start + n])
            mine = np.flatnonzero(block == number)
            some = found[sequence[mine]]
            slots[mine] = np.where(some == EMPTY, EMPTY, some + start)
            start += n
        return rows, slots

    def read_blocks(self, blocks: list[tuple[int, int]]) -> TrainingRows:
        """All rows of some blocks, of (part, number of the row group), one after the other."""
        store, own = self.store, self.store.identity
        starts = np.cumsum([0, *(block_rows(store, block) for block in blocks)]).tolist()
        n = starts[-1] + 1
        near = self.rows.read(blocks, spare=1)
        rows = TrainingRows(
            np.full(n, EMPTY, np.int64), np.full(n, EMPTY, np.int64), np.zeros(n, np.uint16),
            np.zeros((n, own.chunk_length), parts.token_dtype(own.tokenizer.token_bytes)), near,
        )  # fmt: skip
        for (part, group), start, stop in zip(blocks, starts[:-1], starts[1:], strict=True):
            chunks = parts.read_chunks(store, part, [group])
            some = slice(start, stop)
            rows.documents[some] = parts.chunk_ids(part, chunks.doc)
            rows.n_tokens[some], rows.tokens[some] = chunks.n_tokens, chunks.tokens
            rows.ids[some] = parts.chunk_ids(part, group * ROW_GROUP + np.arange(stop - start))
        gone = np.flatnonzero(self.tombstones.contains(rows.ids) | (rows.n_tokens == 0))
        rows.ids[gone], rows.n_tokens[gone], rows.tokens[gone] = EMPTY, 0, 0
        near.clear(gone)
        return rows


@dataclass(frozen=True, slots=True)
class Turns:
    """Which places are worker ``worker``'s, of ``workers``."""

    first: int
    unit: int
    worker: int
    workers: int

    def number(self, places: Ids) -> Ids:
        """Which turn each of some places is in, [n]."""
        return (places - self.first) // self.unit

    def mine(self, places: Ids) -> npt.NDArray[np.bool_]:
        """Which places are this worker's, bool [n]."""
        return np.asarray(self.number(places) % self.workers == self.worker)

    def ends(self, place: int) -> bool:
        """Whether a place is the last of its turn."""
        return (place + 1 - self.first) % self.unit == 0


Window = tuple[Ids, TrainingRows, Ids]
"""Sequences that were read together: their places [n] in what a rank reads, ascending, rows, and slots.

Slots, int64 [n, slots], are places in the rows, −1: empty.
"""


def read_epoch(
    reader: TrainingReader, layout: SequenceLayout, order: Order, share: Share, turns: Turns, consumed: int
) -> Iterator[Window]:
    """The windows of one worker, of which it has had what is before the place ``consumed``."""

    def window(places: Ids, reading: Future[tuple[TrainingRows, Ids]]) -> Window:
        rows, slots = reading.result()
        missing = np.full((len(places) - len(slots), layout.size), EMPTY, np.int64)
        return places, rows, np.concatenate([slots, missing])

    coming: deque[tuple[Ids, Future[tuple[TrainingRows, Ids]]]] = deque()
    with ThreadPoolExecutor(1, "retrotool-dataset") as pool:
        for places, block, sequence in _wanted(order, share, turns, consumed):
            coming.append((places, pool.submit(reader.read, layout, block, sequence)))
            if len(coming) > 1:
                yield window(*coming.popleft())
        if coming:
            yield window(*coming.popleft())


def _wanted(order: Order, share: Share, turns: Turns, consumed: int) -> Iterator[tuple[Ids, Ids, Ids]]:
    """Places, blocks and sequences of one worker, by window; last, where that is its, a place without a sequence."""
    for first, block, sequence in order.pieces(share.own, consumed):
        places = first + np.arange(len(block))
        mine = turns.mine(places)
        if mine.any():
            yield places[mine], block[mine], sequence[mine]
    last = np.array([len(share) - 1])
    if share.is_short and last[0] >= consumed and turns.mine(last)[0]:
        nothing = np.zeros(0, np.int64)
        yield last, nothing, nothing
