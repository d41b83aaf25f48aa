"""Folders that ``datasets`` wrote with ``save_to_disk``: which of their files are the rows, in which order.

Such a folder has ``state.json``, which lists the Arrow files, and ``dataset_info.json``; one of several splits has
``dataset_dict.json``, which lists its subfolders. Files beside the listed ones (caches, remains of an interrupted
save) are not rows. Versions of ``datasets`` before 2 could save a selection of rows beside the whole table
(``_indices_files``, ``_indices_data_files``); reading on without it would bring back rows that were filtered out, so
it is refused.

Source of the layout: ``Dataset.save_to_disk`` and ``DatasetDict.save_to_disk`` of the package ``datasets``.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import orjson

from retrotool.errors import UsageError

_INDICES = ("_indices_files", "_indices_data_files")


def saved_splits(folder: Path, names: Collection[str]) -> list[str] | None:
    """Subfolders of a saved dataset of several splits, in its order; None if the folder, with files ``names``, is none.

    Raises ``UsageError`` if one is missing.
    """
    if "dataset_dict.json" not in names:
        return None
    splits = _load(folder / "dataset_dict.json").get("splits")
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
    state = _load(folder / "state.json")
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


def _load(path: Path) -> dict[str, Any]:
    try:
        content = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise UsageError(f"{path} is not JSON: {error.msg}", "Save the dataset again.") from error
    return content if isinstance(content, dict) else {}
