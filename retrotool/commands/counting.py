"""Small things that results of several commands have: counts of keys, and the command lines that come next."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from retrotool.encoder import plain_name
from retrotool.stages.command_lines import SAVED as SAVED
from retrotool.stages.command_lines import K as K
from retrotool.stages.command_lines import command_line as command_line
from retrotool.stages.command_lines import neighbours_command as neighbours_command
from retrotool.stages.database import count_left, count_living_keys, embedded_parts
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones
from retrotool.tokenizers import BUNDLED


def count_keys_of(store: Store, numbers: Iterable[int]) -> int:
    """Living keys of some parts."""
    tombstones = read_tombstones(store)
    return sum(count_living_keys(store, part, tombstones) for part in numbers)


def commands_to_index(store: Store, root: str | Path, encoder: str, index: str | None) -> list[str]:
    """The commands after which an index (None: exact search) has all chunks of a store: embed first, if it must be."""
    found = []
    if count_left(store, embedded_parts(store, encoder), read_tombstones(store)):
        found.append(embed_command(store, root, encoder))
    if index is not None:
        found.append(command_line("index", root, name=index))
    return found


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
