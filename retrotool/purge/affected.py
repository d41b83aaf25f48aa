"""``affected``: which training chunks have purged chunks among their neighbours, as tables are stored.

Tables are read without a mask. Of each neighbour a model is given the chunk and what follows it, so a chunk is also
affected if a purged chunk only follows a neighbour of it. Places are those in the table, from 1: a reader leaves out
what is purged, so what is stored after it moves up, and a purged chunk may have been read at an earlier place than its
own if others had been purged before. A table of a mixture is read by itself.

Nothing of what was purged is reported: no text, no document, no chunk. A training chunk that is purged itself is
counted and not named. What tables no longer have is not found: entries that an erase has taken out, which it does
within a store, and what was in rows that were searched again after the purge.

Cost: the ids of all tables, with a binary search for each. Memory: a row group, the affected rows of a part, and some
30 bytes a purged chunk.
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
from retrotool.neighbours.stage import check_neighbour_ids, database_of, members_of
from retrotool.purge.purged_chunks import check_purge, find_purge
from retrotool.store import neighbour_tables, parts
from retrotool.store.log import FileEntry
from retrotool.store.parts import ROW_GROUP, Ids, rows_by_part
from retrotool.store.store import Store
from retrotool.store.tombstones import PREFIX, Tombstones, named_chunks, read_tombstones, standing_purges

EXAMPLES = 10
NEVER = int(np.iinfo(np.int64).max)
"""A place among neighbours that there is not."""


@dataclass(frozen=True, slots=True)
class AskedPurge:
    """A purge of ``database`` that is asked about, and how many ``chunks`` it has.

    ``erased``: its chunks were taken out of the tables. Of ``parts`` parts that these have ``since`` were made, or rows
    of them searched again, after the purge.
    """

    purge: str
    database: str
    chunks: int
    erased: bool
    parts: int
    since: int


@dataclass(frozen=True, slots=True)
class AffectedChunk:
    """A training chunk, and at which place, from 1, it names a purged chunk, at the nearest (None: it does not).

    ``neighbour``: as a neighbour; ``continuation``: as what follows one. ``used``: among the first k.
    """

    chunk: int
    document: str
    source: str
    neighbour: int | None
    continuation: int | None
    used: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class AffectedCounts:
    """Affected chunks, ``in_k``: with a purged chunk among the first k neighbours; ``in_saved``: among all.

    Further ones have one only as what follows such a neighbour: ``following_in_k``, ``following_in_saved``. ``purged``
    ones are affected, and purged themselves; they are not among the others, nor among the ``rows``.
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
    """The chunks with neighbours ``table`` that have chunks of the ``purges`` among them; the counts are of all parts.

    ``examples`` are the first of them, and ``out`` is the file that has all ("": none).
    """

    table: str
    k: int
    saved: int
    commit: int
    purges: tuple[AskedPurge, ...] = ()
    parts: tuple[PartAffected, ...] = ()
    examples: tuple[AffectedChunk, ...] = ()
    out: str = ""


@dataclass(frozen=True, slots=True)
class _Table:
    """The files of a table by part, the chunks to look for in them, and those that are followed by one of these."""

    entries: Mapping[int, FileEntry]
    chunks: Tombstones
    followed: Tombstones


def affected(
    root: str | Path, table: str = "main", purges: Sequence[str] = (), *, out: str | Path | None = None
) -> AffectedResult:
    """Find the chunks of the store ``root`` that name chunks of ``purges`` (default: of all) as neighbours.

    ``out``: a new file for all of them, one JSON object a line (``AffectedChunk``). ``UsageError`` if there is no such
    purge, or all that is asked about is erased, so that nothing can be found.
    """
    if out is not None:
        check_file("--out", out, new=True)
    store = Store.open(root)
    members = [(member, *database_of(store, member)) for member, _ in members_of(store, table)]
    k, saved = int(members[0][2]["k"]), max(int(record["saved"]) for *_, record in members)
    databases = [database for _, database, _ in members]
    purges = [find_purge(databases[0], purge) for purge in purges]
    for purge in purges:
        check_purge(next((one for one in databases if PREFIX + purge in one.state.records), databases[0]), purge)
    wanted, asked = [], list[AskedPurge]()
    for member, database, _ in members:
        look, of = _look_for(store, member, database, purges)
        wanted += [look] if of else []
        asked += of
    if purges and asked and all(one.erased for one in asked):
        raise UsageError(
            f"nothing is left of {', '.join(purges)}: an erase takes out of tables, too, what they had of it",
            "Whom a purge affected can be found until it is erased.",
        )
    own, found, examples = read_tombstones(store), list[PartAffected](), list[AffectedChunk]()
    with ExitStack() as stack:
        file = stack.enter_context(stack.enter_context(written(out)).open("wb")) if out is not None else None
        numbers = sorted({part for one in wanted for part in one.entries})
        report = stack.enter_context(counting("read", "part", len(numbers)))
        for part in numbers:
            rows, neighbour, following = _rows(store, part, wanted)
            purged = own.contains(parts.chunk_ids(part, rows))
            rows, neighbour, following = rows[~purged], neighbour[~purged], following[~purged]
            near, near_k = neighbour < NEVER, neighbour <= k
            found.append(
                PartAffected(
                    part=part, rows=count_live_keys(store, part, own), in_k=int(near_k.sum()),
                    in_saved=int(near.sum()), following_in_k=int(((following <= k) & ~near_k).sum()),
                    following_in_saved=int((~near).sum()), purged=int(purged.sum()),
                )
            )  # fmt: skip
            some = slice(None if file is not None else EXAMPLES - len(examples))
            for chunk in _described(store, part, rows[some], neighbour[some], following[some], k):
                if file is not None:
                    file.write(orjson.dumps(asdict(chunk)) + b"\n")
                examples += [chunk] if len(examples) < EXAMPLES else []
            report(1)
    counts = {one.name: sum(getattr(part, one.name) for part in found) for one in fields(AffectedCounts)}
    return AffectedResult(
        table=table, k=k, saved=saved, **counts, commit=store.state.number, purges=tuple(asked), parts=tuple(found),
        examples=tuple(examples), out="" if out is None else str(out),
    )  # fmt: skip


def _look_for(store: Store, table: str, database: Store, purges: Sequence[str]) -> tuple[_Table, list[AskedPurge]]:
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
    return _Table(entries, Tombstones(ids), Tombstones(ids[np.concatenate(follow)] - 1)), asked


def _rows(store: Store, part: int, wanted: Sequence[_Table]) -> tuple[Ids, Ids, Ids]:
    """The affected rows of a part, ascending, and the nearest places of a purged chunk, and of one that follows."""
    n = parts.part_entry(store, "chunks", part).rows
    neighbour, following = np.full(n, NEVER), np.full(n, NEVER)
    for table in wanted:
        if (entry := table.entries.get(part)) is None:
            continue
        for group in range(-(-entry.rows // ROW_GROUP)):
            interrupts.check()
            ids = neighbour_tables.read_ids(store, entry, [group])
            rows = slice(group * ROW_GROUP, group * ROW_GROUP + len(ids))
            for places, sought in ((neighbour, table.chunks), (following, table.followed)):
                hit = sought.contains(ids)
                first = np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, NEVER)
                places[rows] = np.minimum(places[rows], first)
    found = np.flatnonzero((neighbour < NEVER) | (following < NEVER))
    return found, neighbour[found], following[found]


def _described(store: Store, part: int, rows: Ids, neighbour: Ids, following: Ids, k: int) -> Iterator[AffectedChunk]:
    if not len(rows):
        return
    doc = parts.read_parquet(store, parts.part_entry(store, "chunks", part), ["doc"])["doc"].to_numpy()[rows]
    documents = parts.read_documents(store, part, ["id", "source"]).take(pa.array(doc))
    places = (parts.chunk_ids(part, rows).tolist(), neighbour.tolist(), following.tolist())
    for chunk, near, behind, document in zip(*places, documents.to_pylist(), strict=True):
        yield AffectedChunk(
            chunk, document["id"], document["source"],
            None if near == NEVER else near, None if behind == NEVER else behind, min(near, behind) <= k,
        )  # fmt: skip
