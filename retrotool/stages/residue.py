"""Looking for what a purge should have left nothing of: in every file under a store, whoever wrote it, and all of each.

Every file's bytes are read as they are, also of hidden and temporary files, of what no commit names, of spool and
staging. What they stand for is read, too: all columns of Parquet files, dictionaries decoded; of Parquet files that
broke off (no footer) the compressed pages that can be found; what .zst, .gz, .bz2, .xz and .zip files hold, whatever
they are called, also in one another; what JSON's escapes stand for; ids in the lists of faiss files. Codes of whole
vectors, and ``.npy`` files, hold the bytes of vectors as they are.

A finding is a path, a kind of needle and its number; never text. Files that go while they are read are passed over.

Cost: two threads, each at a file of its own. With 10,000 needles of all kinds a core searches 70 (text) to 100 MB/s
(random bytes) of what is read or decompressed for plain needles, and 35 to 50 MB/s for hashed ones; memory of a row
group or some megabytes a thread. See ``benchmarks/residue.py``.

Not found: vectors in product codes, or rotated; ids in an index that broke off; text in encodings other than UTF-8 and
those above, in Parquet files inside of archives, or encrypted; less than a needle, or a piece of a chunk that none was
drawn from; letters beyond ASCII in the other case than the tokenizer gives; text across more than 4 kB of
punctuation. One file is never looked at: the tokenizer, if it has the SHA-256 that the store is bound to. It is older
than all text.
"""

from __future__ import annotations

import itertools
import mmap
import os
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from retrotool.ann import lists
from retrotool.errors import RetrotoolError
from retrotool.sources.streams import LONGEST_MAGIC, BrokenStream, compression_by_magic, unpacked
from retrotool.stages.matching import KINDS, Matcher, Needles
from retrotool.stages.needles import RUNS, said_by_others
from retrotool.stages.views import cells, cells_of, folded, unescaped
from retrotool.store import atomic, identity
from retrotool.store.store import Store

_BLOCK, _OVERLAP = 1 << 20, 1 << 12
_ROWS = 4096
_NESTED = 4
_ZSTD = b"\x28\xb5\x2f\xfd"
_THREADS = 2
_FAISS = (b"Ix", b"Iw")
CHUNK = "chunk"
"""Kind of a finding that is a victim's id in a list of an index; its number is the place in ``Needles.chunks``."""

Report = Callable[[int], object]


@dataclass(frozen=True, order=True, slots=True)
class Finding:
    """Something of a victim is left: in which file (relative to the store), and which needle told."""

    path: str
    kind: str
    number: int


def scan(root: str | Path, needles: Needles, report: Report = lambda _: None) -> list[Finding]:
    """Where needles are, in every file under ``root``; ``report`` is called with the raw bytes that were read."""
    return Residue(Path(root), needles).scan(report)


@dataclass(frozen=True, slots=True)
class Left:
    """What is left of victims: ``findings``; and how many needles were found that others say by right, ``said``."""

    findings: tuple[Finding, ...]
    said: int


def look(store: Store, needles: Needles, report: Report = lambda _: None) -> Left:
    """Look for what is left of the victims of ``needles`` under a store; what others say is nothing of theirs.

    Only if something is found all chunks are read again, to see what they say.
    """
    found = scan(store.root, needles, report)
    runs = np.unique([finding.number for finding in found if finding.kind != CHUNK]).astype(np.int64)
    store.refresh()  # what was appended meanwhile is among the files, too
    said = said_by_others(store, needles.of(runs), store.state.parts()) if len(runs) else set()
    theirs = {int(runs[number]) for number in said}
    left = [finding for finding in found if finding.kind == CHUNK or finding.number not in theirs]
    return Left(tuple(left), len(theirs))


class Residue:
    """The scan of one store for one set of needles."""

    def __init__(self, root: Path, needles: Needles) -> None:
        self._root, self._needles = root, needles
        self._lock = threading.Lock()
        self._tokenizer = _tokenizer(root)
        found = [kind for kind in KINDS if needles.is_cell(kind)]
        self._runs = Matcher(needles, [kind for kind in RUNS if kind not in found])
        self._text, self._cells = Matcher(needles, ("text",)), Matcher(needles, found)

    def files(self) -> list[Path]:
        """All files under the root, the largest first; links are followed to files, not to folders.

        ``OSError`` if a folder can't be read: nothing may be said of what lies in it.
        """
        walk = os.walk(self._root, onerror=_refuse)
        found = [Path(folder) / name for folder, _, names in walk for name in names]
        return sorted((path for path in found if path.is_file()), key=_size, reverse=True)

    def scan(self, report: Report = lambda _: None) -> list[Finding]:
        """Look into every file; ``OSError`` if one can't be read. ``report`` is called by one thread at a time."""

        def counted(n: int) -> None:
            with self._lock:
                report(n)

        with ThreadPoolExecutor(_THREADS) as pool:
            found: set[Finding] = set()
            for some in pool.map(lambda path: self._file(path, counted), self.files()):
                found |= some
        return sorted(found)

    def _file(self, path: Path, report: Report) -> set[Finding]:
        name = os.fsencode(path.relative_to(self._root)).decode("utf-8", "backslashreplace")
        found: set[tuple[str, int]] = set()
        try:
            if path != self._tokenizer:
                with path.open("rb") as file:
                    start = file.read(max(LONGEST_MAGIC, 4))
                self._stream(found, _blocks(path, report))
                self._decoded(found, path, start)
        except FileNotFoundError:
            pass
        return {Finding(name, kind, number) for kind, number in found}

    def _decoded(self, found: set[tuple[str, int]], path: Path, start: bytes) -> None:
        """What the bytes of a file stand for, by what it begins with."""
        if compression := compression_by_magic(start):
            self._unpacked(found, _blocks(path), compression, _NESTED)
        elif start[:4] == b"PAR1":
            try:
                self._parquet(found, path)
            except (pa.ArrowException, OSError, ValueError):
                self._pages(found, path)
        elif start[:4] == b"PK\x03\x04":
            self._zip(found, path)
        elif start[:2] in _FAISS and len(self._needles.chunks):
            self._shard(found, path)

    def _unpacked(self, found: set[tuple[str, int]], raw: Iterator[bytes], compression: str, depth: int) -> None:
        """Search what is compressed, and what is compressed in that."""
        content = _whole(unpacked(raw, compression))
        start = next(content, b"")
        inner = compression_by_magic(start) if depth else ""
        content = itertools.chain([start], content)
        if inner:
            self._unpacked(found, content, inner, depth - 1)
        else:
            self._stream(found, content)

    def _zip(self, found: set[tuple[str, int]], path: Path) -> None:
        try:
            with zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    with archive.open(member) as file:
                        self._stream(found, _whole(iter(lambda file=file: file.read(_BLOCK), b"")))  # type: ignore[misc]
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError):
            return  # its raw bytes were looked at

    def _parquet(self, found: set[tuple[str, int]], path: Path) -> None:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS):
                for column in batch.columns:
                    for data, starts, ends in cells_of(column):
                        self._stream(found, _cut(data))
                        self._note(found, self._cells.cells(data, starts, ends))

    def _pages(self, found: set[tuple[str, int]], path: Path) -> None:
        """Search each frame of zstd that a broken file has: a page of a Parquet file is one."""
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            at = data.find(_ZSTD)
            while at >= 0:
                after = data.find(_ZSTD, at + 4)
                self._unpacked(found, iter([data[at : after if after >= 0 else len(data)]]), "zst", 0)
                at = after

    def _shard(self, found: set[tuple[str, int]], path: Path) -> None:
        try:
            shard = lists.read(path)
            for number in shard.numbers:
                places = np.flatnonzero(np.isin(self._needles.chunks, shard.ids(number)))
                found.update((CHUNK, place) for place in places.tolist())
        except RetrotoolError:
            return  # no index; its raw bytes were looked at

    def _stream(self, found: set[tuple[str, int]], blocks: Iterable[bytes]) -> None:
        """Search bytes as they are, folded, and unescaped; where they are text, also for cells."""
        before = b""
        pending: bytes | None = None
        first = True
        for block in itertools.chain(blocks, [None]):
            if pending is not None:
                data = before + pending
                self._search(found, data, first, block is None)
                before, first = data[-_OVERLAP:], False
            pending = block

    def _search(self, found: set[tuple[str, int]], data: bytes, first: bool, last: bool) -> None:
        self._note(found, self._runs.runs(data))
        for number, view in enumerate(itertools.chain([data], unescaped(data))):
            if len(self._text):
                self._note(found, self._text.runs(folded(view)))
            if len(self._cells):
                whole = not number
                self._note(found, self._cells.cells(*cells(view, begins=first and whole, ends=last and whole)))

    def _note(self, found: set[tuple[str, int]], hits: Iterable[tuple[int, int]]) -> None:
        found.update((KINDS[self._needles.kinds[number]], number) for _, number in hits)


def _tokenizer(root: Path) -> Path | None:
    """The tokenizer of a store, if it is the one that the store was made with."""
    try:
        known = identity.read_identity(root)[0].tokenizer
        path = root / known.file
        return path if atomic.file_sha256(path) == known.sha256 else None
    except (RetrotoolError, FileNotFoundError):
        return None


def _refuse(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _blocks(path: Path, report: Report = lambda _: None) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            report(len(block))
            yield block


def _cut(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), _BLOCK):
        yield data[start : start + _BLOCK]


def _whole(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Blocks up to where they break off."""
    try:
        yield from blocks
    except (BrokenStream, EOFError, OSError, zipfile.BadZipFile):
        return
