"""Scan all text, tokens or vectors of a store for selectors: a stage with one task per part.

Results are stored in ``scans/<scan>/``, named by a keyed hash of the selectors. So a killed scan is resumed
and several machines can share it; a part that an erase rewrote is scanned again. The commit of the purge
removes the files, and so does any erase; a dry run leaves them for the purge after it. They hold chunk ids,
places in text, and distances or scores, but no text.

A result (``scans`` in docs/format.md) has a row per chunk, selector and label, with the first match, in the
order of the chunks.

In a task each thread works on a block of whole documents. Matchers spend their time in numpy, Arrow and RE2,
which release the GIL. Memory: a block per thread, and 34 bytes per hit.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
import orjson
import pyarrow as pa

from retrotool import interrupts
from retrotool.engine.task import Report, Task, Worker, is_taken, task_key
from retrotool.errors import ConflictError
from retrotool.machine import cores
from retrotool.purge.selectors.classified import Classified
from retrotool.purge.selectors.selector import BLOCK_ROWS, Decoder, Matcher, Selector, TextBlock, text_blocks
from retrotool.read_ahead import concurrently
from retrotool.store import parts
from retrotool.store.paths import FileName, part_slot
from retrotool.store.staging import Staged
from retrotool.store.store import Store

KIND = "scans"


@dataclass(frozen=True, slots=True)
class ScanStage:
    """Scans all parts with ``selectors``, if there are any; concurrent runs share the parts."""

    selectors: tuple[Selector, ...]
    name: str = field(default="select", init=False)
    unit: str = field(default="chunk", init=False)

    @property
    def devices(self) -> tuple[str, ...]:
        """The device that a classifier uses, if there is one."""
        return tuple(selector.device for selector in self.selectors if isinstance(selector, Classified))

    def scan(self, store: Store) -> str:
        """Return the name of this scan: a hash of its selectors, keyed with the store's secret."""
        asked = [[selector.kind, selector.literal()] for selector in self.selectors]
        return store.identity.keyed_hash(orjson.dumps(asked, option=orjson.OPT_SORT_KEYS).decode())[:16]

    def plan(self, store: Store) -> list[Task]:
        """Return a task per part with files not scanned yet; ``UsageError`` if a selector lacks files."""
        scan, tasks = self.scan(store), list[Task]()
        for part in store.state.all_parts() if self.selectors else ():
            chunks = parts.part_entry(store, "chunks", part)
            more = {path for selector in self.selectors for path in selector.reads(store, part)}
            reads, old = [chunks.path, *sorted(more)], store.state.part_file(KIND, part, scan)
            if old is None or (old.about or {})["reads"] != reads:
                key = task_key(self.name, {"scan": scan}, reads)
                inputs = {"part": part, "reads": reads, "replaces": [old.path] if old else []}
                tasks.append(Task(key, f"part {part}", chunks.rows, inputs, claimed=True, for_all=True))
        return tasks

    def open(self, store: Store) -> Worker:
        """Return the worker, with all matchers loaded."""
        matchers, decoder = [selector.open(store) for selector in self.selectors], Decoder(store)
        least = min(getattr(matcher, "block_rows", BLOCK_ROWS) for matcher in matchers)
        scan, names = self.scan(store), [list(one.names) for one in self.selectors]
        settings = {"scan": scan, "selectors": [one.kind for one in self.selectors]}

        def work(task: Task, run: str, report: Report) -> Staged | None:
            part, reads = int(task.inputs["part"]), task.inputs["reads"]
            store.refresh()
            if is_taken(store, KIND, part_slot(part), scan, next(iter(task.inputs["replaces"]), None)):
                return None
            found = [parts.SCANS_SCHEMA.empty_table()]
            blocks = text_blocks(store, decoder, part, least)
            for rows, some in concurrently(functools.partial(_first_hits, matchers), blocks, cores()):
                interrupts.check()
                found.append(some)
                report(rows)
            name = FileName.new(run, KIND, part_slot(part), "parquet", scan)
            table, about = pa.concat_tables(found).combine_chunks(), {"reads": reads, "names": names}
            entry = parts.write_parquet(store, name, table, about=about)
            removed = tuple(task.inputs["replaces"])
            return Staged("select", settings, tuple(reads), (entry,), removed, task=task.key, run=run)

        return work


def _first_hits(matchers: list[Matcher], block: TextBlock) -> tuple[int, pa.Table]:
    """Return the rows of a block, and the first hit of each row, matcher and label."""
    every = []
    for number, matcher in enumerate(matchers):
        hits = matcher(block)
        order = np.lexsort((hits.begin, hits.labels, hits.rows))
        _, first = np.unique(hits.rows[order] << 32 | hits.labels[order], return_index=True)
        kept = order[first]
        rows, begin, end = hits.rows[kept], hits.begin[kept], hits.end[kept]
        placed = begin >= 0
        start = block.starts[rows] if placed.any() else begin
        ids, numbers = parts.chunk_ids(block.chunks.part, rows + block.first), np.full(len(rows), number, np.int16)
        columns = [
            ids, numbers, hits.labels[kept], np.where(placed, begin - start, 0), np.where(placed, end - start, 0),
            hits.figures[kept],
        ]  # fmt: skip
        every.append(pa.table(columns, schema=parts.SCANS_SCHEMA))
    return len(block), pa.concat_tables(every).sort_by("chunks")


def read_scan(store: Store, stage: ScanStage) -> pa.Table:
    """Return the result of a scan, in the order of the chunks.

    ``ConflictError`` if a part is not scanned, or was rewritten since.
    """
    if stage.plan(store):
        raise ConflictError("a part was added or rewritten since the scan", "Run the same command again.")
    entries = store.state.group(KIND, stage.scan(store)).entries()
    found = [parts.SCANS_SCHEMA.empty_table(), *(parts.read_parquet(store, entry) for entry in entries)]
    return pa.concat_tables(found)
