"""Finding input files and naming their format."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from retrotool.errors import UsageError

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonl.gz": "jsonl.gz",
    ".jsonl.zst": "jsonl.zst",
    ".parquet": "parquet",
    ".txt": "txt",
}
_SAMPLES = 256
_SAMPLE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class InputFile:
    """An input: where it is, what it is called in the store (for ``.txt`` also its id), size in bytes, and format."""

    path: str
    name: str
    size: int
    format: str

    @property
    def splittable(self) -> bool:
        """Whether any byte range of it can be read on its own."""
        return self.format == "jsonl"

    def fingerprint(self) -> str:
        """BLAKE2b-128 of the content up to 16 MiB, and of size and 256 samples of 64 KiB from start to end above.

        The same for a renamed or copied file.
        """
        digest = hashlib.blake2b(f"{self.format} {self.size}".encode(), digest_size=16)
        if self.format == "txt":
            digest.update(self.name.encode("utf-8", "surrogateescape"))  # its name is its document's id
        last = max(0, self.size - _SAMPLE_BYTES)
        with Path(self.path).open("rb") as file:
            for offset in sorted({last * i // (_SAMPLES - 1) for i in range(_SAMPLES)}):
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()


def input_format(name: str) -> str | None:
    """The format a file name stands for, or None."""
    lower = name.lower()
    return next((FORMATS[suffix] for suffix in sorted(FORMATS, key=len, reverse=True) if lower.endswith(suffix)), None)


def find_inputs(inputs: Sequence[str]) -> list[InputFile]:
    """All input files behind paths and folders, each once: as given, and in folders by their names.

    ``UsageError`` for a path that is missing or, given by name, of no known format; in folders, files of no known
    format and hidden ones are left out.
    """
    found: dict[Path, InputFile] = {}
    known = ", ".join(FORMATS)
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            inside = [file for file in _walk(path) if _is_input(file, path)]
            if not inside:
                raise UsageError(f"{given} has no file of a known format", f"Known are: {known}.")
            for file in inside:
                # Names begin with the folder's own, so that they do not depend on where the folder lies.
                found.setdefault(file.resolve(), _describe(file, path.resolve().name / file.relative_to(path)))
        elif path.is_file():
            if input_format(path.name) is None:
                raise UsageError(f"{given} is of no known format", f"Known are: {known}.")
            found.setdefault(path.resolve(), _describe(path, Path(path.name)))
        else:
            raise UsageError(f"{given}: no such file or folder", "Check the path; nothing was read or changed.")
    return _tell_apart(list(found.values()))


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

    found = []
    for place, folders, names in os.walk(folder, onerror=refuse):
        if "store.json" in names:  # a store of ours among the inputs is none of them
            folders.clear()
        else:
            found += [Path(place) / name for name in names]
    return sorted(found)


def _is_input(file: Path, folder: Path) -> bool:
    hidden = any(component.startswith(".") for component in file.relative_to(folder).parts)
    return file.is_file() and not hidden and input_format(file.name) is not None


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
