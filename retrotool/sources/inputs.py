"""Input files: formats, slices, fingerprints, and how they are opened; standard input is spooled to a file.

``finding`` finds them. Their bytes are read through the methods of ``InputFile``, from a disk or by ranges
(``remote``), but for the headers of zstd's frames and Parquet files on a disk, which their libraries open.

Workers open the unnamed copy of standard input through ``/proc``; it is freed when this process ends.
"""

from __future__ import annotations

import codecs
import errno
import functools
import hashlib
import io
import os
import shutil
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from retrotool.errors import StorageError, UsageError
from retrotool.scratch import more_scratch, scratch_file, scratch_folder
from retrotool.sources import streams
from retrotool.sources.records import Fields
from retrotool.sources.remote import RemoteReader, is_remote, locate, tag_of
from retrotool.sources.streams import BLOCK_BYTES, LONGEST_MAGIC, compression_by_magic, compression_of

FORMATS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".txt": "txt",
    ".md": "txt", ".rst": "txt", ".html": "html", ".htm": "html",
    ".warc": "warc", ".wet": "warc", ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow",
    ".bin": "tokens", ".idx": "tokens", ".npy": "tokens", ".u16": "tokens", ".u32": "tokens",
}  # fmt: skip
NAMED = {"text": "txt"} | {suffix[1:]: base for suffix, base in FORMATS.items()}  # formats by what ``--format`` takes
ENCODABLE = ("jsonl", "json", "csv", "tsv", "txt", "html")  # formats of text, in any encoding
COMPRESSIBLE = (*ENCODABLE, "warc")  # formats of compressed files
IN_BYTES = ("jsonl", "csv", "tsv", "warc", "txt", "html")  # whose positions are byte offsets; else rows from 1
_SAMPLES = 256
_SAMPLE_BYTES = 64 << 10
_BEGINNING_BYTES = 2 << 20
_PIPE_ADVICE = "Pipe text into the command, or give a file instead of -."
_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Slice:
    """A range of an input: bytes [``start``, ``end``) of lines, or row groups, batches or documents."""

    start: int = 0
    end: int | None = None
    first: int = 0  # position of its beginning: byte offset in the decompressed file, or rows before it
    last: int | None = None  # position of its end; None: the end of the file


WHOLE = Slice()
STANDARD_INPUT = "-"


@dataclass(frozen=True, slots=True)
class InputFile:
    """An input: its path, its name in the store, bytes, and format, such as ``jsonl`` or ``jsonl.zst``."""

    path: str
    name: str
    size: int
    format: str
    encoding: str = ""  # Python's name for it; "": UTF-8, or for HTML the one that it declares
    tag: str = ""  # of a file that is not on a disk: changes with its content

    @property
    def base(self) -> str:
        """The format without compression."""
        return self.format.partition(".")[0]

    @property
    def compression(self) -> str:
        """The compression: "gz", "zst", "bz2", "xz", or ""."""
        return self.format.partition(".")[2]

    def blocks(self, start: int = 0, end: int | None = None) -> Generator[bytes]:
        """Yield decompressed blocks of bytes [``start``, ``end``), as UTF-8; see ``streams.blocks``."""
        found = streams.blocks(functools.partial(self.open, end), self.compression, start, end)
        return streams.transcoded(found, self.encoding) if self.encoding else found

    def estimated_text(self) -> int:
        """Estimate the bytes of text: by a zstd archive's headers, otherwise by a sample of the beginning."""
        if self.compression == "zst" and not self.is_remote and (frames := streams.frames_of(Path(self.path))):
            return sum(frame.content for frame in frames)
        text, sample = 0, min(self.size, _BEGINNING_BYTES)
        with suppress(streams.BrokenStream):  # it was cut there, not broken
            for block in self.blocks(0, sample):
                text += len(block)
        return text * self.size // max(sample, 1)

    def reading(self, fields: Fields) -> tuple[object, ...]:
        """Return the settings that decide which documents the rows of this input are."""
        chosen = () if self.format == format_of(Path(self.path).name) or is_spooled(self) else (self.base,)
        return (*fields.reading(self.base), *chosen, *((self.encoding,) if self.encoding else ()))

    def fingerprint(self, fields: Fields | None = None) -> str:
        """Return BLAKE2b-128 of the content; above 16 MiB, of size, time of change and 256 samples.

        Of a file that is not on a disk nothing is read: its tag stands for its content.
        """
        digest = hashlib.blake2b(f"{self.format} {self.size}".encode(), digest_size=16)
        if self.base == "html" or (self.base == "txt" and not (fields is not None and fields.separator)):
            digest.update(self.name.encode("utf-8", "surrogateescape"))  # its name is its document's id
        offsets: Iterable[int] = range(0, self.size, _SAMPLE_BYTES)
        if self.is_remote:
            digest.update(self.tag.encode())
            offsets = ()
        elif self.size > _SAMPLES * _SAMPLE_BYTES:  # the samples may miss a change
            digest.update(str(Path(self.path).stat().st_mtime_ns).encode())
            offsets = ((self.size - _SAMPLE_BYTES) * i // (_SAMPLES - 1) for i in range(_SAMPLES))
        with self.open() as file:
            for offset in offsets:
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
        if index := self.index():
            digest.update(index.fingerprint().encode())
        return digest.hexdigest()

    @property
    def is_remote(self) -> bool:
        """Whether the path is a URI."""
        return is_remote(self.path)

    def open(self, end: int | None = None, buffering: int = -1) -> BinaryIO:
        """Open for random access, to read all bytes up to ``end``, if given, and few after that."""
        if self.is_remote:
            return io.BufferedReader(RemoteReader(self.path, self.size, end))
        return Path(self.path).open("rb", buffering)

    def open_arrow(self) -> pa.NativeFile:
        """Open for pyarrow, which reads ranges."""
        if self.is_remote:
            return pa.PythonFile(RemoteReader(self.path, self.size, exact=True), "r")
        return pa.OSFile(self.path)

    def read_range(self, start: int, length: int) -> bytes:
        """Read ``length`` bytes, fewer at the end of the file."""
        with self.open_arrow() as file:
            file.seek(start)
            return bytes(file.read(length))

    def index(self) -> InputFile | None:
        """Return the index beside a file of tokens, if there is one."""
        if self.base != "tokens" or self.path.endswith(".idx"):
            return None
        beside = replace(self, path=self.path.removesuffix(Path(self.path).suffix) + ".idx", format="")
        try:
            size, tag = beside._status()
        except FileNotFoundError:
            return None
        return replace(beside, size=size, tag=tag)

    def change(self) -> str:
        """Return what has changed since the file was found, or ""; raise ``OSError`` if it can't be read."""
        size, tag = self._status()
        if size != self.size:
            return f"it had {self.size:,} bytes when it was planned, now {size:,}"
        return "" if tag == self.tag else "it was replaced since it was planned"

    def _status(self) -> tuple[int, str]:
        """Return size and tag of what the path is now."""
        if not self.is_remote:
            return Path(self.path).stat().st_size, ""
        objects, key = locate(self.path)
        if (status := objects.stat(key)) is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.path)
        return status.size, tag_of(status)


def format_of(name: str, base: str | None = None) -> str | None:
    """Return the format of a file by its name, with its compression; ``base``: the one without, if known."""
    compression = compression_of(name)
    stem = name[: -len(compression) - 1] if compression else name
    base = base or FORMATS.get(Path(stem.lower()).suffix)
    if not compression:
        return base
    return f"{base}.{compression}" if base in COMPRESSIBLE else None


def base_of(name: str | None) -> str | None:
    """Return the format that ``--format`` names; raise ``UsageError`` for another name."""
    if name is not None and name not in NAMED:
        raise UsageError(f"--format {name}: not a known format", f"Known formats: {', '.join(NAMED)}.")
    return None if name is None else NAMED[name]


def encoding_of(name: str | None) -> str:
    """Return Python's name for an encoding, "" for UTF-8; raise ``UsageError`` for what is not one."""
    try:
        "a".encode(name or "utf-8")
    except (LookupError, ValueError):
        raise UsageError(f"--encoding {name}: unknown", "Give a name such as latin-1, cp1252 or utf-16.") from None
    known = codecs.lookup(name or "utf-8").name
    return "" if known == "utf-8" else known


@contextmanager
def spool(stream: BinaryIO | None, base: str = "jsonl") -> Iterator[InputFile]:
    """Copy a stream of a format to a scratch file that lasts as long as the context."""
    if stream is None or stream.closed:
        raise UsageError("standard input is closed", _PIPE_ADVICE)
    if not (_PROC / "self" / "fd").is_dir():
        raise UsageError("standard input can't be read without /proc", "Give a file instead of -.")
    with scratch_file() as file:
        while block := _read(stream):
            try:
                file.write(block)
                file.flush()
            except OSError as error:
                free = shutil.disk_usage(scratch_folder()).free
                raise StorageError(
                    f"standard input can't be copied to {scratch_folder()}, where {free:,} bytes are free: "
                    f"{error.strerror}",
                    f"{more_scratch('room for it')} Or give a file instead of -.",
                ) from error
        size = file.tell()
        if not size:
            raise UsageError("standard input is empty", _PIPE_ADVICE)
        file.seek(0)
        compression = compression_by_magic(file.read(LONGEST_MAGIC))
        kind = f"{base}.{compression}" if compression and base in COMPRESSIBLE else base
        yield InputFile(str(_PROC / str(os.getpid()) / "fd" / str(file.fileno())), "stdin", size, kind)


def is_spooled(file: InputFile) -> bool:
    """Return whether an input is standard input, which is lost when the process that read it ends."""
    return Path(file.path).is_relative_to(_PROC)


def _read(stream: BinaryIO) -> bytes:
    try:
        return stream.read(BLOCK_BYTES)
    except OSError as error:
        raise UsageError(f"standard input can't be read: {error.strerror or error}", _PIPE_ADVICE) from error
