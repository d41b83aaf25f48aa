"""``leakage``: how much evaluation text a database contains word for word, by RETRO's measure r.

For each evaluation chunk, its nearest neighbours in the database are searched. r is the longest run of tokens
in common with one of them and its continuation, divided by the length of a full chunk (arXiv 2112.04426,
section 2.6). As r of a short chunk is low even if all of it is copied, ``copied`` is the length of the run
divided by the chunk's own length. Documents with the same id in the database count, as they are the leak. A
chunk's own document is excluded only if a store is compared with itself.

Cost: a search, then about 100,000 pairs per second and core (``token_overlap``). Memory: a part of the
evaluation store, and some 100 bytes per chunk of all parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from retrotool.ann.excluded import Excluded, Queries
from retrotool.cli.command_lines import COMPARED
from retrotool.cli.result_files import check_file, written
from retrotool.embed import search_scope
from retrotool.embed.search_scope import own_documents
from retrotool.engine.progress import counting
from retrotool.engine.task import Report
from retrotool.index.searching import Database
from retrotool.neighbours.retrieved import read_document_ids, read_pieces
from retrotool.neighbours.stage import check_encoders
from retrotool.neighbours.token_overlap import check_comparable, longest_common
from retrotool.ranges import in_steps
from retrotool.store import parts
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones

_BLOCK = 1 << 12


LEAKS = pa.schema([
    ("chunk", pa.int64()), ("document", pa.string()), ("source", pa.string()), ("n_tokens", pa.int32()),
    ("common", pa.int32()), ("r", pa.float32()), ("copied", pa.float32()),
    ("neighbour", pa.int64()), ("neighbour_document", pa.string()), ("distance", pa.float32()),
])  # fmt: skip


def find_leaks(
    store: Store, database: Database, *, within: bool, k: int = COMPARED, report: Report
) -> Iterator[pa.Table]:
    """Yield tables of ``LEAKS`` of all embedded keys of ``store`` in ``database``, by ascending chunk id.

    ``common`` is the longest run of tokens in common, with ``neighbour`` (−1: none found), whose document is
    null here; ``distance`` is that of the nearest neighbour.
    """
    tombstones = read_tombstones(store)
    for part in search_scope.embedded_parts(store, database.encoder):
        rows = search_scope.searchable_rows(store, part, tombstones)
        vectors = search_scope.read_part_vectors(store, database.encoder, part)
        chunks = parts.read_chunks(store, part)
        documents = parts.read_documents(store, part, ["id", "source"]).combine_chunks()
        own = own_documents(store, part, database.store, database.tombstones, within=True) if within else None
        for some in in_steps(rows, _BLOCK):
            excluded = Excluded.nothing(len(some)) if own is None else own.take(some)
            best = database.search(Queries(vectors[some].astype(np.float32), excluded), k)
            others, n_others = read_pieces(database.store, database.tombstones, best.ids.ravel()).joined()
            each = np.repeat(some, best.ids.shape[1])
            found = longest_common(chunks.tokens[each], chunks.n_tokens[each].astype(np.int64), others, n_others)
            length = found.length.reshape(best.ids.shape)
            longest = np.arange(len(some)), length.argmax(axis=1)
            named, n_tokens, common = documents.take(pa.array(chunks.doc[some])), chunks.n_tokens[some], length[longest]
            columns = [
                parts.chunk_ids(part, some), named["id"], named["source"].fill_null(""), n_tokens, common,
                common / store.identity.chunk_length, common / n_tokens, best.ids[longest],
                pa.nulls(len(some), pa.string()), best.distances[:, 0],
            ]  # fmt: skip
            yield pa.table(columns, LEAKS.names).cast(LEAKS)
            report(len(some))


SHARES = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)  # α of the shares of chunks with r ≤ α; RETRO has 0.125 to 1
HALF = 0.5
_BINS = 8


@dataclass(frozen=True, slots=True)
class SourceLeakage:
    """Chunks of a source, their mean r, and the shares with r ≥ 1/2 and r = 1; and of the copied share."""

    source: str
    chunks: int
    mean: float
    half: float
    whole: float
    copied: float
    copied_half: float
    copied_whole: float


@dataclass(frozen=True, slots=True)
class LeakageResult:
    """Result of ``leakage``. ``up_to`` maps α to the share with r ≤ α; ``histogram`` counts r by eighths."""

    evaluation: str
    database: str
    index: str
    chunks: int
    neighbours: int
    mean: float
    half: float
    whole: float
    copied: float
    copied_half: float
    copied_whole: float
    up_to: dict[str, float] = field(default_factory=dict)
    copied_up_to: dict[str, float] = field(default_factory=dict)
    histogram: tuple[int, ...] = ()
    sources: tuple[SourceLeakage, ...] = ()
    output: str = ""


def leakage(
    root: str | Path, *, queries: str | Path, index: str | None = None, k: int = COMPARED, out: str | Path | None = None
) -> LeakageResult:
    """Compare each chunk of the store ``queries`` with its ``k`` nearest neighbours in the store ``root``.

    ``out``: also write a Parquet file with a row per chunk. Neither store is changed.
    """
    if out is not None:
        check_file("--out", out)
    database, store = Database(Store.open(root), index), Store.open(queries)
    check_comparable(store, database.store, "Chunk the evaluation text again, with the tokenizer of the database.")
    check_encoders(store, database)
    total = search_scope.count_keys_of(store, search_scope.embedded_parts(store, database.encoder))
    within = search_scope.is_same_store(store, database.store)
    with counting("leakage", "chunk", total) as report:
        found = pa.concat_tables([LEAKS.empty_table(), *find_leaks(store, database, within=within, k=k, report=report)])
    if out is not None:
        _write(out, found, database, store)
    return _result(found, store, database, k, out)


def _write(out: str | Path, found: pa.Table, database: Database, store: Store) -> None:
    about = {"retrotool.database": database.store.identity.uuid, "retrotool.evaluation": store.identity.uuid}
    documents = pa.array(read_document_ids(database.store, found["neighbour"].to_numpy()), pa.string())
    table = found.set_column(LEAKS.get_field_index("neighbour_document"), "neighbour_document", documents)
    with written(out) as scratch:
        pq.write_table(table.replace_schema_metadata(about), scratch, compression="zstd")


def _result(found: pa.Table, store: Store, database: Database, k: int, out: str | Path | None) -> LeakageResult:
    length, common = store.identity.chunk_length, found["common"].to_numpy()
    r, copied = common / length, common / found["n_tokens"].to_numpy()
    sources = found["source"].combine_chunks().dictionary_encode()
    names, of_chunk = sources.dictionary.to_pylist(), sources.indices.to_numpy()
    edges = np.ceil(np.arange(1, _BINS) * length / _BINS)
    by_source = []
    for number, name in sorted(enumerate(names), key=lambda one: str(one[1])):
        mine = of_chunk == number
        by_source.append(SourceLeakage(name, int(mine.sum()), *_shares(r[mine]), *_shares(copied[mine])))
    return LeakageResult(
        store.place, database.store.place, database.name, len(common), k,
        *_shares(r), *_shares(copied),
        {f"{a:g}": _mean(r <= a) for a in SHARES}, {f"{a:g}": _mean(copied <= a) for a in SHARES},
        tuple(int(n) for n in np.bincount(np.searchsorted(edges, common, side="right"), minlength=_BINS)),
        tuple(sorted(by_source, key=lambda one: -one.mean)), str(out or ""),
    )  # fmt: skip


def _shares(r: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    return _mean(r), _mean(r >= HALF), _mean(r >= 1)


def _mean(values: npt.NDArray[Any]) -> float:
    return round(float(values.mean()), 4) if len(values) else 0.0
