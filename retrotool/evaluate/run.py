"""``evaluate``: bits per byte of a language model on a store's text, with and without retrieval.

Chunks are scored once with retrieval off, and once with the neighbours of each table. Results are given for
all chunks, by source, and by leakage: for chunks of which at most a share is copied, as in RETRO (arXiv
2112.04426, section 2.6). That is the longest run in common with one of the chunk's own ten nearest neighbours
and their continuations, divided by the chunk's length: r of full chunks, and the copied share of ``leakage``.
Here, the neighbours that the model is given for the chunk count, too: a search may miss what they have.

Nothing is written. Cost: the model's forwards (``causal_model``, ``language_models``). Memory: some passages
with their neighbours, 60 bytes per document of the store, and 60 per scored chunk with 16 for each table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retrotool.cli.command_lines import COMPARED
from retrotool.embed.search_scope import is_same_store
from retrotool.encoder.devices import check_device, pick_device
from retrotool.engine.progress import counting
from retrotool.errors import UsageError
from retrotool.evaluate import evaluation_text
from retrotool.evaluate.bits_per_byte import BitsPerByte, Scores
from retrotool.evaluate.causal_model import load_causal_model
from retrotool.evaluate.language_models import LanguageModel, load_retro_model
from retrotool.neighbours.table_reader import NeighbourReader, check_same_tokens
from retrotool.neighbours.token_overlap import check_comparable
from retrotool.ranges import runs_up_to
from retrotool.store.store import Store
from retrotool.tokenizers import stored_tokenizer

SHARES = tuple(i / 8 for i in range(1, 9))  # α of the groups by leakage, as in RETRO
_BLOCK = 64  # chunks that are scored together, but all of a document


@dataclass(frozen=True, slots=True)
class TableResult:
    """What the neighbours of a table give for ``all`` chunks, and for groups of them.

    ``compared``: with how many of their own neighbours chunks were compared. ``up_to`` maps α to the chunks
    with a copied share of at most α, ``sources`` a source to its chunks.
    """

    name: str
    databases: tuple[str, ...]
    compared: int
    all: BitsPerByte
    up_to: dict[str, BitsPerByte]
    sources: dict[str, BitsPerByte]


@dataclass(frozen=True, slots=True)
class EvaluateResult:
    """Result of ``evaluate``; ``chunks`` of the ``live_chunks`` of the evaluation store were scored."""

    evaluation: str
    commit: int
    model: str
    method: str
    k: int
    context: int  # most tokens of the document before a chunk that the model got
    seed: int
    live_chunks: int
    chunks: int
    tables: tuple[TableResult, ...]


def evaluate(
    root: str | Path,
    *,
    queries: str | Path,
    model: str | Path | LanguageModel,
    names: Sequence[str] = (),
    k: int | None = None,
    context: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 8,
) -> EvaluateResult:
    """Evaluate ``model`` on the store ``queries``, which has neighbours in the database ``root``.

    ``names``: its tables (default: main, or the only one), at least one of which reads ``root``. ``k``:
    neighbours per chunk (default: the tables'). ``context``: most tokens of the document before a chunk.
    ``limit``: most chunks to score, drawn at random by ``seed``. ``dtype``: of the weights (``auto``:
    float32 on a CPU). ``batch_size``: windows per forward.
    """
    store = Store.open(queries)
    readers = [NeighbourReader(store, name) for name in names] or [NeighbourReader(store)]
    _check(Store.open(root), store, readers)
    k = min(reader.choose_k(min(one.k for one in readers) if k is None else k) for reader in readers)
    documents, drawn, live = evaluation_text.draw_chunks(store, limit, seed)
    name = str(model) if isinstance(model, str | Path) else type(model).__name__
    if isinstance(model, str | Path):
        check_device(device, dtype)
        is_causal = Path(model).suffix == ".gguf" or (Path(model) / "config.json").exists()
        if not (Path(model).exists() or "://" in name):
            raise UsageError(f"--model {name} does not exist", "Give a directory or a file of this machine.")
        load = load_causal_model if is_causal else load_retro_model
        model = load(model, store, k, context, pick_device(device), dtype, batch_size)
    tokenizer = stored_tokenizer(store)
    before, scores = max(model.context // store.identity.chunk_length, model.reach), [list[Scores]() for _ in readers]
    with counting("evaluate", "chunk", drawn) as report:
        for some in runs_up_to(_BLOCK, documents, lambda one: len(one.scored)):
            text = evaluation_text.read_passages(store, tokenizer, readers, some, k, before, model.reach)
            off = model.nats(text.chunks, None)[text.chunks.scored].sum(axis=1)
            for near, of_table in zip(text.near, scores, strict=True):
                on = model.nats(text.chunks, near.nearest(k))[text.chunks.scored].sum(axis=1)
                copied = evaluation_text.measure_copied(text.chunks, near, k)
                of_table.append(Scores(on, off, text.n_bytes, text.document, text.source, copied))
            report(len(off))
    tables = tuple(_table_result(reader, Scores.joined(some)) for reader, some in zip(readers, scores, strict=True))
    return EvaluateResult(
        store.place, store.state.number, name, model.method, k, model.context, seed, live, drawn, tables
    )


def _check(database: Store, store: Store, readers: Sequence[NeighbourReader]) -> None:
    """Raise ``UsageError`` unless one model can read all tables, and one of them is of the database."""
    databases = [one for reader in readers for one in reader.databases]
    if not any(is_same_store(database, one) for one in databases):
        named = ", ".join(repr(reader.name) for reader in readers)
        theirs = ", ".join(dict.fromkeys(one.place for one in databases))
        advice = "Give that store first, or the --name of a table with neighbours in this one."
        raise UsageError(f"{store.place}: the neighbours {named} are in {theirs}, not in {database.place}", advice)
    check_same_tokens(store, databases)
    check_comparable(store, database, "", "Chunk both stores again, with shorter chunks.")
    for reader in readers:
        for part in store.state.parts():
            reader.entries(part)


def _table_result(reader: NeighbourReader, scores: Scores) -> TableResult:
    return TableResult(
        reader.name, tuple(one.place for one in reader.databases), min(reader.saved, COMPARED),
        scores.of(scores.n_bytes >= 0),
        {f"{share:g}": scores.of(scores.copied <= share) for share in SHARES},
        {str(name): scores.of(scores.source == name) for name in np.unique(scores.source)},
    )  # fmt: skip
