"""``leakage``: how much of an evaluation store the database has word for word; a file and figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from retrotool.cli.result_file import check_file, written
from retrotool.embed.search_scope import count_living_keys, embedded_parts, is_same_directory
from retrotool.engine.progress import counting
from retrotool.errors import UsageError
from retrotool.index.searching import Database
from retrotool.leakage.measure import NEIGHBOURS, Leaks, find_leaks
from retrotool.neighbours.stage import check_encoders
from retrotool.store.compatible import check_compatible
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones

SHARES = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
"""α for which the share of chunks with r ≤ α is reported; RETRO's evaluation goes from 12.5 % to 100 %."""
HALF = 0.5
_BINS = 8
_SCHEMA = pa.schema([
    ("chunk", pa.int64()), ("source", pa.string()), ("common", pa.int32()), ("r", pa.float32()),
    ("neighbour", pa.int64()), ("distance", pa.float32()),
])  # fmt: skip


_Write = Callable[[Leaks], object]


@dataclass(frozen=True, slots=True)
class SourceLeakage:
    """Of one source of evaluation text: chunks, their mean r, and the shares with r ≥ 1/2 and r = 1."""

    source: str
    chunks: int
    mean: float
    half: float
    whole: float


@dataclass(frozen=True, slots=True)
class LeakageResult:
    """What ``leakage`` found. ``up_to`` is α → share of chunks with r ≤ α; ``histogram`` counts r by eighths."""

    evaluation: str
    database: str
    index: str
    chunks: int
    neighbours: int
    mean: float
    half: float
    whole: float
    up_to: dict[str, float] = field(default_factory=dict)
    histogram: tuple[int, ...] = ()
    sources: tuple[SourceLeakage, ...] = ()
    output: str = ""


def leakage(
    root: str | Path,
    *,
    evaluation: str | Path,
    index: str | None = None,
    neighbours: int = NEIGHBOURS,
    output: str | Path | None = None,
) -> LeakageResult:
    """Compare the chunks of the store ``evaluation`` with the store ``root``.

    ``output``: a Parquet file, one row an evaluation chunk. Neither store is changed.
    """
    if output is not None:
        check_file("--output", output)
    database, store = Database(Store.open(root), index), Store.open(evaluation)
    _check_tokenizers(store, database.store)
    check_encoders(store, database)
    tombstones = read_tombstones(store)
    total = sum(count_living_keys(store, part, tombstones) for part in embedded_parts(store, database.encoder))
    within = is_same_directory(store, database.store)
    found: list[Leaks] = []
    with _writing(output, database, store) as write, counting("leakage", "chunk", total) as report:
        for leaks in find_leaks(store, database, within=within, k=neighbours, report=report):
            write(leaks)
            found.append(leaks)
    return _result(found, store, database, neighbours, output)


def _check_tokenizers(one: Store, other: Store) -> None:
    advice = "Chunk the evaluation text again, with the tokenizer of the database."
    check_compatible(one, other, "their tokens can't be compared", advice, lengths=False)
    if one.identity.chunk_length > 64:
        raise UsageError(f"{one.root} has chunks of {one.identity.chunk_length} tokens; 64 can be compared")


@contextmanager
def _writing(output: str | Path | None, database: Database, store: Store) -> Iterator[_Write]:
    """Write leaks to a file that is there when all is, or not at all."""
    if output is None:
        yield lambda _: None
        return
    schema = _SCHEMA.with_metadata(
        {"retrotool.database": database.store.identity.uuid, "retrotool.evaluation": store.identity.uuid}
    )
    with written(output) as scratch, pq.ParquetWriter(scratch, schema, compression="zstd") as writer:
        length = store.identity.chunk_length

        def write(some: Leaks) -> None:
            r = (some.common / length).astype(np.float32)
            columns = [some.ids, some.sources, some.common, r, some.neighbours, some.distances]
            arrays = [pa.array(c, kind) for c, kind in zip(columns, _SCHEMA.types, strict=True)]
            writer.write_table(pa.table(arrays, schema=_SCHEMA))

        yield write


def _result(
    found: list[Leaks],
    store: Store,
    database: Database,
    neighbours: int,
    output: str | Path | None,
) -> LeakageResult:
    length = store.identity.chunk_length
    common = np.concatenate([np.zeros(0, np.int64), *(some.common for some in found)])
    names = np.array([source for some in found for source in some.sources], object)
    edges = np.ceil(np.arange(1, _BINS) * length / _BINS)
    by_source = [_source(str(name), common[names == name], length) for name in np.unique(names.astype(str))]
    return LeakageResult(
        str(store.root), str(database.store.root), database.name, len(common), neighbours,
        *_shares(common, length), {f"{a:g}": _share(common <= a * length) for a in SHARES},
        tuple(int(n) for n in np.bincount(np.searchsorted(edges, common, side="right"), minlength=_BINS)),
        tuple(sorted(by_source, key=lambda one: -one.mean)), str(output or ""),
    )  # fmt: skip


def _source(name: str, common: npt.NDArray[np.int64], length: int) -> SourceLeakage:
    return SourceLeakage(name, len(common), *_shares(common, length))


def _shares(common: npt.NDArray[np.int64], length: int) -> tuple[float, float, float]:
    mean = round(float(common.mean()) / length, 4) if len(common) else 0.0
    return mean, _share(common >= HALF * length), _share(common >= length)


def _share(which: npt.NDArray[np.bool_]) -> float:
    return round(float(which.mean()), 4) if len(which) else 0.0
