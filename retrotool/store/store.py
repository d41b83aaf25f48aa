"""A store as one process sees it: its identity, its state at one commit, and the way to commit.

``Store.open`` folds the newest checkpoint and the commits after it (30,000 parts in well under a second, see
``benchmarks/open_store.py``). ``refresh`` takes in newer commits; ``commit`` is optimistic: it builds a draft on the
newest state, tries to append it, and builds again if another writer came first.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from retrotool.errors import ConflictError, CorruptError, ErasedError, LostRunError, UsageError
from retrotool.store import atomic, disk, identity, log, paths
from retrotool.store.atomic import FileEntry
from retrotool.store.identity import Identity, TokenizerIdentity
from retrotool.store.log import Draft
from retrotool.store.runs import Run
from retrotool.store.state import State, decode_checkpoint, encode_checkpoint

CHECKPOINT_EVERY = 256
CHECKPOINT_NAME = re.compile(r"(\d+)-[0-9a-f]{16}\.json")
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

    def __init__(self, root: Path, identity: Identity, genesis: str, state: State) -> None:
        self.root = root
        self.identity = identity
        self.genesis = genesis
        self.state = state

    @classmethod
    def open(cls, root: str | Path) -> Store:
        """Open the store at its newest commit; ``StoreNotFoundError`` if there is none."""
        path = Path(root)
        found, genesis = identity.read_identity(path)
        state = newest_checkpoint(path) or State(-1, genesis)
        store = cls(path, found, genesis, state)
        # Listed before it is read: commits are made in order, so all up to the last one listed are there.
        last = log.last_number(path)
        if last > store.refresh().number:
            # Without the commits behind the gap, what they purged would come back.
            missing, newest = log.commit_path(path, store.state.number + 1), log.commit_path(path, last)
            raise CorruptError(
                f"{missing} is missing, and there are commits after it, up to {newest.name}",
                f"Bring it back from a copy; or, if {newest} is not a commit of this store, move that out of it.",
            )
        return store

    @classmethod
    def create(cls, root: str | Path, tokenizer: TokenizerIdentity, tokenizer_json: bytes, chunk_length: int) -> Store:
        """Make a store, or open the one that another process made meanwhile."""
        identity.create_identity(Path(root), tokenizer, tokenizer_json, chunk_length)
        return cls.open(root)

    def refresh(self) -> State:
        """Fold the commits made since, and return the state."""
        self.state = self.state.fold(log.read_after(self.root, self.state.number, self.state.head))
        return self.state

    def at(self, number: int) -> Store:
        """The store as it was after commit ``number``; what has left it since can't be read any more.

        ``CorruptError`` if there is no such commit.
        """
        if number == self.state.number:
            return self
        state = newest_checkpoint(self.root, most=number) or State(-1, self.genesis)
        commits = log.read_after(self.root, state.number, state.head)
        state = state.fold(itertools.islice(commits, number - state.number))
        if state.number != number:
            raise CorruptError(f"{log.commit_path(self.root, number)} is missing", "Bring it back from a copy.")
        return Store(self.root, self.identity, self.genesis, state)

    def path(self, entry: FileEntry) -> Path:
        """The absolute path of a file of this view, checked against its size.

        ``ErasedError`` if a newer commit removed it, ``CorruptError`` if it is missing or of another size.
        """
        path = paths.inside(self.root, entry.path)
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            if not Store.open(self.root).state.has(entry.path):
                raise ErasedError(
                    f"{entry.path} was replaced, or erased, after this reader opened the store",
                    "Open the store again: run the same command again.",
                ) from None
            raise self.corrupt(f"{path} is missing") from None
        if size != entry.bytes:
            raise self.corrupt(f"{path} has {size:,} bytes, the log says {entry.bytes:,}")
        return path

    @contextlib.contextmanager
    def reading(self, entry: FileEntry) -> Iterator[Path]:
        """Give the path of a file of this view to what opens and reads it. Errors are as of ``path``.

        What fails because a newer commit removed the file after it was looked up is an ``ErasedError``, too.
        """
        path = self.path(entry)
        disk.announce("read", path)
        try:
            yield path
        except Exception:
            self.path(entry)
            raise

    def check_sum(self, entry: FileEntry) -> None:
        """Read a file of this view; ``CorruptError`` if its SHA-256 is not what the log says. Errors as of ``path``."""
        with self.reading(entry) as path:
            if atomic.file_sha256(path) != entry.sha256:
                raise self.corrupt(f"{path}: its SHA-256 is not what the log says")

    def corrupt(self, what: str) -> CorruptError:
        """An error that says ``what`` is wrong, and how to see whether anything else is."""
        return CorruptError(what, f"See what else is wrong: retrotool verify {self.root}")

    def renew(self) -> int:
        """Move to the newest commit, and return its number; for ``retry_overtaken``."""
        return self.refresh().number

    def tokenizer_json(self) -> bytes:
        """The tokenizer file's bytes, checked against the hash that the store is bound to."""
        path = self.root / self.identity.tokenizer.file
        if not path.exists() or atomic.file_sha256(path) != self.identity.tokenizer.sha256:
            raise CorruptError(
                f"{path} is missing, or not the tokenizer this store was made with", "Put the original file there."
            )
        return path.read_bytes()

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
            draft = build(state)
            if draft is None:
                return state
            state.check(draft)
            removed = [paths.inside(self.root, path) for path in draft.remove]
            if self._append(run, state, draft):
                disk.unlink_all(removed)
                if state.number + 1 > 0 and (state.number + 1) % CHECKPOINT_EVERY == 0:
                    self._write_checkpoint(run)
                return self.refresh()
            attempt += 1
            # Contending writers would otherwise keep meeting at the same number.
            time.sleep(random.uniform(0, _BACKOFF_SECONDS * min(attempt, 32)))  # noqa: S311

    def _append(self, run: Run, state: State, draft: Draft) -> bool:
        try:
            with disk.told(self.root):
                _link(self.root, draft)
                _check_files(self.root, draft)
                won = log.append(self.root, run.id, state.number + 1, state.head, draft)
                if not won:
                    _unlink(self.root, draft)
                return won
        except (FileNotFoundError, LostRunError) as error:
            _unlink(self.root, draft)
            if self.refresh().number > state.number:
                return False  # the writer that came first has committed these files and removed their staged names
            if isinstance(error, LostRunError):
                raise
            raise LostRunError(f"{error.filename} is to be committed, and is missing") from error

    def _write_checkpoint(self, run: Run) -> None:
        """Write the folded state, and remove all older checkpoints but the last."""
        self.refresh()
        folder = self.root / "checkpoints"
        name = f"{self.state.number:08d}-{paths.new_token(run.id)}.json"
        atomic.put_if_absent(folder / name, paths.new_token(run.id), encode_checkpoint(self.state))
        for _, old in checkpoint_files(self.root)[2:]:
            disk.unlink(old)


def checkpoint_files(root: Path) -> list[tuple[int, Path]]:
    """Checkpoint files and the commits that they say to be of, newest first."""
    folder = paths.inside(root, "checkpoints")
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := CHECKPOINT_NAME.fullmatch(path.name))]
    return sorted(found, reverse=True)


def newest_checkpoint(root: Path, most: float = math.inf) -> State | None:
    """The state of the newest whole checkpoint, up to commit ``most``, that the log still goes with; None without."""
    for _, path in checkpoint_files(root):
        with contextlib.suppress(FileNotFoundError):
            state = decode_checkpoint(path.read_bytes())
            # A checkpoint is believed only while the log still holds the commit it was made at.
            if state is None or state.number > most:
                continue
            if (commit := log.read(root, state.number)) and commit.sha256 == state.head:
                return state
    return None


def _link(root: Path, draft: Draft) -> None:
    """Make a draft's links, durable.

    After an error nobody knows whether the commit was made, so they stay: clean-up takes those that no commit names.
    """
    folders = set()
    for source, target in draft.links:
        path = paths.inside(root, target)
        disk.make_directory(path.parent)
        disk.link(paths.inside(root, source), path)
        folders.add(path.parent)
    for folder in folders:
        disk.fsync_directory(folder)


def _check_files(root: Path, draft: Draft) -> None:
    lost = next((entry.path for entry in draft.add if not atomic.is_there(root, entry)), None)
    if lost is not None:
        raise LostRunError(f"{root / lost} is to be committed, and is missing or of another size")


def _unlink(root: Path, draft: Draft) -> None:
    """Take the links of a draft back that another writer came before."""
    for _, target in draft.links:
        disk.unlink(paths.inside(root, target))


def check_compatible(one: Store, other: Store, consequence: str, advice: str, *, lengths: bool = True) -> None:
    """``UsageError`` unless two stores have one tokenizer and, with ``lengths``, chunks of one length.

    ``consequence`` says what can't be done then, and ``advice`` what to do.
    """
    ours, theirs = one.identity, other.identity
    if ours.tokenizer.sha256 != theirs.tokenizer.sha256:
        raise UsageError(
            f"{one.root} and {other.root} have different tokenizers, {ours.tokenizer.name} and "
            f"{theirs.tokenizer.name}: {consequence}",
            advice,
        )
    if lengths and ours.chunk_length != theirs.chunk_length:
        raise UsageError(
            f"{one.root} has chunks of {ours.chunk_length} tokens, {other.root} of {theirs.chunk_length}: "
            f"{consequence}",
            advice,
        )
