"""What documents that repeat hold, and where they came from: their chunks, and their rows for quarantine.

Reads the parts that hold a repeat one after another: four columns of their documents and one of their chunks. Of ids
that repeat, inputs of lines that are not large are read again, to turn byte offsets into line numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retrotool.chunk.chunk_plan import Plan
from retrotool.chunk.hash_partitions import Places
from retrotool.errors import InputError
from retrotool.sources import InputFile
from retrotool.sources.files import IN_BYTES
from retrotool.sources.lines import count_lines
from retrotool.store import parts, schemas
from retrotool.store.parts import PART_SHIFT
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones

BY_ID = "duplicate document id"
BY_TEXT = "duplicate text"
_LOCATED_ROWS = 1 << 20
_COUNTED_BYTES, _TEXTS_COUNTED_BYTES = 256 << 20, 4 << 20
"""Larger inputs are not read again for the line numbers of ids, and of texts, that repeat: their offsets must do."""
_TABLE_ROWS = 1 << 16
_IN_LINES = ("jsonl", "csv", "tsv")
"""Formats whose rows go by the number of a line."""

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Repeats:
    """Documents of one part that repeat and have a living chunk, in order: n each but for ``chunks``, which are theirs.

    ``inputs`` and ``positions`` are as in documents; ``by_text``: not by id.
    """

    chunks: npt.NDArray[np.int64]
    by_text: Flags
    inputs: pa.Array
    positions: npt.NDArray[np.int64]
    sources: list[str]
    tokens: int

    def head(self, n: int) -> Repeats:
        """The first n documents (with all chunks)."""
        return Repeats(
            self.chunks, self.by_text[:n], self.inputs[:n], self.positions[:n], self.sources[:n], self.tokens
        )


def read_repeats(store: Store, tombstones: Tombstones, places: Places, by_text: Flags) -> Iterator[Repeats]:
    """What the documents at ``places`` (ascending) hold, part by part; those without a living chunk are left out."""
    for part in np.unique(places >> PART_SHIFT).tolist():
        start, end = np.searchsorted(places, [part << PART_SHIFT, (part + 1) << PART_SHIFT])
        docs = places[start:end] - (part << PART_SHIFT)
        found = _read_part(store, tombstones, part, docs, by_text[start:end])
        if len(found.by_text):
            yield found


def _read_part(store: Store, tombstones: Tombstones, part: int, docs: Places, by_text: Flags) -> Repeats:
    columns = ["first_row", "n_chunks", "input", "position", "source"]
    table = parts.read_documents(store, part, columns).take(pa.array(docs))
    n_tokens = parts.read_parquet(store, parts.part_entry(store, "chunks", part), ["n_tokens"])["n_tokens"].to_numpy()
    count = table["n_chunks"].to_numpy()
    owner = np.repeat(np.arange(len(docs)), count)
    rows = table["first_row"].to_numpy()[owner] + np.arange(len(owner)) - (np.cumsum(count) - count)[owner]
    ids = parts.chunk_ids(part, rows)
    alive = ~tombstones.contains(ids) & (n_tokens[rows] > 0)
    living = np.bincount(owner[alive], minlength=len(docs)) > 0
    table = table.filter(pa.array(living))
    return Repeats(
        ids[alive],
        by_text[living],
        table["input"].combine_chunks(),
        table["position"].to_numpy(),
        [source or "" for source in table["source"].to_pylist()],
        int(n_tokens[rows[alive]].sum()),
    )


def locate(plan: Plan, found: Iterator[Repeats]) -> Iterator[pa.Table]:
    """Tables of quarantine rows for documents that repeat, in order."""
    files = {file.name: file for file in plan.files}
    waiting: list[pa.Table] = []
    rows = 0
    for name, positions, by_text in _by_input(found):
        waiting.append(_quarantine_rows(files.get(name), name, positions, by_text))
        rows += len(positions)
        if rows >= _TABLE_ROWS:
            yield pa.concat_tables(waiting)
            waiting, rows = [], 0
    if waiting:
        yield pa.concat_tables(waiting)


def _by_input(found: Iterator[Repeats]) -> Iterator[tuple[str, npt.NDArray[np.int64], Flags]]:
    """Positions of one input after another, at most a million and those of a part at a time."""
    name = ""
    gathered: list[tuple[npt.NDArray[np.int64], Flags]] = []
    for repeats in found:
        runs = pc.run_end_encode(repeats.inputs)
        start = 0
        for value, end in zip(runs.values.to_pylist(), runs.run_ends.to_pylist(), strict=True):
            if gathered and (value != name or sum(len(flags) for _, flags in gathered) >= _LOCATED_ROWS):
                yield (name, *_joined(gathered))
                gathered = []
            name = value
            gathered.append((repeats.positions[start:end], repeats.by_text[start:end]))
            start = end
    if gathered:
        yield (name, *_joined(gathered))


def _joined(gathered: list[tuple[npt.NDArray[np.int64], Flags]]) -> tuple[npt.NDArray[np.int64], Flags]:
    positions, by_text = (np.concatenate(column) for column in zip(*gathered, strict=True))
    order = np.argsort(positions, kind="stable")
    return positions[order], by_text[order]


def _quarantine_rows(file: InputFile | None, name: str, positions: npt.NDArray[np.int64], by_text: Flags) -> pa.Table:
    """Quarantine rows for documents of one input at ascending positions.

    Lines are counted, which reads the input again, for ids that repeat in a file that is not large.
    """
    has_offsets = file is not None and file.base in IN_BYTES
    n = len(positions)
    lines = [0] * n if has_offsets else positions.tolist()
    if file is not None and file.base in _IN_LINES:
        ids = np.flatnonzero(~by_text | (file.size <= _TEXTS_COUNTED_BYTES)).tolist()
        if ids and file.size <= _COUNTED_BYTES:
            with contextlib.suppress(OSError, InputError):
                # A file that has become shorter since has fewer lines than were asked for.
                for i, line in zip(ids, count_lines(file, positions[ids].tolist()), strict=False):
                    lines[i] = line
    columns: dict[str, Any] = {
        "input": [file.path if file is not None else name] * n,
        "line": lines,
        "offset": positions.tolist() if has_offsets else [None] * n,
        "reason": [BY_TEXT if text else BY_ID for text in by_text.tolist()],
        "excerpt": [None] * n,
        "damage": [False] * n,
    }
    return parts.columns_of(columns, schemas.QUARANTINE_SCHEMA)
