"""Which files of an index are current: its training and its shards, by the log alone.

An index has a *generation*, the number of its training. Files of generation 0 are in the slots ``trained`` and
``shard-…``, those of a later one in ``trained.g1`` and so on. While the next generation is built, the record names the
current one, which all readers use; the commit that switches removes the old files.
"""

from __future__ import annotations

from retrotool.store.atomic import FileEntry
from retrotool.store.paths import generation_in, generation_slot
from retrotool.store.state import State

SHARD = "shard-"
"""What slots of shards begin with."""
DEFAULT = "default_index"
"""Key of the record that names the index to take where none is named."""


def index_key(name: str) -> str:
    """Key of an index's record."""
    return f"index:{name}"


def default_index(state: State) -> str:
    """The index that is meant where none is named."""
    return str(state.records.get(DEFAULT, "main"))


def generation_of(state: State, name: str) -> int:
    """The current generation of an index; 0 also if there is none yet."""
    return int(state.records.get(index_key(name), {}).get("generation", 0))


def trained_entry(state: State, name: str, generation: int | None = None) -> FileEntry | None:
    """The training of an index, of its current generation or of another one."""
    current = generation_of(state, name) if generation is None else generation
    return state.file("index", generation_slot("trained", current), name)


def shards(state: State, name: str, generation: int | None = None) -> dict[str, FileEntry]:
    """Slot → file of the shards of an index, of its current generation or of another one."""
    current = generation_of(state, name) if generation is None else generation
    return {slot: entry for slot, entry in all_shards(state, name).items() if generation_in(slot) == current}


def held_vectors(state: State, name: str, generation: int | None = None) -> int:
    """Vectors in the shards of an index."""
    return sum(entry.rows for entry in shards(state, name, generation).values())


def all_shards(state: State, name: str) -> dict[str, FileEntry]:
    """Slot → file of the shards of all generations."""
    group = state.group("index", name)
    found = {slot: group.get(slot) for slot in group if slot.startswith(SHARD)}
    return {slot: entry for slot, entry in found.items() if entry is not None}
