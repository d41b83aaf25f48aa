"""Small things that results of several commands have: counts of keys, and the command lines that come next."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

from retrotool.encoder import plain_name
from retrotool.stages.database import count_living_keys
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones
from retrotool.tokenizers import BUNDLED


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
