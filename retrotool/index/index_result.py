"""What ``index`` says of an index: what it is, what it takes and what it finds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retrotool.chunk.chunk_plan import read_json_file
from retrotool.cli.command_lines import command_line, embed_command
from retrotool.embed.search_scope import count_left, embedded_parts
from retrotool.errors import CorruptError
from retrotool.index.generations import generation_of, held_vectors, index_key, shards, trained_entry
from retrotool.index.index_files import RECALL, encoder_of
from retrotool.index.recall import Recall
from retrotool.index.staleness import Drift, drift
from retrotool.store.atomic import FileEntry
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones

_SHOWN = (
    "encoder", "kind", "factory", "why", "vectors", "nlist", "nprobe", "depth", "target", "holds", "bytes_per_vector",
    "trained_bytes", "recall_at_1", "recall_at_10", "recall_at_100", "recall_error", "queries", "share", "rate", "due",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class IndexResult:
    """What ``index`` made.

    In memory a vector takes ``bytes_per_vector``, its code and id, and all of them ``trained_bytes`` besides; a re-rank
    reads the embeddings, ``embedding_bytes`` on the disk. ``added`` vectors are of this run. ``curve`` is what was
    measured, ``groups`` the recall@10 by source. ``due`` says why to train anew; "": there is no reason. ``elsewhere``
    shards are left to other runs. ``not_embedded`` keys are in no shard, for they have no embeddings;
    ``next`` are the commands that change that.
    """

    name: str
    encoder: str
    kind: str
    factory: str
    why: str
    vectors: int
    added: int
    shards: int
    nlist: int
    nprobe: int
    depth: int
    target: float
    holds: bool
    bytes_per_vector: int
    trained_bytes: int
    index_bytes: int
    embedding_bytes: int
    recall_at_1: float
    recall_at_10: float
    recall_at_100: float
    recall_error: float
    queries: int
    share: float
    rate: float
    commit: int
    due: str = ""
    retrain: str = ""
    drift: Drift | None = None
    curve: tuple[Recall, ...] = ()
    groups: dict[str, dict[str, tuple[float, float, int]]] = field(default_factory=dict)
    elsewhere: int = 0
    not_embedded: int = 0
    next: tuple[str, ...] = ()


def commands_to_index(store: Store, root: str | Path, encoder: str, index: str | None) -> list[str]:
    """The commands after which an index (None: exact search) has all chunks of a store: embed first, if it must be."""
    left = count_left(store, embedded_parts(store, encoder), read_tombstones(store))
    found = [embed_command(store, encoder)] if left else []
    return found if index is None else [*found, command_line("index", root, name=index)]


def describe(
    store: Store, root: str | Path, name: str, *, before: int | None = None, elsewhere: int = 0
) -> IndexResult:
    """The result for an index as it is now."""
    state = store.refresh()
    record = state.records.get(index_key(name))
    generation = generation_of(state, name)
    encoder = encoder_of(store, name) or ""
    entries = shards(state, name)
    left = count_left(store, embedded_parts(store, encoder), read_tombstones(store)) if encoder else 0
    todo = commands_to_index(store, root, encoder, name) if left else []
    measured = state.file("index", RECALL, name)
    content = _read_measured(store, measured, name) if measured is not None else {}
    about = (entry.about or {}) if (entry := trained_entry(state, name)) is not None else {}
    shown: dict[str, Any] = dict.fromkeys(_SHOWN, 0) | {
        "due": "",
        "kind": "not measured yet",
        "encoder": encoder,
        "holds": False,
    }
    shown |= {key: about.get(key, "") for key in ("factory", "why")}
    shown |= {key: record[key] for key in _SHOWN} if record is not None else {}
    embedded = (state.part_file("embeddings", part, encoder) for part in embedded_parts(store, encoder))
    now = held_vectors(state, name, generation)
    return IndexResult(
        name=name, added=0 if before is None else now - before, shards=len(entries),
        index_bytes=sum(entry.bytes for entry in entries.values()),
        embedding_bytes=sum(entry.bytes for entry in embedded if entry is not None), commit=state.number,
        drift=drift(state, name),
        retrain=f"{command_line('index', root, name=name)} --retrain",
        curve=tuple(Recall(**point) for point in content.get("curve", ())),
        groups={kind: {n: tuple(v) for n, v in some.items()} for kind, some in content.get("groups", {}).items()},
        elsewhere=elsewhere, not_embedded=left, next=tuple(todo), **{**shown, "vectors": now},
    )  # fmt: skip


def _read_measured(store: Store, entry: FileEntry, name: str) -> dict[str, Any]:
    try:
        return dict(read_json_file(store, entry))
    except CorruptError as error:
        raise CorruptError(
            str(error), f"Measure it anew: {command_line('index', store.root, name=name)} --mend"
        ) from error
