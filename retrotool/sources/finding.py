"""Finding input files: behind paths, patterns and folders, each once, by a name that depends on nothing else given.

A file given by its path is named by that path, one found in a folder by the folder's own name and the way from there.
Links to folders are followed, each folder once; what lies there by its real path is named by that. What can't be an
input is refused by name, so that nothing is missing in silence: a link to nothing, a pipe or a device, a folder that
may not be listed. Left out, and named in a ``Survey``, are files in folders whose suffix is of no known format, and
``.bin`` and ``.npy`` files of which nothing says that they are tokens. Not even that is said of hidden files, of what
stands beside the rows of a saved dataset, and of a store.

A folder that ``datasets`` wrote with ``save_to_disk`` has ``state.json``, which lists the Arrow files, and
``dataset_info.json``; one of several splits has ``dataset_dict.json``, which lists its subfolders. Files beside the
listed ones (caches, remains of an interrupted save) are not rows. Versions of ``datasets`` before 2 could save a
selection of rows beside the whole table; reading on without it would bring back rows that were filtered out, so it is
refused. Source of the layout: ``Dataset.save_to_disk`` and ``DatasetDict.save_to_disk`` of the package ``datasets``.

Cost: a few system calls a file.
"""

from __future__ import annotations

import errno
import glob
import itertools
import os
import stat
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import orjson

from retrotool.errors import UsageError
from retrotool.sources.files import OFFSETS, STANDARD_INPUT, InputFile, input_format, known_formats

_NOTHING_CHANGED = "Check the path; nothing was read or changed."

_INDICES = ("_indices_files", "_indices_data_files")
_NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


class Survey(NamedTuple):
    """The input files behind what was given, and the files in folders that were left out for what they are."""

    files: list[InputFile]
    left_out: list[Path]


def find_inputs(inputs: Sequence[str], standard_input: InputFile | None = None) -> list[InputFile]:
    """All input files behind paths, patterns and folders, each once: as given, and in folders by their names.

    A path that does not exist may be a pattern (``*``, ``?``, ``[...]``, ``**``), which stands for all that match it,
    sorted. ``-`` is ``standard_input``, made by ``spool``. ``UsageError`` for a path that is missing, can't be
    read as a file or, given by name, is of no known format.
    """
    return survey(inputs, standard_input).files


def survey(inputs: Sequence[str], standard_input: InputFile | None = None) -> Survey:
    """What ``find_inputs`` gives, and what was left out in folders, sorted."""
    found: dict[Path, InputFile] = {}
    left_out: set[Path] = set()
    for given in itertools.chain.from_iterable(map(_expand, inputs)):
        if given == STANDARD_INPUT:
            if standard_input is None:
                raise UsageError("standard input can't be read here", "Give a file instead of -.")
            found.setdefault(Path(standard_input.path), standard_input)
            continue
        path = _token_file(Path(given))
        mode = _mode(path, given)
        if stat.S_ISDIR(mode):
            folder = _Folder(path)
            folder.walk()
            if not folder.files:
                raise UsageError(f"{given} has no file of a known format", f"Known are: {known_formats()}.")
            for file in sorted(folder.files, key=folder.files.__getitem__):
                # Names begin with the folder's own, so that they do not depend on where the folder lies.
                name = (path.resolve().name / file.relative_to(path)).as_posix()
                found.setdefault(file.resolve(), _describe(file, name))
            left_out |= folder.left_out
        else:
            if not stat.S_ISREG(mode):
                raise _no_regular_file(path)
            if input_format(path.name) is None:
                raise UsageError(f"{given} is of no known format", f"Known are: {known_formats()}.")
            found.setdefault(path.resolve(), _describe(path, _own_name(path)))
    unread = sorted(file for file in left_out if file.resolve() not in found)
    return Survey(_tell_apart(list(found.values())), unread)


def _own_name(path: Path) -> str:
    """The path as given, without what leads up from here or down from the root."""
    parts = Path(os.path.normpath(path)).parts
    return "/".join(part for part in parts if part != ".." and part.strip("/"))


def _expand(given: str) -> list[str]:
    """What a pattern matches, unless it is the name of something; anything else as it is."""
    if not given:
        raise UsageError("an empty name was given", "A variable may have no value; nothing was read or changed.")
    named = given == STANDARD_INPUT or os.path.lexists(given) or _token_file(Path(given)) != Path(given)
    if named or not glob.has_magic(given):
        return [given]
    matches = sorted(glob.glob(given, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
    if not matches:
        raise UsageError(f"{given} matches nothing", "Check the pattern; nothing was read or changed.")
    return matches


def _token_file(path: Path) -> Path:
    """The tokens that an index or a prefix without suffix stands for; any other path as it is."""
    if path.suffix == ".idx" and path.with_suffix(".bin").is_file():
        return path.with_suffix(".bin")
    if not os.path.lexists(path) and path.name and os.path.isfile(f"{path}.idx"):  # noqa: PTH113 - refuses nothing
        return path.with_name(f"{path.name}.bin")
    return path


def _mode(path: Path, given: str) -> int:
    """What a path leads to; ``UsageError`` if that is nothing."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError) as error:
        number = getattr(error, "errno", errno.ENOENT)  # none where the name is one that no file can have
        if number in _NOTHING_THERE and os.path.islink(path):  # noqa: PTH114 - has an answer for any name
            raise _link_to_nothing(path) from error
        reason = "no such file or folder" if number in _NOTHING_THERE else os.strerror(number)
        raise UsageError(f"{given}: {reason}", _NOTHING_CHANGED) from error


def _link_to_nothing(path: Path) -> UsageError:
    return UsageError(f"{path}: a link to nothing", "Remove it, or bring the file; nothing was changed.")


def _no_regular_file(path: Path) -> UsageError:
    return UsageError(f"{path} is no regular file", "Pipe it into - instead; nothing was changed.")


@dataclass(slots=True)
class _Folder:
    """What lies in a folder: ``files`` that are inputs, each with its place in the order, and those left out."""

    path: Path
    files: dict[Path, Path] = field(default_factory=dict)
    left_out: set[Path] = field(default_factory=set)
    _links: set[Path] = field(default_factory=set)
    _broken: set[Path] = field(default_factory=set)
    _seen: set[tuple[int, int]] = field(default_factory=set)

    def walk(self) -> None:
        """Look everywhere; ``rglob`` would leave out in silence what may not be listed."""
        waiting = [self.path]
        while waiting:
            # Links come after all that has been found by its real path, and in an order that no file system decides.
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
                folders.clear()  # a store of ours among the inputs is none of them
                continue
            self._seen.add((status.st_dev, status.st_ino))
            if (splits := saved_splits(here, names)) is not None:
                folders[:] = splits
            elif (listed := saved_files(here, names)) is not None:
                folders.clear()
                self.files.update({file: here / f"{i:09d}" for i, file in enumerate(listed)})
            else:
                folders[:] = _not_hidden(folders)
                for name in _not_hidden(names):
                    self._add(here / name)
            links = [folder for folder in folders if (here / folder).is_symlink()]
            self._links.update(here / folder for folder in links)

    def _add(self, file: Path) -> None:
        if _token_file(file) != file or file.name.endswith(OFFSETS):
            return  # it is read with the file that it belongs to
        try:
            regular = stat.S_ISREG(file.stat().st_mode)
        except OSError as error:
            if file.is_symlink() and error.errno in _NOTHING_THERE:
                self._broken.add(file)
            elif error.errno != errno.ENOENT:  # else it has gone since it was listed
                _refuse(error)
            return
        if input_format(file.name) is None or (regular and not _says_what_it_is(file)):
            self.left_out.add(file)
        elif regular:
            self.files[file] = file
        else:
            raise _no_regular_file(file)


def _refuse(error: OSError) -> NoReturn:
    raise UsageError(f"{error.filename}: {error.strerror}", "Nothing was changed.") from error


def _not_hidden(names: Sequence[str]) -> list[str]:
    return [name for name in names if not name.startswith(".")]


def _says_what_it_is(file: Path) -> bool:
    """Whether a file's contents are known; others are weights or vectors, perhaps: tokens only if named."""
    companions: Iterator[Path] = (file.with_suffix(beside) for beside in (".idx", OFFSETS))
    return file.suffix.lower() not in (".bin", ".npy") or any(beside.is_file() for beside in companions)


def _tell_apart(files: list[InputFile]) -> list[InputFile]:
    """Give inputs of one name as many of their folders' names as it takes to tell them apart."""
    while shared := {name for name, n in Counter(file.name for file in files).items() if n > 1}:
        for i, file in enumerate(files):
            if file.name in shared:
                longer = Path(file.path).resolve().parts[-file.name.count("/") - 2 :]
                files[i] = replace(file, name="/".join(longer).lstrip("/"))
    return files


def _describe(path: Path, name: str) -> InputFile:
    kind = input_format(path.name)
    assert kind is not None
    # Made absolute, so that the work can go on from another directory.
    absolute = str(path.absolute())
    try:
        absolute.encode()
    except UnicodeEncodeError:
        shown = absolute.encode("utf-8", "backslashreplace").decode()
        raise UsageError(f"{shown}: its name is not UTF-8", "Rename it; nothing was changed.") from None
    return InputFile(absolute, name, path.stat().st_size, kind)


def saved_splits(folder: Path, names: Collection[str]) -> list[str] | None:
    """Subfolders of a saved dataset of several splits, in its order; None if the folder, with files ``names``, is none.

    Raises ``UsageError`` if one is missing.
    """
    if "dataset_dict.json" not in names:
        return None
    splits = _saved_json(folder / "dataset_dict.json").get("splits")
    if not isinstance(splits, list):
        raise UsageError(f"{folder / 'dataset_dict.json'} names no splits", "Save the dataset again.")
    for split in splits:
        _inside(folder, split)
        if not (folder / split / "state.json").is_file():
            raise UsageError(f"{folder}: the split {split!r} is missing", "Save the dataset again.")
    return splits


def saved_files(folder: Path, names: Collection[str]) -> list[Path] | None:
    """Arrow files of a saved dataset, in its order; None if the folder, with files ``names``, is none.

    Raises ``UsageError`` if one is missing, or if rows were chosen by a mapping beside the files.
    """
    if not {"state.json", "dataset_info.json"} <= set(names):
        return None
    state = _saved_json(folder / "state.json")
    listed = state.get("_data_files")
    if not isinstance(listed, list):
        return None  # another program's state.json
    if any(state.get(key) for key in _INDICES):
        raise UsageError(
            f"{folder} holds a selection of rows as an indices mapping, which is not applied",
            "Save it again: datasets.load_from_disk(folder).flatten_indices().save_to_disk(other).",
        )
    files = []
    for entry in listed:
        name = entry.get("filename") if isinstance(entry, dict) else None
        _inside(folder, name)
        if not str(name).endswith(".arrow"):
            raise UsageError(f"{folder} lists {name}, which is no Arrow file", "Save the dataset again.")
        if not (folder / str(name)).is_file():
            raise UsageError(f"{folder}: {name} is listed in state.json, but missing", "Copy the folder again, whole.")
        files.append(folder / str(name))
    return files


def _inside(folder: Path, name: object) -> None:
    if not isinstance(name, str) or name != Path(name).name or name in ("", ".", ".."):
        raise UsageError(f"{folder} lists {name!r}, which is no name in it", "Save the dataset again.")


def _saved_json(path: Path) -> dict[str, Any]:
    try:
        content = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise UsageError(f"{path} is not JSON: {error.msg}", "Save the dataset again.") from error
    return content if isinstance(content, dict) else {}
