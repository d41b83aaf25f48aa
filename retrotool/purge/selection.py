"""What a purge is asked for: any number of selectors, and how they go together.

Chunk ids, document ids and an expression over document columns are looked up: nothing is read but the ids, the
``keys/`` files, or the documents. Selectors by content are held against all tokens or all text of the store
(``selectors.scan``). The selection is what any selector means, or with ``every`` what all of them mean; with
``whole_documents`` all chunks of the documents that it touches.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from retrotool.errors import UsageError
from retrotool.purge.selectors.repeated_documents import SHORTEST, select_duplicates
from retrotool.purge.selectors.scan import Found, ScanStage, read_scan
from retrotool.purge.selectors.selector import Selector
from retrotool.purge.selectors.where import Where
from retrotool.store import parts, schemas
from retrotool.store.atomic import FileEntry
from retrotool.store.parts import PART_SHIFT
from retrotool.store.store import Store

Ids = npt.NDArray[np.int64]
Report = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Given:
    """A selector that is looked up: ``kind`` ids or documents (``lines``, one a line), or where (an expression)."""

    kind: str
    lines: tuple[str, ...]

    def literal(self) -> dict[str, Any]:
        """All that it was given, as JSON."""
        return {"lines": list(self.lines)}

    def select(self, store: Store, *, missing_ok: bool, report: Report) -> Ids:
        """Chunk ids, ascending; ``missing_ok``: what the store has not is left out, otherwise a ``UsageError``."""
        if self.kind == "ids":
            return select_ids(store, self.lines, missing_ok=missing_ok)
        if self.kind == "documents":
            return select_documents(store, self.lines, missing_ok=missing_ok, report=report)
        return select_where(store, self.lines[0], report)


@dataclass(frozen=True, slots=True)
class Repeats:
    """Chunks that repeat one before them, token by token: what is meant changes with every part and every purge."""

    shortest: int = SHORTEST
    kind: str = field(default="duplicates", init=False)

    def literal(self) -> dict[str, Any]:
        """The number of tokens that they have at least."""
        return {"shortest": self.shortest}

    def select(self, store: Store, *, missing_ok: bool, report: Report) -> Ids:  # noqa: ARG002
        """Chunk ids, ascending."""
        return select_duplicates(store, report, shortest=self.shortest)


@dataclass(frozen=True, slots=True)
class Asked:
    """Selectors, at least one; ``every``: what all of them mean; ``whole_documents``: all chunks of the documents."""

    given: tuple[Given | Repeats, ...] = ()
    scanned: tuple[Selector, ...] = ()
    every: bool = False
    whole_documents: bool = False

    @property
    def selectors(self) -> list[tuple[str, dict[str, Any]]]:
        """Kind and literal of each."""
        given = [(one.kind, one.literal()) for one in self.given]
        return given + [(one.kind, one.literal()) for one in self.scanned]

    @property
    def kind(self) -> str:
        """The kinds of its selectors."""
        return (" and " if self.every else ", ").join(kind for kind, _ in self.selectors)

    @property
    def literal(self) -> str:
        """All that was asked for, as JSON: the same for the same."""
        asked = {
            "selectors": self.selectors,
            "every": self.every,
            "whole_documents": self.whole_documents,
        }
        return orjson.dumps(asked, option=orjson.OPT_SORT_KEYS).decode()

    @property
    def scan(self) -> ScanStage | None:
        """The scan that has to be done before; None: there is nothing to scan for."""
        return ScanStage(self.scanned) if self.scanned else None


@dataclass(frozen=True, slots=True)
class Match:
    """How many chunks a selector means, by its kind and one of its names ("": it has only one)."""

    selector: str
    name: str
    chunks: int


@dataclass(frozen=True, slots=True)
class Chosen:
    """What was asked for: ``chunks``, ascending; how many each selector means; and where in text scans found some."""

    chunks: Ids
    matches: tuple[Match, ...]
    found: Found


def choose(store: Store, asked: Asked, *, missing_ok: bool = False, report: Report = lambda _: None) -> Chosen:
    """The chunks that are asked for; the scan must have been done."""
    sets: list[Ids] = []
    matches: list[Match] = []
    for given in asked.given:
        ids = given.select(store, missing_ok=missing_ok, report=report)
        sets.append(ids)
        matches.append(Match(given.kind, "", len(ids)))
    found, named = read_scan(store, asked.scan) if asked.scan else (Found.joined([]), [])
    for number, (selector, names) in enumerate(zip(asked.scanned, named, strict=True)):
        mine = found.selectors == number
        sets.append(np.unique(found.chunks[mine]))
        counts = np.bincount(found.labels[mine], minlength=len(names))
        only = names in ([""], [selector.kind])
        counted = [("" if only else name, int(n)) for name, n in zip(names, counts, strict=True)]
        matches += [Match(selector.kind, name, n) for name, n in counted if n or only]
    chunks = sets[0]
    for some in sets[1:]:
        chunks = np.intersect1d(chunks, some) if asked.every else np.union1d(chunks, some)
    if asked.whole_documents:
        chunks = widen(store, chunks)
    return Chosen(chunks, tuple(matches), found)


def widen(store: Store, chunks: Ids) -> Ids:
    """All chunks of the documents that any of some chunks is of, ascending."""
    found = [np.zeros(0, np.int64)]
    for part in np.unique(chunks >> PART_SHIFT).tolist():
        first = parts.read_documents(store, part, ["first_row"])["first_row"].to_numpy()
        rows = chunks[chunks >> PART_SHIFT == part] - (part << PART_SHIFT)
        found.append(chunks_of(store, part, np.unique(np.searchsorted(first, rows, side="right") - 1)))
    return np.concatenate(found)


def select_ids(store: Store, lines: Sequence[str], *, missing_ok: bool = False) -> Ids:
    """Chunk ids given as text, one a line; ``UsageError`` names the first that is no chunk of the store.

    ``missing_ok``: those of parts that a ``chunk`` took back are left out.
    """
    found = []
    given = int(store.state.records.get("parts", 0)) if missing_ok else 0
    sizes = {part: parts.part_entry(store, "chunks", part).rows for part in store.state.parts()}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        # What ``int`` takes besides plain digits (1_0, ٣) is more likely a mistake than an id.
        if re.fullmatch(r"[0-9]{1,19}", line.strip()) is None:
            raise UsageError(f"line {number}: {line.strip()[:40]!r} is no chunk id", "Nothing was purged.")
        chunk = int(line)
        if chunk >> PART_SHIFT < given and chunk >> PART_SHIFT not in sizes:
            continue
        if not 0 <= chunk & ((1 << PART_SHIFT) - 1) < sizes.get(chunk >> PART_SHIFT, 0):
            raise UsageError(f"line {number}: the store has no chunk {chunk}", "Nothing was purged.")
        found.append(chunk)
    return np.unique(np.array(found, np.int64))


def select_documents(
    store: Store, names: Sequence[str], *, missing_ok: bool = False, report: Report = lambda _: None
) -> Ids:
    """Chunk ids of documents, given by their ids; ``UsageError`` names the first that the store has not."""
    wanted = {name: number for number, name in reversed(list(enumerate(names, 1))) if name.strip()}
    hashes = [hashlib.blake2b(name.encode(), digest_size=schemas.HASH_BYTES).digest() for name in wanted]
    keys = pa.array(hashes, pa.binary())
    seen = np.zeros(len(keys), np.bool_)
    found: list[Ids] = []
    for part in store.state.parts():
        place = pc.index_in(parts.read_documents(store, part, ["key"])["key"].cast(pa.binary()), value_set=keys)
        hit = place.is_valid()
        seen[place.filter(hit).to_numpy()] = True
        found.append(chunks_of(store, part, np.flatnonzero(hit.to_numpy())))
        report(1)
    if not (seen.all() or missing_ok):
        name, number = list(wanted.items())[int(np.argmin(seen))]
        raise UsageError(
            f"line {number}: the store has no document {name[:100]!r} ({int((~seen).sum()):,} such in all)",
            "Nothing was purged. Take those lines out and run it again.",
        )
    return np.sort(np.concatenate(found)) if found else np.zeros(0, np.int64)


def select_where(store: Store, expression: str, report: Report = lambda _: None) -> Ids:
    """Chunk ids of the documents for which an expression over their columns holds."""
    where = Where(expression)
    found: list[Ids] = []
    names = (parts.read_parquet(store, entry, row_groups=[]).schema.names for entry in _documents_files(store))
    where.check(list(dict.fromkeys(itertools.chain.from_iterable(names))))
    for part in store.state.parts():
        table = parts.read_documents(store, part)
        for column in where.columns:
            if column not in table.schema.names:  # kept by other parts, not by this one
                table = table.append_column(column, pa.nulls(table.num_rows, pa.string()))
        known = table["id"].is_valid()  # an erased document is nobody's any more
        mask = pc.and_(where.mask(table), known)
        found.append(chunks_of(store, part, np.flatnonzero(mask.to_numpy())))
        report(1)
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def _documents_files(store: Store) -> list[FileEntry]:
    return [parts.part_entry(store, "documents", part) for part in store.state.parts()]


def chunks_of(store: Store, part: int, docs: npt.NDArray[Any]) -> Ids:
    """Chunk ids of some documents of a part, ascending."""
    if not len(docs):
        return np.zeros(0, np.int64)
    table = parts.read_documents(store, part, ["first_row", "n_chunks"]).take(pa.array(np.sort(docs)))
    return parts.chunk_ids(part, rows_of(table["first_row"].to_numpy(), table["n_chunks"].to_numpy()))


def rows_of(first: npt.NDArray[Any], count: npt.NDArray[Any]) -> Ids:
    """The rows of some documents, one document after another."""
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    rows: Ids = np.repeat(first.astype(np.int64), count) + within
    return rows
