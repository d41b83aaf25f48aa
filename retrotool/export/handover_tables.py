"""Living chunks with their neighbours as rows: for Parquet readers, and for Hugging Face's ``datasets``.

Both have the same columns (``schema``). Parquet: a file a part, row groups of 8,192, zstd, page checksums.
``datasets``: what its ``save_to_disk`` writes, that is Arrow streams, ``dataset_info.json`` and ``state.json``; the
library is not needed. It takes types from the Arrow schema where ``dataset_info.json`` names none, so nothing here
depends on how a version spells its features.

Cost: about a kilobyte a chunk at k = 2, before compression. Memory: one table of 8,192 chunks beside the block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from retrotool.engine.task import Report
from retrotool.export.handover import Block, Counts, Handover, read_blocks
from retrotool.neighbours.retrieved import Pieces
from retrotool.store import disk
from retrotool.store.parts import ROW_GROUP
from retrotool.store.tables import NO_NEIGHBOUR

SHARD_BYTES = 500 << 20
"""Arrow files are closed once they have so much, as those of ``datasets`` are."""
_STRINGS = ["document", "source"]


def schema(k: int, chunk_length: int, token: pa.DataType) -> pa.Schema:
    """The columns of a chunk with k neighbours; ``token`` is the type of token ids."""
    tokens = pa.list_(pa.list_(token, chunk_length), k)
    lengths = pa.list_(pa.int32(), k)
    return pa.schema([
        ("chunk", pa.int64()), ("document", pa.string()), ("source", pa.string()), ("index", pa.int32()),
        ("tokens", pa.list_(token)),
        ("neighbours", pa.list_(pa.int64(), k)), ("distances", pa.list_(pa.float32(), k)),
        ("databases", pa.list_(pa.int16(), k)),
        ("neighbour_tokens", tokens), ("neighbour_lengths", lengths),
        ("continuation_tokens", tokens), ("continuation_lengths", lengths),
    ])  # fmt: skip


def tables_of(block: Block, pieces: Pieces, schema: pa.Schema) -> Iterator[pa.Table]:
    """A block as tables of ``schema``, of at most 8,192 chunks each."""
    for start in range(0, len(block), ROW_GROUP):
        yield _table(block, pieces, slice(start, min(start + ROW_GROUP, len(block))), schema)


def _table(block: Block, pieces: Pieces, some: slice, schema: pa.Schema) -> pa.Table:
    n, k = some.stop - some.start, block.found.ids.shape[1]
    ids = block.found.ids[some]
    rows = slice(some.start * k, some.stop * k)
    tokens = pieces.tokens[rows].reshape(n, k, 2, -1)
    lengths = pieces.n_tokens[rows].reshape(n, k, 2)
    databases = np.where(ids == NO_NEIGHBOUR, -1, block.found.databases[some].astype(np.int16))
    columns = [
        pa.array(block.ids[some]), block.documents[some.start : some.stop], block.sources[some.start : some.stop],
        pa.array(block.index[some]),
        _lists(block.tokens[some], block.n_tokens[some], schema.field("tokens").type),
        *(_fixed(values, schema.field(name).type) for name, values in (
            ("neighbours", ids), ("distances", block.found.distances[some]), ("databases", databases),
            ("neighbour_tokens", tokens[:, :, 0]), ("neighbour_lengths", lengths[:, :, 0]),
            ("continuation_tokens", tokens[:, :, 1]), ("continuation_lengths", lengths[:, :, 1]),
        )),
    ]  # fmt: skip
    return pa.table(columns, schema=schema)


def _fixed(values: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    """[n, k] or [n, k, l] numbers as fixed-size lists."""
    sizes = []
    while pa.types.is_fixed_size_list(kind):
        sizes.append(kind.list_size)
        kind = kind.value_type
    array = pa.array(np.ascontiguousarray(values, kind.to_pandas_dtype()).reshape(-1))
    for size in reversed(sizes):
        array = pa.FixedSizeListArray.from_arrays(array, size)
    return array


def _lists(tokens: npt.NDArray[Any], n_tokens: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    """The first ``n_tokens`` [n] of each row of tokens [n, l] as lists."""
    used = np.arange(tokens.shape[1]) < n_tokens[:, None]
    offsets = np.concatenate([[0], np.cumsum(n_tokens, dtype=np.int64)]).astype(np.int32)
    values = pa.array(tokens[used].astype(kind.value_type.to_pandas_dtype()))
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def write_parquet(handover: Handover, folder: Path, report: Report) -> tuple[Counts, list[str]]:
    """Write ``part-<number>.parquet`` for each part that has living chunks; return their names, too."""
    own = handover.store.identity
    token = pa.uint16() if own.tokenizer.token_bytes == 2 else pa.uint32()
    columns = schema(handover.k, own.chunk_length, token)
    counts, names = Counts(), list[str]()
    part, writer = -1, cast(Any, None)
    with ExitStack() as files:
        for block, pieces in read_blocks(handover):
            counts.add(block.part, block.doc, block.n_tokens, block.found)
            if block.part != part:
                files.close()
                part = block.part
                names.append(f"part-{part:06d}.parquet")
                writer = files.enter_context(_parquet(folder / names[-1], columns))
            for table in tables_of(block, pieces, columns):
                disk.announce("write", folder / names[-1])
                writer.write_table(table)
                report(table.num_rows)
    return counts, names


def _parquet(path: Path, columns: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        path, columns, compression="zstd", use_dictionary=_STRINGS, write_page_checksum=True, write_page_index=True
    )


def write_saved_dataset(handover: Handover, folder: Path, report: Report, fingerprint: str) -> tuple[Counts, list[str]]:
    """Write what ``datasets.load_from_disk`` opens; return the names of the Arrow files, too.

    ``fingerprint`` is what caches of ``datasets`` know the content by.
    """
    columns = schema(handover.k, handover.store.identity.chunk_length, pa.int32())
    counts, names = Counts(), list[str]()
    writer, written = cast(Any, None), 0
    with ExitStack() as files:
        for block, pieces in read_blocks(handover):
            counts.add(block.part, block.doc, block.n_tokens, block.found)
            for table in tables_of(block, pieces, columns):
                if writer is None or written >= SHARD_BYTES:
                    files.close()
                    names.append(f"data-{len(names):05d}.arrow")
                    writer, written = files.enter_context(pa.ipc.new_stream(str(folder / names[-1]), columns)), 0
                disk.announce("write", folder / names[-1])
                writer.write_table(table)
                written += table.nbytes
                report(table.num_rows)
    names = _number(folder, names)
    about = "Chunks with their nearest neighbours, exported by retrotool; see export.json."
    _write_json(folder / "dataset_info.json", {"description": about, "citation": "", "homepage": "", "license": ""})
    _write_json(folder / "state.json", {
        "_data_files": [{"filename": name} for name in names], "_fingerprint": fingerprint, "_format_columns": None,
        "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False, "_split": None,
    })  # fmt: skip
    return counts, names


def _number(folder: Path, names: Sequence[str]) -> list[str]:
    """Say in the name of each file how many there are, as ``datasets`` does."""
    numbered = [f"data-{i:05d}-of-{len(names):05d}.arrow" for i in range(len(names))]
    for name, new in zip(names, numbered, strict=True):
        disk.rename(folder / name, folder / new)
    return numbered


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    disk.write(path, orjson.dumps(fields, option=orjson.OPT_INDENT_2))
