"""``verify``: check a store against its log, and compute hashes by which stores can be compared.

Checks, reporting every problem:

* the chain and the fold of the log, and the size and SHA-256 of every file;
* rows, documents and their chunks, keys, padding, tombstones, totals;
* embeddings, indexes, neighbours and their tokens, block lists, records. Vectors in indexes, distances, and
  tokens in neighbour tables are sampled; the file's hash is the seed, so the same file always gives the same
  result. Databases in other stores are not read.

If another process removes files concurrently, it starts again on the newest commit. Cost: every byte is read
once for SHA-256, and Parquet files and embeddings a second time. Memory: one part or table, or the ids of one
shard, and what ``_Checked`` holds.

A job of an array checks its share of the files, the first also what is not in a single file. It does not know
what others find, so what belongs to a broken file may be a problem, too, unless it checks all SHA-256
(``all_sums``). There are no digests: they need all.

Digests of documents do not depend on how a store is split into files: they are sums of one BLAKE2b-256 per
document, about 1.5 µs per document and 1 GB/s of tokens.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrotool.ann.lists import InvertedLists, read_lists
from retrotool.chunk.chunker import id_hash
from retrotool.embed.search_scope import document_intervals, erased_chunks, purges_erased
from retrotool.engine import engine_in_use, gathering
from retrotool.engine.run import Gather
from retrotool.engine.task import Report, Task, Worker, task_key
from retrotool.errors import CorruptError, ErasedError, RetrotoolError
from retrotool.index.index_records import RECALL, SHARD, IndexFiles
from retrotool.index.searching import read_trained
from retrotool.info.problems import Problem, problem_with
from retrotool.ranges import runs_up_to
from retrotool.store import neighbour_tables, parts, paths, staging
from retrotool.store.blocked import read_hashes
from retrotool.store.gc import foreign_files, unnamed_files
from retrotool.store.log import Commit, FileEntry
from retrotool.store.neighbour_tables import ERASED, NO_NEIGHBOUR, NeighbourTable, NeighbourText, is_within
from retrotool.store.parts import ROW_GROUP, Chunks, Ids, part_of, row_of
from retrotool.store.paths import generation_in, part_slot
from retrotool.store.store import Store, retry_overtaken
from retrotool.store.tombstones import KEPT, Tombstones, named_chunks, read_tombstones, undone_chunks, undone_purges
from retrotool.store.vectors import not_finite, read_vectors
from retrotool.store.verify_log import check_log, same_state

_DIGESTS = {  # by kind of files, the digests that can't be trusted if one of them has a problem
    "tombstones": ("tombstones",), "embeddings": ("embeddings",), "index": ("indexes",),
    "neighbours": ("neighbours", "materialised"), "chunks": ("content", "ids"), "documents": ("content", "ids"),
}  # fmt: skip
_TASK_BYTES = 1 << 30
_BLOCK = 1 << 16
_SAMPLED_VECTORS = 256
_SAMPLED_ROWS, _NEAR_PARTS = 16, 8
_ROUNDING = 5e-4  # allowed error of a distance computed in float32, as a share of the two squared norms
_INFINITE = 0x7C00  # smallest bits of a float16, without its sign, that are infinite or NaN
_LOGGED = re.compile(r"(log|checkpoints)/[0-9a-f-]+\.json")


@dataclass(slots=True)
class Verification:
    """Result of ``verify``, see ``docs/json.md``. Digests are empty where a problem prevents them.

    ``shard``: I/N in a job of an array, whose share ``files`` and ``bytes`` are; totals are 0.
    """

    ok: bool
    commit: int
    shard: str = ""
    problems: list[Problem] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    unnamed: int = 0
    content: str = ""
    ids: str = ""
    tombstones: str = ""
    embeddings: str = ""
    indexes: str = ""
    neighbours: str = ""
    materialised: str = ""
    documents: int = 0
    chunks: int = 0
    tokens: int = 0
    files: int = 0
    bytes: int = 0


class _Checked:
    """A store that is being checked, its problems, the paths of ``broken`` files, and what checks share."""

    def __init__(self, store: Store, problems: list[Problem]) -> None:
        self.store, self.problems, self.broken = store, problems, set[str]()
        self._keys: dict[int, npt.NDArray[np.uint8]] = {}
        entries = {entry.part: entry for entry in store.state.group("chunks").entries()}
        self._parts = np.array([-1, *entries])
        self._rows = np.array([0, *(entry.rows for entry in entries.values())])
        self._with_values = {part for part, entry in entries.items() if parts.n_keys(entry) < entry.rows}

    def add(self, path: str, text: str) -> None:
        """Add a problem with a file; ``path`` "": with the records of the log."""
        self.problems.append(problem_with(self.store, path, text))

    def note(self, path: str, wrong: Mapping[str, object], what: str = "") -> None:
        """Add a problem with a file, which is called ``what``, for each sentence whose value is true."""
        for sentence in (sentence for sentence, is_true in wrong.items() if is_true):
            self.add(path, f"{what or path}: {sentence}")

    @contextmanager
    def noting(self, path: str, what: str = "") -> Iterator[None]:
        """Turn errors into a problem with a file, as a broken file can break anything that reads it.

        Lets ``ErasedError`` pass: a newer commit removed the file that was being read.
        """
        try:
            yield
        except ErasedError:
            raise
        except RetrotoolError as error:
            self.add(path, str(error))
        except (ArithmeticError, LookupError, OSError, SyntaxError, TypeError, ValueError, pa.ArrowException) as error:
            self.add(path, f"{what or path}: can't be checked: {type(error).__name__}: {error}")

    @cached_property
    def tombstones(self) -> Tombstones:
        """Purged chunks; none if their files are damaged."""
        with suppress(RetrotoolError, OSError, ValueError, pa.ArrowException):
            return read_tombstones(self.store)
        return Tombstones(np.zeros(0, np.int64))

    @cached_property
    def erasing(self) -> Tombstones:
        """Chunks of purges that are not erased yet; an erase of these may be running, or was interrupted."""
        purges = self.store.state.with_prefix("purge:").keys() - purges_erased(self.store)
        return Tombstones(np.setdiff1d(named_chunks(self.store, purges), self.erased.ids))

    @cached_property
    def erased(self) -> Tombstones:
        """Chunks of erased purges, which must not be in any file."""
        return erased_chunks(self.store)

    def rows_of(self, numbers: Ids) -> Ids:
        """Return the number of rows of each part, int64 [n]; 0 for parts that don't exist."""
        place = np.minimum(np.searchsorted(self._parts, numbers), len(self._parts) - 1)
        return np.where(self._parts[place] == numbers, self._rows[place], 0)

    def whole(self, kind: str, part: int, name: str = "") -> FileEntry | None:
        """Return a part's file, None if it is missing or broken."""
        entry = self.store.state.part_file(kind, part, name)
        return None if entry is None or entry.path in self.broken else entry

    def are_keys(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Return which ids, all of them rows of parts, are not values of key-value records, bool [n]."""
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


def verify(root: str | Path, *, all_sums: bool = False) -> Verification:
    """Check every file of a store, and compute the hashes by which stores are compared.

    A store that is too damaged to open is reported as a problem. Raises ``ErasedError`` if other processes
    keep removing files. ``all_sums``: check sizes and SHA-256 of all files in each job of a shard, too.
    """
    try:
        return retry_overtaken(lambda: check_store(Store.open(root), all_sums))
    except CorruptError as error:
        advice = error.advice or "Restore the store from a backup."
        return Verification(False, -1, problems=[Problem("store", "", str(error), advice)])


def check_store(store: Store, all_sums: bool = False) -> Verification:
    """Check the store at its view. Raises ``ErasedError`` if a newer commit removes one of its files."""
    store.reads_copies = True
    stage = VerifyStage(store.state.number, engine_in_use().shard, all_sums)
    result = Verification(True, store.state.number, "{}/{}".format(*stage.shard) if stage.shard else "")
    checked = _Checked(store, result.problems)
    if stage.is_first:
        _check_whole(checked, result)
    with gathering(stage, store) as gather:
        _check_files(checked, result, stage, gather)
    for kind in {problem.kind for problem in result.problems}:
        for name in _DIGESTS.get(kind, ()):
            setattr(result, name, "")
    if not all(problem.repairable for problem in result.problems):  # sound files may look wrong without the others
        result.problems = [one if one.path in checked.broken else one.doubtful() for one in result.problems]
    result.ok = not result.problems
    return result


def _check_whole(checked: _Checked, result: Verification) -> None:
    """Check the log, its records, and what else is in the store's folder."""
    store = checked.store
    _check_records(checked, _check_log(checked))
    for path in sorted(store.storage.irregular()):
        if not path.endswith("/") and ("/" in path or path in paths.FOLDERS):  # links elsewhere are harmless
            result.problems.append(problem_with(store, path, f"{path} is a symbolic link", is_link=True))
    broken = "is not a finished task: the next command that writes removes it and repeats the task"
    for path in staging.broken(store.storage):
        checked.add(path, f"{path} {broken}")
    result.foreign, result.unnamed = foreign_files(store), len(unnamed_files(store))
    with checked.noting(store.identity.tokenizer.file):
        store.tokenizer_json()


def _check_files(checked: _Checked, result: Verification, stage: VerifyStage, gather: Gather) -> None:
    """Check the content of the files of a stage's share, and compute the digests if it has all."""
    store, ids = checked.store, None
    sizes = _do_step(checked, "sums", stage, gather)
    result.files, result.bytes = len(sizes), sum(sizes)
    if stage.is_first:
        with checked.noting("", "tombstones"):
            ids = read_tombstones(store).ids
    total = sum(_do_step(checked, "chunks", stage, gather), PartDigest())
    if stage.is_first:
        _check_chunk_ids(checked, checked.tombstones.ids, "", "tombstones")
        _check_blocked(checked)
        _check_undone(checked)
    if not stage.shard:
        result.embeddings, result.indexes = (_digest_files(store, kind) for kind in ("embeddings", "index"))
    tables: list[tuple[str, str]] = _do_step(checked, "neighbours", stage, gather)
    if stage.is_first:
        _check_windows(checked)
    _do_step(checked, "index", stage, gather)
    if stage.shard:
        return
    if ids is not None:
        result.tombstones = hashlib.blake2b(ids.astype("<i8").tobytes(), digest_size=32).hexdigest()
    result.neighbours = _lines_digest(line for line, _ in tables)
    result.materialised = _lines_digest(text for _, text in tables if text)
    if not checked.broken:
        result.content, result.ids = hexadecimal(total.content), hexadecimal(total.ids)
        for name in ("documents", "chunks", "tokens"):
            setattr(result, name, found := getattr(total, name))
            logged = store.state.records.get("totals", {}).get(name, 0)
            if found != logged:
                checked.add("", f"found {found:,} live {name}, but the log says {logged:,}")


def _check_log(checked: _Checked) -> set[str]:
    """Fold the log, and compare the result with the open state; return the keys of all records ever set."""
    store, recorded = checked.store, set[str]()

    def note(commit: Commit) -> None:
        recorded.update(commit.records)
        # A dropped index may be started again.
        removed = (key for key, value in commit.records.items() if value is None)
        recorded.difference_update(key for key in removed if key.startswith("index:"))

    with checked.noting("", "log"):
        found = check_log(store.storage, store.genesis, store.state.number, note)
        for problem in found.problems:
            named = _LOGGED.search(problem)
            checked.add(named[0] if named else "", problem)
        if not found.problems and not same_state(found.state, store.state):
            checked.add("", "the open state differs from the fold of the log: commits are missing")
    return recorded


_Found = tuple[list[Problem], set[str], list[Any]]  # by a task: problems, files that are broken, and digests


@dataclass(frozen=True, slots=True)
class VerifyStage:
    """Checks files of a store as of ``commit``. A task checks some of them and returns a ``_Found``.

    Its steps: the "sums" of all files, then "chunks" with their documents and embeddings, tables of
    "neighbours", and shards of an "index". ``shard`` (i, n): only the files of job i of n, which depend on
    their places alone: jobs may begin at different commits. ``all_sums``: the first step has all files.
    """

    commit: int
    shard: tuple[int, int] | None = None
    all_sums: bool = False
    name: str = field(default="verify", init=False)
    unit: str = field(default="B", init=False)

    @property
    def is_first(self) -> bool:
        """Whether no other job checks what is not in a single file."""
        return self.shard is None or self.shard[0] == 0

    def plan(self, store: Store) -> list[Task]:
        """Return the tasks of the first step."""
        return self.tasks("sums", store, set())

    def tasks(self, step: str, store: Store, broken: set[str]) -> list[Task]:
        """Return the tasks of a step; ``broken`` is what earlier ones found."""
        job, jobs = (0, 1) if self.shard is None or (self.all_sums and step == "sums") else self.shard
        entries = (
            entry for entry in store.state.files()
            if step in ("sums", entry.kind) and int(task_key("verify", {"file": entry.place}, []), 16) % jobs == job
        )  # fmt: skip
        tasks = []
        for number, some in enumerate(runs_up_to(_TASK_BYTES, entries, lambda entry: entry.bytes)):
            inputs = {"step": step, "places": [entry.place for entry in some], "broken": broken}
            key = task_key("verify", {"step": step, "number": number}, [])
            tasks.append(Task(key, f"{step} of {some[0].path}", sum(entry.bytes for entry in some), inputs))
        return tasks

    def open(self, store: Store) -> Worker:
        """Return the worker."""
        view = store.at(self.commit)
        view.reads_copies = True
        checked = _Checked(view, [])
        check = {"sums": _check_sum, "chunks": _check_part, "neighbours": _check_table_file, "index": _check_index}

        def work(task: Task, run: str, report: Report) -> _Found:  # noqa: ARG001
            checked.problems, checked.broken = [], set(task.inputs["broken"])
            digests = []
            for kind, name, slot in task.inputs["places"]:
                entry = view.state.file(kind, slot, name)
                assert entry is not None, "the state is that of the plan"
                with checked.noting(entry.path):
                    digests.append(check[task.inputs["step"]](checked, entry))
                report(entry.bytes)
            return checked.problems, checked.broken, [one for one in digests if one is not None]

        return work


def _do_step(checked: _Checked, step: str, stage: VerifyStage, gather: Gather) -> list[Any]:
    """Do a step of ``verify``; add what it finds to ``checked``, and return its digests."""
    digests = list[Any]()
    for problems, broken, some in gather(stage.tasks(step, checked.store, checked.broken)):
        checked.problems += problems
        checked.broken |= broken
        digests += some
    return digests


def _check_sum(checked: _Checked, entry: FileEntry) -> int:
    """Check a file's size and sum, and note it if it is broken; return the size that the log says."""
    try:
        checked.store.check_sum(entry)
    except ErasedError:
        raise
    except (RetrotoolError, OSError) as error:
        checked.add(entry.path, str(error).removeprefix(f"{checked.store.place}/"))
        checked.broken.add(entry.path)
    return entry.bytes


def _check_part(checked: _Checked, entry: FileEntry) -> PartDigest | None:
    """Check a part's chunks with its documents and embeddings; return its digest if readers see it."""
    store, part = checked.store, entry.part
    if store.state.part_file("documents", part) is None:
        checked.add("", f"part {part} has no documents file or no chunks file")
        return None
    if checked.whole("documents", part) is None or checked.whole("chunks", part) is None:
        return None
    digest: PartDigest | None = None
    with checked.noting(entry.path, f"part {part}"):
        digest = _check_chunks(checked, part)
    return digest if store.state.is_live(part) else None


def _check_chunks(checked: _Checked, part: int) -> PartDigest:
    store = checked.store
    chunks = parts.read_chunks(store, part)
    documents = parts.read_documents(store, part, ["id", "key", "first_row", "n_chunks", "n_tokens"])
    entry, n, docs = parts.part_entry(store, "chunks", part), len(chunks), documents.num_rows
    first, count, n_tokens = (documents[name].to_numpy() for name in ("first_row", "n_chunks", "n_tokens"))
    if count.sum() != n or (count < 0).any() or not ((chunks.doc >= 0) & (chunks.doc < docs)).all():
        checked.add(entry.path, f"part {part}: its {docs:,} documents don't match its {n:,} chunks")
        return PartDigest()
    row = parts.read_parquet(store, entry, ["row"])["row"].to_numpy()
    doc, index = np.repeat(np.arange(docs), count), np.arange(n) - np.repeat(first, count)
    tokens = np.bincount(chunks.doc, chunks.n_tokens, minlength=docs).astype(np.int64)
    keys = [None if name is None else id_hash(name) for name in documents["id"].to_pylist()]
    padding = np.arange(chunks.tokens.shape[1]) >= chunks.n_tokens[:, None]
    wrong = {
        "rows are not numbered from 0": (row != np.arange(n)).any(),
        "documents are not contiguous": (first != np.cumsum(count) - count).any(),
        "documents and chunks disagree about which belong together": (chunks.doc != doc).any(),
        "chunks have wrong positions in their documents": (chunks.index != index).any(),
        "documents and chunks have different numbers of tokens": (tokens != n_tokens).any(),
        "padding is not zero": (chunks.tokens * padding).any(),
        "keys are not the hashes of the documents' ids": documents["key"].to_pylist() != keys,
        "the first chunk of a document is not a key": not chunks.key[chunks.index == 0].all(),
        "the log has a different number of keys": chunks.key.sum() != parts.n_keys(entry),
    }
    checked.note(entry.path, wrong, f"part {part}")
    for encoder in store.state.names("embeddings"):
        if (vectors := checked.whole("embeddings", part, encoder)) is not None:
            with checked.noting(vectors.path):
                _check_vectors(checked, encoder, vectors, chunks.embedded)
    alive = (chunks.n_tokens > 0) & ~checked.tombstones.contains(parts.chunk_ids(part, np.arange(n)))
    return part_digest(chunks, documents["key"].to_pylist(), alive)


def _digest_files(store: Store, kind: str) -> str:
    files = [entry for name in store.state.names(kind) for entry in store.state.group(kind, name).entries()]
    lines = [f"{kind}/{one.name}/{one.slot} {one.sha256}" for one in files if one.slot != RECALL]
    return _lines_digest(lines)


def _check_chunk_ids(checked: _Checked, ids: Ids, path: str, what: str = "") -> bool:
    """Return whether all ``ids`` are rows of parts; add a problem if not."""
    known = (ids >= 0) & (row_of(ids) < checked.rows_of(part_of(ids)))
    if not known.all():
        unknown = int((~known).sum())
        checked.add(path, f"{what or path}: ids that are not chunks of the store: {unknown:,}")
    return bool(known.all())


def _check_records(checked: _Checked, recorded: set[str]) -> None:
    """Check mixtures, and that files have their records; an unfinished index or table may have none yet."""
    state = checked.store.state
    for kind, prefix in (("embeddings", "encoder:"), ("index", "index:"), ("neighbours", "neighbours:")):
        for name in state.names(kind):
            key = prefix + name
            measured = kind == "index" and state.file(kind, RECALL, name) is not None
            if key not in state.records and (kind == "embeddings" or measured or key in recorded):
                checked.add("", f"{kind} {name}: it has files, but the record {key!r} is missing")
    records = state.with_prefix("neighbours:")
    for name, record in records.items():
        if "mix" not in record:
            continue
        tables = [str(member["table"]) for member in record["mix"]]
        databases = [records[table]["database"] for table in tables if "database" in records.get(table, {})]
        wrong = {
            "the mixture names a table that doesn't exist": len(databases) < len(tables),
            "the mixture has no tables, or two of the same database": not 0 < len(set(databases)) == len(databases),
            "the mixture has a weight that is not a positive number": any(one["weight"] <= 0 for one in record["mix"]),
        }
        checked.note("", wrong, f"neighbours {name}")


def _check_blocked(checked: _Checked) -> None:
    """Check that block lists are readable and belong to purges."""
    for slot, entry in checked.store.state.group("blocked").items():
        checked.note(entry.path, {f"purge {slot} doesn't exist": f"purge:{slot}" not in checked.store.state.records})
        if entry.path not in checked.broken:
            with checked.noting(entry.path):
                read_hashes(checked.store, entry)


def _check_undone(checked: _Checked) -> None:
    """Check that undone purges have only their lists of chunks left."""
    state = checked.store.state
    undone = undone_purges(state)
    for purge, record in undone.items():
        for kind in ("tombstones", "blocked", "selectors"):
            if state.file(kind, purge) is not None:
                checked.add("", f"purge {purge} was undone, but still has a file in {kind}/")
        if record["erased"]:
            checked.add("", f"purge {purge} was undone, but is recorded as erased")
    for slot, entry in state.group(KEPT).items():
        if slot not in undone:
            checked.add("", f"{KEPT}/{slot}: it does not belong to an undone purge")
        elif entry.path not in checked.broken:
            with checked.noting(entry.path):
                _check_chunk_ids(checked, undone_chunks(checked.store, slot), entry.path)


def _check_vectors(checked: _Checked, encoder: str, entry: FileEntry, embedded: npt.NDArray[np.bool_]) -> None:
    """Check that a part's embeddings have vectors for exactly the rows ``embedded``, bool [n]."""
    store = checked.store
    matrix = np.asarray(read_vectors(store, entry))
    record = store.state.records.get(f"encoder:{encoder}", {})
    if len(matrix) != len(embedded):
        checked.add(entry.path, f"{entry.path}: {len(matrix):,} rows for {len(embedded):,} chunks")
        return
    d, due = matrix.shape[1], record.get("dimension", matrix.shape[1])
    checked.note(entry.path, {f"{d:,} dimensions, but its encoder has {due:,}": d != due})
    largest = np.zeros(len(matrix), np.uint16)
    for start in range(0, len(matrix), _BLOCK):  # the file may be larger than memory
        block = matrix[start : start + _BLOCK].view(np.uint16) & 0x7FFF
        largest[start : start + _BLOCK] = block.max(axis=1, initial=0)
    zero, infinite = (largest == 0) & embedded, np.flatnonzero(largest >= _INFINITE)
    same = record.get("tokenizer") == store.identity.tokenizer.sha256
    # Another tokenizer may give no tokens for a text, such as white space. Then its vector is zero.
    # So is that of a purged chunk that none was given for.
    nothing = zero.any() if same else embedded.any() and (zero == embedded).all() and not record.get("foreign")
    wrong = {
        not_finite(entry.part, infinite): len(infinite),
        "a chunk that is erased or not a key has a vector": ((largest > 0) & ~embedded).any(),
        "a key that is not erased has a zero vector": nothing,
    }
    checked.note(entry.path, wrong)


def _check_windows(checked: _Checked) -> None:
    """Check that no part is in two shards of a generation of an index."""
    for name in checked.store.state.names("index"):
        everything: dict[int, set[int]] = {}
        for slot, entry in checked.store.state.group("index", name).items():
            if slot.startswith(SHARD):
                held, covered = everything.setdefault(generation_in(slot), set()), _parts_of_shard(entry)
                checked.note(entry.path, {"has parts that another shard has too": not held.isdisjoint(covered)})
                held |= covered


def _parts_of_shard(entry: FileEntry) -> set[int]:
    return set((entry.about or {}).get("parts", ()))


def _check_index(checked: _Checked, entry: FileEntry) -> None:
    """Check that a shard has all live embedded chunks of its parts, and no erased ones."""
    if not entry.slot.startswith(SHARD) or entry.path in checked.broken:
        return
    trained, name, generation = None, entry.name, generation_in(entry.slot)
    # A broken training file is a problem of its own; shards are still readable without it.
    with suppress(CorruptError):
        trained = read_trained(checked.store, name, generation)[1]
    with checked.store.reading(entry), checked.store.local(entry) as path:
        shard = read_lists(path, trained)
    ids = np.sort(np.concatenate([np.zeros(0, np.int64), *map(shard.ids, shard.numbers)]))
    checked.note(entry.path, {f"has {len(ids):,} vectors, but the log says {entry.rows:,}": len(ids) != entry.rows})
    if not _check_chunk_ids(checked, ids, entry.path):
        return
    encoder = IndexFiles(checked.store.state, name, generation).encoder or ""
    expected = missing = unembedded = 0
    for part in sorted(_parts_of_shard(entry)):
        if not checked.rows_of(np.array([part]))[0]:
            checked.add(entry.path, f"{entry.path}: lists part {part}, which doesn't exist")
            continue
        own = ids[parts.slice_of_part(ids, part)]
        expected += len(own)
        if checked.whole("chunks", part) is None:
            continue
        embedded = parts.read_embedded(checked.store, part)
        rows = row_of(own)
        # An erase rewrites parts and shards one after another.
        unembedded += int((~checked.erasing.contains(own[~embedded[rows]])).sum())
        embedded[checked.tombstones.rows(part)] = False
        embedded[rows] = False
        missing += int(embedded.sum())
    wrong = {
        "has a chunk twice": bool((ids[1:] == ids[:-1]).any()),
        "has chunks that are erased or not keys": unembedded > 0,
        "has chunks of parts that it does not list": expected < len(ids),
        f"chunks of its parts are missing: {missing:,}": missing > 0,
        "has vectors that differ from the embeddings": not _same_vectors(checked, encoder, entry, shard),
    }
    checked.note(entry.path, wrong)


def _same_vectors(checked: _Checked, encoder: str, entry: FileEntry, shard: InvertedLists) -> bool:
    sizes = np.array([shard.size(number) for number in shard.numbers], np.int64)
    drawn = np.sort(_draw(entry).choice(len(shard), min(len(shard), _SAMPLED_VECTORS), replace=False))
    numbers = np.searchsorted(sizes.cumsum(), drawn, "right")
    rows = drawn - (sizes.cumsum() - sizes)[numbers]
    chunks = [shard.ids(number)[row] for number, row in zip(numbers.tolist(), rows, strict=True)]
    stored = _vectors(checked, encoder, np.array(chunks, np.int64))
    known = stored.any(axis=1)
    for number in np.unique(numbers[known]).tolist():
        some = known & (numbers == number)
        if not shard.may_stand_for(number, rows[some], stored[some]):
            return False
    return True


def _draw(entry: FileEntry) -> np.random.Generator:
    return np.random.default_rng(int(entry.sha256[:16], 16))


def _vectors(checked: _Checked, encoder: str, chunks: Ids) -> npt.NDArray[np.float16]:
    """Return the stored vectors of chunks [n], float16 [n, d]; zero for those erased or in a broken file."""
    found = np.zeros((len(chunks), 0), np.float16)
    for part in parts.distinct_parts(chunks):
        if (entry := checked.whole("embeddings", part, encoder)) is not None:
            matrix = read_vectors(checked.store, entry)
            found = found if found.shape[1] else np.zeros((len(chunks), matrix.shape[1]), np.float16)
            mine = np.flatnonzero((part_of(chunks) == part) & (row_of(chunks) < entry.rows))
            found[mine] = matrix[row_of(chunks[mine])]
    return found


def _check_table_file(checked: _Checked, entry: FileEntry) -> tuple[str, str] | None:
    """Check a table; return a line with the digest of its neighbours, and one of its tokens or ""."""
    if entry.path in checked.broken:
        return None
    table = neighbour_tables.read_table(checked.store, entry)
    digest = hashlib.blake2b(np.ascontiguousarray(table.ids, "<i8").data, digest_size=32)
    digest.update(np.ascontiguousarray(table.distances, "<f4").data)
    if table.scores is not None:
        digest.update(np.ascontiguousarray(table.scores, "<f4").data)
    file, text = f"neighbours/{entry.name}/{entry.slot}", ""
    with checked.noting(entry.path):
        _check_table(checked, entry, table)
        if neighbour_tables.text_size(entry):
            within = is_within(checked.store, entry, parts.read_schema(checked.store, entry).metadata)
            text = f"{file} {_check_neighbour_text(checked, entry, table, within=within)}"
    return f"{file} {digest.hexdigest()}", text


def _lines_digest(lines: Iterable[str]) -> str:
    """Compute the BLAKE2b-256 of sorted lines, "" without any."""
    text = "".join(f"{line}\n" for line in sorted(lines)).encode()
    return hashlib.blake2b(text, digest_size=32).hexdigest() if text else ""


def _check_table(checked: _Checked, entry: FileEntry, table: NeighbourTable) -> None:
    store, part = checked.store, entry.part
    record = store.state.records.get(f"neighbours:{entry.name}", {})
    metadata = parts.read_schema(store, entry).metadata or {}
    database = metadata.get(b"retrotool.database", b"").decode()
    checked.note(entry.path, {"its database is not that of its record": database != record.get("database", database)})
    chunks = store.state.file("chunks", part_slot(part))
    if chunks is None or table.ids.shape != table.distances.shape or len(table.ids) != chunks.rows:
        checked.add(entry.path, f"{entry.path}: its {len(table.ids):,} rows don't match its part")
        return
    found: set[str] = set()
    if chunks.path not in checked.broken and (table.ids[~parts.read_key(store, part)] != NO_NEIGHBOUR).any():
        found.add("a chunk that is not a key has neighbours")
    within = is_within(store, entry, metadata)
    own = _documents_of_rows(checked, part) if within else None
    known = True
    for start in range(0, len(table.ids), _BLOCK):
        rows = slice(start, start + _BLOCK)
        found |= _problems_of_rows(table.rows(rows))
        if own is not None and ((table.ids[rows] >= own[0][rows]) & (table.ids[rows] <= own[1][rows])).any():
            found.add("a chunk has a neighbour in its own document")
        if within and known:
            ids = table.ids[rows]
            ids = ids[ids >= 0]
            known = _check_chunk_ids(checked, ids, entry.path)
            if known and not checked.are_keys(ids).all():
                found.add("a neighbour is not a key")
    if within and known and "encoder" in record and not found:
        wrong, sampled = _wrong_distances(checked, str(record["encoder"]), entry, table)
        if wrong:
            found.add(f"{wrong:,} of {sampled:,} sampled distances are not those of the vectors")
    checked.note(entry.path, dict.fromkeys(sorted(found), True))


def _problems_of_rows(table: NeighbourTable) -> set[str]:
    ids, distances, none = table.ids, table.distances, table.ids == NO_NEIGHBOUR
    ordered, unlike, scores = np.sort(ids, axis=1), none != np.isposinf(distances), table.scores
    ascends = distances[:, 1:] >= distances[:, :-1]
    checks = {}
    if scores is not None:
        descends = scores[:, 1:] <= scores[:, :-1]
        ascends |= scores[:, 1:] < scores[:, :-1]
        checks = {
            "scores do not descend": not descends.all(),
            "a score is negative or not a finite number": not (none | ((scores >= 0) & (scores < np.inf))).all(),
            "a neighbour has no score, or an empty place has one": (none != np.isneginf(scores)).any(),
        }
    checks |= {
        "distances do not ascend": not ascends.all(),
        "a distance is negative or not a number": not (distances >= 0).all(),
        "an id is negative": (ids < NO_NEIGHBOUR).any(),
        "a neighbour has no distance, or an empty place has one": unlike.any(),
        "a row has a neighbour twice": ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(),
    }
    return {what for what, found in checks.items() if found}


def _documents_of_rows(checked: _Checked, part: int) -> tuple[Ids, Ids] | None:
    """Return first and last chunk id of each row's document, [n, 1] each; None if documents are damaged."""
    if checked.whole("documents", part) is None:
        return None
    with suppress(ValueError):  # of negative numbers of chunks
        first, last = document_intervals(checked.store, part)
        if len(first) == checked.rows_of(np.array([part]))[0]:
            return first[:, None], last[:, None]
    return None


def _wrong_distances(checked: _Checked, encoder: str, entry: FileEntry, table: NeighbourTable) -> tuple[int, int]:
    """Compute a sample of the distances again; return how many are wrong, and the size of the sample.

    Only neighbours in ``_NEAR_PARTS`` parts are drawn, so that each file is read by few of these checks.
    """
    others = np.array(checked.store.state.parts())
    near = others[np.argsort(abs(others - entry.part), kind="stable")[:_NEAR_PARTS]]
    is_near = (table.ids != NO_NEIGHBOUR) & np.isin(part_of(table.ids), near)
    asking = np.flatnonzero(is_near.any(axis=1))
    drawn = _draw(entry).choice(asking, min(len(asking), _SAMPLED_ROWS), replace=False)
    pair, place = np.nonzero(is_near[drawn])
    rows = drawn[pair]
    stored = _vectors(checked, encoder, np.concatenate([parts.chunk_ids(entry.part, rows), table.ids[rows, place]]))
    one, two = np.split(stored.astype(np.float64), 2)
    known = one.any(axis=1) & two.any(axis=1)  # the others were erased since
    off = abs(((one - two) ** 2).sum(axis=1) - table.distances[rows, place])
    wrong = known & (off > _ROUNDING * ((one**2).sum(axis=1) + (two**2).sum(axis=1)))
    return int(wrong.sum()), int(known.sum())


def _check_neighbour_text(checked: _Checked, entry: FileEntry, table: NeighbourTable, *, within: bool) -> str:
    """Check the tokens of neighbours that a table stores; return their digest."""
    digest, found = hashlib.blake2b(digest_size=32), set[str]()
    drawn = _draw(entry).choice(entry.rows, min(entry.rows, _SAMPLED_ROWS), replace=False)
    for group in range(-(-entry.rows // ROW_GROUP)):
        rows = slice(group * ROW_GROUP, (group + 1) * ROW_GROUP)
        text = neighbour_tables.read_text(checked.store, entry, [group])
        for values in (text.ids, text.distances, text.n_tokens, text.tokens):
            digest.update(np.ascontiguousarray(values).data)
        found |= _problems_of_text(text, table.ids[rows])
        if within and not found:
            some = drawn[(drawn >= rows.start) & (drawn < rows.stop)] - rows.start
            found |= _not_of_chunks(checked, entry, text, some)
    checked.note(entry.path, dict.fromkeys(sorted(found), True))
    return digest.hexdigest()


def _problems_of_text(text: NeighbourText, saved: Ids) -> set[str]:
    """Check the tokens of rows whose neighbours are ``saved`` [n, saved], without reading chunks."""
    ids, counts = text.ids, text.n_tokens
    none, length = ids == NO_NEIGHBOUR, text.tokens.shape[3]
    # Replace what is not an id by values that are all different.
    ordered = np.sort(np.where(ids < 0, ERASED - np.arange(ids.shape[1]), ids), axis=1)
    named = (ids[:, :, None] == saved[:, None, :]).any(axis=2)
    unlike = (ids >= 0) != np.isfinite(text.distances)
    checks = {
        "the id of a text is negative": (ids < ERASED).any(),
        "a text follows an empty place": (none[:, :-1] & ~none[:, 1:]).any(),
        "a row has the text of a neighbour twice": (ordered[:, 1:] == ordered[:, :-1]).any(),
        "a row has the text of a chunk that is not its neighbour": ((ids >= 0) & ~named).any(),
        "a neighbour with a text has no distance, or an empty place has one": unlike.any(),
        "a text has more tokens than a chunk can": ((counts < 0) | (counts > length)).any(),
        "a neighbour has no tokens, or an empty place has some": ((counts[:, :, 0] > 0) != (ids >= 0)).any(),
        "a continuation has no neighbour": ((counts[:, :, 1] > 0) & (ids < 0)).any(),
        "the padding of a text is not zero": (text.tokens * (np.arange(length) >= counts[..., None])).any(),
    }
    return {what for what, found in checks.items() if found}


def _not_of_chunks(checked: _Checked, entry: FileEntry, text: NeighbourText, rows: Ids) -> set[str]:
    """Check text of chunks of the store itself: all ids, and the tokens of ``rows``."""
    mine = text.ids >= 0
    follows = mine & (text.n_tokens[:, :, 1] > 0)
    ids, following = text.ids[mine], text.ids[follows] + 1
    if not (_check_chunk_ids(checked, ids, entry.path) and _check_chunk_ids(checked, following, entry.path)):
        return set()
    found: set[str] = set()
    if checked.erased.contains(ids).any() or checked.erased.contains(following).any():
        found.add("it has tokens of erased chunks")
    if not _have_tokens(checked, text.ids[rows], text.tokens[rows], text.n_tokens[rows]):
        found.add("tokens differ from those of the chunks")
    return found


def _have_tokens(checked: _Checked, ids: Ids, tokens: npt.NDArray[Any], counts: npt.NDArray[np.int32]) -> bool:
    """Return whether tokens [n, k, 2, length] are those of chunks [n, k] and of the chunks after them.

    Erased chunks, whose tokens are unknown, are ignored.
    """
    whole = [part for part in parts.distinct_parts(ids[ids >= 0]) if checked.whole("chunks", part) is not None]
    present = (np.isin(part_of(ids), whole) & (ids >= 0))[:, :, None] & (counts > 0)
    own, counts, tokens = (ids[:, :, None] + np.arange(2))[present], counts[present], tokens[present]
    follows = np.nonzero(present)[2] == 1
    for some, chunks, rows in parts.read_groups_of(checked.store, own):
        stored = chunks.n_tokens[rows]
        same = (stored == counts[some]) & (chunks.tokens[rows] == tokens[some]).all(axis=1)
        if ((stored > 0) & ~same | follows[some] & (chunks.index[rows] == 0)).any():
            return False
    return True


@dataclass(frozen=True, slots=True)
class PartDigest:
    """Sums of hashes over the live documents of a part, and its live documents, chunks and tokens."""

    content: int = 0
    ids: int = 0
    documents: int = 0
    chunks: int = 0
    tokens: int = 0

    def __add__(self, other: PartDigest) -> PartDigest:
        return PartDigest(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))


def hexadecimal(number: int) -> str:
    """Return a sum of 256-bit numbers, modulo 2^256, as 64 digits."""
    return f"{number % (1 << 256):064x}"


def part_digest(chunks: Chunks, keys: list[bytes | None], live: npt.NDArray[np.bool_]) -> PartDigest:
    """Compute the digest of the ``live`` (bool [n]) chunks of a part, whose documents have ``keys``."""
    rows = np.flatnonzero(live)
    if not len(rows):
        return PartDigest()
    length = chunks.tokens.shape[1]
    # One structured record per chunk, so that a document's bytes are one slice.
    record = np.dtype([("index", "<i4"), ("n_tokens", "<i4"), ("tokens", chunks.tokens.dtype, (length,))])
    named = np.dtype([("id", "<i8"), ("index", "<i4")])
    contents = np.empty(len(rows), record)
    for column in ("index", "n_tokens", "tokens"):
        contents[column] = getattr(chunks, column)[rows]
    names = np.empty(len(rows), named)
    names["id"], names["index"] = parts.chunk_ids(chunks.part, rows), chunks.index[rows]
    doc = chunks.doc[rows]
    starts = np.flatnonzero(np.diff(doc, prepend=doc[0] - 1))
    ends = np.append(starts[1:], len(rows))
    content_bytes, name_bytes = contents.view(np.uint8), names.view(np.uint8)
    content = ids = 0
    for start, end, document in zip(starts.tolist(), ends.tolist(), doc[starts].tolist(), strict=True):
        key = keys[document] or b""
        content += _hash(key, content_bytes[start * record.itemsize : end * record.itemsize])
        ids += _hash(key, name_bytes[start * named.itemsize : end * named.itemsize])
    tokens = int(chunks.n_tokens[rows].sum())
    return PartDigest(content, ids, len(starts), len(rows), tokens)


def _hash(key: bytes, data: Any) -> int:
    return int.from_bytes(hashlib.blake2b(b"".join((key, data)), digest_size=32).digest(), "little")
