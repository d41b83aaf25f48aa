"""Standard input as an input file: what can be read once becomes a file that is cut, and read by several processes.

The stream is copied as it is to a scratch file without a name, in the folder for temporary files (``TMPDIR``): the
system frees it when this process ends, whatever ends it. So a ``chunk`` that is killed can't be resumed with it; pipe
the input again. Worker processes open it through ``/proc``. Whether the stream is compressed (gzip, zstd, bzip2, xz) is
decided by its first bytes; its text is JSON lines.

Cost: disk space of the stream's size, and writing and reading it once.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from retrotool.errors import StorageError, UsageError
from retrotool.sources.files import InputFile
from retrotool.sources.streams import BLOCK_BYTES, LONGEST_MAGIC, compression_by_magic

_ADVICE = "Pipe text into the command, or give a file instead of -."
_FOLDER = Path("/proc")


@contextmanager
def spool(stream: BinaryIO | None) -> Iterator[InputFile]:
    """Copy a stream to a scratch file that lasts as long as the context. None: there is no stream.

    Raises ``UsageError`` for a stream that is empty, closed or can't be read, ``StorageError`` if the disk is full.
    """
    if stream is None or stream.closed:
        raise UsageError("standard input is closed", _ADVICE)
    if not (_FOLDER / "self" / "fd").is_dir():
        raise UsageError("standard input can't be read without /proc", "Give a file instead of -.")
    with tempfile.TemporaryFile() as file:
        while block := _read(stream):
            try:
                file.write(block)
                file.flush()
            except OSError as error:
                free = shutil.disk_usage(tempfile.gettempdir()).free
                raise StorageError(
                    f"standard input can't be kept in {tempfile.gettempdir()}, where {free:,} bytes are free: "
                    f"{error.strerror}",
                    "Set TMPDIR to a folder with room for it, or give a file instead of -.",
                ) from error
        size = file.tell()
        if not size:
            raise UsageError("standard input is empty", _ADVICE)
        file.seek(0)
        compression = compression_by_magic(file.read(LONGEST_MAGIC))
        kind = f"jsonl.{compression}" if compression else "jsonl"
        yield InputFile(str(_FOLDER / str(os.getpid()) / "fd" / str(file.fileno())), f"stdin.{kind}", size, kind)


def is_spooled(file: InputFile) -> bool:
    """Return whether an input is standard input, which is gone when the process that read it is."""
    return Path(file.path).is_relative_to(_FOLDER) and file.name.startswith("stdin.jsonl")


def _read(stream: BinaryIO) -> bytes:
    try:
        return stream.read(BLOCK_BYTES)
    except OSError as error:
        raise UsageError(f"standard input can't be read: {error.strerror or error}", _ADVICE) from error
