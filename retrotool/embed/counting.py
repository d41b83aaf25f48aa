"""Small things that results of several commands have: counts of keys, and the command lines that come next."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from retrotool.cli.command_lines import SAVED as SAVED
from retrotool.cli.command_lines import K as K
from retrotool.cli.command_lines import command_line as command_line
from retrotool.cli.command_lines import embed_command as embed_command
from retrotool.cli.command_lines import neighbours_command as neighbours_command
from retrotool.embed.search_scope import count_left, count_living_keys, embedded_parts
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones


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
