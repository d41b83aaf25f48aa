"""``retrotool.RetroDataset``: a store and its neighbours as training sequences, for PyTorch.

A sequence is a row of slots for chunks, with the neighbours of the chunk in each slot. Sequences come in an order that
is decided by the seed and the epoch (``train.order``), block by block, and each rank reads its own blocks. Positions
are decided on the commit on which the epoch began, and content is that of now: what is purged in the course of an epoch
keeps its slots, which are masked. So training goes on after a purge, without what was purged.

The order of a rank's sequences depends neither on how many workers a DataLoader has nor on the size of batches: worker
processes take turns, batch by batch. Each of them reads all blocks of its rank, so a second one adds little: reading
is quick, and a thread reads ahead.

Everything is masked where it is read: rows that are purged by now have no tokens and no neighbours, whatever the layout
that they got their slots by. Tokens stay in the store's type until sequences are gathered, 0.7 KB a row of two
neighbours. The workers of a rank take turns of ``unit`` sequences, counted from the place ``first`` of what the rank
reads. So the sequences of all workers, turn by turn, are in the rank's order for any number of workers.

Memory: ``shuffle_blocks`` blocks of 8,192 chunks, twice: 0.2 GB with two neighbours, and 16 bytes for every block of
the store. Cost: 0.4 µs a row for chunks, and that of ``neighbours.table_reader`` for neighbours; see
``docs/performance.md``.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import IterableDataset, get_worker_info

from retrotool.cli.command_lines import table_command
from retrotool.embed.search_scope import has_commit
from retrotool.errors import UsageError
from retrotool.neighbours.table_reader import NeighbourReader, NeighbourTokens, TextReader, block_rows
from retrotool.store import parts
from retrotool.store.parts import ROW_GROUP, Ids
from retrotool.store.store import Store, retry_overtaken
from retrotool.store.tombstones import read_tombstones
from retrotool.train.order import EMPTY, Order, SequenceLayout, Share, Span

Item = dict[str, torch.Tensor]

STATE_VERSION = 1
_STATE = (
    "store", "epoch", "commit", "head", "sequences", "world_size", "whole", "batch_size", "spans", "consumed", "first",
    "worker",
)  # fmt: skip
"""What a state has besides its version, and what decides the order."""
_HEAD_DIGITS = 16
_GATHERED = 16
"""Sequences that are gathered at once where no batch size is given."""
_IN_ORDER = 4
"""Blocks that are read at once where sequences are not shuffled."""
_READ = 4
"""Place, in what the processes share, of the change since which a worker process has read. Before it are the epoch, its
commit, a count of changes to them, and whether the last change was a state that was loaded."""


@dataclass(frozen=True, slots=True)
class _Start:
    """Where to begin in an epoch.

    ``spans`` of the order are left for all ranks (None: all of it), and of its share this one has read ``consumed``
    sequences. Turns of workers count from ``first``.
    """

    spans: tuple[Span, ...] | None = None
    first: int = 0
    consumed: int = 0


class RetroDataset(IterableDataset[Item]):
    """The sequences of the store at ``store``, with the neighbours ``name`` of their chunks.

    Each item is a dict of tensors, of s = ``sequence_length`` tokens in u = s / chunk_length slots:

    =======================  ==================  =====================================================================
    ``tokens``               int64 [s]           0 where there is none
    ``loss_mask``            bool [s]            which of them are text: the others are no targets
    ``neighbours``           int64 [u, k, 2·64]  of the chunk in each slot: a neighbour N, then what follows it, F, each
                                                 padded with 0 to the length of a chunk
    ``neighbour_mask``       bool [u, k, 2·64]   which of these are text
    ``chunk_ids``            int64 [u]           −1: the slot is empty
    ``neighbour_ids``        int64 [u, k]        ids of N in its database; −1: there is none
    ``neighbour_databases``  int64 [u, k]        which of ``databases`` that is
    ``documents``            int64 [u]           a number that chunks of one document have in common; −1: empty
    ``cursor``               int64 [3]           what ``state_dict(batch)`` reads
    =======================  ==================  =====================================================================

    **The neighbours of slot i are those of the chunk in slot i itself.** A causal model may use them from the next
    chunk on only (RETRO, arXiv 2112.04426): the neighbours of chunk u, and still more their continuations, tell what
    stands in chunk u. A model that sees them while it predicts chunk u learns to copy, has a loss that is too good,
    and is useless when it generates. So the model shifts by one chunk.

    k: neighbours a chunk (default: the table's). batch_size: give whole batches, a leading dimension more, to a
    DataLoader with ``batch_size=None``. packed: chunks of consecutive documents fill the slots; else each document
    begins a sequence. shuffle, seed: another order in each epoch; ``shuffle_blocks`` blocks of 8,192 chunks from random
    places are mixed. drop_last: leave out, of each epoch, the last sequences that don't make whole batches for every
    rank; else a rank that has one sequence less reads an empty one, so that all read equally many. rank, world_size: of
    ``torch.distributed`` if that is initialised, else of the environment (RANK, WORLD_SIZE), else one rank.

    ``UsageError`` if a part has no neighbours, or the databases have other tokens than the store. Where ranks are those
    of ``torch.distributed``, constructing and ``set_epoch`` are collective: all ranks must call them.
    """

    def __init__(
        self,
        store: str | Path,
        name: str = "main",
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
            raise UsageError("of rank and world_size only one is given", "Give both, or none.")
        for what, value, least in (
            ("batch_size", batch_size, 1),
            ("shuffle_blocks", shuffle_blocks, 1),
            ("seed", seed, 0),
        ):
            if value is not None and value < least:
                raise UsageError(f"{what}={value} is less than {least}")
        self._distributed = rank is None and _is_distributed()
        self.rank, self.world_size = _own_rank() if rank is None or world_size is None else (rank, world_size)
        if not 0 <= self.rank < self.world_size:
            raise UsageError(f"rank {self.rank} is not one of {self.world_size}")
        self.path, self.name, self.sequence_length = str(store), name, sequence_length
        self.batch_size, self.packed, self.shuffle, self.seed = batch_size, packed, shuffle, seed
        self.shuffle_blocks, self.drop_last = shuffle_blocks, drop_last
        reader = TrainingReader(self.path, name, k)
        length = reader.store.identity.chunk_length
        if sequence_length < length or sequence_length % length:
            raise UsageError(f"a sequence of {sequence_length} tokens is not of whole chunks of {length} tokens")
        if sequence_length > ROW_GROUP * length:
            raise UsageError(f"a sequence has at most {ROW_GROUP * length:,} tokens, those of a block")
        self.k = reader.rows.k
        """Neighbours a chunk."""
        self.databases = tuple(database.place for database in reader.rows.reader.databases)
        """Paths of the stores that neighbours are chunks of."""
        self.chunk_length = length
        self._shared = torch.zeros(_READ + 1, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._change = 0
        self._finished = -1
        self._begin_epoch(0, reader)

    def _begin_epoch(self, epoch: int, reader: TrainingReader) -> None:
        layout = self._lay_out(reader.store, self._agreed(reader.store.state.number))
        reader.check_tables(layout)
        self.epoch, self._commit, self._layout = epoch, layout.commit, layout
        """The number of the epoch, the commit it is on, and its sequences."""
        self._begin = self._at = _Start()
        self._tell(loaded=False)

    @property
    def sequences(self) -> int:
        """How many sequences an epoch has, over all ranks."""
        return self._sequences().sequences

    @property
    def padding(self) -> float:
        """The share of an epoch's tokens that is no text: empty slots, and what short chunks leave of theirs."""
        layout = self._sequences()
        return 1 - layout.tokens / (layout.sequences * self.sequence_length) if layout.sequences else 0.0

    def materialised_parts(self) -> tuple[int, int]:
        """In how many parts neighbours are read with their tokens from the tables, and how many there are."""
        reader = TrainingReader(self.path, self.name, self.k)
        numbers = reader.store.state.parts()
        return sum(bool(reader.rows.with_text(part)) for part in numbers), len(numbers)

    def __len__(self) -> int:
        n = len(self._share(self._at))
        return n if self.batch_size is None else -(-n // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Begin another epoch, with another order, on the newest commit; call it before each, on every rank.

        Without it an epoch is read again in the same order. The number of the epoch that it is at changes nothing: one
        that a loaded state is in the middle of is gone on with.
        """
        if epoch == self.epoch:
            return
        if epoch < 0:
            raise UsageError(f"epoch {epoch} is less than 0")
        self._begin_epoch(epoch, TrainingReader(self.path, self.name, self.k))

    def state_dict(self, batch: Mapping[str, torch.Tensor] | None = None) -> dict[str, Any]:
        """Where this rank is: after ``batch``, or after what was read last in this process.

        A DataLoader with worker processes reads in these, and ahead: give it the last batch that was trained on. The
        state is the same on every rank once all have read as many batches, and any number of ranks can go on from it.
        """
        worker = get_worker_info()
        at = self._at
        if batch is not None:
            at = self._after(batch)
        elif worker is None and self._shared[_READ] == self._change:
            raise UsageError(
                "worker processes read this dataset: what they have read is not known here",
                "Give the last batch: state_dict(batch).",
            )
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
        """Go on where a state was taken; in the same order if there are as many ranks, else with what none had read.

        Load it before a loader's worker processes start. With them its epoch begins there until ``set_epoch``.

        ``UsageError`` if it is of another store, or of other settings that decide the order. What the store has purged
        since is masked; what it has got since comes with the next epoch.
        """
        worker = get_worker_info()
        if state.get("version") != STATE_VERSION:
            raise UsageError(f"this is no state of a RetroDataset of version {STATE_VERSION}")
        if missing := [key for key in _STATE if key not in state]:
            raise UsageError(f"the state is not whole: {', '.join(missing)} is missing", "Take one as it was given.")
        if state["worker"] is not None and worker is None:
            raise UsageError(
                "this is the state of a worker process", "Load it through the loader that it was taken by."
            )
        store = Store.open(self.path)
        if state["store"] != store.identity.uuid or not has_commit(store, int(state["commit"]), str(state["head"])):
            raise UsageError(f"the state is of another store than {self.path}, or of a copy that went its own way")
        other = {key: state.get(key) for key, value in self._settings().items() if state.get(key) != value}
        if state["worker"] is not None and state["batch_size"] != self.batch_size:
            other["batch_size"] = state["batch_size"]  # workers take turns by it
        if other:
            told = ", ".join(f"{key}={value}" for key, value in other.items())
            raise UsageError(f"the state is of a dataset with {told}: the order is another", "Make it with the same.")
        layout = self._lay_out(store, int(state["commit"]))
        if layout.sequences != state["sequences"]:
            raise UsageError(f"{self.path} had other sequences at commit {layout.commit} than the state says")
        spans = tuple((int(start), int(stop)) for start, stop in state["spans"])
        consumed = int(state["consumed"])
        inside = all(0 <= start <= stop <= layout.sequences for start, stop in spans)
        if not inside or min(consumed, int(state["epoch"]), int(state["world_size"]) - 1, int(state["whole"])) < 0:
            raise UsageError("the state has numbers that can't be", "Take one as it was given.")
        self.epoch, self._commit, self._layout = int(state["epoch"]), layout.commit, layout
        if (state["world_size"], state["whole"]) == (self.world_size, self._whole()):
            first = consumed if state["worker"] is None else int(state["first"])
            self._begin = _Start(spans, first, consumed)
        else:
            share = Share(spans, 0, int(state["world_size"]), int(state["whole"]))
            self._begin = _Start(tuple(share.left(consumed)))
        self._at = self._begin
        if worker is None:
            self._tell(loaded=True)

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        if worker is not None:
            if self._missed():
                return _Failing(UsageError("a state was loaded after the worker processes started: make a new loader"))
            self._shared[_READ] = self._change
        number, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        if self.shuffle and self._finished == self.epoch:
            warnings.warn(f"epoch {self.epoch} is read again, in the same order: call set_epoch", stacklevel=2)
        start, self._begin = self._begin, _Start()
        self._at = start
        return self._items(start, number, workers)

    def _items(self, start: _Start, worker: int, workers: int) -> Iterator[Item]:
        """Items of one worker, each with its cursor."""
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
                    begun = values  # the batch goes on in the next window
        if begun:
            yield from self._given(start, begun)
        self._finished = self.epoch

    def _given(self, start: _Start, values: Mapping[str, npt.NDArray[Any]]) -> Iterator[Item]:
        """A batch, or one sequence after the other; where one goes on after each is known before it is given."""
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
            raise UsageError(f"the batch is of epoch {epoch}, the dataset in {self.epoch}", "Take the state before.")
        if workers > 1 and self.batch_size is None:
            raise UsageError(
                f"{workers} worker processes took turns by sequences: a batch does not tell what the others read",
                "Let the dataset make the batches: RetroDataset(batch_size=...), DataLoader(batch_size=None).",
            )
        consumed = int(cursor[:, 1].max()) + 1
        return _Start(self._at.spans, consumed, consumed)

    def _tell(self, *, loaded: bool) -> None:
        """Let worker processes that are there already know what changed."""
        self._change += 1
        told = [self.epoch, self._commit, self._change, int(loaded), -1]
        self._shared.copy_(torch.tensor(told))

    def _missed(self) -> bool:
        """In a worker process: take in what the main process changed; True if it loaded a state, which can't be."""
        epoch, commit, change, loaded, _ = self._shared.tolist()
        if change == self._change:
            return False
        self.epoch, self._commit, self._change = epoch, commit, change
        self._begin = _Start()
        return bool(loaded)

    def _agreed(self, commit: int) -> int:
        """The newest commit that all ranks see."""
        if not self._distributed or self.world_size == 1:
            return commit
        commits: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(commits, commit)
        return int(min(commits))


class _Failing(Iterator[Item]):
    """Raises an error when it is read: in ``__iter__`` it would end a worker process without a word."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __next__(self) -> Item:
        raise self._error


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _own_rank() -> tuple[int, int]:
    """Rank and number of ranks: of ``torch.distributed``, or the environment, or one."""
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
            f"the environment has {variable}={os.environ[variable]!r}, which is no number",
            "Set it to one, or give rank= and world_size=.",
        ) from None


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

    def check_tables(self, layout: SequenceLayout) -> None:
        """``UsageError`` unless all parts of a layout have neighbours."""
        reader = self.rows.reader
        missing = sorted(set(layout.part[layout.counts > 0].tolist()) - set(reader.parts()))
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


def read_epoch(
    reader: TrainingReader, layout: SequenceLayout, order: Order, share: Share, turns: Turns, consumed: int
) -> Iterator[tuple[Ids, TrainingRows, Ids]]:
    """The windows of one worker, of which it has had what is before the place ``consumed``.

    Of sequences that were read together: their places [n] in what a rank reads, ascending, rows, and slots, int64
    [n, slots], which are places in the rows, −1: empty.
    """

    def window(places: Ids, reading: Future[tuple[TrainingRows, Ids]]) -> tuple[Ids, TrainingRows, Ids]:
        rows, slots = reading.result()
        missing = np.full((len(places) - len(slots), layout.size), EMPTY, np.int64)
        return places, rows, np.concatenate([slots, missing])

    before = None
    with ThreadPoolExecutor(1, "retrotool-dataset") as pool:
        for places, block, sequence in _wanted(order, share, turns, consumed):
            coming = places, pool.submit(reader.read, layout, block, sequence)
            if before is not None:
                yield window(*before)
            before = coming
        if before is not None:
            yield window(*before)


def _wanted(order: Order, share: Share, turns: Turns, consumed: int) -> Iterator[tuple[Ids, Ids, Ids]]:
    """Places, blocks and sequences of one worker, by window; last, where that is its, a place without a sequence."""
    for first, block, sequence in order.pieces(share.of(share.rank), consumed):
        places = first + np.arange(len(block))
        mine = turns.mine(places)
        if mine.any():
            yield places[mine], block[mine], sequence[mine]
    last = np.array([len(share) - 1])
    if share.is_short and last[0] >= consumed and turns.mine(last)[0]:
        nothing = np.zeros(0, np.int64)
        yield last, nothing, nothing
