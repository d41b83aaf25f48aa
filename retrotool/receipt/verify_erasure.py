"""Check that no data of purged chunks is left in a store, by decoding its files; no bytes are searched.

The format is closed: the log names every file that can hold data of a chunk, and each kind of file
(``paths.DATA_KINDS``) has a check in ``CHECKS``.

- A check decodes the file. Rows of purged chunks must be zero or null; index lists and neighbour tables must
  not name them.
- Every decoded file must have the SHA-256 that the log has for it.
- Files that left the state (``PurgeHistory``) must be absent. Their folders are synced, so that they do not
  reappear after a power cut.
- Files that no commit names, and symbolic links, are listed and not decoded.

Cost: reading the parts of the purged chunks, the ids of all shards and all neighbour tables, twice (once for
SHA-256); one walk over the folders. Memory: one part or the ids of one list, and 150 bytes per path that the
log ever named.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from retrotool.engine.task import Report
from retrotool.errors import CorruptError, ErasedError, RetrotoolError, StorageError
from retrotool.index.index_records import RECALL, SHARD
from retrotool.index.searching import read_shard
from retrotool.purge.erase import leftovers_in_table
from retrotool.purge.purged_chunks import has_any
from retrotool.ranges import in_steps
from retrotool.store import gc, identity, leases, neighbour_tables, parts, staging
from retrotool.store.log import Commit, FileEntry
from retrotool.store.parts import Bools
from retrotool.store.storage import Storage
from retrotool.store.store import CHECKPOINT_PATH, Store
from retrotool.store.sums import with_sums, without_sums
from retrotool.store.tombstones import read_tombstones
from retrotool.store.vectors import read_vectors

_BLOCK_ROWS = 1 << 16
_OF_LOG = re.compile(rf"log/\d{{8,}}\.json|{CHECKPOINT_PATH.pattern}")

_NOTHING = np.zeros(0, np.bool_)
"""The result for a file that can't hold data of a purged chunk and is not counted."""


@dataclass(frozen=True, slots=True)
class KindChecked:
    """The live files of one kind: in ``files``, ``rows`` were checked and ``left`` still hold data.

    ``checked``: what was checked, or why files of this kind can't hold data of a chunk. Where an erase
    removes whole files, rows are files.
    """

    kind: str
    checked: str
    files: int
    rows: int
    left: int


@dataclass(frozen=True, slots=True)
class UnknownFile:
    """A file under the store that no commit names; ``path`` is relative to the store.

    ``link``: a symbolic link, which was not followed.
    """

    path: str
    bytes: int
    link: bool = False


@dataclass(frozen=True, slots=True)
class Erasure:
    """The result of checking the files of a store.

    * ``left``: for each file, the number of rows that still hold data of purged chunks.
    * ``damaged``: problems of files that can't be read or differ from the log.
    * ``replaced``: how many files left the state. ``present``: paths of those that still exist. ``synced``:
      the absence of the others is durable.
    * Not checked: ``unknown`` files, and ``in_progress`` files of running commands and tasks that wait for a
      commit.
    """

    kinds: tuple[KindChecked, ...]
    left: Mapping[str, int]
    damaged: tuple[str, ...]
    replaced: int
    present: tuple[str, ...]
    synced: bool
    unknown: tuple[UnknownFile, ...]
    in_progress: int


@dataclass(frozen=True, slots=True)
class CommitDigest:
    """A commit that purged or erased; ``time`` is UTC."""

    number: int
    kind: str
    time: str
    sha256: str
    files_added: int
    files_removed: int


class PurgeHistory:
    """The ``chunks`` of a purge, and what the log records; ``check_log`` calls ``note`` with each commit."""

    def __init__(self, store: Store, purge: str) -> None:
        self.store, self.chunks = store, read_tombstones(store, purge)
        self._record = f"purge:{purge}"
        self.erased: CommitDigest | None = None  # the commit after which nothing of the purge was left
        self.commits: list[CommitDigest] = []
        """The commit of the purge, and those of erases until it was erased."""
        self.removed: set[str] = set()  # paths of all files that ever left the state
        self.new: set[str] = set()  # paths of all files that were added after the erase was done
        self._places: set[tuple[str, str, str]] = set()

    def is_new(self, entry: FileEntry) -> bool:
        """Return whether a file was added after the erase was done, to a slot that was unused before."""
        return entry.path in self.new and entry.place not in self._places

    def note(self, commit: Commit) -> None:
        """Record the next commit."""
        self.removed.update(commit.remove)
        if self.erased is not None:
            self.new.update(entry.path for entry in commit.add)
            return
        record = commit.records.get(self._record)
        if commit.kind == "erase" if self.commits else record is not None:
            sizes = len(commit.add), len(commit.remove)
            self.commits.append(CommitDigest(commit.number, commit.kind, commit.time, commit.sha256, *sizes))
            if record is not None and record["erased"]:
                self.erased = self.commits[-1]
        if self.erased is None:
            self._places.update(entry.place for entry in commit.add)


def check_files(purged: PurgeHistory, report: Report) -> Erasure:
    """Check all files of a store; ``report`` is called with the bytes of each live file after its check.

    ``ErasedError`` if another process replaced a file of the view, so that the check must be repeated.
    """
    store = purged.store
    counts = {kind: np.zeros(3, np.int64) for kind in CHECKS}
    left: dict[str, int] = {}
    damaged: list[str] = []
    for entry in store.state.files():
        _, check = CHECKS[entry.kind]
        if check is not None and (entry.kind not in _BY_ROW or len(purged.chunks.rows(entry.part))):
            try:
                if len(holds := check(purged, entry)):
                    n = int(holds.sum())
                    counts[entry.kind] += 1, len(holds), n
                    left |= {entry.path: n} if n else {}
                    store.check_sum(entry)
            except ErasedError:
                raise
            except RetrotoolError as error:
                damaged.append(str(error).removeprefix(f"{store.place}/"))
            except (OSError, LookupError, ValueError, pa.ArrowException) as error:
                damaged.append(f"{entry.path}: can't be checked: {error}")
        report(entry.bytes)
    kinds = tuple(KindChecked(kind, CHECKS[kind][0], *found.tolist()) for kind, found in counts.items())
    removed = {path for one in purged.removed for path in with_sums(one)}
    present, synced, hidden = _check_removed(store.storage, removed)
    damaged += [problem.removeprefix(f"{store.place}/") for problem in hidden]
    unknown, in_progress = find_unknown(store, removed)
    return Erasure(kinds, left, tuple(damaged), len(removed), present, synced, unknown, in_progress)


def _check_documents(purged: PurgeHistory, entry: FileEntry) -> Bools:
    rows, part = purged.chunks.rows(entry.part), entry.part
    chunks = parts.read_parquet(purged.store, parts.part_entry(purged.store, "chunks", part), ["doc", "n_tokens"])
    doc, n_tokens = chunks["doc"].to_numpy(), np.array(chunks["n_tokens"].to_numpy())
    n_tokens[rows] = 0
    tokens = np.bincount(doc, weights=n_tokens).astype(np.int64)
    table = parts.read_documents(purged.store, part)
    holds: Bools = table["n_tokens"].to_numpy() != tokens
    for name in set(table.schema.names) - {"first_row", "n_chunks", "n_tokens"}:
        present = table[name].is_valid().to_numpy()
        holds |= present if name == "text_hash" else present & (tokens == 0)
    return np.asarray(holds[np.unique(doc[rows])])


def _check_chunks(purged: PurgeHistory, entry: FileEntry) -> Bools:
    rows = purged.chunks.rows(entry.part)
    chunks = parts.read_chunks(purged.store, entry.part)
    return np.asarray((chunks.n_tokens[rows] != 0) | chunks.tokens[rows].any(axis=1))


def _check_embeddings(purged: PurgeHistory, entry: FileEntry) -> Bools:
    rows, matrix = purged.chunks.rows(entry.part), read_vectors(purged.store, entry)
    return np.concatenate([matrix[some].any(axis=1) for some in in_steps(rows, _BLOCK_ROWS)])


def _check_index(purged: PurgeHistory, entry: FileEntry) -> Bools:
    if entry.slot == RECALL:
        return np.array([entry.path not in purged.new])
    if not entry.slot.startswith(SHARD):
        return _NOTHING
    shard = read_shard(purged.store, entry)
    return np.concatenate([_NOTHING, *(purged.chunks.contains(shard.ids(number)) for number in shard.numbers)])


def _check_neighbours(purged: PurgeHistory, entry: FileEntry) -> Bools:
    return np.concatenate([_NOTHING, *leftovers_in_table(purged.store, entry, purged.chunks, whole=True)])


def _check_edits(purged: PurgeHistory, entry: FileEntry) -> Bools:
    return neighbour_tables.edits_naming(purged.store, entry.name, purged.chunks.contains)[1]


def _check_quarantine(purged: PurgeHistory, entry: FileEntry) -> Bools:
    if purged.is_new(entry):
        return _NOTHING
    return np.asarray(parts.read_parquet(purged.store, entry, ["excerpt"])["excerpt"].is_valid())


def _check_selectors(purged: PurgeHistory, entry: FileEntry) -> Bools:
    # A purge made after the erase may name the same chunks, and keeps its selectors.
    named = has_any(purged.store, entry.slot, purged.chunks)
    return np.array([True]) if named and not purged.is_new(entry) else _NOTHING


def _check_scans(purged: PurgeHistory, entry: FileEntry) -> Bools:
    names = purged.chunks.contains(parts.read_parquet(purged.store, entry, ["chunks"])["chunks"].to_numpy()).any()
    return np.array([bool(names) or entry.path not in purged.new])


def _check_routes(purged: PurgeHistory, entry: FileEntry) -> Bools:
    return np.array([entry.path not in purged.new])


CHECKS: Mapping[str, tuple[str, Callable[[PurgeHistory, FileEntry], Bools] | None]] = {
    "documents": ("documents: all columns null; no hash where a part is erased", _check_documents),
    "chunks": ("rows: no tokens", _check_chunks),
    "embeddings": ("rows: the vector zero", _check_embeddings),
    "index": ("no id in lists; no measurements from before the erase", _check_index),
    "neighbours": ("rows empty; no id, distance or token in other rows", _check_neighbours),
    "tombstones": ("not decoded: only chunk ids", None),
    "undone": ("not decoded: only chunk ids", None),
    "blocked": ("not decoded: only hashes keyed with the store's secret", None),
    "quarantine": ("rows: no excerpt of the input", _check_quarantine),
    "plans": ("not decoded: only names of inputs, and hashes keyed with the store's secret", None),
    "inputs": ("not decoded: only names of inputs, and hashes keyed with the store's secret", None),
    "selectors": ("files that quote the selectors of the purge", _check_selectors),
    "seen": ("not decoded: only hashes of ids, while a chunk is unfinished", None),
    "edits": ("entries: no id", _check_edits),
    "routes": ("files older than the erase", _check_routes),
    "scans": ("files that name a chunk, or are older than the erase", _check_scans),
}
"""What is checked of each kind of file, in words, and the check (None: they can't hold data of a chunk).

A check returns whether each checked row still holds data, bool [n]. Every kind of ``paths.DATA_KINDS`` must
be here.
"""
_BY_ROW = ("documents", "chunks", "embeddings")  # files without a row of a purged chunk are not read


def _check_removed(storage: Storage, removed: set[str]) -> tuple[tuple[str, ...], bool, list[str]]:
    """Return removed files that still exist, whether others are durably absent, and problems."""
    present = removed.intersection(storage.irregular())
    absent = []
    hidden: dict[str, None] = {}
    for path in sorted(removed - present):
        try:
            if storage.stat(path) is None:
                absent.append(path)
            else:
                present.add(path)
        except CorruptError as error:  # a folder is a symbolic link, which is not followed
            hidden[str(error)] = None
    synced = False
    with contextlib.suppress(OSError, StorageError):  # for example a read-only file system
        storage.delete(absent)
        synced = True
    return tuple(sorted(present)), synced, list(hidden)


def find_unknown(store: Store, removed: set[str]) -> tuple[tuple[UnknownFile, ...], int]:
    """Return the files under a store that no commit names, and the number of files of work in progress.

    Neither includes ``removed`` files. Symbolic links are listed, not followed.
    """
    storage = store.storage
    own = {identity.FILE, store.identity.tokenizer.file, *removed}
    staged = staging.read_staged(storage)
    waiting = {f"staging/{task}.json" for task in staged}.union(*(task.files() for task in staged.values()))
    unknown: list[UnknownFile] = []
    in_progress = 0
    # ``is_alive`` removes and writes nothing, so a read-only store can be checked.
    is_alive = functools.cache(lambda run: leases.is_alive(storage, run, now=time.time()))
    irregular = list(storage.irregular())
    folders = (path for path in irregular if path.endswith("/"))
    for info in itertools.chain(storage.list(""), *map(storage.list, folders)):
        if info.path in own or _OF_LOG.fullmatch(info.path):
            continue
        with contextlib.suppress(CorruptError):  # raised if the path is not one of a store's files
            if store.state.has(without_sums(info.path)):
                continue
        owner = gc.owner_of(storage, info.path)
        if info.path in waiting or (owner is not None and is_alive(owner)):
            in_progress += 1
            continue
        with contextlib.suppress(FileNotFoundError):
            unknown.append(UnknownFile(info.path, info.size))
    unfinished = list(storage.unfinished())
    dead = [UnknownFile(one.path, one.size) for one in unfinished if not is_alive(one.run)]
    in_progress += len(unfinished) - len(dead)
    links = (path for path in irregular if not path.endswith("/"))
    unknown += [*dead, *(UnknownFile(path, 0, link=True) for path in links if path not in removed)]
    return tuple(sorted(unknown, key=lambda one: one.path)), in_progress
