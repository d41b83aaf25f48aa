"""Looking for what a purge should have left nothing of: in every file under a store, whoever wrote it, and all of each.

Every file's bytes are read as they are, also of hidden and temporary files, of what no commit names, of spool and
staging. What they stand for is read, too: all columns of Parquet files, dictionaries decoded; of Parquet files that
broke off (no footer) the compressed pages that can be found; what .zst, .gz, .bz2, .xz and .zip files hold, whatever
they are called, also in one another (of a .zip in anything but a .zip only the bytes); what JSON's escapes stand for;
ids in the lists of faiss files. Codes of whole vectors, and ``.npy`` files, hold the bytes of vectors as they are.

A finding is a path, a kind of needle and its number; never text. Files that go while they are read are passed over.

Cost: two threads, each at a file of its own. See ``benchmarks/residue.py`` for rates; memory of a row group or some
megabytes a thread.

Not found: vectors in product codes, or rotated, or of other numbers than float16 and float32; tokens as other numbers
than the store's; ids in an index that broke off; text in encodings other than UTF-8 and those above (base64, %20,
&nbsp;), in Parquet files inside of archives, in archives that broke off or are of other kinds, or encrypted; less than
a needle, or a piece of a chunk that none was drawn from; letters beyond ASCII in the other case than the tokenizer
gives; text across more than 4 kB of punctuation. Ids are not looked for in JSON of the store's own but in what people
wrote there, nor in bytes that are no text, nor, if they are numbers, between commas. One file is never looked at: the
tokenizer, if it has the SHA-256 that the store is bound to. It is older than all text.
"""

from __future__ import annotations

import contextlib
import itertools
import lzma
import mmap
import os
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from retrotool.ann import lists
from retrotool.errors import RetrotoolError
from retrotool.purge.decode import Places, cells, cells_of, folded, unescaped
from retrotool.purge.matching import KINDS, Matcher, Needles
from retrotool.purge.needles import RUNS, hidden_by, said_by_others
from retrotool.sources.streams import LONGEST_MAGIC, BrokenStream, compression_by_magic, unpacked
from retrotool.store import atomic, identity
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones

_BLOCK, _OVERLAP = 1 << 20, 1 << 12
_ROWS = 4096
_NESTED = 4
_ZSTD = b"\x28\xb5\x2f\xfd"
_THREADS = 2
_FAISS = (b"Ix", b"Iw")
_BZIP2 = (b"1AY&SY", b"\x17rE8P\x90")
"""How the first block of bzip2 begins, behind the mark and a digit; and the end of one that has none."""
_START = max(LONGEST_MAGIC, 16)
"""Bytes that tell what a file is."""
_RECORDS = ("log", "checkpoints", "plans", "inputs")
_FREE = ("reason", "who", "restored_reason", "restored_by")
_BROKEN = (
    BrokenStream, EOFError, OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error, lzma.LZMAError,
)  # fmt: skip
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
    """What is left of victims: ``findings``.

    ``said`` counts needles that were found and that living documents say by right. ``waiting`` are those of the
    findings that chunks say which are purged, or set aside, and not erased.
    """

    findings: tuple[Finding, ...]
    said: int
    waiting: frozenset[int] = frozenset()


def look(store: Store, needles: Needles, report: Report = lambda _: None, part: Report = lambda _: None) -> Left:
    """Look for what is left of the victims of ``needles`` under a store; what living documents say is not theirs.

    Only if something is found all chunks are read again, to see what they say: ``part`` is called with 1 for each part.
    """
    found = scan(store.root, needles, report)
    store.refresh()  # what was appended meanwhile is among the files, too
    numbers = np.unique([finding.number for finding in found if finding.kind != CHUNK]).astype(np.int64)
    theirs = _said(store, needles, numbers, hidden_by(store, needles.chunks), part)
    left = [finding for finding in found if finding.kind == CHUNK or finding.number not in theirs]
    rest = np.setdiff1d(numbers, np.array(sorted(theirs), np.int64))
    waiting = _said(store, needles, rest, Tombstones(np.unique(needles.chunks)), part)
    return Left(tuple(left), len(theirs), frozenset(waiting))


def _said(store: Store, needles: Needles, numbers: Places, hidden: Tombstones, report: Report) -> set[int]:
    """Those of some needles that chunks say which are not hidden."""
    if not len(numbers):
        return set()
    said = said_by_others(store, needles.of(numbers), store.state.parts(), report, hidden=hidden)
    return {int(numbers[number]) for number in said}


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
        """All files under the root, the largest first; links are followed, each folder is walked once.

        ``OSError`` if a folder can't be read: nothing may be said of what lies in it.
        """
        found: list[Path] = []
        seen: set[tuple[int, int]] = set()
        for folder, inner, names in os.walk(self._root, onerror=_refuse, followlinks=True):
            with contextlib.suppress(FileNotFoundError):
                about = Path(folder).stat()
                if (about.st_dev, about.st_ino) in seen:
                    inner.clear()
                    continue
                seen.add((about.st_dev, about.st_ino))
            found += [Path(folder) / name for name in names]
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
                    start = file.read(_START)
                record = self._is_record(path)
                self._stream(found, _blocks(path, report), cells_too=not (record or _is_packed(start)))
                if record:
                    self._note(found, self._cells.cells(*_free_texts(path.read_bytes())))
                else:
                    self._decoded(found, path, start)
        except FileNotFoundError:
            pass
        return {Finding(name, kind, number) for kind, number in found}

    def _is_record(self, path: Path) -> bool:
        """Whether it is JSON of the store's own, with names of kinds, fields and parts: an id can be any of these."""
        first = path.relative_to(self._root).parts[0]
        return first == identity.FILE or (first in _RECORDS and path.suffix == ".json")

    def _decoded(self, found: set[tuple[str, int]], path: Path, start: bytes) -> None:
        """What the bytes of a file stand for, by what it begins with."""
        if compression := _compression(start):
            self._unpacked(found, _blocks(path), compression, _NESTED)
        elif start[:4] == b"PAR1":
            try:
                self._parquet(found, path)
            except (pa.ArrowException, OSError, ValueError):
                self._pages(found, path)
        elif start[:4] == b"PK\x03\x04":
            self._zip(found, path, _NESTED)
        elif start[:2] in _FAISS and len(self._needles.chunks):
            self._shard(found, path)

    def _unpacked(self, found: set[tuple[str, int]], raw: Iterator[bytes], compression: str, depth: int) -> None:
        """Search what is compressed, and what is compressed in that."""
        content = _whole(unpacked(raw, compression))
        start = next(content, b"")
        inner = _compression(start) if depth else ""
        content = itertools.chain([start], content)
        if inner:
            self._unpacked(found, content, inner, depth - 1)
        else:
            self._stream(found, content, cells_too=not _is_packed(start))

    def _zip(self, found: set[tuple[str, int]], file: Path | IO[bytes], depth: int) -> None:
        """Search all members that can be read, and archives among them; raw bytes were looked at."""
        with contextlib.suppress(*_BROKEN), zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                with contextlib.suppress(*_BROKEN):
                    self._member(found, archive, member, depth)

    def _member(
        self, found: set[tuple[str, int]], archive: zipfile.ZipFile, member: zipfile.ZipInfo, depth: int
    ) -> None:
        with archive.open(member) as file:
            start = file.read(_START)
            content = _whole(itertools.chain([start], iter(lambda: file.read(_BLOCK), b"")))
            compression = _compression(start) if depth else ""
            if compression:
                self._unpacked(found, content, compression, depth - 1)
            else:
                self._stream(found, content, cells_too=not _is_packed(start))
        if depth and start[:4] == b"PK\x03\x04":
            with archive.open(member) as file:
                self._zip(found, file, depth - 1)

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

    def _stream(self, found: set[tuple[str, int]], blocks: Iterable[bytes], *, cells_too: bool = True) -> None:
        """Search bytes as they are, folded, and unescaped; where they are text, also for cells."""
        before = b""
        pending: bytes | None = None
        first = True
        for block in itertools.chain(blocks, [None]):
            if pending is not None:
                data = before + pending
                self._search(found, data, first, block is None, cells_too=cells_too)
                before, first = data[-_OVERLAP:], False
            pending = block

    def _search(self, found: set[tuple[str, int]], data: bytes, first: bool, last: bool, *, cells_too: bool) -> None:
        self._note(found, self._runs.runs(data))
        for number, view in enumerate(itertools.chain([data], unescaped(data))):
            if len(self._text):
                self._note(found, self._text.runs(folded(view)))
            if cells_too and len(self._cells):
                whole = not number
                self._note(found, self._cells.cells(*cells(view, begins=first and whole, ends=last and whole)))

    def _note(self, found: set[tuple[str, int]], hits: Iterable[tuple[int, int]]) -> None:
        found.update((KINDS[self._needles.kinds[number]], number) for _, number in hits)


def _is_packed(start: bytes) -> bool:
    """Whether bytes begin like those of a format that is decoded, or has no texts: cells in them are there by chance.

    So that no text begins like that, more is asked for than letters where a format's mark is letters.
    """
    if start[:2] in _FAISS:
        return 0 in start[4:_START]  # the dimension, and how many there are
    return start.startswith((b"PAR1\x15", b"PK\x03\x04", b"\x93NUMPY")) or bool(_compression(start))


def _compression(start: bytes) -> str:
    """What bytes are compressed by, or "": text may begin like bzip2's mark."""
    compression = compression_by_magic(start)
    return "" if compression == "bz2" and start[4:10] not in _BZIP2 else compression


def _free_texts(data: bytes) -> tuple[bytes, Places, Places]:
    """What people wrote into JSON of the store's own, as cells; a checkpoint has a line before it."""
    texts: list[bytes] = []

    def gather(value: object) -> None:
        if isinstance(value, dict):
            texts.extend(
                text.encode() for key, text in value.items() if key in _FREE and isinstance(text, str) and text
            )
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            gather(inner)

    for piece in (data, data.partition(b"\n")[2]):
        with contextlib.suppress(orjson.JSONDecodeError):
            gather(orjson.loads(piece))
    sizes = np.array([len(text) for text in texts], np.int64)
    ends = np.cumsum(sizes)
    return b"".join(texts), ends - sizes, ends


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
    except _BROKEN:
        return
