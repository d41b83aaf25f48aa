"""Small things that results of several commands have: counts of keys, and the command lines that come next."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from retrotool.encoder import plain_name
from retrotool.stages.database import count_living_keys
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones
from retrotool.tokenizers import BUNDLED

K = 2
"""Neighbours that reading a table gives, if nothing else is asked for."""
SAVED = 20
"""Neighbours that are saved."""


def count_keys_of(store: Store, numbers: Iterable[int]) -> int:
    """Living keys of some parts."""
    tombstones = read_tombstones(store)
    return sum(count_living_keys(store, part, tombstones) for part in numbers)


def command_line(command: str, root: str | Path, **options: object) -> str:
    """A command line, without the options that are what they are by default."""
    given = [
        ("-k" if option == "k" else f"--{option}", str(value))
        for option, value in options.items()
        if value not in ("main", None)
    ]
    return shlex.join(["retrotool", command, str(root), *(word for pair in given for word in pair)])


def neighbours_command(root: str | Path, queries: str | Path | None, name: str, again: Mapping[str, Any]) -> str:
    """The command that brings tables up to date which were made with ``again``: index, k and saved."""
    given = {option: again[option] for option, usual in (("k", K), ("saved", SAVED)) if again[option] != usual}
    index = again["index"] or None
    line = command_line("neighbours", root, queries=queries, **given, name=name)
    # Named also where it is the usual one: that may have changed.
    return f"{line} --exact" if index is None else f"{line} {shlex.join(['--index', str(index)])}"


def embed_command(store: Store, root: str | Path, encoder: str) -> str:
    """The command that embeds what is new in a store with an encoder that it knows."""
    record = store.state.records[f"encoder:{encoder}"]
    origin, pooling = str(record["origin"]), str(record["pooling"])
    overridden = bool(record.get("overridden"))
    plain = f"{plain_name(origin)}-{pooling}" if overridden else plain_name(origin)
    return command_line(
        "embed",
        root,
        encoder=None if origin == BUNDLED else origin,
        name=None if encoder == plain else encoder,
        pooling=pooling if overridden else None,
    )
