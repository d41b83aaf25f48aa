"""What the checks of ``verify`` share: the store they look at, what they found wrong, and what is known of it by now.

Memory: 8 bytes a part, the tombstones, and a bit a chunk of the parts that hold values of key-value records.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrotool.errors import CorruptError, ErasedError, RetrotoolError
from retrotool.store import parts
from retrotool.store.atomic import FileEntry
from retrotool.store.ids import part_of, row_of
from retrotool.store.paths import FileName
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones, read_tombstones

Ids = npt.NDArray[np.int64]


@dataclass(slots=True)
class Checked:
    """A store that is being checked: what is wrong with it, and what is known of it by now.

    ``recorded`` are the keys of all records that were ever set; ``broken`` paths of files that can't be read for what
    they are. ``rows`` are those of each part, by its number. ``zeros`` has, by path of embeddings, the rows whose
    vector is zero though they are neither erased nor values.
    """

    store: Store
    problems: list[str]
    recorded: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    tombstones: Tombstones = field(default_factory=lambda: Tombstones(np.zeros(0, np.int64)))
    rows: Ids = field(default_factory=lambda: np.zeros(1, np.int64))
    zeros: dict[str, Ids] = field(default_factory=dict)
    _with_values: frozenset[int] = frozenset()
    _keys: dict[int, npt.NDArray[np.uint8]] = field(default_factory=dict)
    _purged: tuple[Tombstones, Tombstones] | None = None
    _newest: Store | None = None

    def __post_init__(self) -> None:
        state = self.store.state
        entries = {part: entry for part in state.parts() if (entry := state.part_file("chunks", part)) is not None}
        self.rows = np.zeros(max(entries, default=-1) + 2, np.int64)
        for part, entry in entries.items():
            self.rows[part] = entry.rows
        self._with_values = frozenset(part for part, entry in entries.items() if parts.n_keys(entry) < entry.rows)

    @contextmanager
    def noting(self, what: str) -> Iterator[None]:
        """Turn what goes wrong with ``what`` into a problem, and go on: a broken file can break anything that reads it.

        ``ErasedError`` if a newer commit has removed files, which may be all that is wrong.
        """
        try:
            yield
        except ErasedError:
            raise
        except RetrotoolError as error:
            self.check_current()
            self.problems.append(str(error))
        except (ArithmeticError, LookupError, OSError, SyntaxError, TypeError, ValueError, pa.ArrowException) as error:
            self.check_current()
            self.problems.append(f"{what}: can't be checked: {type(error).__name__}: {error}")

    def check_current(self) -> None:
        """``ErasedError`` if a file of the view has left the store since it was opened."""
        store = self.store
        if self._newest is None:
            self._newest = Store(store.root, store.identity, store.genesis, store.state)
        seen = self._newest.state.number
        try:
            newest = self._newest.refresh()
        except CorruptError:
            return  # the log is broken behind the view: that is no reason why a file of it is
        if newest.number > seen:
            for entry in store.state.files():
                if not newest.has(entry.path):
                    raise ErasedError(f"{entry.path} was replaced while the store was verified", "Run it again.")

    def erasing(self) -> Tombstones:
        """Chunks that an erase may be at work on, or was interrupted in: those of purges that are not erased yet."""
        return self._by_state()[0]

    def erased(self) -> Tombstones:
        """Chunks that no file must hold any more: those of purges that are erased."""
        return self._by_state()[1]

    def _by_state(self) -> tuple[Tombstones, Tombstones]:
        if self._purged is None:
            purges = self.store.state.with_prefix("purge:")
            by_state: dict[bool, list[Ids]] = {True: [], False: []}
            for slot in self.store.state.group("tombstones"):
                if (purge := slot.partition(".")[0]) in purges:
                    by_state[bool(purges[purge].get("erased"))].append(read_tombstones(self.store, slot).ids)
            erased, waiting = (np.concatenate([np.zeros(0, np.int64), *by_state[done]]) for done in (True, False))
            self._purged = Tombstones(np.setdiff1d(waiting, erased)), Tombstones(np.unique(erased))
        return self._purged

    def whole(self, kind: str, part: int, name: str = "") -> FileEntry | None:
        """A file of a part, if it is there and not broken."""
        entry = self.store.state.part_file(kind, part, name)
        return None if entry is None or entry.path in self.broken else entry

    def are_keys(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Which ids, all of them rows of parts, are not values of key-value records, bool [n]."""
        keys = np.ones(len(ids), np.bool_)
        if not self._with_values:
            return keys
        of = part_of(ids)
        for part in self._with_values.intersection(np.unique(of).tolist()):
            if self.whole("chunks", part) is None:
                continue
            if part not in self._keys:
                self._keys[part] = np.packbits(parts.read_key(self.store, part))
            mine = of == part
            rows = row_of(ids[mine])
            keys[mine] = (self._keys[part][rows >> 3] << (rows & 7) & 0x80) > 0
        return keys


def is_within(store: Store, entry: FileEntry, metadata: Mapping[bytes, bytes] | None) -> bool:
    """Whether the ids in a neighbour table are chunks of the store that it lies in; ``metadata`` is that of its file.

    A copy of a store has the same uuid, and goes its own way: the table's record knows where the database was.
    """
    if (metadata or {}).get(b"retrotool.database", b"") != store.identity.uuid.encode():
        return False
    record = store.state.records.get(f"neighbours:{FileName.parse(entry.path).name}", {})
    return bool(record.get("within", True))


def check_chunk_ids(checked: Checked, ids: Ids, what: str) -> bool:
    """Note if any of ``ids`` is not a row of a part; whether all are."""
    limit = checked.rows
    part = np.clip(part_of(ids), 0, len(limit) - 1)
    known = (ids >= 0) & (part_of(ids) < len(limit)) & (row_of(ids) < limit[part])
    if not known.all():
        checked.problems.append(f"{what}: {int((~known).sum()):,} ids are no chunks of the store")
    return bool(known.all())
