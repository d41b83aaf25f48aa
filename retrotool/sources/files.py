"""Input files: their names, formats, slices and fingerprints.

Which files there are finds ``finding``; here nothing is looked for but the files beside one that belong to it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from retrotool.sources.records import Fields
from retrotool.sources.streams import COMPRESSIONS, compression_of

FORMATS = {
    ".arrow": "arrow",
    ".bin": "tokens",
    ".feather": "arrow",
    ".idx": "tokens",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".warc": "warc",
    ".wet": "warc",
    ".npy": "tokens",
    ".parquet": "parquet",
    ".txt": "txt",
    ".u16": "tokens",
    ".u32": "tokens",
}
"""Format by suffix."""
COMPRESSIBLE = ("jsonl", "json", "csv", "tsv", "warc", "txt")
"""Formats whose files may be compressed as a whole."""
IN_BYTES = ("jsonl", "csv", "tsv", "warc", "txt")
"""Formats whose documents' positions are byte offsets; in others they are rows from 1."""
OFFSETS = ".offsets.npy"
"""What a file has instead of its suffix that says where the documents of the token file beside it begin."""
_SAMPLES = 256
_SAMPLE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Slice:
    """A range of an input: bytes [``start``, ``end``) of a file of lines, row groups, batches or documents of another.

    ``first`` is the position of its beginning: byte offset in the decompressed file, or number of rows before; ``last``
    that of its end. None: to the end of the file.
    """

    start: int = 0
    end: int | None = None
    first: int = 0
    last: int | None = None


WHOLE = Slice()
STANDARD_INPUT = "-"


@dataclass(frozen=True, slots=True)
class InputFile:
    """An input: where it is, what it is called in the store (for ``.txt`` also its id), size in bytes, and format.

    ``format`` is the name of a format, and for a compressed file a dot and its compression: ``jsonl.zst``.
    """

    path: str
    name: str
    size: int
    format: str

    @property
    def base(self) -> str:
        """The format without compression."""
        return self.format.partition(".")[0]

    @property
    def compression(self) -> str:
        """The compression: "gz", "zst", "bz2", "xz", or ""."""
        return self.format.partition(".")[2]

    def fingerprint(self, fields: Fields | None = None) -> str:
        """BLAKE2b-128 of the content up to 16 MiB, and of size and 256 samples of 64 KiB from start to end above.

        The same for a renamed or copied file, unless it is a text that is one document (``fields`` name no separator).
        What else decides which documents its rows are is ``Fields.reading``.
        """
        digest = hashlib.blake2b(f"{self.format} {self.size}".encode(), digest_size=16)
        if self.base == "txt" and not (fields is not None and fields.separator):
            digest.update(self.name.encode("utf-8", "surrogateescape"))  # its name is its document's id
        last = max(0, self.size - _SAMPLE_BYTES)
        with Path(self.path).open("rb") as file:
            for offset in sorted({last * i // (_SAMPLES - 1) for i in range(_SAMPLES)}):
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
        for beside in self.companions():
            digest.update(replace(self, path=str(beside), size=beside.stat().st_size, format="").fingerprint().encode())
        return digest.hexdigest()

    def companions(self) -> list[Path]:
        """Files beside that say where its documents are."""
        if self.base != "tokens" or self.path.endswith(".idx"):
            return []
        path = Path(self.path)
        return [beside for suffix in (".idx", OFFSETS) if (beside := path.with_suffix(suffix)).is_file()]


def input_format(name: str) -> str | None:
    """The format a file name stands for, or None."""
    compression = compression_of(name)
    stem = name[: -len(compression) - 1] if compression else name
    base = FORMATS.get(Path(stem.lower()).suffix)
    if base is None or (compression and base not in COMPRESSIBLE):
        return None
    return f"{base}.{compression}" if compression else base


def known_formats() -> str:
    """The suffixes that are understood, for messages."""
    packed = [suffix for suffix, base in FORMATS.items() if base in COMPRESSIBLE]
    return f"{', '.join(FORMATS)}; {', '.join(packed)} also with {', '.join(COMPRESSIONS)}"
