"""A store as one process sees it: its identity, its state at one commit, and the way to commit.

``Store.open`` folds the newest checkpoint and the commits after it (30,000 parts in well under a second, see
``benchmarks/open_store.py``). ``refresh`` takes in newer commits; ``commit`` is optimistic: it builds a draft on the
newest state, tries to append it, and builds again if another writer came first.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import os
import random
import re
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from retrotool.errors import ConflictError, CorruptError, ErasedError, LostRunError, UsageError
from retrotool.store import disk, identity, leases, log, paths
from retrotool.store.identity import Identity, TokenizerIdentity
from retrotool.store.leases import Run
from retrotool.store.log import Draft, FileEntry, is_there
from retrotool.store.paths import FileName
from retrotool.store.state import State, decode_checkpoint, encode_checkpoint
from retrotool.store.storage import Sink, Storage, file_sha256, storage_at, where
from retrotool.store.sums import SUMS, BlockSums, has_sums, with_sums

CHECKPOINT_EVERY = 256
CHECKPOINT_PATH = re.compile(r"checkpoints/(\d+)-[0-9a-f]{16}\.json")
FENCE = "fenced:"
"""Before the id of a run that can't commit any more, among the records."""
_BACKOFF_SECONDS = 0.002
_ATTEMPTS = 20
"""How often what other processes have overtaken is begun."""
_Result = TypeVar("_Result")


def retry_overtaken(
    attempt: Callable[[], _Result], renew: Callable[[], object] = lambda: None, attempts: int = _ATTEMPTS
) -> _Result:
    """Return ``attempt()``; ``renew`` and try again, ``attempts`` times in all, while commits of others make it fail.

    A commit that replaces or erases a file under its reader is an ``ErasedError`` (``Store.reading``), one that a
    draft does not go with a ``ConflictError``. ``renew`` moves to the newest commits, and returns what tells these
    from older ones: a conflict that comes again although nothing was committed since is raised, as is a
    ``CorruptError``, which is damage.
    """
    seen: object = None
    for _ in range(attempts - 1):
        try:
            return attempt()
        except (ErasedError, ConflictError) as error:
            before, seen = seen, renew()
            if isinstance(error, ConflictError) and seen == before:
                raise
    return attempt()


class Store:
    """An open store. ``state`` is its view; it changes only by ``refresh`` and ``commit``.

    ``genesis`` is the SHA-256 of ``store.json``, the parent of commit 0.
    """

    def __init__(self, storage: Storage, identity: Identity, genesis: str, state: State) -> None:
        self.storage = storage
        self.identity = identity
        self.genesis = genesis
        self.state = state

    @classmethod
    def open(cls, place: str | os.PathLike[str] | Storage) -> Store:
        """Open the store at its newest commit; ``StoreNotFoundError`` if there is none."""
        storage = storage_at(place)
        found, genesis = identity.read_identity(storage)
        state = newest_checkpoint(storage) or State(-1, genesis)
        store = cls(storage, found, genesis, state)
        # Listed before it is read: commits are made in order, so all up to the last one listed are there.
        last = log.last_number(storage, state.number)
        if last > store.refresh().number:
            # Without the commits behind the gap, what they purged would come back.
            missing, newest = (store.where(log.commit_path(number)) for number in (store.state.number + 1, last))
            raise CorruptError(
                f"{missing} is missing, and there are commits after it, up to {log.commit_path(last)}",
                f"Bring it back from a copy; or, if {newest} is not a commit of this store, move that out of it.",
            )
        return store

    @classmethod
    def create(
        cls,
        place: str | os.PathLike[str] | Storage,
        tokenizer: TokenizerIdentity,
        tokenizer_json: bytes,
        chunk_length: int,
    ) -> Store:
        """Make a store, or open the one that another process made meanwhile."""
        storage = storage_at(place)
        identity.create_identity(storage, tokenizer, tokenizer_json, chunk_length)
        return cls.open(storage)

    @property
    def place(self) -> str:
        """The store as messages and command lines name it."""
        return self.storage.place

    @property
    def uri(self) -> str:
        """The store as any process of any folder can find it."""
        return self.storage.uri

    def where(self, path: str) -> str:
        """A file of the store, for a person."""
        return where(self.storage, path)

    def refresh(self) -> State:
        """Fold the commits made since, and return the state."""
        self.state = self.state.fold(log.read_after(self.storage, self.state.number, self.state.head))
        return self.state

    def at(self, number: int) -> Store:
        """The store as it was after commit ``number``; what has left it since can't be read any more.

        ``CorruptError`` if there is no such commit.
        """
        if number == self.state.number:
            return self
        state = newest_checkpoint(self.storage, most=number) or State(-1, self.genesis)
        commits = log.read_after(self.storage, state.number, state.head)
        state = state.fold(itertools.islice(commits, number - state.number))
        if state.number != number:
            raise CorruptError(f"{self.where(log.commit_path(number))} is missing", "Bring it back from a copy.")
        return Store(self.storage, self.identity, self.genesis, state)

    def check_there(self, entry: FileEntry) -> None:
        """Check a file of this view against its size.

        ``ErasedError`` if a newer commit removed it, ``CorruptError`` if it is missing or of another size.
        """
        found = self.storage.stat(entry.path)
        if found is None:
            if not Store.open(self.storage).state.has(entry.path):
                raise ErasedError(
                    f"{entry.path} was replaced, or erased, after this reader opened the store",
                    "Open the store again: run the same command again.",
                )
            raise self.corrupt(f"{self.where(entry.path)} is missing")
        if found.size != entry.bytes:
            raise self.corrupt(f"{self.where(entry.path)} has {found.size:,} bytes, the log says {entry.bytes:,}")

    @contextlib.contextmanager
    def reading(self, entry: FileEntry) -> Iterator[Storage]:
        """Give the storage to what opens and reads a file of this view. Errors are as of ``check_there``.

        What fails because a newer commit removed the file after it was looked up is an ``ErasedError``, too.
        """
        self.check_there(entry)
        disk.announce("read", Path(self.where(entry.path)))
        try:
            yield self.storage
        except Exception:
            self.check_there(entry)
            raise

    def check_sum(self, entry: FileEntry) -> None:
        """Read a file of this view; ``CorruptError`` if its SHA-256 is not what the log says. Else as ``reading``."""
        with self.reading(entry) as storage:
            sums = BlockSums()
            if file_sha256(storage, entry.path, sums.update if has_sums(entry.path) else None) != entry.sha256:
                raise self.corrupt(f"{self.where(entry.path)}: its SHA-256 is not what the log says")
            if has_sums(entry.path):
                beside = entry.path + SUMS
                if storage.stat(beside) is None or storage.get(beside) != sums.content():
                    raise self.corrupt(f"{self.where(beside)} is missing, or not the sums of its file")

    def write(self, name: FileName, write: Callable[[Sink], int], *, about: dict[str, Any] | None = None) -> FileEntry:
        """Write a new file, by ``write(sink)``, which returns the number of rows; return its entry.

        It counts once a commit names it. After any error nothing has changed.
        """
        sums = BlockSums()

        def write_summed(sink: Sink) -> int:
            sink.taps += [sums.update] if has_sums(name.path) else []
            return write(sink)

        sink, rows = self.storage.put(name.path, name.run, write_summed)
        if has_sums(name.path):
            try:
                self.storage.put(name.path + SUMS, name.run, lambda beside: beside.write(sums.content()))
            except BaseException:
                self.storage.delete([name.path])
                raise
        return FileEntry(name.path, name.slot, rows, sink.size, sink.sha256, about)

    def corrupt(self, what: str) -> CorruptError:
        """An error that says ``what`` is wrong, and how to see whether anything else is."""
        return CorruptError(what, f"See what else is wrong: {shlex.join(['retrotool', 'verify', self.place])}")

    def renew(self) -> int:
        """Move to the newest commit, and return its number; for ``retry_overtaken``."""
        return self.refresh().number

    def tokenizer_json(self) -> bytes:
        """The tokenizer file's bytes, checked against the hash that the store is bound to."""
        own = self.identity.tokenizer
        data = self.storage.get(own.file) if self.storage.stat(own.file) is not None else b""
        if hashlib.sha256(data).hexdigest() != own.sha256:
            raise CorruptError(
                f"{self.where(own.file)} is missing, or not the tokenizer this store was made with",
                "Put the original file there.",
            )
        return data

    def commit(self, run: Run, build: Callable[[State], Draft | None]) -> State:
        """Commit what ``build`` makes of the newest state; return the state that includes it.

        ``build`` is called again whenever another writer was first, so it must decide from the state it is given;
        it returns None if there is nothing (any more) to commit, and raises ``ConflictError`` if its work was
        overtaken. Files that the draft removes are unlinked once it is committed; a kill in between leaves them to
        clean-up. ``CorruptError`` if one of them is a symbolic link, ``LostRunError`` if another process took the run
        for dead, or a file that the draft adds is missing or of another size: nothing is committed then.
        """
        attempt = 0
        while True:
            state = self.refresh()
            if FENCE + run.id in state.records:
                raise LostRunError(f"{self.place}: another process took this run for dead")
            draft = build(state)
            if draft is None:
                return state
            state.check(draft)
            for path in draft.remove:
                self.storage.stat(path)  # refuses what must not be removed
            if self._append(run, state, draft):
                self.storage.delete(path for removed in draft.remove for path in with_sums(removed))
                if state.number + 1 > 0 and (state.number + 1) % CHECKPOINT_EVERY == 0:
                    self._write_checkpoint(run)
                return self.refresh()
            attempt += 1
            # Contending writers would otherwise keep meeting at the same number.
            time.sleep(random.uniform(0, _BACKOFF_SECONDS * min(attempt, 32)))  # noqa: S311

    def _append(self, run: Run, state: State, draft: Draft) -> bool:
        try:
            leases.renew(self.storage, run.id)
            _check_files(self.storage, draft)
            return log.append(self.storage, run.id, state.number + 1, state.head, draft)
        except (FileNotFoundError, LostRunError) as error:
            if self.refresh().number > state.number:
                return False  # the writer that came first has committed these files and removed their staged names
            if isinstance(error, LostRunError):
                raise
            raise LostRunError(f"{error.filename} is to be committed, and is missing") from error

    def _write_checkpoint(self, run: Run) -> None:
        """Write the folded state, and remove all older checkpoints but the last."""
        self.refresh()
        path = f"checkpoints/{self.state.number:08d}-{paths.new_token(run.id)}.json"
        self.storage.put_if_absent(path, run.id, encode_checkpoint(self.state))
        self.storage.delete(old for _, old in checkpoint_files(self.storage)[2:])


def checkpoint_files(storage: Storage) -> list[tuple[int, str]]:
    """Checkpoint files and the commits that they say to be of, newest first."""
    found = (CHECKPOINT_PATH.fullmatch(info.path) for info in storage.list("checkpoints/"))
    return sorted(((int(match[1]), match[0]) for match in found if match), reverse=True)


def newest_checkpoint(storage: Storage, most: float = math.inf) -> State | None:
    """The state of the newest whole checkpoint, up to commit ``most``, that the log still goes with; None without."""
    for _, path in checkpoint_files(storage):
        try:
            state = decode_checkpoint(storage.get(path))
        except (FileNotFoundError, CorruptError):
            continue
        # A checkpoint is believed only while the log still holds the commit it was made at.
        if state is None or state.number > most:
            continue
        if (commit := log.read(storage, state.number)) and commit.sha256 == state.head:
            return state
    return None


def _check_files(storage: Storage, draft: Draft) -> None:
    lost = next((entry.path for entry in draft.add if not is_there(storage, entry)), None)
    if lost is not None:
        raise LostRunError(f"{where(storage, lost)} is to be committed, and is missing or of another size")


def check_compatible(one: Store, other: Store, consequence: str, advice: str, *, lengths: bool = True) -> None:
    """``UsageError`` unless two stores have one tokenizer and, with ``lengths``, chunks of one length.

    ``consequence`` says what can't be done then, and ``advice`` what to do.
    """
    ours, theirs = one.identity, other.identity
    if ours.tokenizer.sha256 != theirs.tokenizer.sha256:
        raise UsageError(
            f"{one.place} and {other.place} have different tokenizers, {ours.tokenizer.name} and "
            f"{theirs.tokenizer.name}: {consequence}",
            advice,
        )
    if lengths and ours.chunk_length != theirs.chunk_length:
        raise UsageError(
            f"{one.place} has chunks of {ours.chunk_length} tokens, {other.place} of {theirs.chunk_length}: "
            f"{consequence}",
            advice,
        )
