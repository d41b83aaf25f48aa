"""``purge``: selecting chunks and making them tombstones, in one commit.

Selectors: chunk ids, document ids, an expression over document columns, or a pattern (RE2, linear time) over the
decoded text of each chunk. Selecting scans what the selector needs: nothing but the ids, the ``keys/`` files, the
documents, or all tokens. The commit costs what is purged, not what is stored; it also adds to the block list, so
that what is purged does not come back with its input. A match across the border of two chunks is not found by
``--pattern``; a tokenizer that loses case or spacing shows the pattern what is left of the text.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from retrotool.errors import ConflictError, UsageError
from retrotool.stages.chunk_plan import write_json
from retrotool.stages.where import Where
from retrotool.store import blocked, parts
from retrotool.store.blocked import Hashes, read_blocked
from retrotool.store.log import Draft
from retrotool.store.parts import PART_SHIFT
from retrotool.store.paths import FileName
from retrotool.store.runs import Run
from retrotool.store.state import State
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones, read_tombstones, write_tombstones
from retrotool.tokenizers import Tokenizer, TokenizerFile

Ids = npt.NDArray[np.int64]
Report = Callable[[int], object]
_DECODE_ROWS = 1 << 16


@dataclass(frozen=True, slots=True)
class Selection:
    """What a selector matched.

    ``chunks`` are all ids, sorted, and ``living`` those that were not purged before; ``documents`` and ``tokens``
    count what these take from the totals. ``blocked`` are the hashes that keep what is purged from coming back, and
    ``newly_blocked`` says how many of them the store has not yet. ``state`` is the state that was searched.
    """

    kind: str
    literal: str
    chunks: Ids
    living: Ids
    documents: int
    tokens: int
    blocked: Hashes
    newly_blocked: int
    state: State


def select_ids(store: Store, lines: Sequence[str]) -> Ids:
    """Chunk ids given as text, one a line; ``UsageError`` names the first that is no chunk of the store."""
    found = []
    sizes = {part: parts.part_entry(store, "chunks", part).rows for part in store.state.parts()}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            chunk = int(line)
        except ValueError:
            raise UsageError(f"line {number}: {line.strip()[:40]!r} is no chunk id", "Nothing was purged.") from None
        if not 0 <= chunk & ((1 << PART_SHIFT) - 1) < sizes.get(chunk >> PART_SHIFT, 0):
            raise UsageError(f"line {number}: the store has no chunk {chunk}", "Nothing was purged.")
        found.append(chunk)
    return np.unique(np.array(found, np.int64))


def same_selector(store: Store, kind: str, literal: str) -> dict[str, bool]:
    """Purges made by the same selector before, and whether they are erased."""
    wanted = store.identity.keyed_hash(literal)
    records = store.state.with_prefix("purge:")
    return {p: r["erased"] for p, r in records.items() if (r["selector"], r["hash"]) == (kind, wanted)}


def select_documents(
    store: Store, names: Sequence[str], *, missing_ok: bool = False, report: Report = lambda _: None
) -> Ids:
    """Chunk ids of documents, given by their ids; ``UsageError`` names the first that the store has not."""
    wanted = {name.removesuffix("\r"): number for number, name in reversed(list(enumerate(names, 1))) if name.strip()}
    keys = pa.array(
        [
            hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=parts.HASH_BYTES).digest()
            for name in wanted
        ],
        pa.binary(),
    )
    seen = np.zeros(len(keys), np.bool_)
    found: list[Ids] = []
    for part in store.state.parts():
        table = parts.read_parquet(store, parts.part_entry(store, "keys", part), ["key", "doc"])
        place = pc.index_in(table["key"].cast(pa.binary()), value_set=keys)
        hit = place.is_valid()
        seen[place.filter(hit).to_numpy()] = True
        found.append(_chunks_of(store, part, table["doc"].filter(hit).to_numpy()))
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
    entries = [parts.part_entry(store, "documents", part) for part in store.state.parts()]
    where.check(list(dict.fromkeys(name for entry in entries for name in pq.read_schema(store.path(entry)).names)))
    for part in store.state.parts():
        table = parts.read_documents(store, part)
        for column in where.columns:
            if column not in table.schema.names:  # kept by other parts, not by this one
                table = table.append_column(column, pa.nulls(table.num_rows, pa.string()))
        known = table["id"].is_valid()  # an erased document is nobody's any more
        mask = pc.and_(where.mask(table), known)
        found.append(_chunks_of(store, part, np.flatnonzero(mask.to_numpy())))
        report(1)
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def select_pattern(store: Store, pattern: str, report: Report = lambda _: None) -> Ids:
    """Chunk ids whose decoded text matches an RE2 pattern."""
    try:
        pc.match_substring_regex(pa.array([""]), pattern)
    except pa.ArrowInvalid as error:
        raise UsageError(
            f"the pattern can't be compiled: {str(error).splitlines()[0]}", "Patterns are in RE2's syntax."
        ) from error
    tokenizer = Tokenizer(TokenizerFile(store.identity.tokenizer.name, store.tokenizer_json()))
    found: list[Ids] = []
    for part in store.state.parts():
        chunks = parts.read_chunks(store, part)
        for start in range(0, len(chunks), _DECODE_ROWS):
            rows = slice(start, start + _DECODE_ROWS)
            text = _as_text(tokenizer.decode(chunks.tokens[rows], chunks.n_tokens[rows]))
            hit = pc.match_substring_regex(text, pattern).to_numpy(zero_copy_only=False) & (chunks.n_tokens[rows] > 0)
            found.append(parts.chunk_ids(part, start + np.flatnonzero(hit)))
        report(1)
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def _as_text(values: pa.LargeBinaryArray) -> pa.LargeStringArray:
    """The same bytes as strings, unchecked: RE2 takes binary for Latin-1, and bears broken UTF-8 at a border."""
    _, offsets, data = values.buffers()
    return pa.LargeStringArray.from_buffers(len(values), offsets, data, offset=values.offset)


def _chunks_of(store: Store, part: int, docs: npt.NDArray[Any]) -> Ids:
    """Chunk ids of some documents of a part, ascending."""
    if not len(docs):
        return np.zeros(0, np.int64)
    table = parts.read_documents(store, part, ["first_row", "n_chunks"]).take(pa.array(np.sort(docs)))
    first, count = table["first_row"].to_numpy().astype(np.int64), table["n_chunks"].to_numpy()
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    return parts.chunk_ids(part, np.repeat(first, count) + within)


def weigh(store: Store, kind: str, literal: str, chunks: Ids) -> Selection:
    """Find out what selected chunks would take from the store."""
    tombstones = read_tombstones(store)
    fresh = chunks[~tombstones.contains(chunks)]
    living: list[Ids] = []
    documents = tokens = 0
    for part in np.unique(fresh >> PART_SHIFT).tolist():
        rows = fresh[fresh >> PART_SHIFT == part] - (part << PART_SHIFT)
        table = parts.read_parquet(store, parts.part_entry(store, "chunks", part), ["doc", "n_tokens"])
        doc, n_tokens = table["doc"].to_numpy(), table["n_tokens"].to_numpy()
        rows = rows[n_tokens[rows] > 0]
        tokens += int(n_tokens[rows].sum())
        documents += _documents_ended(doc, n_tokens, tombstones.rows(part), rows)
        living.append(parts.chunk_ids(part, rows))
    ids = np.concatenate(living) if living else np.zeros(0, np.int64)
    hashes = _hashes_to_block(store, chunks)
    new = len(read_blocked(store).lacks(hashes))
    return Selection(kind, literal, chunks, ids, documents, tokens, hashes, new, store.state)


def _hashes_to_block(store: Store, chunks: Ids) -> Hashes:
    """What a purge of ``chunks`` blocks: ids of documents that are purged as a whole then, and texts of all it touches.

    Chunks of earlier purges count as purged, those of documents that repeat do not. What is erased can't be hashed.
    """
    purges = [read_tombstones(store, purge).ids for purge in store.state.with_prefix("purge:")]
    purged = Tombstones(np.unique(np.concatenate([chunks, *purges])))
    secret = store.identity.secret
    found = [np.zeros(0, blocked.HASH)]
    for part in np.unique(chunks >> PART_SHIFT).tolist():
        table = parts.read_documents(store, part, ["id", "text_hash", "first_row", "n_chunks"])
        first, count = table["first_row"].to_numpy(), table["n_chunks"].to_numpy()
        gone = np.zeros(parts.part_entry(store, "chunks", part).rows, np.int64)
        gone[purged.rows(part)] = 1
        rows = chunks[chunks >> PART_SHIFT == part] - (part << PART_SHIFT)
        docs = np.unique(np.searchsorted(first, rows, side="right") - 1)
        whole = docs[np.add.reduceat(gone, first)[docs] == count[docs]]
        for column, of, hashed in (("id", whole, blocked.id_hashes), ("text_hash", docs, blocked.keyed_texts)):
            found.append(hashed(secret, table[column].take(pa.array(of)).drop_null().to_pylist()))
    return np.unique(np.concatenate(found))


def _documents_ended(doc: npt.NDArray[Any], n_tokens: npt.NDArray[Any], before: Ids, rows: Ids) -> int:
    """How many documents of a part have their last living chunk among ``rows``."""
    alive = n_tokens > 0
    alive[before] = False
    left = alive.copy()
    left[rows] = False
    size = int(doc[-1]) + 1 if len(doc) else 0
    had, has = np.bincount(doc[alive], minlength=size), np.bincount(doc[left], minlength=size)
    return int(((had > 0) & (has == 0)).sum())


def commit_purge(store: Store, run: Run, selection: Selection, reason: str) -> str:
    """Make the chunks of a selection tombstones, also those that other purges had, and block what they were of.

    Returns the purge's id. ``ConflictError`` if another purge was committed since the selection was made.
    """
    purge = "p" + secrets.token_hex(4)
    tombstones = write_tombstones(store.root, FileName.new(run.id, "tombstones", purge, "parquet"), selection.chunks)
    literal = {"kind": selection.kind, "literal": selection.literal}
    literal_file = write_json(store.root, FileName.new(run.id, "selectors", purge, "json"), literal, 1)
    add = [tombstones, literal_file]
    if len(selection.blocked):
        name = FileName.new(run.id, "blocked", purge, "parquet")
        add.append(blocked.write_blocked(store.root, name, selection.blocked))
    seen = list(selection.state.group("tombstones"))

    def build(state: State) -> Draft:
        if list(state.group("tombstones")) != seen:
            raise ConflictError("another purge was committed while this one selected", "Run the same command again.")
        counts = {"chunks": len(selection.living), "documents": selection.documents, "tokens": selection.tokens}
        totals = {name: n - counts.get(name, 0) for name, n in state.records["totals"].items()}
        selector = {"selector": selection.kind, "hash": store.identity.keyed_hash(selection.literal), "reason": reason}
        record = {**counts, **selector, "commit": state.number + 1, "erased": False}
        records = {f"purge:{purge}": record, "totals": totals}
        return Draft("purge", selector, add=tuple(add), records=records)

    store.commit(run, build)
    return purge


def purges_within(store: Store, chunks: Tombstones) -> list[str]:
    """Ids of the purges, not yet erased, of which every chunk is among ``chunks``."""
    records = store.state.with_prefix("purge:")
    waiting = [purge for purge, record in records.items() if not record["erased"]]
    return [purge for purge in waiting if chunks.contains(read_tombstones(store, purge).ids).all()]
