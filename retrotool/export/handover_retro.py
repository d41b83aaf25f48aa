"""The files that ``RETRODataset`` of RETRO-pytorch (lucidrains, 0.3.9) reads, made of a query store and its neighbours.

That reader addresses chunks by row, in one file for sequences and neighbours alike:

* ``chunks.dat`` int32 [rows + seq, chunk_length + 1]: the tokens, and the one that follows;
* ``chunks.knn.dat`` int32 [rows + seq, k]: rows of neighbours, −1 for none;
* ``seq.dat`` int32 [sequences]: the row that each sequence begins at; it is the ``seq`` rows from there;
* ``doc_ids.dat`` int32 [rows] and ``processed-stats.json``, by which its own tools go.

It takes the next row for the continuation of a row unless that has the end token, and goes on with a sequence until it
meets one. It knows nothing else of documents. So an end token stands wherever ``retrotool.open`` gives no
continuation: at the end of a document, and before a purged chunk. It stands behind the last token, which for a full
chunk is the column of the token that follows. A sequence has that column of its last row only; so in the query store a
row of the end token alone comes after such a chunk. Sequences begin anew after each end token.

Its padding is token 0, whatever its argument says. Where the tokenizer has a token 0 that text can have, all tokens are
one higher in the files. The end token is one above the highest, as text can spell those that the tokenizer has.

``chunk_ids.npy`` int64 [rows] has the ids of the chunks (−1: a row of the end token alone); ``retro_rows`` says which
rows there are. Cost: neighbours' tokens aren't looked up, so everything is read once and in order.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import orjson

from retrotool.engine.task import Report
from retrotool.errors import UsageError
from retrotool.export.handover import Counts, Handover, row_slices
from retrotool.export.retro_rows import LIMIT, Layout, PartRows, Section, read_part_rows
from retrotool.neighbours.table_reader import Found
from retrotool.store import disk, parts
from retrotool.store.parts import ROW_GROUP
from retrotool.store.store import Store
from retrotool.tokenizers import Tokenizer, TokenizerFile

Ids = npt.NDArray[np.int64]

PAD = 0
NONE = -1
CHUNKS, KNN, SEQ, DOC_IDS, CHUNK_IDS = "chunks.dat", "chunks.knn.dat", "seq.dat", "doc_ids.dat", "chunk_ids.npy"
STATS = "processed-stats.json"


@dataclass(frozen=True, slots=True)
class Tokens:
    """How tokens stand in the files: ``shift`` higher than in the store, ``end`` after a text, all below ``total``."""

    shift: int
    end: int
    total: int


def tokens_of(store: Store) -> Tokens:
    """How the tokens of a store are written: alike for all stores of one tokenizer."""
    tokenizer = Tokenizer(TokenizerFile(store.identity.tokenizer.name, store.tokenizer_json()))
    first = tokenizer.backend.get_added_tokens_decoder().get(PAD)
    shift = 0 if first is not None and first.special else 1
    end = tokenizer.vocabulary + shift
    if end > LIMIT:
        raise UsageError(f"token {end:,} is more than int32 holds, and RETRO-pytorch has no wider type")
    return Tokens(shift, end, end + 1)


class RetroWriter:
    """Writes the files of a layout, for sequences of ``seq_chunks`` chunks; counts what it writes."""

    def __init__(self, handover: Handover, layout: Layout, tokens: Tokens, seq_chunks: int) -> None:
        self.handover, self.layout, self.tokens, self.seq_chunks = handover, layout, tokens, seq_chunks
        self.counts = Counts()
        self.sequences = 0
        self.documents = 0
        """Of databases, too."""
        self._files: dict[str, BinaryIO] = {}

    def write(self, folder: Path, report: Report) -> None:
        """Write all files into a folder; reports chunks."""
        with ExitStack() as stack:
            for name in (CHUNKS, KNN, SEQ, DOC_IDS, CHUNK_IDS):
                self._files[name] = stack.enter_context((folder / name).open("xb"))
            header = {"descr": "<i8", "fortran_order": False, "shape": (self.layout.rows,)}
            np.lib.format.write_array_header_1_0(self._files[CHUNK_IDS], header)
            for section in self.layout.sections:
                for part in section.store.state.parts():
                    disk.announce("write", folder / CHUNKS)
                    self._write_part(section, part, report)
            length = self.handover.store.identity.chunk_length
            self._put(CHUNKS, np.full((self.seq_chunks, length + 1), PAD))
            self._put(KNN, np.full((self.seq_chunks, self.handover.k), NONE))
        stats = {"chunks": self.layout.rows, "docs": self.documents, "seqs": self.sequences}
        disk.write(folder / STATS, orjson.dumps(stats))

    def _put(self, name: str, values: npt.NDArray[Any], kind: str = "<i4") -> None:
        self._files[name].write(np.ascontiguousarray(values, kind).data)

    def _write_part(self, section: Section, part: int, report: Report) -> None:
        kept = section.kept.of_part(part)
        if not kept.any():
            return
        rows = read_part_rows(section.store, part, section.tombstones)
        if section is self.layout.queries:
            begin = parts.chunk_ids(part, np.flatnonzero(rows.begins(self.seq_chunks)))
            self._put(SEQ, section.number(begin))
            self.sequences += len(begin)
        ends, last = section.ends.of_part(part), -1
        for groups, some in row_slices(len(kept)):
            chosen = some.start + np.flatnonzero(kept[some])
            if len(chosen):
                self._write_rows(section, part, groups, rows, chosen, ends[chosen], last)
                last = int(rows.doc[chosen[-1]])
                report(len(chosen))

    def _write_rows(
        self,
        section: Section,
        part: int,
        groups: list[int],
        rows: PartRows,
        chosen: Ids,
        ends: npt.NDArray[np.bool_],
        last: int,
    ) -> None:
        """Write some rows of a part, all in ``groups``; ``ends`` [n]: which a row of the end token follows.

        ``last`` is the document of the row before.
        """
        copies = 1 + ends
        place = np.cumsum(copies) - copies
        total = int(copies.sum())
        doc, n_tokens = rows.doc[chosen], rows.n_tokens[chosen]
        tokens, following = self._read_tokens(section.store, part, groups, chosen)
        out = np.full((total, tokens.shape[1] + 1), PAD, np.int32)
        used = np.arange(tokens.shape[1]) < n_tokens[:, None]
        out[place, :-1] = np.where(used, tokens + self.tokens.shift, PAD)
        follows = rows.follows[chosen]
        out[place[follows], -1] = following[follows] + self.tokens.shift
        out[place[~follows], n_tokens[~follows]] = self.tokens.end
        out[place[ends] + 1, 0] = self.tokens.end
        self._put(CHUNKS, out)
        neighbours = np.full((total, self.handover.k), NONE, np.int64)
        if section is self.layout.queries:
            first = groups[0] * ROW_GROUP
            found = self.handover.found(part, groups, min(len(groups) * ROW_GROUP, len(rows.doc) - first))
            found = found.take(chosen - first)
            neighbours[place] = self._numbers(found)
            self.counts.add(part, doc, n_tokens, found)
        self._put(KNN, neighbours)
        new = np.diff(doc, prepend=last) != 0
        self._put(DOC_IDS, np.repeat(self.documents - 1 + np.cumsum(new), copies))
        self.documents += int(new.sum())
        ids = np.full(total, NONE, np.int64)
        ids[place] = parts.chunk_ids(part, chosen)
        self._put(CHUNK_IDS, ids, "<i8")

    def _read_tokens(
        self, store: Store, part: int, groups: list[int], chosen: Ids
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """The tokens [n, chunk_length] of rows, and the first token of the row after each, [n]."""
        total = parts.part_entry(store, "chunks", part).rows
        beyond = groups[-1] + 1
        groups = [*groups, beyond] if beyond * ROW_GROUP < total else groups
        tokens = parts.read_chunks(store, part, groups).tokens.astype(np.int32)
        place = chosen - groups[0] * ROW_GROUP
        return tokens[place], tokens[np.minimum(place + 1, len(tokens) - 1), 0]

    def _numbers(self, found: Found) -> Ids:
        """The rows of neighbours, int64 [n, k], −1 for none."""
        out = np.full(found.ids.shape, NONE, np.int64)
        for number, section in enumerate(self.layout.of_database):
            where = found.is_of(number)
            ids = found.ids[where]
            lost = ~section.kept.contains(ids)
            if lost.any():
                raise self.handover.foreign(section.store, int(ids[lost][0]))
            out[where] = section.number(ids)
        return out
