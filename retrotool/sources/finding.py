"""Find input files behind paths, URIs, patterns and folders, and name them.

docs/how-to/chunk-a-corpus.md says what is found and how it is named. The rules are the same for folders of a
disk (``_Disk``) and for objects whose keys begin alike (``_Objects``), which one request lists.

* In folders, ``.bin`` and ``.npy`` files without an index are skipped, too. Stores are skipped silently.
* A folder saved by ``datasets`` lists its Arrow files in ``state.json``, or its splits in
  ``dataset_dict.json``. A saved row selection (before version 2) is refused, because reading the table would
  include rows that were filtered out.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, Literal, NamedTuple, NoReturn

import orjson

from retrotool.errors import UsageError
from retrotool.sources import remote
from retrotool.sources.inputs import COMPRESSIBLE, ENCODABLE, FORMATS, STANDARD_INPUT, InputFile, format_of
from retrotool.sources.streams import COMPRESSIONS
from retrotool.store.storage import FileStatus

_PACKED = ", ".join(suffix for suffix, base in FORMATS.items() if base in COMPRESSIBLE)
_KNOWN_FORMATS = f"Known formats: {', '.join(FORMATS)}; {_PACKED} also with {', '.join(COMPRESSIONS)}."
_NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


class Survey(NamedTuple):
    """The input files that were found, the files in folders that were skipped, and what was excluded."""

    files: list[InputFile]
    left_out: list[str]
    excluded: list[str]


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
    found: dict[PurePath, InputFile] = {}
    left_out: dict[PurePath, PurePath] = {}  # by the file that a link leads to
    excluded: set[PurePath] = set()
    trees = {False: _Disk(), True: _Objects()}
    for tree, given in ((trees[remote.is_remote(name)], name) for name in inputs):
        if given == STANDARD_INPUT:
            if standard_input is None:
                raise UsageError("standard input can't be read here", "Give a file instead of -.")
            found.setdefault(Path(standard_input.path), standard_input)
            continue
        for one in _expand(tree, given):
            path = _token_file(tree, tree.path(one))
            kind = tree.kind(path)
            if kind == "gone":
                raise UsageError(f"{one}: no such file or folder", "Check the path; nothing was read or changed.")
            if is_excluded(path, exclude):
                excluded.add(path)
            elif kind == "folder":
                folder = _Folder(tree, path, base, exclude)
                folder.walk()
                excluded |= folder.excluded
                if not folder.files and not folder.excluded:
                    raise UsageError(f"{one} has no file of a known format", _KNOWN_FORMATS)
                for file in sorted(folder.files, key=folder.files.__getitem__):
                    found.setdefault(tree.resolved(file), tree.input_of(file, path, base))
                left_out |= {tree.resolved(file): file for file in folder.left_out}
            elif kind == "other":
                raise _not_regular(path)
            elif format_of(path.name, base) is None:
                raise UsageError(f"{one} has an unknown format", f"{_KNOWN_FORMATS} For other names: --format.")
            else:
                found.setdefault(tree.resolved(path), tree.input_of(path, base=base))
    unread = sorted(file for resolved, file in left_out.items() if resolved not in found)
    files = _tell_apart(list(found.values()))
    files = [replace(one, encoding=encoding) if one.base in ENCODABLE else one for one in files]
    return Survey(files, list(map(_shown, unread)), list(map(_shown, sorted(excluded))))


def is_excluded(path: PurePath, patterns: Sequence[str]) -> bool:
    """Return whether a pattern matches the end of a path: its name, or the names of folders and its name."""
    whole = path.absolute() if isinstance(path, Path) and patterns else path
    return any(map(whole.match, patterns))


def _expand(tree: _Disk, given: str) -> list[str]:
    if not given:
        raise UsageError("an input has an empty name", "A variable may be empty; nothing was read or changed.")
    if not glob.has_magic(given):
        return [given]
    matches, path = tree.glob(given), tree.path(given)
    if tree.is_there(path) or _token_file(tree, path) != path:
        return [given]  # a name that looks like a pattern
    if not matches:
        raise UsageError(f"{given} matches nothing", "Check the pattern; nothing was read or changed.")
    return sorted(matches)


def _token_file(tree: _Disk, path: PurePath) -> PurePath:
    """Return the token file that an index or a prefix stands for; other paths unchanged."""
    if path.suffix == ".idx" and tree.is_file(path.with_suffix(".bin")):
        return path.with_suffix(".bin")
    if path.name and not tree.is_there(path) and tree.is_file(path.with_name(f"{path.name}.idx")):
        return path.with_name(f"{path.name}.bin")
    return path


def _shown(path: PurePath) -> str:
    """Return a path as a person names it; without a disk it is a URI."""
    return str(path) if isinstance(path, Path) else str(path).replace(":/", "://", 1)


def _not_regular(path: PurePath) -> UsageError:
    return UsageError(f"{path} is not a regular file", "Pipe it into - instead; nothing was changed.")


def _refuse(error: OSError) -> NoReturn:
    raise UsageError(f"{error.filename}: {error.strerror}", "Nothing was changed.") from error


class _Disk:
    """The files and folders of the file system."""

    path: type[PurePath] = Path
    is_there: Callable[[PurePath], bool] = staticmethod(os.path.lexists)
    is_file: Callable[[PurePath], bool] = staticmethod(os.path.isfile)  # unlike Path's, refuses no name
    is_link: Callable[[PurePath], bool] = staticmethod(os.path.islink)

    def resolved(self, path: PurePath) -> PurePath:
        """Return the path that all names of a file have in common."""
        return Path(path).resolve()

    def kind(self, path: PurePath) -> Literal["file", "folder", "other", "gone"]:
        try:
            mode = Path(path).stat().st_mode
        except ValueError:  # no file can have this name
            return "gone"
        except OSError as error:
            if error.errno not in _NOTHING_THERE:
                _refuse(error)
            if self.is_link(path):
                advice = "Remove it, or restore its target; nothing was changed."
                raise UsageError(f"{path}: broken link", advice) from error
            return "gone"
        return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "other"

    def children(self, path: PurePath) -> tuple[list[str], list[str]]:
        """Return the names of the folders in a folder, also of links to them, and of the files."""
        return next(os.walk(path, onerror=_refuse))[1:]

    def glob(self, pattern: str) -> list[str]:
        return glob.glob(pattern, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern

    def input_of(self, path: PurePath, top: PurePath | None = None, base: str | None = None) -> InputFile:
        """Return the file, named as it was given, or as it was found in the folder ``top``."""
        if top is not None:
            name = (Path(top).resolve().name / path.relative_to(top)).as_posix()
        else:
            name = "/".join(part for part in Path(os.path.normpath(path)).parts if part != ".." and part.strip("/"))
        # Absolute, so that work can be resumed from another directory.
        absolute = str(Path(path).absolute())
        try:
            absolute.encode()
        except UnicodeEncodeError:
            shown = absolute.encode("utf-8", "backslashreplace").decode()
            raise UsageError(f"{shown}: its name is not UTF-8", "Rename it; nothing was changed.") from None
        return InputFile(absolute, name, Path(path).stat().st_size, format_of(path.name, base) or "")


class _Objects(_Disk):
    """Objects by their URIs as paths, and the folders that their keys imply; what was found out is kept."""

    path = PurePosixPath

    def __init__(self) -> None:
        self._files: dict[PurePath, FileStatus | None] = {}
        self._folders: dict[PurePath, set[str]] = {}  # the names in each
        self._listed: set[str] = set()

    def resolved(self, path: PurePath) -> PurePath:
        return path

    def is_there(self, path: PurePath) -> bool:
        return self.kind(path) != "gone"

    def is_file(self, path: PurePath) -> bool:
        status = self._status(path)
        return status is not None and (status.size > 0 or path not in self._folders)  # else it marks a folder

    def is_link(self, path: PurePath) -> bool:  # noqa: ARG002
        return False

    def kind(self, path: PurePath) -> Literal["file", "folder", "gone"]:
        if (status := self._status(path)) is not None and status.size > 0:
            return "file"
        self._list(*remote.split_uri(_shown(path)))
        return "folder" if path in self._folders else "gone" if status is None else "file"

    def children(self, path: PurePath) -> tuple[list[str], list[str]]:
        names = sorted(self._folders[path])
        files = [name for name in names if self.is_file(path / name)]
        return [name for name in names if path / name in self._folders], files

    def glob(self, pattern: str) -> list[str]:
        root, key = remote.split_uri(pattern)
        self._list(root, re.split("[*?[]", key, maxsplit=1)[0], "")
        found: set[PurePath] = {self.path(root)}
        for part in key.split("/"):
            if part == "**":
                found = {below for one in found for below in self._below(one)}
            else:
                found = {one / name for one in found for name in self._folders.get(one, ()) if _matches(name, part)}
        end = "/" if pattern.endswith("/") else ""  # for folders only
        return [_shown(one) + end for one in found if not end or one in self._folders]

    def input_of(self, path: PurePath, top: PurePath | None = None, base: str | None = None) -> InputFile:  # noqa: ARG002
        uri, status = _shown(path), self._files[path]
        assert status is not None, "it is a file"
        return InputFile(uri, uri, status.size, format_of(path.name, base) or "", tag=remote.tag_of(status))

    def _status(self, path: PurePath) -> FileStatus | None:
        if path not in self._files:
            objects, key = remote.locate(_shown(path))
            is_known = not key or any(map(_shown(path).startswith, self._listed))
            self._files[path] = None if is_known else objects.stat(key)
        return self._files[path]

    def _list(self, root: str, key: str, end: str = "/") -> None:
        """Find all objects whose keys begin with ``key`` and ``end``; a web server has no listing."""
        prefix = key + end if key else ""
        uri = f"{root}/{prefix}"
        if any(map(uri.startswith, self._listed)) or root.startswith("http"):
            return
        for status in remote.objects_at(root).list(prefix):
            path = self.path(f"{root}/{status.path}")
            self._files[path] = status
            for above in path.parents:
                names = self._folders.setdefault(above, set())
                if path.name in names:
                    break
                names.add(path.name)
                path = above
        self._listed.add(uri)

    def _below(self, top: PurePath) -> list[PurePath]:
        """Return a folder and all below it that ``**`` matches; nothing of what is not a folder."""
        found = [top] if top in self._folders else []
        for path in found:  # which grows
            found += [path / name for name in self._folders.get(path, ()) if not name.startswith(".")]
        return found


def _matches(name: str, part: str) -> bool:
    """Return whether a name matches a part of a pattern; no wildcard matches a dot that is first."""
    if not glob.has_magic(part):
        return name == part
    return fnmatch.fnmatchcase(name, part) and (part.startswith(".") or not name.startswith("."))


@dataclass(slots=True)
class _Folder:
    """The files in a folder: inputs, each with its sort key, and those skipped; and what is excluded."""

    tree: _Disk
    path: PurePath
    base: str | None = None
    exclude: Sequence[str] = ()
    files: dict[PurePath, PurePath] = field(default_factory=dict)
    left_out: set[PurePath] = field(default_factory=set)
    excluded: set[PurePath] = field(default_factory=set)
    _seen: set[PurePath] = field(default_factory=set)

    def walk(self) -> None:
        """Search all subfolders; unlike ``rglob``, fail if one can't be listed."""
        waiting, links = [self.path], list[PurePath]()
        while waiting:
            here = waiting.pop()
            for folder in self._visit(here):
                (links if self.tree.is_link(here / folder) else waiting).append(here / folder)
            if not waiting:
                # Links come last and sorted, so the order does not depend on the file system.
                waiting, links = sorted(links, reverse=True), []

    def _visit(self, here: PurePath) -> list[str]:
        """Add the files of a folder; return the names of the folders in it that are to be searched."""
        folders, names = self.tree.children(here)
        resolved = self.tree.resolved(here)
        if resolved in self._seen or ("store.json" in names and {"log", "chunks"}.intersection(folders)):
            return []  # a store is not an input
        self._seen.add(resolved)
        if (saved := _saved(self.tree, here, names)) is not None:
            files = [here / name for name in saved if name.endswith(".arrow")]
            self.files.update({file: here / f"{i:09d}" for i, file in enumerate(files)})
            return [name for name in saved if not name.endswith(".arrow")]
        for name in sorted(self._wanted(here, names)):
            self._add(here / name)
        return self._wanted(here, sorted(folders))

    def _wanted(self, here: PurePath, names: Sequence[str]) -> list[str]:
        shown = [name for name in names if not name.startswith(".")]
        dropped = [name for name in shown if is_excluded(here / name, self.exclude)]
        self.excluded.update(here / name for name in dropped)
        return [name for name in shown if name not in dropped]

    def _add(self, file: PurePath) -> None:
        if _token_file(self.tree, file) != file:
            return  # read with its token file
        kind = self.tree.kind(file)
        if kind == "gone":  # it was deleted since it was listed
            return
        # Without an index it may be weights or vectors: tokens only if named.
        is_odd = not self.base and file.suffix.lower() in (".bin", ".npy")
        is_unclear = is_odd and not self.tree.is_file(file.with_suffix(".idx"))
        if format_of(file.name, self.base) is None or (kind == "file" and is_unclear):
            self.left_out.add(file)
        elif kind == "file":
            self.files[file] = file
        else:
            raise _not_regular(file)


def _tell_apart(files: list[InputFile]) -> list[InputFile]:
    while shared := {name for name, n in Counter(file.name for file in files).items() if n > 1}:
        for i, file in enumerate(files):
            if file.name in shared:
                longer = Path(file.path).resolve().parts[-file.name.count("/") - 2 :]
                files[i] = replace(file, name="/".join(longer).lstrip("/"))
    return files


def _saved(tree: _Disk, folder: PurePath, names: Collection[str]) -> list[str] | None:
    """Return the Arrow files or splits that a saved dataset lists, in its order; None for other folders."""
    inside = ""
    if "dataset_dict.json" in names:
        listed, inside = _saved_json(tree, folder / "dataset_dict.json").get("splits"), "state.json"
    elif {"state.json", "dataset_info.json"} <= set(names):
        state = _saved_json(tree, folder / "state.json")
        if any(state.get(key) for key in ("_indices_files", "_indices_data_files")):
            advice = "Save it again: datasets.load_from_disk(folder).flatten_indices().save_to_disk(other)."
            raise UsageError(f"{_shown(folder)} has a row selection (indices mapping), which is not supported", advice)
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
            advice = "Save the dataset again."
            raise UsageError(f"{_shown(folder)} lists {name!r}, which is not the name of a {what}", advice)
        if not tree.is_file(folder / name / inside):
            raise UsageError(f"{_shown(folder)}: {name} is listed, but missing", "Copy the whole folder again.")
        found.append(name)
    return found


def _saved_json(tree: _Disk, path: PurePath) -> dict[str, Any]:
    file = tree.input_of(path)
    try:
        content = orjson.loads(file.read_range(0, file.size))
    except orjson.JSONDecodeError as error:
        raise UsageError(f"{_shown(path)} is not JSON: {error.msg}", "Save the dataset again.") from error
    return content if isinstance(content, dict) else {}
