"""A store as one process sees it: its identity, its state at one commit, and how to commit.

``Store.open`` folds the newest checkpoint and the commits after it (30,000 parts in well under a second, see
``benchmarks/open_store.py``). ``refresh`` applies newer commits. ``commit`` is optimistic: it builds a draft
on the newest state, tries to append it, and builds it again if another writer came first.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import random
import re
import shlex
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from retrotool.errors import ConflictError, CorruptError, ErasedError, LostRunError, StorageError, UsageError
from retrotool.read_ahead import ahead
from retrotool.store import disk, identity, leases, log, paths
from retrotool.store.cache import FileCache
from retrotool.store.identity import Identity, TokenizerIdentity
from retrotool.store.leases import Run
from retrotool.store.log import Draft, FileEntry
from retrotool.store.paths import FileName
from retrotool.store.state import State, decode_checkpoint, encode_checkpoint
from retrotool.store.storage import BLOCK_BYTES, Place, Sink, Storage, get_if_there, storage_at, where
from retrotool.store.sums import SUMS, BlockSums, has_sums, with_sums

if TYPE_CHECKING:
    import pyarrow as pa

CHECKPOINT_EVERY = 256
CHECKPOINT_PATH = re.compile(r"checkpoints/(\d+)-[0-9a-f]{16}\.json")
FENCE = "fenced:"  # record prefix: the run whose id follows can't commit any more
_BACKOFF_SECONDS = 0.002
_T = TypeVar("_T")
_STOP_SECONDS = 1.0


def retry_overtaken(attempt: Callable[[], _T], renew: Callable[[], object] = lambda: None, attempts: int = 20) -> _T:
    """Return ``attempt()``; ``renew`` and retry, ``attempts`` times in all, while other commits make it fail.

    A commit that replaces or erases a file under its reader causes an ``ErasedError`` (``Store.reading``),
    one that a draft is incompatible with a ``ConflictError``. ``renew`` moves to the newest commit and
    returns its number. A conflict that recurs at the same number is raised, like damage (``CorruptError``).
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
    """An open store; only ``refresh`` and ``commit`` change ``state``. ``genesis`` is commit 0's parent."""

    def __init__(self, storage: Storage, identity: Identity, genesis: str, state: State) -> None:
        self.storage = storage
        self.place, self.uri = storage.place, storage.uri
        self.identity = identity
        self.genesis = genesis
        self.state = state
        self.cache = FileCache(storage, identity.uuid)
        self.reads_copies = False  # of tables, too, in a bucket: for work that reads files again, or in any order
        self._cleaned = -1  # the last commit whose removed files were removed from the cache, too

    @classmethod
    def open(cls, place: Place) -> Store:
        """Open the store at its newest commit; ``StoreNotFoundError`` if it does not exist."""
        storage = storage_at(place)
        found, genesis = identity.read_identity(storage)
        state = newest_checkpoint(storage) or State(-1, genesis)
        store = cls(storage, found, genesis, state)
        copies = store.cache.names()
        # Listed before reading: commits are made in order, so all up to the last one listed exist.
        last = log.last_number(storage, state.number)
        store.state = state.fold(log.read_after(storage, state.number, state.head, last))
        if last > store.state.number:
            # Without the commits after the gap, text that they purged would reappear.
            missing, newest = (store.where(log.commit_path(number)) for number in (store.state.number + 1, last))
            raise CorruptError(
                f"{missing} is missing, and there are commits after it, up to {log.commit_path(last)}",
                f"Restore it from a backup. If {newest} is not a commit of this store, move that file elsewhere.",
            )
        store._clean_cache(copies)
        return store

    @classmethod
    def create(cls, place: Place, tokenizer: TokenizerIdentity, tokenizer_json: bytes, chunk_length: int) -> Store:
        """Create a store, or open the one that another process just created."""
        storage = storage_at(place)
        identity.create_identity(storage, tokenizer, tokenizer_json, chunk_length)
        return cls.open(storage)

    def where(self, path: str) -> str:
        """Return a file's path for messages."""
        return where(self.storage, path)

    def refresh(self) -> State:
        """Apply newer commits, remove copies of files that they removed, and return the state."""
        copies = self.cache.names()  # listed first: what is copied later is newer
        self.state = self.state.fold(log.read_after(self.storage, self.state.number, self.state.head))
        self._clean_cache(copies)
        return self.state

    def _clean_cache(self, copies: Collection[str]) -> None:
        """Remove those copies whose files are not live, once for each state."""
        if copies and self._cleaned < self.state.number:
            self.cache.remove_others(copies, {entry.sha256 for entry in self.state.files()})
            self._cleaned = self.state.number

    def at(self, number: int) -> Store:
        """Return the store as of commit ``number``; files removed since can't be read."""
        if number == self.state.number:
            return self
        state = newest_checkpoint(self.storage, most=number) or State(-1, self.genesis)
        commits = log.read_after(self.storage, state.number, state.head, number)
        state = state.fold(itertools.islice(commits, number - state.number))
        if state.number != number:
            raise CorruptError(f"{self.where(log.commit_path(number))} is missing", "Restore it from a backup.")
        return Store(self.storage, self.identity, self.genesis, state)

    def check_there(self, entry: FileEntry) -> None:
        """Check a file's size; ``ErasedError`` if a newer commit removed it, otherwise ``CorruptError``."""
        found = self.storage.stat(entry.path)
        if found is None:
            if not Store.open(self.storage).state.has(entry.path):
                advice = "Run the same command again; in Python, open the store again."
                raise ErasedError(f"{entry.path} was replaced or erased after this reader opened the store", advice)
            raise self.corrupt(f"{self.where(entry.path)} is missing")
        if found.size != entry.bytes:
            raise self.corrupt(f"{self.where(entry.path)} has {found.size:,} bytes, the log says {entry.bytes:,}")

    @contextlib.contextmanager
    def reading(self, entry: FileEntry) -> Iterator[Storage]:
        """Yield the storage for reading a file; if that fails, raise as ``check_there`` does."""
        if not self.storage.latent:
            self.check_there(entry)
        disk.announce("read", Path(self.where(entry.path)))
        try:
            yield self.storage
        except Exception:
            self.check_there(entry)
            raise

    def check_sum(self, entry: FileEntry) -> None:
        """Read a file of this view; ``CorruptError`` if its SHA-256 is not the one in the log."""
        with self.reading(entry) as storage:
            sums, digest = BlockSums(), hashlib.sha256()
            for block in self._blocks(entry):
                digest.update(block)
                if has_sums(entry.path):
                    sums.update(memoryview(block))
            if digest.hexdigest() != entry.sha256:
                raise self.corrupt(f"{self.where(entry.path)}: its SHA-256 is not what the log says")
            beside = entry.path + SUMS
            if has_sums(entry.path) and get_if_there(storage, beside) != sums.content():
                raise self.corrupt(f"{self.where(beside)} is missing or does not match its file")

    def _blocks(self, entry: FileEntry) -> Iterator[bytes]:
        """Yield a file's bytes; with ``reads_copies`` those of a new copy, which later reads use."""
        if self.reads_copies and self.storage.latent:
            self.cache.remove(entry)
            with contextlib.suppress(StorageError), self.cache.file(entry) as path, path.open("rb") as file:
                while block := file.read(BLOCK_BYTES):
                    yield block
                return
        yield from self.storage.blocks(entry.path)

    @property
    def is_local(self) -> bool:
        """Whether the store's files can be mapped, so that no copies are needed."""
        return not self.storage.latent

    @contextlib.contextmanager
    def local(self, entry: FileEntry) -> Iterator[Path]:
        """Yield a file of this machine with an entry's bytes, to be mapped: the store's own, or a copy."""
        own = self.storage.local(entry.path)
        with contextlib.nullcontext(own) if own is not None else self.cache.file(entry) as path:
            yield path

    @contextlib.contextmanager
    def opened(self, entry: FileEntry) -> Iterator[pa.NativeFile]:
        """Yield a file for random access; see ``reads_copies``."""
        import pyarrow as pa

        with contextlib.ExitStack() as stack:
            copy: Path | None = None
            if self.reads_copies and self.storage.latent:
                with contextlib.suppress(StorageError):  # without room it is read in the bucket
                    copy = stack.enter_context(self.cache.file(entry))
            yield self.storage.open(entry.path, entry.bytes) if copy is None else pa.memory_map(str(copy))

    def copied_ahead(self, items: Iterable[_T], entry_of: Callable[[_T], FileEntry | None]) -> Iterable[_T]:
        """Iterate over ``items``; in a bucket, the files of the next two are copied while one is in use.

        What fails here, or does not fit beside what was used lately, is left to the reader of the file.
        """

        def copied() -> Iterator[_T]:
            for item in items:
                if (entry := entry_of(item)) is not None:
                    with contextlib.suppress(CorruptError, StorageError, OSError), self.cache.file(entry, needed=False):
                        pass
                yield item

        return items if self.is_local else ahead(copied(), 1, patience=_STOP_SECONDS)

    def write(self, name: FileName, write: Callable[[Sink], int], *, about: dict[str, Any] | None = None) -> FileEntry:
        """Write a new file by ``write(sink)``, which returns its rows; it counts once a commit names it."""
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
        """Return an error with the advice to run ``verify``."""
        verify = shlex.join(["retrotool", "verify", self.place])
        return CorruptError(what, f"See what else is damaged, and what repairs it: {verify}")

    def renew(self) -> int:
        """Move to the newest commit and return its number, for ``retry_overtaken``."""
        return self.refresh().number

    def tokenizer_json(self) -> bytes:
        """Return the tokenizer file's bytes, checked against the store's hash."""
        own = self.identity.tokenizer
        data = get_if_there(self.storage, own.file) or b""
        if hashlib.sha256(data).hexdigest() != own.sha256:
            advice = "Restore the original file."
            raise CorruptError(f"{self.where(own.file)} is missing or not this store's tokenizer", advice)
        return data

    def commit(self, run: Run, build: Callable[[State], Draft | None]) -> State:
        """Commit what ``build`` makes of the newest state; return the state that includes it.

        ``build`` is called again if another writer was first, so it must decide from the state it is given.
        It returns None if nothing is left to commit, and raises ``ConflictError`` if its work was overtaken.
        After the commit files that the draft removes are deleted; a kill in between leaves them to clean-up.
        Nothing is committed on an error: ``CorruptError`` if a file to remove is a symbolic link,
        ``LostRunError`` if the run was taken for dead, or a file to add is missing or has another size.
        """
        collisions = itertools.count(1)
        while True:
            state = self.refresh()
            if FENCE + run.id in state.records:
                raise LostRunError(f"{self.place}: another process took this run for dead")
            draft = build(state)
            if draft is None:
                return state
            if reason := state.conflict(draft):
                raise ConflictError(f"{draft.kind}: {reason}", "Run the same command again.")
            if not self.storage.latent:  # there are no symbolic links in a bucket
                for path in draft.remove:
                    self.storage.stat(path)  # refuses them
            if self._append(run, state, draft):
                with contextlib.suppress(StorageError, OSError):  # it is committed: clean-up does the rest
                    self.storage.delete(path for removed in draft.remove for path in with_sums(removed))
                    if state.number + 1 > 0 and (state.number + 1) % CHECKPOINT_EVERY == 0:
                        self.write_checkpoint(run)
                return self.refresh()
            # Otherwise contending writers would keep colliding.
            time.sleep(random.uniform(0, _BACKOFF_SECONDS * min(next(collisions), 32)))  # noqa: S311

    def _append(self, run: Run, state: State, draft: Draft) -> bool:
        try:
            leases.renew(self.storage, run.id)
            lost = log.first_missing(self.storage, draft.add)
            if lost is not None:
                raise LostRunError(f"{self.where(lost)} is to be committed, but is missing or has another size")
            return log.append(self.storage, run.id, state.number + 1, state.head, draft)
        except (FileNotFoundError, LostRunError) as error:
            if self.refresh().number > state.number:
                return False  # the writer that came first committed these files and removed their staged names
            if isinstance(error, LostRunError):
                raise
            raise LostRunError(f"{error.filename} is to be committed, but is missing") from error

    def write_checkpoint(self, run: Run) -> None:
        """Write the folded state; remove all older checkpoints but the last."""
        self.refresh()
        path = f"checkpoints/{self.state.number:08d}-{paths.new_token(run.id)}.json"
        self.storage.put_if_absent(path, run.id, encode_checkpoint(self.state))
        self.storage.delete(old for _, old in checkpoint_files(self.storage)[2:])


def checkpoint_files(storage: Storage) -> list[tuple[int, str]]:
    """Return the commit numbers in the names of checkpoint files, and their paths, newest first."""
    found = (CHECKPOINT_PATH.fullmatch(info.path) for info in storage.list("checkpoints/"))
    return sorted(((int(match[1]), match[0]) for match in found if match), reverse=True)


def newest_checkpoint(storage: Storage, most: float = math.inf) -> State | None:
    """Return the state of the newest valid checkpoint up to commit ``most``, or None."""
    for _, path in checkpoint_files(storage):
        try:
            state = decode_checkpoint(storage.get(path))
        except (FileNotFoundError, CorruptError):
            continue
        if state is not None and state.number <= most:
            commit = log.read(storage, state.number)
            if commit is not None and commit.sha256 == state.head:  # the log still has the checkpoint's commit
                return state
    return None


def check_compatible(one: Store, other: Store, consequence: str, advice: str, *, lengths: bool = True) -> None:
    """Raise ``UsageError`` unless two stores have equal tokenizers and, with ``lengths``, chunk lengths."""
    ours, theirs = one.identity, other.identity
    if ours.tokenizer.sha256 != theirs.tokenizer.sha256:
        names = f"{ours.tokenizer.name} and {theirs.tokenizer.name}"
        raise UsageError(f"{one.place} and {other.place} have different tokenizers, {names}: {consequence}", advice)
    if lengths and ours.chunk_length != theirs.chunk_length:
        lengths_differ = f"has chunks of {ours.chunk_length} tokens, {other.place} of {theirs.chunk_length}"
        raise UsageError(f"{one.place} {lengths_differ}: {consequence}", advice)
