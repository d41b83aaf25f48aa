"""Finding input files and naming their format."""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from retrotool.errors import UsageError
from retrotool.sources.saved import saved_files, saved_splits
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

    def fingerprint(self) -> str:
        """BLAKE2b-128 of the content up to 16 MiB, and of size and 256 samples of 64 KiB from start to end above.

        The same for a renamed or copied file.
        """
        digest = hashlib.blake2b(f"{self.format} {self.size}".encode(), digest_size=16)
        if self.base == "txt":
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


def find_inputs(inputs: Sequence[str], standard_input: Path | None = None) -> list[InputFile]:
    """All input files behind paths, patterns and folders, each once: as given, and in folders by their names.

    A path that does not exist may be a pattern (``*``, ``?``, ``[...]``, ``**``), which stands for all that match it,
    sorted. ``-`` is ``standard_input``, a file made by ``spool``. ``UsageError`` for a path that is missing or, given
    by name, of no known format; in folders, files of no known format and hidden ones are left out.
    """
    found: dict[Path, InputFile] = {}
    for given in itertools.chain.from_iterable(map(_expand, inputs)):
        path = _token_file(Path(given))
        if given == STANDARD_INPUT:
            if standard_input is None:
                raise UsageError("standard input can't be read here", "Give a file instead of -.")
            suffix = standard_input.name.partition(".")[2]
            found.setdefault(standard_input.resolve(), _describe(standard_input, Path(f"stdin.{suffix}")))
            continue
        if path.is_dir():
            inside = [file for file in _walk(path) if _is_input(file, path)]
            if not inside:
                raise UsageError(f"{given} has no file of a known format", f"Known are: {known_formats()}.")
            for file in inside:
                # Names begin with the folder's own, so that they do not depend on where the folder lies.
                found.setdefault(file.resolve(), _describe(file, path.resolve().name / file.relative_to(path)))
        elif path.is_file():
            if input_format(path.name) is None:
                raise UsageError(f"{given} is of no known format", f"Known are: {known_formats()}.")
            found.setdefault(path.resolve(), _describe(path, Path(path.name)))
        else:
            raise UsageError(f"{given}: no such file or folder", "Check the path; nothing was read or changed.")
    return _tell_apart(list(found.values()))


def _token_file(path: Path) -> Path:
    """The tokens that an index or a prefix without suffix stands for; any other path as it is."""
    if path.suffix == ".idx" and path.with_suffix(".bin").is_file():
        return path.with_suffix(".bin")
    if not path.exists() and path.with_name(f"{path.name}.idx").is_file():
        return path.with_name(f"{path.name}.bin")
    return path


def _expand(given: str) -> list[str]:
    """What a pattern matches, unless it is the name of something; anything else as it is."""
    if given == STANDARD_INPUT or os.path.lexists(given) or not glob.has_magic(given):
        return [given]
    matches = sorted(glob.glob(given, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
    if not matches:
        raise UsageError(f"{given} matches nothing", "Check the pattern; nothing was read or changed.")
    return matches


def _tell_apart(files: list[InputFile]) -> list[InputFile]:
    """Give inputs of one name as many of their folders' names as it takes to tell them apart."""
    while shared := {name for name, n in Counter(file.name for file in files).items() if n > 1}:
        for i, file in enumerate(files):
            if file.name in shared:
                longer = Path(file.path).resolve().parts[-file.name.count("/") - 2 :]
                files[i] = replace(file, name="/".join(longer).lstrip("/"))
    return files


def _walk(folder: Path) -> list[Path]:
    """All files in a folder; ``rglob`` would leave out in silence what may not be listed."""

    def refuse(error: OSError) -> None:
        raise UsageError(f"{error.filename}: {error.strerror}", "Nothing was changed.") from error

    found = {}
    for place, folders, names in os.walk(folder, onerror=refuse):
        if "store.json" in names:  # a store of ours among the inputs is none of them
            folders.clear()
        elif (splits := saved_splits(Path(place), names)) is not None:
            folders[:] = splits
        elif (listed := saved_files(Path(place), names)) is not None:
            folders.clear()
            found.update({file: Path(place) / f"{i:09d}" for i, file in enumerate(listed)})
        else:
            found.update({file: file for name in names if _token_file(file := Path(place) / name) == file})
    return sorted(found, key=found.__getitem__)


def _is_input(file: Path, folder: Path) -> bool:
    hidden = any(component.startswith(".") for component in file.relative_to(folder).parts)
    if hidden or not file.is_file() or file.name.endswith(OFFSETS):
        return False
    if file.suffix.lower() in (".bin", ".npy") and not any(
        file.with_suffix(beside).is_file() for beside in (".idx", OFFSETS)
    ):
        return False  # weights or vectors, perhaps: tokens only if named, or if something says where documents are
    return input_format(file.name) is not None


def _describe(path: Path, name: Path) -> InputFile:
    kind = input_format(path.name)
    assert kind is not None
    # Made absolute, so that the work can go on from another directory.
    absolute = str(path.absolute())
    try:
        absolute.encode()
    except UnicodeEncodeError:
        shown = absolute.encode("utf-8", "backslashreplace").decode()
        raise UsageError(f"{shown}: its name is not UTF-8", "Rename it; nothing was changed.") from None
    return InputFile(absolute, name.as_posix(), path.stat().st_size, kind)
