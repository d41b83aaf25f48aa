"""``affected``: find the training chunks that have purged chunks among their stored neighbours.

Tables are read without excluding purged chunks. A model gets each neighbour and the chunk after it, so a
chunk is also affected if a purged chunk only follows one of its neighbours. Places are those in the table,
from 1; a purged chunk may have been read at an earlier place if others were purged before it. Tables of a
mixture are read separately.

Purged text, documents and chunks are never reported. Not found: entries that an erase removed (it does so
within a store), and former entries of rows that were searched again after the purge.

Cost: reading the ids of all tables, with a binary search for each. Memory: a row group, the affected rows of
a part, and about 30 bytes per purged chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa

from retrotool import interrupts
from retrotool.cli.result_files import check_file, written
from retrotool.embed.search_scope import count_live_keys, is_same_store
from retrotool.engine.progress import counting
from retrotool.errors import UsageError
from retrotool.neighbours.stage import check_neighbour_ids, database_of, members_of, pick_table
from retrotool.purge.purged_chunks import find_purge
from retrotool.store import neighbour_tables, parts
from retrotool.store.log import FileEntry
from retrotool.store.parts import ROW_GROUP, Ids, rows_by_part
from retrotool.store.store import Store
from retrotool.store.tombstones import PREFIX, Tombstones, named_chunks, read_tombstones, standing_purges

EXAMPLES = 10
NEVER = int(np.iinfo(np.int64).max)  # the place of a chunk that is not among the neighbours


@dataclass(frozen=True, slots=True)
class AskedPurge:
    """A purge of ``database`` to look for, and how many ``chunks`` it has.

    ``erased``: its chunks were removed from the tables. The tables have ``parts`` parts; ``since`` of them
    were searched, in whole or in part, after the purge.
    """

    purge: str
    database: str
    chunks: int
    erased: bool
    parts: int
    since: int


@dataclass(frozen=True, slots=True)
class AffectedChunk:
    """A training chunk and the first places, from 1, at which it has a purged chunk (None: nowhere).

    ``neighbour``: as a neighbour; ``continuation``: as the chunk after one. ``used``: among the first k.
    """

    chunk: int
    document: str
    source: str
    neighbour: int | None
    continuation: int | None
    used: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class AffectedCounts:
    """Counts of affected chunks among ``rows`` live ones.

    * ``in_k``, ``in_saved``: with a purged chunk among the first k, or among all saved neighbours.
    * ``following_in_k``, ``following_in_saved``: only with a purged chunk after such a neighbour.
    * ``purged``: affected, but purged themselves; not in the other counts.
    """

    rows: int
    in_k: int
    in_saved: int
    following_in_k: int
    following_in_saved: int
    purged: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PartAffected(AffectedCounts):
    """The affected chunks of a part."""

    part: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AffectedResult(AffectedCounts):
    """Affected chunks of a neighbour ``table``: counts over all parts, and per part.

    ``examples`` are the first affected chunks; ``out`` is the file with all of them ("": none).
    """

    table: str
    k: int
    saved: int
    commit: int
    purges: tuple[AskedPurge, ...] = ()
    parts: tuple[PartAffected, ...] = ()
    examples: tuple[AffectedChunk, ...] = ()
    out: str = ""


_Sought = tuple[Mapping[int, FileEntry], tuple[Tombstones, Tombstones]]
"""The files of a table by part; the chunks to find, and the chunks followed by one of these."""


def affected(
    root: str | Path, table: str | None = None, purges: Sequence[str] = (), *, out: str | Path | None = None
) -> AffectedResult:
    """Find the chunks of the store ``root`` that have chunks of ``purges`` (default: of all) as neighbours.

    ``out``: a new file for all of them, one JSON object per line (``AffectedChunk``). ``UsageError`` if a
    purge does not exist, or all of them are erased, so that nothing can be found.
    """
    if out is not None:
        check_file("--out", out, new=True)
    store = Store.open(root)
    table = pick_table(store, table)
    members = [(member, *database_of(store, member)) for member, _ in members_of(store, table)]
    k, saved = int(members[0][2]["k"]), max(int(record["saved"]) for *_, record in members)
    databases = [database for _, database, _ in members]
    holding = [
        next((one for one in databases if PREFIX + purge in one.state.records), databases[0]) for purge in purges
    ]
    purges = [purge for purge, _ in map(find_purge, holding, purges)]
    wanted, asked = [], list[AskedPurge]()
    for member, database, _ in members:
        look, of = _look_for(store, member, database, purges)
        wanted += [look] if of else []
        asked += of
    if purges and asked and all(one.erased for one in asked):
        raise UsageError(
            f"nothing is left of {', '.join(purges)}: the erase removed its chunks from neighbour tables as well",
            "Affected chunks can be found only until a purge is erased.",
        )
    own, found, examples = read_tombstones(store), list[PartAffected](), list[AffectedChunk]()
    with ExitStack() as stack:
        file = stack.enter_context(stack.enter_context(written(out)).open("wb")) if out is not None else None
        numbers = sorted({part for entries, _ in wanted for part in entries})
        report = stack.enter_context(counting("read", "part", len(numbers)))
        for part in numbers:
            rows, places = _rows(store, part, wanted)
            purged = own.contains(parts.chunk_ids(part, rows))
            rows, places = rows[~purged], places[:, ~purged]
            neighbour, following = places
            near, near_k = neighbour < NEVER, neighbour <= k
            found.append(
                PartAffected(
                    part=part, rows=count_live_keys(store, part, own), in_k=int(near_k.sum()),
                    in_saved=int(near.sum()), following_in_k=int(((following <= k) & ~near_k).sum()),
                    following_in_saved=int((~near).sum()), purged=int(purged.sum()),
                )
            )  # fmt: skip
            some = slice(None if file is not None else EXAMPLES - len(examples))
            for chunk in _described(store, part, rows[some], places[:, some], k):
                if file is not None:
                    file.write(orjson.dumps(asdict(chunk)) + b"\n")
                examples += [chunk] if len(examples) < EXAMPLES else []
            report(1)
    counts = {one.name: sum(getattr(part, one.name) for part in found) for one in fields(AffectedCounts)}
    return AffectedResult(
        table=table, k=k, saved=saved, **counts, commit=store.state.number, purges=tuple(asked), parts=tuple(found),
        examples=tuple(examples), out="" if out is None else str(out),
    )  # fmt: skip


def _look_for(store: Store, table: str, database: Store, purges: Sequence[str]) -> tuple[_Sought, list[AskedPurge]]:
    entries = {e.part: e for e in store.state.group("neighbours", table).entries()}
    for entry in entries.values():
        check_neighbour_ids(entry, table, database)
    within, asked = is_same_store(store, database), list[AskedPurge]()
    made = [(entry.about or {})["commit"] for entry in entries.values()]
    for purge, record in standing_purges(database.state).items():
        if purges and purge not in purges:
            continue
        n = len(read_tombstones(database, purge).ids)
        since = sum(commit >= record["commit"] for commit in made)
        erased = within and bool(record["erased"])
        asked.append(AskedPurge(purge, database.place, n, erased, len(entries), since))
    ids, follow = named_chunks(database, [one.purge for one in asked]), [np.zeros(0, np.bool_)]
    for part, rows in rows_by_part(ids):
        chunks = parts.read_parquet(database, parts.part_entry(database, "chunks", part), ["index"])
        follow.append(chunks["index"].to_numpy()[rows] > 0)
    return (entries, (Tombstones(ids), Tombstones(ids[np.concatenate(follow)] - 1))), asked


def _rows(store: Store, part: int, wanted: Sequence[_Sought]) -> tuple[Ids, Ids]:
    """Return affected rows [n], and the first places [2, n] of a purged chunk and of one that follows."""
    places = np.full((2, parts.part_entry(store, "chunks", part).rows), NEVER)
    for entries, sought in wanted:
        if (entry := entries.get(part)) is None:
            continue
        edits = neighbour_tables.read_edits(store, entry.name)
        for group in range(-(-entry.rows // ROW_GROUP)):
            interrupts.check()
            saved = neighbour_tables.read_table(store, entry, [group])
            ids = neighbour_tables.edit_rows(edits, saved, part, [group], lambda ids: ids < -1).ids
            rows = slice(group * ROW_GROUP, group * ROW_GROUP + len(ids))
            for known, chunks in zip(places[:, rows], sought, strict=True):
                hit = chunks.contains(ids)
                known[:] = np.minimum(known, np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, NEVER))
    found = np.flatnonzero((places < NEVER).any(axis=0))
    return found, places[:, found]


def _described(store: Store, part: int, rows: Ids, places: Ids, k: int) -> Iterator[AffectedChunk]:
    if not len(rows):
        return
    doc = parts.read_parquet(store, parts.part_entry(store, "chunks", part), ["doc"])["doc"].to_numpy()[rows]
    documents = parts.read_documents(store, part, ["id", "source"]).take(pa.array(doc))
    ids = parts.chunk_ids(part, rows).tolist()
    for chunk, near, after, document in zip(ids, *places.tolist(), documents.to_pylist(), strict=True):
        yield AffectedChunk(
            chunk, document["id"], document["source"],
            None if near == NEVER else near, None if after == NEVER else after, min(near, after) <= k,
        )  # fmt: skip
