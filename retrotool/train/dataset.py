"""``retrotool.RetroDataset``: a store and its neighbours as training sequences, for PyTorch.

A sequence is a row of slots, each for one chunk and its neighbours. Blocks of 8,192 rows (the row groups of
``chunks/``) are laid out independently, so that reading a block gives whole sequences:

* packed: the live chunks of a block fill the slots in order, across documents;
* not packed: every document begins a sequence, and is cut at the end of a block.

Live rows have no tombstone at a given commit. Rows never move, so the layout of a commit can be reproduced.

* Order: decided by the layout, the seed and the epoch only. Blocks are shuffled, ``mixed`` consecutive ones
  make a window, and the sequences of a window are shuffled. Ranks read consecutive spans of equal length,
  which share at most two windows. An epoch resumes from the spans that are left, with any number of ranks.
* Purges: the layout of an epoch is that of the commit on which it began, but rows are masked as they are
  read. A chunk that is purged during an epoch keeps its slot, which has no tokens and no neighbours.
* Workers: the processes of a DataLoader take turns of ``Turns.unit`` sequences, so the order of a rank
  depends neither on their number nor on the batch size. Each reads all blocks of its rank, and a thread reads
  ahead, so a second worker adds little.

Memory: ``shuffle_blocks`` blocks of 8,192 chunks, twice (0.2 GB with two neighbours), and 48 bytes per block
of the store. Cost: tombstones, and if not packed two columns of all documents; 0.4 µs per chunk, and
neighbours as in ``neighbours.table_reader``; see ``docs/performance.md``.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import IterableDataset, get_worker_info

from retrotool.embed.search_scope import has_commit
from retrotool.errors import UsageError
from retrotool.neighbours.table_reader import NeighbourReader, NeighbourTokens, TextReader, block_rows
from retrotool.ranges import positions_within
from retrotool.store import parts
from retrotool.store.parts import ROW_GROUP, Ids
from retrotool.store.storage import each
from retrotool.store.store import Store, retry_overtaken
from retrotool.store.tombstones import Tombstones, read_tombstones

Slots = npt.NDArray[np.int32]
Span = tuple[int, int]  # [start, stop) of places in the order
EMPTY = -1  # stands for the row or id of an empty slot


def slots_of(live: npt.NDArray[np.bool_], doc: npt.NDArray[Any], size: int, *, packed: bool) -> Slots:
    """Arrange the rows of a block in sequences, int32 [sequences, size] (−1: empty slot).

    ``live`` and ``doc`` (the document of each row, ascending) are [n].
    """
    rows = np.flatnonzero(live).astype(np.int32)
    # Indexes of rows that begin a sequence: the first, or those that begin documents.
    starts = np.zeros(1, np.int64) if packed else np.flatnonzero(np.diff(doc[rows], prepend=-1))
    inside = positions_within(np.diff(starts, append=len(rows)))
    begins = inside % size == 0
    slots = np.full((int(begins.sum()), size), EMPTY, np.int32)
    place = (np.cumsum(begins) - 1) * size + inside % size
    slots.reshape(-1)[place] = rows
    return slots


@dataclass(frozen=True, slots=True)
class SequenceLayout:
    """The sequences of a store at one commit, in blocks by ascending ids."""

    commit: int
    head: str
    size: int  # slots per sequence
    packed: bool
    part: npt.NDArray[np.int32]  # of each block
    group: npt.NDArray[np.int32]  # number of each block in its part
    counts: npt.NDArray[np.int64]  # sequences of each block
    tombstones: Tombstones
    tokens: int  # tokens of all live chunks

    @classmethod
    def of(cls, store: Store, commit: int, size: int, *, packed: bool) -> SequenceLayout:
        """Compute the layout of a store as it was after ``commit``."""
        then = store.at(commit)
        tombstones = read_tombstones(then)
        part, group, counts = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]

        def sequences(number: int) -> Ids:
            begun = np.zeros(0, np.int64) if packed else _first_rows(store, number)
            rows = parts.part_entry(then, "chunks", number).rows
            return _count_sequences(rows, begun, tombstones.rows(number), size)

        numbers = then.state.parts()
        for number, of_part in zip(numbers, each(store.storage, sequences, numbers), strict=True):
            part.append(np.full(len(of_part), number, np.int32))
            group.append(np.arange(len(of_part), dtype=np.int32))
            counts.append(of_part)
        tokens = int(then.state.records.get("totals", {}).get("tokens", 0))
        return cls(
            then.state.number, then.state.head, size, packed,
            np.concatenate(part), np.concatenate(group), np.concatenate(counts), tombstones, tokens,
        )  # fmt: skip

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return int(self.counts.sum())

    def slots(self, block: int, doc: npt.NDArray[Any]) -> Slots:
        """Arrange a block, whose rows have the documents ``doc``; row numbers are relative to the block."""
        live = np.ones(len(doc), np.bool_)
        purged = self.tombstones.rows(int(self.part[block]))
        first = int(self.group[block]) * ROW_GROUP
        low, high = np.searchsorted(purged, [first, first + len(doc)])
        live[purged[low:high] - first] = False
        return slots_of(live, doc, self.size, packed=self.packed)


def _first_rows(store: Store, part: int) -> Ids:
    """Return the first row of each document of a part. Erases do not move documents."""
    documents = parts.read_documents(store, part, ["first_row", "n_chunks"])
    return np.asarray(documents["first_row"].to_numpy()[documents["n_chunks"].to_numpy() > 0])


def _count_sequences(rows: int, begun: Ids, purged: Ids, size: int) -> Ids:
    """Return the number of sequences of each block of a part; one begins in each, and at rows ``begun``."""
    blocks = np.arange(0, rows, ROW_GROUP)
    starts = np.union1d(begun, blocks)
    ends = np.append(starts, rows)
    live = np.diff(ends - np.searchsorted(purged, ends))
    return np.bincount(starts // ROW_GROUP, -(-live // size), len(blocks)).astype(np.int64)


def permutation(n: int, *seed: int) -> Ids:
    """Shuffle 0 to n − 1 with NumPy's PCG64, which unlike its ``Generator`` is stable across versions."""
    return np.argsort(np.random.PCG64(np.random.SeedSequence(seed)).random_raw(n), kind="stable")


class Order:
    """The order of an epoch's sequences. ``counts``: sequences per block; ``seed`` None: as stored."""

    def __init__(self, counts: Ids, seed: int | None, epoch: int, mixed: int) -> None:
        self._seed, self._epoch, self._mixed = seed, epoch, mixed
        self._blocks = np.arange(len(counts)) if seed is None else permutation(len(counts), seed, epoch)
        self._counts = counts[self._blocks]
        sizes = np.add.reduceat(self._counts, np.arange(0, len(counts), mixed)) if len(counts) else counts
        self._ends = np.cumsum(sizes)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def pieces(self, spans: Sequence[Span], skip: int = 0) -> Iterator[tuple[int, Ids, Ids]]:
        """Yield the sequences in ``spans``, without the first ``skip``, window by window.

        Of a window: the place of its first one in the rank, the block [n] of each, its number in it [n].
        """
        done = skip
        for place, stop in cut_spans(spans, skip, length(spans)):
            while place < stop:
                window = int(np.searchsorted(self._ends, place, side="right"))
                end = min(stop, int(self._ends[window]))
                block, sequence = self._window(window)
                offset = int(self._ends[window]) - len(block)
                some = slice(place - offset, end - offset)
                yield done, block[some], sequence[some]
                place, done = end, done + end - place

    def _window(self, window: int) -> tuple[Ids, Ids]:
        some = slice(window * self._mixed, (window + 1) * self._mixed)
        counts = self._counts[some]
        block = np.repeat(self._blocks[some], counts)
        sequence = positions_within(counts)
        if self._seed is None:
            return block, sequence
        # From 1, as NumPy ignores a last seed of 0, and blocks are shuffled without it.
        order = permutation(len(block), self._seed, self._epoch, window + 1)
        return block[order], sequence[order]


def length(spans: Sequence[Span]) -> int:
    """Return the number of places in some spans."""
    return sum(stop - start for start, stop in spans)


def cut_spans(spans: Sequence[Span], low: int, high: int) -> list[Span]:
    """Return the spans of the places ``low`` to ``high`` − 1 of the concatenated ``spans``."""
    found, done = [], 0
    for start, stop in spans:
        some = (start + max(low - done, 0), min(stop, start + high - done))
        if some[0] < some[1]:
            found.append(some)
        done += stop - start
    return found


@dataclass(frozen=True, slots=True)
class Share:
    """The sequences in ``spans`` that a rank reads, equally many for all ranks.

    ``whole`` 0: a rank with one sequence less than another reads an empty sequence at the end. Otherwise each
    rank reads whole batches of ``whole`` sequences, and the last sequences of the order are dropped.
    """

    spans: tuple[Span, ...]
    rank: int
    world_size: int
    whole: int

    def __len__(self) -> int:
        total = length(self.spans)
        if self.whole:
            return total // (self.world_size * self.whole) * self.whole
        return -(-total // self.world_size)

    def of(self, rank: int) -> list[Span]:
        """Return the spans of a rank."""
        total = len(self) * self.world_size if self.whole else length(self.spans)
        return cut_spans(self.spans, rank * total // self.world_size, (rank + 1) * total // self.world_size)

    def left(self, consumed: int) -> list[Span]:
        """Return the spans that are left once each rank has read ``consumed``, with those to be dropped."""
        each = [cut_spans(self.of(rank), consumed, len(self)) for rank in range(self.world_size)]
        tail = cut_spans(self.spans, len(self) * self.world_size, length(self.spans)) if self.whole else []
        return [span for spans in (*each, tail) for span in spans]


Item = dict[str, torch.Tensor]

STATE_VERSION = 1
_STATE = (
    "store", "epoch", "commit", "head", "sequences", "world_size", "whole", "batch_size", "spans", "consumed", "first",
    "worker",
)  # fmt: skip
"""Keys of a state, besides its version and the settings that decide the order."""
_HEAD_DIGITS = 16
_GATHERED = 16  # sequences that are gathered at once without a batch size
_IN_ORDER = 4  # blocks that are read at once without shuffling
_READ = 4
"""Index, in the tensor shared by all processes, of the last change that a worker process has read under.
Before it are the epoch, its commit, the number of changes, and whether the last change loaded a state."""


@dataclass(frozen=True, slots=True)
class _Start:
    """A position in an epoch."""

    spans: tuple[Span, ...] | None = None  # of the order, left for all ranks; None: all of it
    first: int = 0  # sequence from which the turns of workers are counted
    consumed: int = 0  # sequences of its share that this rank has read


class RetroDataset(IterableDataset[Item]):
    """The sequences of a store with the neighbours ``name`` (default: main, or the only ones) of chunks.

    Each item is a dict of tensors, of s = ``sequence_length`` tokens in u = s / chunk_length slots:

    =======================  ==================  ============================================================
    ``tokens``               int64 [s]           0 for padding
    ``loss_mask``            bool [s]            True for text, False for padding
    ``neighbours``           int64 [u, k, 2·64]  a neighbour N of the chunk in the slot, then its continuation
                                                 F, each padded with 0 to the length of a chunk
    ``neighbour_mask``       bool [u, k, 2·64]   True for text, False for padding
    ``chunk_ids``            int64 [u]           −1: empty slot
    ``neighbour_ids``        int64 [u, k]        ids of N in its database; −1: none
    ``neighbour_databases``  int64 [u, k]        index of that database in ``databases``
    ``documents``            int64 [u]           equal for chunks of the same document; −1: empty slot
    ``cursor``               int64 [3]           position, which ``state_dict(batch)`` reads
    =======================  ==================  ============================================================

    **The neighbours of slot i are those of the chunk in slot i itself.** A causal model may use them only
    from the next chunk on (RETRO, arXiv 2112.04426), because they, and their continuations even more, reveal
    the text of the chunk. A model that sees them while it predicts the chunk learns to copy: its loss is too
    low, and it generates badly. So the model must shift neighbours by one chunk.

    * k: neighbours per chunk (default: the table's).
    * batch_size: yield batches instead, for a DataLoader with ``batch_size=None``.
    * packed: fill slots with chunks of consecutive documents; else each document begins a sequence.
    * shuffle, seed: use another order in each epoch, mixing ``shuffle_blocks`` random blocks of 8,192 chunks.
    * drop_last: drop the last sequences of an epoch that don't make whole batches for every rank; else ranks
      with one sequence less read an empty one.
    * rank, world_size: by default from ``torch.distributed`` if initialised, else from RANK and WORLD_SIZE in
      the environment, else one rank. With ``torch.distributed``, all ranks must call the constructor and
      ``set_epoch``.

    Raises ``UsageError`` if a part has no neighbours, or a database has another tokenizer than the store.
    """

    def __init__(
        self,
        store: str | Path,
        name: str | None = None,
        sequence_length: int = 2048,
        k: int | None = None,
        *,
        batch_size: int | None = None,
        packed: bool = True,
        shuffle: bool = True,
        seed: int = 0,
        shuffle_blocks: int = 16,
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__()
        if (rank is None) != (world_size is None):
            raise UsageError("only one of rank and world_size is given", "Give both or neither.")
        given = {"batch_size": (batch_size, 1), "shuffle_blocks": (shuffle_blocks, 1), "seed": (seed, 0)}
        for what, (value, least) in given.items():
            if value is not None and value < least:
                raise UsageError(f"{what}={value} is less than {least}")
        self._distributed = rank is None and _is_distributed()
        self.rank, self.world_size = _own_rank() if rank is None or world_size is None else (rank, world_size)
        if not 0 <= self.rank < self.world_size:
            raise UsageError(f"rank {self.rank} is not between 0 and world_size - 1 = {self.world_size - 1}")
        self.path, self.sequence_length = str(store), sequence_length
        self.batch_size, self.packed, self.shuffle, self.seed = batch_size, packed, shuffle, seed
        self.shuffle_blocks, self.drop_last = shuffle_blocks, drop_last
        reader = TrainingReader(self.path, name, k)
        self.name = reader.rows.reader.name
        length = reader.store.identity.chunk_length
        if sequence_length < length or sequence_length % length:
            raise UsageError(f"sequence_length={sequence_length} is not a multiple of the chunk length, {length}")
        if sequence_length > ROW_GROUP * length:
            raise UsageError(f"sequence_length={sequence_length} is more than a block has, {ROW_GROUP * length:,}")
        self.k = reader.rows.k
        self.databases = tuple(database.place for database in reader.rows.reader.databases)
        """Paths of the databases of the neighbours."""
        self.chunk_length = length
        self._shared = torch.zeros(_READ + 1, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._change = 0
        self._finished = -1
        self._begin_epoch(0, reader)

    def _begin_epoch(self, epoch: int, reader: TrainingReader) -> None:
        layout = self._lay_out(reader.store, self._agreed(reader.store.state.number))
        reader.check_tables(layout)
        self.epoch, self._commit, self._layout = epoch, layout.commit, layout
        self._begin = self._at = _Start()
        self._publish(loaded=False)

    def __repr__(self) -> str:
        shape = f"{self.sequences} sequences of {self.sequence_length} tokens, k={self.k}"
        return f"<RetroDataset of {self.path}: {shape}, rank {self.rank} of {self.world_size}>"

    @property
    def sequences(self) -> int:
        """Number of sequences of an epoch, over all ranks."""
        return self._sequences().sequences

    @property
    def padding(self) -> float:
        """Share of an epoch's tokens that is padding, in empty slots and after short chunks."""
        layout = self._sequences()
        return 1 - layout.tokens / (layout.sequences * self.sequence_length) if layout.sequences else 0.0

    def materialised_parts(self) -> tuple[int, int]:
        """Return the number of parts whose tables have tokens of neighbours, and that of all parts."""
        reader = TrainingReader(self.path, self.name, self.k)
        numbers = reader.store.state.parts()
        return sum(bool(reader.rows.with_text(part)) for part in numbers), len(numbers)

    def __len__(self) -> int:
        n = len(self._share(self._at))
        return n if self.batch_size is None else -(-n // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch on the newest commit; call it before each epoch, on every rank.

        Without a call, an epoch is read again in the same order. A call with the current epoch does nothing,
        so a loaded state is resumed.
        """
        if epoch == self.epoch:
            return
        if epoch < 0:
            raise UsageError(f"epoch {epoch} is less than 0")
        self._begin_epoch(epoch, TrainingReader(self.path, self.name, self.k))

    def state_dict(self, batch: Mapping[str, torch.Tensor] | None = None) -> dict[str, Any]:
        """Return the position of this rank, after ``batch`` or after what this process read last.

        The worker processes of a DataLoader read ahead, so give the last batch that was trained on. The state
        is equal on all ranks that have read the same number of batches, and any number of ranks can resume
        from it.
        """
        worker = get_worker_info()
        at = self._at
        if batch is not None:
            at = self._after(batch)
        elif worker is None and self._shared[_READ] == self._change:
            advice = "Give the last batch: state_dict(batch)."
            raise UsageError("worker processes read this dataset, so its position is not known here", advice)
        layout = self._sequences()
        return {
            "version": STATE_VERSION, "store": Store.open(self.path).identity.uuid,
            **self._settings(), "epoch": self.epoch, "commit": self._commit, "head": layout.head[:_HEAD_DIGITS],
            "sequences": layout.sequences, "world_size": self.world_size, "whole": self._whole(),
            "batch_size": self.batch_size,
            "spans": [list(span) for span in self._share(at).spans], "consumed": at.consumed,
            "first": at.consumed if worker is None else at.first,
            "worker": None if worker is None else [worker.id, worker.num_workers],
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a state: in the same order with as many ranks, else with what no rank has read.

        Load it before a loader's worker processes start, which begin the epoch there until ``set_epoch``.
        Chunks that were purged since are masked; chunks that were added since come with the next epoch.
        Raises ``UsageError`` if the state is from another store, or from other settings that decide the
        order.
        """
        worker = get_worker_info()
        if state.get("version") != STATE_VERSION:
            raise UsageError(f"this is not a state of a RetroDataset of version {STATE_VERSION}")
        if missing := [key for key in _STATE if key not in state]:
            raise UsageError(f"the state has no {', '.join(missing)}", "Load what state_dict returned, unchanged.")
        if state["worker"] is not None and worker is None:
            raise UsageError("this is the state of a worker process", "Load it with the loader that saved it.")
        store = Store.open(self.path)
        if state["store"] != store.identity.uuid or not has_commit(store, int(state["commit"]), str(state["head"])):
            raise UsageError(f"the state is from another store than {self.path}, or from a diverged copy")
        other = {key: state.get(key) for key, value in self._settings().items() if state.get(key) != value}
        if state["worker"] is not None and state["batch_size"] != self.batch_size:
            other["batch_size"] = state["batch_size"]  # workers take turns by it
        if other:
            shown = ", ".join(f"{key}={value}" for key, value in other.items())
            raise UsageError(f"the state is from a dataset with {shown}", "Use the same settings, for the same order.")
        layout = self._lay_out(store, int(state["commit"]))
        if layout.sequences != state["sequences"]:
            raise UsageError(f"{self.path} does not have the sequences of the state at commit {layout.commit}")
        spans = tuple((int(start), int(stop)) for start, stop in state["spans"])
        consumed = int(state["consumed"])
        inside = all(0 <= start <= stop <= layout.sequences for start, stop in spans)
        if not inside or min(consumed, int(state["epoch"]), int(state["world_size"]) - 1, int(state["whole"])) < 0:
            raise UsageError("the state has impossible numbers", "Load what state_dict returned, unchanged.")
        self.epoch, self._commit, self._layout = int(state["epoch"]), layout.commit, layout
        if (state["world_size"], state["whole"]) == (self.world_size, self._whole()):
            first = consumed if state["worker"] is None else int(state["first"])
            self._begin = _Start(spans, first, consumed)
        else:
            share = Share(spans, 0, int(state["world_size"]), int(state["whole"]))
            self._begin = _Start(tuple(share.left(consumed)))
        self._at = self._begin
        if worker is None:
            self._publish(loaded=True)

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        if worker is not None:
            if self._missed():
                error = UsageError("a state was loaded after the worker processes started: make a new loader")
                return map(_fail, [error])  # raised here, it would end the worker process silently
            self._shared[_READ] = self._change
        number, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        if self.shuffle and self._finished == self.epoch:
            warnings.warn(f"epoch {self.epoch} is read again in the same order: call set_epoch", stacklevel=2)
        start, self._begin = self._begin, _Start()
        self._at = start
        return self._items(start, number, workers)

    def _items(self, start: _Start, worker: int, workers: int) -> Iterator[Item]:
        turns = Turns(start.first, self.batch_size or 1, worker, workers)
        layout, share = self._sequences(), self._share(start)
        reader = TrainingReader(self.path, self.name, self.k)
        reader.check_tables(layout)
        begun: dict[str, npt.NDArray[Any]] = {}
        mixed = self.shuffle_blocks if self.shuffle else _IN_ORDER
        order = Order(layout.counts, self.seed if self.shuffle else None, self.epoch, mixed)
        for places, rows, slots in read_epoch(reader, layout, order, share, turns, start.consumed):
            groups = np.arange(len(places)) // _GATHERED if self.batch_size is None else turns.number(places)
            for some in np.split(np.arange(len(places)), np.flatnonzero(np.diff(groups)) + 1):
                cursor = np.stack([np.full_like(some, self.epoch), places[some], np.full_like(some, workers)], 1)
                values = {**rows.gathered(slots[some]), "cursor": cursor}
                if begun:
                    values = {key: np.concatenate([begun[key], value]) for key, value in values.items()}
                begun = {}
                if turns.ends(int(places[some[-1]])):
                    yield from self._given(start, values)
                else:
                    begun = values  # the batch continues in the next window
        if begun:
            yield from self._given(start, begun)
        self._finished = self.epoch

    def _given(self, start: _Start, values: Mapping[str, npt.NDArray[Any]]) -> Iterator[Item]:
        """Yield a batch, or its sequences one by one; the position is updated before each yield."""
        tensors = {key: torch.from_numpy(value) for key, value in values.items()}
        positions = values["cursor"][:, 1].tolist()
        if self.batch_size is not None:
            self._at = _Start(start.spans, start.first, positions[-1] + 1)
            yield tensors
            return
        for i, position in enumerate(positions):
            self._at = _Start(start.spans, start.first, position + 1)
            yield {key: value[i] for key, value in tensors.items()}

    def _sequences(self) -> SequenceLayout:
        if self._layout.commit != self._commit:
            self._layout = self._lay_out(Store.open(self.path), self._commit)
        return self._layout

    def _lay_out(self, store: Store, commit: int) -> SequenceLayout:
        return SequenceLayout.of(store, commit, self.sequence_length // self.chunk_length, packed=self.packed)

    def _share(self, start: _Start) -> Share:
        spans = ((0, self._sequences().sequences),) if start.spans is None else start.spans
        return Share(spans, self.rank, self.world_size, self._whole())

    def _whole(self) -> int:
        return (self.batch_size or 1) if self.drop_last else 0

    def _settings(self) -> dict[str, Any]:
        found = {"sequence_length": self.sequence_length, "packed": self.packed, "shuffle": self.shuffle}
        return {**found, "seed": self.seed, "shuffle_blocks": self.shuffle_blocks} if self.shuffle else found

    def _after(self, batch: Mapping[str, torch.Tensor]) -> _Start:
        cursor = batch["cursor"].reshape(-1, 3)
        epoch, workers = int(cursor[0, 0]), int(cursor[0, 2])
        if epoch != self.epoch:
            advice = "Take the state before set_epoch."
            raise UsageError(f"the batch is from epoch {epoch}, but the dataset is in {self.epoch}", advice)
        if workers > 1 and self.batch_size is None:
            raise UsageError(
                f"{workers} worker processes took turns by sequences, so a batch does not have the position of all",
                "Let the dataset make the batches: RetroDataset(batch_size=...), DataLoader(batch_size=None).",
            )
        consumed = int(cursor[:, 1].max()) + 1
        return _Start(self._at.spans, consumed, consumed)

    def _publish(self, *, loaded: bool) -> None:
        self._change += 1
        self._shared.copy_(torch.tensor([self.epoch, self._commit, self._change, int(loaded), -1]))

    def _missed(self) -> bool:
        """Apply changes of the main process in a worker; return whether it loaded a state (too late)."""
        epoch, commit, change, loaded, _ = self._shared.tolist()
        if change == self._change:
            return False
        self.epoch, self._commit, self._change = epoch, commit, change
        self._begin = _Start()
        return bool(loaded)

    def _agreed(self, commit: int) -> int:
        if not self._distributed or self.world_size == 1:
            return commit
        commits: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(commits, commit)
        return int(min(commits))


def _fail(error: Exception) -> Item:
    raise error


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _own_rank() -> tuple[int, int]:
    if _is_distributed():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _number("RANK"), _number("WORLD_SIZE")
    return 0, 1


def _number(variable: str) -> int:
    try:
        return int(os.environ[variable])
    except ValueError:
        raise UsageError(
            f"the environment variable {variable}={os.environ[variable]!r} is not a number",
            "Set it to a number, or give rank= and world_size=.",
        ) from None


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """n chunks, followed by an empty row for empty slots."""

    ids: Ids  # [n + 1]; −1: empty or purged
    documents: Ids  # [n + 1], also of purged rows
    n_tokens: npt.NDArray[np.uint16]  # [n + 1]
    tokens: npt.NDArray[Any]  # [n + 1, chunk_length]
    neighbours: NeighbourTokens  # n + 1 rows

    def gathered(self, rows: Ids) -> dict[str, npt.NDArray[Any]]:
        """Gather the sequences of ``rows`` [b, slots] (−1: empty slot) in the layout of ``RetroDataset``."""
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
    """Return a mask of the first ``counts`` [...] of ``length`` tokens, bool [..., length]."""
    first: npt.NDArray[np.bool_] = np.tri(length + 1, length, -1, np.bool_)  # row n: n times True
    return first.take(counts, axis=0)


class TrainingReader:
    """Reads blocks of a store with the neighbours ``name``, at the newest commit."""

    def __init__(self, path: str, name: str | None, k: int | None) -> None:
        self._path, self._name, self._k = path, name, k
        self._open()

    def _open(self) -> None:
        self.store = Store.open(self._path)
        reader = NeighbourReader(self.store, self._name)
        self.rows = TextReader(reader, reader.choose_k(self._k))
        self.tombstones = read_tombstones(self.store)

    def check_tables(self, layout: SequenceLayout) -> None:
        """Raise ``UsageError`` unless all parts of a layout have neighbours."""
        reader = self.rows.reader
        missing = sorted(set(layout.part[layout.counts > 0].tolist()) - set(reader.parts()))
        if not missing:
            return
        shown = ", ".join(map(str, missing[:5])) + (", …" if len(missing) > 5 else "")
        those, have = ("part", "has") if len(missing) == 1 else ("parts", "have")
        of = f"(of {len(self.store.state.parts()):,}) of {self.store.place}"
        raise UsageError(f"{those} {shown} {of} {have} no neighbours {reader.name!r}", reader.advice())

    def read(self, layout: SequenceLayout, block: Ids, sequence: Ids) -> tuple[TrainingRows, Ids]:
        """Read the rows of blocks, and the index of the row in each slot of sequences, int64 [n, slots].

        Opens the newest commit if a file of the present one was erased or replaced.
        """

        def renew() -> None:
            self._open()
            self.check_tables(layout)

        return retry_overtaken(lambda: self._read(layout, block, sequence), renew)

    def _read(self, layout: SequenceLayout, block: Ids, sequence: Ids) -> tuple[TrainingRows, Ids]:
        store, own, wanted = self.store, self.store.identity, np.unique(block).tolist()
        blocks = [(int(layout.part[i]), int(layout.group[i])) for i in wanted]
        starts = np.cumsum([0, *(block_rows(store, one) for one in blocks)]).tolist()
        n = starts[-1] + 1
        near = self.rows.read(blocks, spare=1)
        rows = TrainingRows(
            np.full(n, EMPTY, np.int64), np.full(n, EMPTY, np.int64), np.zeros(n, np.uint16),
            np.zeros((n, own.chunk_length), parts.token_dtype(own.tokenizer.token_bytes)), near,
        )  # fmt: skip
        slots = np.full((len(block), layout.size), EMPTY, np.int64)
        read = each(store.storage, lambda one: parts.read_chunks(store, one[0], [one[1]]), blocks)
        edges = pairwise(starts)
        for number, (part, group), chunks, (start, stop) in zip(wanted, blocks, read, edges, strict=True):
            some = slice(start, stop)
            rows.documents[some] = parts.chunk_ids(part, chunks.doc)
            rows.n_tokens[some], rows.tokens[some] = chunks.n_tokens, chunks.tokens
            rows.ids[some] = parts.chunk_ids(part, group * ROW_GROUP + np.arange(stop - start))
            mine = np.flatnonzero(block == number)
            found = layout.slots(number, rows.documents[some])[sequence[mine]]
            slots[mine] = np.where(found == EMPTY, EMPTY, found + start)
        purged = np.flatnonzero(self.tombstones.contains(rows.ids) | (rows.n_tokens == 0))
        rows.ids[purged], rows.n_tokens[purged], rows.tokens[purged] = EMPTY, 0, 0
        near.clear(purged)
        return rows, slots


@dataclass(frozen=True, slots=True)
class Turns:
    """The places of worker ``worker`` of ``workers``: turns of ``unit`` sequences, counted from ``first``."""

    first: int
    unit: int
    worker: int
    workers: int

    def number(self, places: Ids) -> Ids:
        """Return the number of each place's turn, [n]."""
        return (places - self.first) // self.unit

    def mine(self, places: Ids) -> npt.NDArray[np.bool_]:
        """Return which places belong to this worker, bool [n]."""
        return np.asarray(self.number(places) % self.workers == self.worker)

    def ends(self, place: int) -> bool:
        """Return whether a place is the last of its turn."""
        return (place + 1 - self.first) % self.unit == 0


def read_epoch(
    reader: TrainingReader, layout: SequenceLayout, order: Order, share: Share, turns: Turns, consumed: int
) -> Iterator[tuple[Ids, TrainingRows, Ids]]:
    """Yield the windows of one worker, from the place ``consumed`` on.

    A window has sequences that were read together: their ascending places [n] among those of the rank, rows,
    and slots int64 [n, slots], which are indexes of the rows (−1: empty).
    """
    with ThreadPoolExecutor(1, "retrotool-dataset") as pool:
        wanted = _wanted(order, share, turns, consumed)
        begun = ((places, pool.submit(reader.read, layout, *sequences)) for places, *sequences in wanted)
        following = next(begun, None)
        while following is not None:
            (places, reading), following = following, next(begun, None)
            rows, slots = reading.result()
            missing = np.full((len(places) - len(slots), layout.size), EMPTY, np.int64)
            yield places, rows, np.concatenate([slots, missing])


def _wanted(order: Order, share: Share, turns: Turns, consumed: int) -> Iterator[tuple[Ids, Ids, Ids]]:
    """Yield places, blocks and sequences of one worker by window; then a place for an empty sequence."""
    for first, block, sequence in order.pieces(share.of(share.rank), consumed):
        places = first + np.arange(len(block))
        mine = turns.mine(places)
        if mine.any():
            yield places[mine], block[mine], sequence[mine]
    last, is_short = np.array([len(share) - 1]), length(share.of(share.rank)) < len(share)
    if is_short and last[0] >= consumed and turns.mine(last)[0]:
        nothing = np.zeros(0, np.int64)
        yield last, nothing, nothing
