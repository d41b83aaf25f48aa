"""Find input files: their names, formats, slices and fingerprints; standard input is spooled to a file.

docs/how-to/chunk-a-corpus.md says what is found and how it is named.

* In folders, ``.bin`` and ``.npy`` files without an index are skipped, too. Stores are skipped silently.
* A folder saved by ``datasets`` lists its Arrow files in ``state.json``, or its splits in
  ``dataset_dict.json``. A saved row selection (before version 2) is refused, because reading the table would
  include rows that were filtered out.
* Workers open the unnamed copy of standard input through ``/proc``; it is freed when this process ends.
"""

from __future__ import annotations

import codecs
import errno
import glob
import hashlib
import itertools
import os
import shutil
import stat
from collections import Counter
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import orjson

from retrotool.errors import StorageError, UsageError
from retrotool.scratch import more_scratch, scratch_file, scratch_folder
from retrotool.sources import streams
from retrotool.sources.records import Fields
from retrotool.sources.streams import BLOCK_BYTES, COMPRESSIONS, LONGEST_MAGIC, compression_by_magic, compression_of

FORMATS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".txt": "txt",
    ".md": "txt", ".rst": "txt", ".html": "html", ".htm": "html",
    ".warc": "warc", ".wet": "warc", ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow",
    ".bin": "tokens", ".idx": "tokens", ".npy": "tokens", ".u16": "tokens", ".u32": "tokens",
}  # fmt: skip
NAMED = {"text": "txt"} | {suffix[1:]: base for suffix, base in FORMATS.items()}  # formats by what ``--format`` takes
ENCODABLE = ("jsonl", "json", "csv", "tsv", "txt", "html")  # formats of text, in any encoding
COMPRESSIBLE = (*ENCODABLE, "warc")  # formats of compressed files
_PACKED = ", ".join(suffix for suffix, base in FORMATS.items() if base in COMPRESSIBLE)
_KNOWN_FORMATS = f"Known formats: {', '.join(FORMATS)}; {_PACKED} also with {', '.join(COMPRESSIONS)}."
IN_BYTES = ("jsonl", "csv", "tsv", "warc", "txt", "html")  # whose positions are byte offsets; else rows from 1
_SAMPLES = 256
_SAMPLE_BYTES = 64 << 10
_NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
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
        found = streams.blocks(Path(self.path), self.compression, start, end)
        return streams.transcoded(found, self.encoding) if self.encoding else found

    def reading(self, fields: Fields) -> tuple[object, ...]:
        """Return the settings that decide which documents the rows of this input are."""
        chosen = () if self.format == _input_format(Path(self.path).name) or is_spooled(self) else (self.base,)
        return (*fields.reading(self.base), *chosen, *((self.encoding,) if self.encoding else ()))

    def fingerprint(self, fields: Fields | None = None) -> str:
        """Return BLAKE2b-128 of the content; above 16 MiB of size, time of change and 256 samples."""
        digest = hashlib.blake2b(f"{self.format} {self.size}".encode(), digest_size=16)
        if self.base == "html" or (self.base == "txt" and not (fields is not None and fields.separator)):
            digest.update(self.name.encode("utf-8", "surrogateescape"))  # its name is its document's id
        offsets: Iterable[int] = range(0, self.size, _SAMPLE_BYTES)
        if self.size > _SAMPLES * _SAMPLE_BYTES:  # the samples may miss a change
            digest.update(str(Path(self.path).stat().st_mtime_ns).encode())
            offsets = ((self.size - _SAMPLE_BYTES) * i // (_SAMPLES - 1) for i in range(_SAMPLES))
        with Path(self.path).open("rb") as file:
            for offset in offsets:
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
        beside = Path(self.path).with_suffix(".idx")
        if self.base == "tokens" and beside != Path(self.path) and beside.is_file():
            digest.update(replace(self, path=str(beside), size=beside.stat().st_size, format="").fingerprint().encode())
        return digest.hexdigest()


def _input_format(name: str, base: str | None = None) -> str | None:
    compression = compression_of(name)
    stem = name[: -len(compression) - 1] if compression else name
    base = base or FORMATS.get(Path(stem.lower()).suffix)
    if not compression:
        return base
    return f"{base}.{compression}" if base in COMPRESSIBLE else None


class Survey(NamedTuple):
    """The input files that were found, the files in folders that were skipped, and what was excluded."""

    files: list[InputFile]
    left_out: list[Path]
    excluded: list[Path]


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


def find_inputs(inputs: Sequence[str], standard_input: InputFile | None = None) -> list[InputFile]:
    """Find all input files behind paths, patterns and folders, each once; ``-`` is ``standard_input``."""
    return survey(inputs, standard_input).files


def survey(
    inputs: Sequence[str], standard_input: InputFile | None = None, base: str | None = None, encoding: str = "",
    exclude: Sequence[str] = (),
) -> Survey:  # fmt: skip
    """Find inputs as ``find_inputs`` does; also return what was skipped in folders and excluded, sorted.

    ``base``: the format of every file, whatever its name; ``encoding``: that of files of text; ``exclude``:
    patterns of files and folders to leave out (``is_excluded``).
    """
    found: dict[Path, InputFile] = {}
    left_out: set[Path] = set()
    excluded: set[Path] = set()
    for given in itertools.chain.from_iterable(map(_expand, inputs)):
        if given == STANDARD_INPUT:
            if standard_input is None:
                raise UsageError("standard input can't be read here", "Give a file instead of -.")
            found.setdefault(Path(standard_input.path), standard_input)
            continue
        path = _token_file(Path(given))
        mode = _mode(path, given)
        if is_excluded(path, exclude):
            excluded.add(path)
        elif stat.S_ISDIR(mode):
            folder = _Folder(path, base, exclude)
            folder.walk()
            excluded |= folder.excluded
            if not folder.files and not folder.excluded:
                raise UsageError(f"{given} has no file of a known format", _KNOWN_FORMATS)
            for file in sorted(folder.files, key=folder.files.__getitem__):
                name = (path.resolve().name / file.relative_to(path)).as_posix()
                found.setdefault(file.resolve(), _describe(file, name, base))
            left_out |= folder.left_out
        else:
            if not stat.S_ISREG(mode):
                raise _not_regular(path)
            if _input_format(path.name, base) is None:
                raise UsageError(f"{given} has an unknown format", f"{_KNOWN_FORMATS} For other names: --format.")
            named = (part for part in Path(os.path.normpath(path)).parts if part != ".." and part.strip("/"))
            found.setdefault(path.resolve(), _describe(path, "/".join(named), base))
    unread = sorted(file for file in left_out if file.resolve() not in found)
    files = _tell_apart(list(found.values()))
    files = [replace(one, encoding=encoding) if one.base in ENCODABLE else one for one in files]
    return Survey(files, unread, sorted(excluded))


def is_excluded(path: Path, patterns: Sequence[str]) -> bool:
    """Return whether a pattern matches the end of a path: its name, or the names of folders and its name."""
    return bool(patterns) and any(map(path.absolute().match, patterns))


def _expand(given: str) -> list[str]:
    if not given:
        raise UsageError("an input has an empty name", "A variable may be empty; nothing was read or changed.")
    named = given == STANDARD_INPUT or os.path.lexists(given) or _token_file(Path(given)) != Path(given)
    if named or not glob.has_magic(given):
        return [given]
    matches = sorted(glob.glob(given, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
    if not matches:
        raise UsageError(f"{given} matches nothing", "Check the pattern; nothing was read or changed.")
    return matches


def _token_file(path: Path) -> Path:
    """Return the token file that an index or a prefix stands for; other paths unchanged."""
    if path.suffix == ".idx" and path.with_suffix(".bin").is_file():
        return path.with_suffix(".bin")
    if not os.path.lexists(path) and path.name and os.path.isfile(f"{path}.idx"):  # noqa: PTH113 - refuses nothing
        return path.with_name(f"{path.name}.bin")
    return path


def _mode(path: Path, given: str) -> int:
    try:
        return path.stat().st_mode
    except (OSError, ValueError) as error:
        number = getattr(error, "errno", errno.ENOENT)  # invalid names have no errno
        if number in _NOTHING_THERE and os.path.islink(path):  # noqa: PTH114 - has an answer for any name
            raise _link_to_nothing(path) from error
        reason = "no such file or folder" if number in _NOTHING_THERE else os.strerror(number)
        raise UsageError(f"{given}: {reason}", "Check the path; nothing was read or changed.") from error


def _link_to_nothing(path: Path) -> UsageError:
    return UsageError(f"{path}: broken link", "Remove it, or restore its target; nothing was changed.")


def _not_regular(path: Path) -> UsageError:
    return UsageError(f"{path} is not a regular file", "Pipe it into - instead; nothing was changed.")


@dataclass(slots=True)
class _Folder:
    """The files in a folder: inputs, each with its sort key, and those skipped; and what is excluded."""

    path: Path
    base: str | None = None
    exclude: Sequence[str] = ()
    files: dict[Path, Path] = field(default_factory=dict)
    left_out: set[Path] = field(default_factory=set)
    excluded: set[Path] = field(default_factory=set)
    _links: set[Path] = field(default_factory=set)
    _broken: set[Path] = field(default_factory=set)
    _seen: set[tuple[int, int]] = field(default_factory=set)

    def walk(self) -> None:
        """Search all subfolders; unlike ``rglob``, fail if one can't be listed."""
        waiting = [self.path]
        while waiting:
            # Links come last and sorted, so the order does not depend on the file system.
            for top in waiting:
                self._walk(top)
            waiting = sorted(self._links)
            self._links.clear()
        if self._broken:
            raise _link_to_nothing(min(self._broken))

    def _walk(self, top: Path) -> None:
        for place, folders, names in os.walk(top, onerror=_refuse):
            here = Path(place)
            status = here.stat()
            if (status.st_dev, status.st_ino) in self._seen or "store.json" in names:
                folders.clear()  # a store is not an input
                continue
            self._seen.add((status.st_dev, status.st_ino))
            if (saved := _saved(here, names)) is not None:
                folders[:] = [name for name in saved if not name.endswith(".arrow")]
                files = [here / name for name in saved if name.endswith(".arrow")]
                self.files.update({file: here / f"{i:09d}" for i, file in enumerate(files)})
            else:
                folders[:] = self._wanted(here, folders)
                for name in self._wanted(here, names):
                    self._add(here / name)
            links = [folder for folder in folders if (here / folder).is_symlink()]
            self._links.update(here / folder for folder in links)

    def _wanted(self, here: Path, names: Sequence[str]) -> list[str]:
        shown = [name for name in names if not name.startswith(".")]
        dropped = [name for name in shown if is_excluded(here / name, self.exclude)]
        self.excluded.update(here / name for name in dropped)
        return [name for name in shown if name not in dropped]

    def _add(self, file: Path) -> None:
        if _token_file(file) != file:
            return  # read with its token file
        try:
            regular = stat.S_ISREG(file.stat().st_mode)
        except OSError as error:
            if file.is_symlink() and error.errno in _NOTHING_THERE:
                self._broken.add(file)
            elif error.errno != errno.ENOENT:  # else it was deleted since it was listed
                _refuse(error)
            return
        # Without an index it may be weights or vectors: tokens only if named.
        is_unclear = (
            not self.base and file.suffix.lower() in (".bin", ".npy") and not file.with_suffix(".idx").is_file()
        )
        if _input_format(file.name, self.base) is None or (regular and is_unclear):
            self.left_out.add(file)
        elif regular:
            self.files[file] = file
        else:
            raise _not_regular(file)


def _refuse(error: OSError) -> NoReturn:
    raise UsageError(f"{error.filename}: {error.strerror}", "Nothing was changed.") from error


def _tell_apart(files: list[InputFile]) -> list[InputFile]:
    while shared := {name for name, n in Counter(file.name for file in files).items() if n > 1}:
        for i, file in enumerate(files):
            if file.name in shared:
                longer = Path(file.path).resolve().parts[-file.name.count("/") - 2 :]
                files[i] = replace(file, name="/".join(longer).lstrip("/"))
    return files


def _describe(path: Path, name: str, base: str | None) -> InputFile:
    kind = _input_format(path.name, base)
    assert kind is not None
    # Absolute, so that work can be resumed from another directory.
    absolute = str(path.absolute())
    try:
        absolute.encode()
    except UnicodeEncodeError:
        shown = absolute.encode("utf-8", "backslashreplace").decode()
        raise UsageError(f"{shown}: its name is not UTF-8", "Rename it; nothing was changed.") from None
    return InputFile(absolute, name, path.stat().st_size, kind)


def _saved(folder: Path, names: Collection[str]) -> list[str] | None:
    """Return the Arrow files or splits that a saved dataset lists, in its order; None for other folders."""
    inside = ""
    if "dataset_dict.json" in names:
        listed, inside = _saved_json(folder / "dataset_dict.json").get("splits"), "state.json"
    elif {"state.json", "dataset_info.json"} <= set(names):
        state = _saved_json(folder / "state.json")
        if any(state.get(key) for key in ("_indices_files", "_indices_data_files")):
            raise UsageError(
                f"{folder} has a row selection (indices mapping), which is not supported",
                "Save it again: datasets.load_from_disk(folder).flatten_indices().save_to_disk(other).",
            )
        listed = state.get("_data_files")
    else:
        return None
    if not isinstance(listed, list):
        return None  # another program's state.json
    found = []
    for entry in listed:
        name = entry.get("filename") if isinstance(entry, dict) else entry
        is_name = name == Path(str(name)).name and name not in ("", ".", "..")
        if not (isinstance(name, str) and is_name) or bool(inside) == name.endswith(".arrow"):
            what = "split" if inside else "Arrow file"
            raise UsageError(f"{folder} lists {name!r}, which is not the name of a {what}", "Save the dataset again.")
        if not (folder / name / inside).is_file():
            raise UsageError(f"{folder}: {name} is listed, but missing", "Copy the whole folder again.")
        found.append(name)
    return found


def _saved_json(path: Path) -> dict[str, Any]:
    try:
        content = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise UsageError(f"{path} is not JSON: {error.msg}", "Save the dataset again.") from error
    return content if isinstance(content, dict) else {}


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
