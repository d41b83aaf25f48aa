"""``show``: one document with its chunks, or one chunk with its neighbours; also what purged it.

Finding a document by its id reads the keys of all documents, 16 bytes each. Purged chunks have no text here.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retrotool.cli.command_lines import command_line
from retrotool.errors import UsageError
from retrotool.inspect.run import Choice, InspectedNeighbour, inspect
from retrotool.reader import DocumentEntry, Reader
from retrotool.store import parts
from retrotool.store.blocked import id_hashes, read_blocked
from retrotool.store.parts import format_id, parse_id, split_id
from retrotool.store.store import Store, retry_overtaken
from retrotool.store.tombstones import Tombstones, may_name, read_tombstones, standing_purges


@dataclass(frozen=True, slots=True)
class ShownChunk:
    """A chunk; ``state`` is "live", "purged", "erased" or "duplicate"; only live ones have a ``text``."""

    id: int
    index: int
    n_tokens: int
    state: str
    purges: tuple[str, ...]
    text: str | None


@dataclass(frozen=True, slots=True)
class Shown:
    """A document with all its chunks, or with one and its neighbours, see ``docs/json.md``."""

    store: str
    commit: int
    document: DocumentEntry
    chunks: tuple[ShownChunk, ...]
    purges: dict[str, str]  # reasons by purge
    neighbours: tuple[InspectedNeighbour, ...]


def show_item(root: str | Path, name: str) -> Shown:
    """Show a document by its id, or a chunk by ``part:row``, or by its number if no document has that id.

    If several documents have the id, a live one. ``UsageError`` if there is none, or it is erased.
    """
    return retry_overtaken(lambda: _show(Store.open(root), name))


def _show(store: Store, name: str) -> Shown:
    reader, chunk = Reader(store), parse_id(name)
    part, row = (-1, 0) if chunk is None else split_id(chunk)
    is_chunk = store.state.is_live(part) and row < parts.part_entry(store, "chunks", part).rows
    if not (is_chunk and ":" in name) and (found := reader.documents_named(name)):
        return _shown(store, reader, found[0], np.arange(found[0].n_chunks) + found[0].first_chunk)
    if is_chunk and chunk is not None:
        return _shown(store, reader, reader.document_of(chunk), np.array([chunk]))
    if read_blocked(store).contains(id_hashes(store.identity.secret, [name]))[0]:
        advice = f"List the purges: {command_line('purge', store.place)}"
        raise UsageError(f"the document {name!r} was erased: nothing is left of it in {store.place}", advice)
    nor = "" if chunk is None else f", nor a chunk {format_id(chunk)}"
    raise UsageError(f"the store has no document {name!r}{nor}", reader.did_you_mean(name))


def _shown(store: Store, reader: Reader, document: DocumentEntry, ids: parts.Ids) -> Shown:
    some, records = Tombstones(ids), standing_purges(store.state)
    named = {purge: read_tombstones(store, purge).contains(ids) for purge in records if may_name(store, purge, some)}
    live, shown = reader.is_live(ids), list[ShownChunk]()
    for places, chunks, rows in parts.read_groups_of(store, ids):
        texts = reader.tokenizer.decode_text(chunks.tokens[rows], chunks.n_tokens[rows])
        for i, row, text in zip(places.tolist(), rows.tolist(), texts, strict=True):
            n_tokens, by = int(chunks.n_tokens[row]), tuple(purge for purge in named if named[purge][i])
            state = "live" if live[i] else "erased" if not n_tokens else "purged" if by else "duplicate"
            index = int(chunks.index[row])
            shown.append(ShownChunk(int(ids[i]), index, n_tokens, state, by, text if live[i] else None))
    near: tuple[InspectedNeighbour, ...] = ()
    if len(ids) == 1 and live.all():
        with contextlib.suppress(UsageError):  # not computed yet, or several tables
            near = inspect(store.place, Choice(chunk=int(ids[0]))).chunks[0].neighbours
    purges = {purge: str(records[purge]["reason"]) for purge in named if named[purge].any()}
    return Shown(store.place, store.state.number, document, tuple(shown), purges, near)
