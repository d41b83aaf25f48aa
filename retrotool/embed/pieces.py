"""Pieces of a part that is being embedded: finished blocks of rows, staged about once a minute.

An interrupted run loses only what it computed since the last piece. The next run takes rows from pieces of
the same chunks, encoder and settings, and computes the others in the same batches, so that vectors are equal
to the bit. Folding drops pieces once their part is committed, or its chunks are replaced, as by an erase.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from retrotool.engine.task import task_key
from retrotool.errors import CorruptError, ErasedError
from retrotool.store import staging
from retrotool.store.paths import FileName
from retrotool.store.staging import Staged
from retrotool.store.store import Store
from retrotool.store.vectors import MappedVectors, read_vectors, write_vector_blocks

PIECE_SECONDS = 60.0
_MOST_BYTES = 1 << 30  # held for a piece; a device that computes more in a minute needs about that for a part
Vectors = npt.NDArray[np.float16]


class PartPieces:
    """The pieces of the part with the chunks file ``path``; ``new_name`` names the file of another one."""

    def __init__(
        self, store: Store, path: str, settings: Mapping[str, Any], cosine: float, new_name: Callable[[], FileName]
    ) -> None:
        self._store, self._path, self._settings, self._new_name = store, path, settings, new_name
        self._found: list[tuple[int, int, MappedVectors]] = []
        self.cosine = cosine  # the least of those that computed a row
        for staged in staging.read_staged(store.storage).values():
            if staged.piece is not None and staged.reads == (path,) and staged.settings == settings:
                with contextlib.suppress(CorruptError, ErasedError):  # else its rows are computed again
                    vectors = read_vectors(store, staged.add[0])
                    np.asarray(vectors)  # checks all blocks
                    self._found.append((*staged.piece, vectors))
                    self.cosine = min(self.cosine, float((staged.add[0].about or {})["cosine"]))
        self._held: list[Vectors] = []
        self._first, self._since = 0, time.monotonic()

    def rows(self, start: int, stop: int) -> Vectors | None:
        """Return rows [start, stop) of the part, float16 [n, d], if one piece has all of them."""
        for first, last, vectors in self._found:
            if first <= start and stop <= last + 1:
                return vectors[start - first : stop - first]
        return None

    def add(self, start: int, block: Vectors) -> None:
        """Keep a finished block, float16 [n, d], and stage those since the last piece once a minute."""
        held = sum(map(len, self._held))
        if self._held and start != self._first + held:  # what is between is in another piece
            self._stage()
        if not self._held:
            self._first = start
        self._held.append(block)
        if time.monotonic() - self._since >= PIECE_SECONDS:
            self._stage()
        elif (held + len(block)) * block[0].nbytes > _MOST_BYTES:
            self._held = []

    def _stage(self) -> None:
        rows = sum(map(len, self._held))
        piece = (self._first, self._first + rows - 1)
        entry = write_vector_blocks(self._store, self._new_name(), rows, self._held[0].shape[1], self._held)
        entry = replace(entry, about={"cosine": self.cosine})
        key = task_key("embed", {**self._settings, "piece": piece}, [self._path])
        run = FileName.parse(entry.path).run
        staged = Staged(key, "embed", run, self._settings, (self._path,), (entry,), piece=piece)
        staging.stage(self._store.storage, staged)
        self._held, self._since = [], time.monotonic()


def drop_pieces(store: Store, path: str) -> None:
    """Remove all pieces that were made from the chunks file ``path``."""
    gone = [one for one in staging.read_staged(store.storage).values() if one.piece is not None and path in one.reads]
    store.storage.delete(file for one in gone for file in one.files())
    store.storage.delete(staging.staged_path(one.task) for one in gone)  # last, as after a kill they name the files
