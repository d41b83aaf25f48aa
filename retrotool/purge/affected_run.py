"""``purge --affected``: which training chunks had purged chunks among their neighbours; they go to a file.

It tells nothing of what was purged: no text, no document, no chunk. A training chunk that is purged itself is counted
and not named.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import orjson
from tqdm import tqdm

from retrotool.cli.result_file import check_file, written
from retrotool.embed.search_scope import count_living_keys
from retrotool.errors import UsageError
from retrotool.purge.affected import NEVER, AffectedReader, Asked, Hits
from retrotool.store import parts
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones

EXAMPLES = 10


@dataclass(frozen=True, slots=True)
class AffectedCost:
    """What is read to tell: the tables of so many parts."""

    parts: int
    bytes: int


@dataclass(frozen=True, slots=True)
class AffectedChunk:
    """A training chunk, and at which place, from 1, it read a purged chunk, at the nearest (None: it did not).

    ``neighbour``: as a neighbour; ``continuation``: as what follows one. ``used``: among the first k.
    """

    chunk: int
    document: str
    source: str
    neighbour: int | None
    continuation: int | None
    used: bool


@dataclass(frozen=True, slots=True)
class PartAffected:
    """Affected chunks of a part, ``in_k``: with a purged chunk among the first k neighbours; ``in_saved``: among all.

    Further ones had one only as what follows such a neighbour: ``following_in_k``, ``following_in_saved``. ``purged``
    ones are affected, and purged themselves; they are not among the others, nor among the ``rows``.
    """

    part: int
    rows: int
    in_k: int
    in_saved: int
    following_in_k: int
    following_in_saved: int
    purged: int


@dataclass(frozen=True, slots=True)
class AffectedResult:
    """The chunks with neighbours ``name`` that had chunks of the ``purges`` among them.

    ``rows`` and the counts are sums of those of the parts. ``examples`` are the first of them, and ``out`` is the file
    that has all ("": none). ``bytes`` of tables were read.
    """

    name: str
    k: int
    saved: int
    rows: int
    in_k: int
    in_saved: int
    following_in_k: int
    following_in_saved: int
    purged: int
    bytes: int
    commit: int
    purges: tuple[Asked, ...] = field(default=())
    parts: tuple[PartAffected, ...] = field(default=())
    examples: tuple[AffectedChunk, ...] = field(default=())
    out: str = ""


def affected(
    root: str | Path,
    name: str = "main",
    purges: Sequence[str] = (),
    *,
    out: str | Path | None = None,
    begin: Callable[[AffectedCost], object] = lambda _: None,
) -> AffectedResult:
    """Which chunks of the store ``root`` had chunks of ``purges`` (default: all that stand) among their neighbours.

    ``out``: a new file for all of them, one JSON object a line (``AffectedChunk``). ``begin`` is told what is to be
    read, before it is. ``UsageError`` if all that is asked about is erased, so that nothing can be told.
    """
    if out is not None:
        check_file("--out", out)
        if Path(out).exists():
            raise UsageError(f"--out {out} is there already", "Name a file that is not.")
    store = Store.open(root)
    reader = AffectedReader(store, name, purges)
    _check_told(reader, purges)
    begin(AffectedCost(len(reader.parts), reader.bytes))
    own = read_tombstones(store)
    found: list[PartAffected] = []
    examples: list[AffectedChunk] = []
    with ExitStack() as stack:
        file = stack.enter_context(stack.enter_context(written(out)).open("wb")) if out is not None else None
        bar = stack.enter_context(
            tqdm(total=reader.bytes, unit="B", unit_scale=True, desc="read", disable=None, delay=2, file=sys.stderr)
        )
        for hits in reader.read(bar.update):
            purged = own.contains(parts.chunk_ids(hits.part, hits.rows))
            living = hits.take(~purged)
            rows = count_living_keys(store, hits.part, own)
            found.append(_counted(living, reader.k, rows, int(purged.sum())))
            if file is not None or len(examples) < EXAMPLES:
                for chunk in _told(store, living, reader.k, None if file is not None else EXAMPLES - len(examples)):
                    if file is not None:
                        file.write(orjson.dumps(asdict(chunk)) + b"\n")
                    if len(examples) < EXAMPLES:
                        examples.append(chunk)
    counts = {
        count: sum(getattr(part, count) for part in found)
        for count in ("rows", "in_k", "in_saved", "following_in_k", "following_in_saved", "purged")
    }
    return AffectedResult(
        name, reader.k, reader.saved, **counts, bytes=reader.bytes, commit=store.state.number, purges=reader.asked,
        parts=tuple(found), examples=tuple(examples), out="" if out is None else str(out),
    )  # fmt: skip


def _check_told(reader: AffectedReader, purges: Sequence[str]) -> None:
    """``UsageError`` if each purge that was named is erased, and with it what its tables had."""
    if purges and all(one.within and 0 < one.chunks == one.erased for one in reader.asked):
        raise UsageError(
            f"nothing is left of {', '.join(purges)}: an erase takes out of tables, too, what they had of it",
            "Whom a purge affected can be told until it is erased.",
        )


def _counted(hits: Hits, k: int, rows: int, purged: int) -> PartAffected:
    neighbour, following = hits.neighbour < NEVER, hits.continuation < NEVER
    near, following_near = hits.neighbour <= k, hits.continuation <= k
    return PartAffected(
        hits.part, rows, int(near.sum()), int(neighbour.sum()), int((following_near & ~near).sum()),
        int((following & ~neighbour).sum()), purged,
    )  # fmt: skip


def _told(store: Store, hits: Hits, k: int, most: int | None) -> Iterator[AffectedChunk]:
    """The affected rows of a part, or the first of them, with the documents that they are of."""
    rows = hits.rows[:most]
    if not len(rows):
        return
    doc = parts.read_parquet(store, parts.part_entry(store, "chunks", hits.part), ["doc"])["doc"].to_numpy()[rows]
    of, place = np.unique(doc, return_inverse=True)
    documents = parts.read_documents(store, hits.part, ["id", "source"]).take(of)
    names, sources = documents["id"].to_pylist(), documents["source"].to_pylist()
    for i, chunk in enumerate(parts.chunk_ids(hits.part, rows).tolist()):
        neighbour, continuation = int(hits.neighbour[i]), int(hits.continuation[i])
        yield AffectedChunk(
            chunk, names[place[i]], sources[place[i]],
            None if neighbour == NEVER else neighbour, None if continuation == NEVER else continuation,
            min(neighbour, continuation) <= k,
        )  # fmt: skip
