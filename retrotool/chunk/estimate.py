"""``chunk --dry-run``: estimate the result of chunking from a sample of the inputs.

Up to ``_FILES`` inputs, spread over all of them, are read from the beginning (large ones also from slices
further in), tokenised and cut. The counts are scaled by the share of the bytes that was read.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from retrotool import sources
from retrotool.chunk import CHUNK_LENGTH, chunker
from retrotool.chunk import run as chunk_run
from retrotool.chunk.chunk_plan import EXACT, ChunkOptions, cut_units, hashes_of, known_inputs, open_plans, text_bytes
from retrotool.engine.progress import Progress
from retrotool.errors import UsageError
from retrotool.sources import Document, InputFile, Rejected, Slice
from retrotool.sources.records import content_hash
from retrotool.store import parts
from retrotool.store.identity import is_store
from retrotool.store.storage import storage_at
from retrotool.store.store import Store
from retrotool.tokenizers import DEFAULT_TOKENIZER, FastTokenizer, Tokenizer, find_tokenizer, stored_tokenizer

_FILES = 24
_CHARACTERS = 2 << 20
_SECONDS = 10.0
_DOCUMENT_BYTES = 50  # of a documents file, per document, besides the id


@dataclass(frozen=True, slots=True)
class Estimate:
    """The estimated result of chunking; ``bytes`` on disk, ``seconds`` at the measured rate."""

    inputs: int
    known_inputs: int
    input_bytes: int
    documents: int
    tokens: int
    chunks: int
    parts: int
    rejected: int
    bytes: int
    seconds: float
    megabytes_per_second: float
    workers: int
    sampled_documents: int
    sampled_bytes: int
    reasons: tuple[chunk_run.RejectedReason, ...] = ()  # for rejected rows, with their numbers in the sample


@dataclass(slots=True)
class _Sample:
    documents: int = 0
    rejected: int = 0
    text: int = 0
    tokens: int = 0
    chunks: int = 0
    disk: int = 0
    read: float = 0.0
    cpu: float = 0.0


def estimate(
    root: str | Path,
    inputs: Sequence[str],
    *,
    tokenizer: str | None = None,
    chunk_length: int | None = None,
    options: ChunkOptions | None = None,
) -> Estimate:
    """Estimate what chunking inputs into the store at ``root`` would give, from a sample. Changes nothing."""
    options = chunk_run.check_options(options or ChunkOptions())
    chunk_run.check_chunk_length(chunk_length)
    if not inputs:
        raise UsageError("no input was given", "Name files or folders.")
    files = chunk_run.find_readable(inputs, options)
    chunk_run.check_rows(files, options)
    known = 0
    if is_store(storage_at(root)):
        store = Store.open(root)
        given = Tokenizer(find_tokenizer(tokenizer)) if tokenizer else None
        chunk_run.check_store_identity(store, tokenizer, given, chunk_length)
        fingerprints = known_inputs(store, store.state, options).fingerprints
        fingerprints = fingerprints.difference(*(plan.fingerprints for _, _, plan in open_plans(store)))
        new = [fingerprint not in fingerprints for fingerprint, _ in hashes_of(store, files, options.fields)]
        known, files = new.count(False), list(itertools.compress(files, new))
        chunk_length = store.identity.chunk_length
        options = replace(options, exact_tokenizer=options.exact_tokenizer or EXACT in store.state.records)
        loaded = stored_tokenizer(store)
    else:
        loaded = Tokenizer(find_tokenizer(tokenizer or DEFAULT_TOKENIZER))
        chunk_length = chunk_length or CHUNK_LENGTH
    with Progress("chunk", doing="chunking a sample"):
        sampler = _Sampler(loaded, chunk_length, options)
        samples = sampler.sample(files)
    sizes = Counter[str]()
    for file in files:
        sizes[file.format] += file.size
    whole = _Sample()
    for kind, sample in samples.items():
        factor = max(1.0, sizes[kind] / sample.read) if sample.read else 0.0
        for name in ("documents", "rejected", "text", "tokens", "chunks", "disk"):
            setattr(whole, name, getattr(whole, name) + round(getattr(sample, name) * factor))
        whole.cpu += sample.cpu * factor
    units = cut_units(files, options.fields, options.part_size, chunk_length)
    # Every unit has at least one part.
    n_parts = max(len(units), -(-whole.chunks // options.part_size)) if whole.chunks else 0
    seconds = whole.cpu / max(1, min(options.workers, len(units)))
    return Estimate(
        inputs=len(files), known_inputs=known, input_bytes=sum(sizes.values()), documents=whole.documents,
        tokens=whole.tokens, chunks=whole.chunks, parts=n_parts, rejected=whole.rejected, bytes=whole.disk,
        seconds=seconds, megabytes_per_second=whole.text / seconds / 1e6 if seconds else 0.0,
        workers=options.workers, sampled_documents=sum(sample.documents for sample in samples.values()),
        sampled_bytes=sum(sample.text for sample in samples.values()),
        reasons=chunk_run.merge_reasons(sampler.rejected),
    )  # fmt: skip


class _Sampler:
    def __init__(self, tokenizer: Tokenizer, chunk_length: int, options: ChunkOptions) -> None:
        self._encoder = FastTokenizer(tokenizer, check=options.check, first=0, use_tokie=not options.exact_tokenizer)
        self._vocabulary, self._chunk_length = tokenizer.vocabulary, chunk_length
        self._dtype = parts.token_dtype(tokenizer.identity.token_bytes)
        self._options = options
        self._seen: set[str | bytes] = set()
        self.rejected: list[chunk_run.RejectedReason] = []

    def sample(self, files: Sequence[InputFile]) -> dict[str, _Sample]:
        chosen: list[InputFile] = []
        for kind in sorted({file.format for file in files}):
            alike = [file for file in files if file.format == kind]
            step = max(1, len(alike) // _FILES)
            chosen += alike[step // 2 :: step][:_FILES]
        samples: dict[str, _Sample] = {}
        end = time.monotonic() + _SECONDS
        for file in chosen:
            sample = samples.setdefault(file.format, _Sample())
            slices = sources.cut_input(file, self._options.fields, max(1 << 20, text_bytes(file) // 3))
            share = file.size / len(slices)
            for where in slices:
                self._add(sample, file, where, share, _CHARACTERS // (len(slices) * min(len(chosen), 8)))
            if time.monotonic() > end:
                break
        return samples

    def _repeats(self, document: Document) -> bool:
        """Return whether the sample had this id or text before."""
        keys: set[str | bytes] = {document.id, content_hash(document.text, document.value, document.tokens)}
        known = not self._seen.isdisjoint(keys)
        self._seen |= keys
        return known

    def _add(self, sample: _Sample, file: InputFile, where: Slice, share: float, characters: int) -> None:
        started = time.process_time()
        batch: list[Document] = []
        bad: list[Rejected] = []
        text = 0
        for row in sources.read_input(file, self._options.fields, where):
            if isinstance(row, Rejected):
                bad.append(row._replace(line=0) if where.first else row)
            else:
                if self._options.duplicates != "skip" or not self._repeats(row):
                    batch.append(row)
                text += len(row.text) + len(row.value or "") + (0 if row.tokens is None else 4 * len(row.tokens))
            if text >= characters:
                break
        expanded = file.estimated_text() if file.compression else text_bytes(file)
        sample.read += share if text < characters else min(share, text * file.size / max(file.size, expanded))
        sample.cpu += time.process_time() - started
        if batch:
            self._add_batch(sample, batch, bad)
        sample.rejected += len(bad)
        self.rejected += (chunk_run.RejectedReason(row.reason, 1, file.path, row.line, row.excerpt) for row in bad)

    def _add_batch(self, sample: _Sample, batch: list[Document], bad: list[Rejected]) -> None:
        # Warm up: classifying new characters must not count in the rate.
        chunker.tokenise(batch, self._encoder, self._vocabulary, self._chunk_length, id)
        started = time.process_time()
        found = chunker.tokenise(batch, self._encoder, self._vocabulary, self._chunk_length, bad.append)
        cut = chunker.cut_chunks(found.ids, found.lengths, self._chunk_length, self._dtype, found.pieces)
        sample.documents += len(found.documents)
        sample.chunks += len(cut.doc)
        sample.tokens += len(found.ids)
        sample.text += sum(len(d.text.encode("utf-8", "surrogatepass")) for d in found.documents)
        table, sink = parts.chunks_table(cut.doc, cut.index, cut.n_tokens, cut.tokens, cut.key), pa.BufferOutputStream()
        pq.write_table(table, sink, row_group_size=parts.ROW_GROUP, compression="zstd")
        sample.disk += int(sink.getvalue().size) if found.documents else 0
        sample.disk += sum(_DOCUMENT_BYTES + len(d.id) for d in found.documents)
        sample.cpu += time.process_time() - started
