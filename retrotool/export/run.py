"""``export``: a query store's live chunks with neighbours, text and tokens, for tools that know nothing of stores.

The output is a folder that is whole or not there: Parquet files, the tokenizer as ``tokenizer.json``, and
``export.json``, which has what was exported of what: stores and their commits, the table, k, counts and files. One view
of each store is taken, always through the tombstones. What is purged later stays in an export.

Cost: neighbours are anywhere, so looking up those of some chunks touches most row groups of the databases, and reads
each once. So it is done for as many chunks as give ``HELD_BYTES`` of tokens, not for a row group; a database is
read about (chunks · k · 2 · bytes a chunk) / ``HELD_BYTES`` times. Memory: some four times ``HELD_BYTES``, a part of
the database, a part's documents, and a table of 8,192 chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from retrotool.cli.command_lines import embed_command, table_command
from retrotool.cli.result_files import check_place, new_folder
from retrotool.embed.search_scope import count_keys_of, embedded_parts
from retrotool.engine.progress import counting
from retrotool.engine.task import Report
from retrotool.errors import CorruptError, UsageError
from retrotool.neighbours.retrieved import Pieces
from retrotool.neighbours.table_reader import Found, NeighbourReader, check_same_tokens
from retrotool.store import disk, parts
from retrotool.store.neighbour_tables import NO_NEIGHBOUR
from retrotool.store.parts import ROW_GROUP, Ids
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones, read_tombstones
from retrotool.tokenizers import Tokenizer, stored_tokenizer

MANIFEST, TOKENIZER = "export.json", "tokenizer.json"

HELD_BYTES = 128 << 20
"""Tokens of neighbours that are looked up at once."""
_PARQUET = {
    "compression": "zstd",
    "use_dictionary": ["document", "source"],
    "write_page_checksum": True,
    "write_page_index": True,
}


@dataclass(frozen=True, slots=True)
class ExportedTables:
    """The live chunks of ``store`` and, through ``reader``, k neighbours of each; ``tombstones`` are the store's.

    ``tabled`` are the parts that have tables; chunks of others have no neighbours.
    """

    store: Store
    reader: NeighbourReader
    tokenizer: Tokenizer
    tombstones: Tombstones
    tabled: frozenset[int]
    k: int

    def found(self, part: int, group: int, rows: int) -> Found:
        """Return the neighbours, [rows, k], of all rows of a row group, of purged ones too."""
        if part in self.tabled:
            found = self.reader.read(part, self.k, [group])
            if len(found.ids) == rows:
                return found
            raise self.store.corrupt(
                f"the neighbours {self.reader.name!r} of part {part} have {len(found.ids):,} rows, not {rows:,}"
            )
        empty = np.full((rows, self.k), NO_NEIGHBOUR, np.int64)
        return Found(empty, np.full(empty.shape, np.inf, np.float32), np.zeros(empty.shape, np.uint8))


def open_tables(store: Store, name: str, k: int | None = None) -> ExportedTables:
    """Open the table, or mixture of tables, ``name``, with ``k`` neighbours a chunk (default: the table's own).

    ``UsageError`` if it, a database or so many neighbours are not there, if a table is out of date, or if the chunks of
    a database are of another length or another tokenizer: ids of their tokens would mean something else.
    """
    reader = NeighbourReader(store, name)
    k = reader.k if k is None else k
    if not 1 <= k <= reader.saved:
        raise UsageError(
            f"-k {k} is not between 1 and the {reader.saved} neighbours that {name!r} has of a chunk",
            "To have more, compute them with a greater --saved: retrotool neighbours",
        )
    check_same_tokens(store, reader.databases)
    tabled = reader.parts()
    for part in tabled:
        reader.entries(part)  # ids mean what they meant
    return ExportedTables(store, reader, stored_tokenizer(store), read_tombstones(store), frozenset(tabled), k)


@dataclass(frozen=True, slots=True)
class Block:
    """The n live chunks of a row group: ``ids`` int64 [n], ids and sources of their documents, places in these [n].

    ``tokens`` [n, chunk_length] is zero-padded, of which ``n_tokens`` [n] count; ``found`` their neighbours, [n, k],
    and ``pieces`` [N, F] of these, [n · k].
    """

    part: int
    ids: Ids
    doc: npt.NDArray[np.int32]
    documents: pa.ChunkedArray
    sources: pa.ChunkedArray
    index: npt.NDArray[np.int32]
    tokens: npt.NDArray[Any]
    n_tokens: npt.NDArray[np.int32]
    found: Found
    pieces: Pieces


def read_blocks(opened: ExportedTables) -> Iterator[Block]:
    """Yield all live chunks in the order of their ids, block by block, none of them empty."""
    store, k = opened.store, opened.k
    most = HELD_BYTES // (2 * k * store.identity.chunk_length * store.identity.tokenizer.token_bytes) - ROW_GROUP
    waiting, held = list[Block](), 0
    for part in store.state.parts():
        # Combined once: ``take`` would copy all chunks of a column each time.
        documents = parts.read_documents(store, part, ["id", "source"]).combine_chunks()
        for group in range(-(-parts.part_entry(store, "chunks", part).rows // ROW_GROUP)):
            chunks = parts.read_chunks(store, part, [group])
            ids = parts.chunk_ids(part, group * ROW_GROUP + np.arange(len(chunks)))
            rows = np.flatnonzero((chunks.n_tokens > 0) & ~opened.tombstones.contains(ids))
            if not len(rows):
                continue
            named = documents.take(pa.array(chunks.doc[rows]))
            waiting.append(Block(
                part, ids[rows], chunks.doc[rows], named["id"], named["source"], chunks.index[rows],
                chunks.tokens[rows], chunks.n_tokens[rows], opened.found(part, group, len(chunks)).take(rows),
                Pieces.none(store, 0),
            ))  # fmt: skip
            held += len(rows)
            if held > most:
                yield from _with_pieces(opened, waiting)
                waiting, held = [], 0
    if waiting:
        yield from _with_pieces(opened, waiting)


def _with_pieces(opened: ExportedTables, blocks: list[Block]) -> Iterator[Block]:
    """Blocks with what their neighbours are, looked up for all at once."""
    every = [block.found for block in blocks]
    found = Found(
        np.concatenate([one.ids for one in every]),
        np.concatenate([one.distances for one in every]),
        np.concatenate([one.databases for one in every]),
    )
    pieces = opened.reader.pieces(found)
    wrong = (found.ids != NO_NEIGHBOUR) & (pieces.n_tokens[:, 0] == 0).reshape(found.ids.shape)
    if wrong.any():
        place = tuple(np.argwhere(wrong)[0])
        database = opened.reader.databases[found.databases[place]].place
        raise CorruptError(
            f"the neighbours {opened.reader.name!r} name the chunk {found.ids[place]}, which {database} does not have",
            f"See what is wrong: retrotool verify {opened.store.place}, and: retrotool verify {database}",
        )
    start = 0
    for block in blocks:
        some = slice(start, start + block.found.ids.size)
        yield replace(block, pieces=Pieces(pieces.tokens[some], pieces.n_tokens[some]))
        start = some.stop


def _schema(k: int, chunk_length: int, token: pa.DataType) -> pa.Schema:
    """Return the columns of a chunk with k neighbours; ``token`` is the type of token ids."""
    tokens = pa.list_(pa.list_(token, chunk_length), k)
    lengths = pa.list_(pa.int32(), k)
    return pa.schema([
        ("chunk", pa.int64()), ("document", pa.string()), ("source", pa.string()), ("index", pa.int32()),
        ("text", pa.string()), ("tokens", pa.list_(token)),
        ("neighbours", pa.list_(pa.int64(), k)), ("distances", pa.list_(pa.float32(), k)),
        ("databases", pa.list_(pa.int16(), k)),
        ("neighbour_tokens", tokens), ("neighbour_lengths", lengths),
        ("continuation_tokens", tokens), ("continuation_lengths", lengths),
    ])  # fmt: skip


def _table(opened: ExportedTables, block: Block, schema: pa.Schema) -> pa.Table:
    ids = block.found.ids
    tokens = block.pieces.tokens.reshape(*ids.shape, 2, -1)
    lengths = block.pieces.n_tokens.reshape(*ids.shape, 2)
    databases = np.where(ids == NO_NEIGHBOUR, -1, block.found.databases.astype(np.int16))
    columns = [
        pa.array(block.ids), block.documents, block.sources, pa.array(block.index),
        opened.tokenizer.decode_text(block.tokens, block.n_tokens),
        _lists(block.tokens, block.n_tokens, schema.field("tokens").type),
        *(_fixed(values, schema.field(name).type) for name, values in (
            ("neighbours", ids), ("distances", block.found.distances), ("databases", databases),
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


def write_export(opened: ExportedTables, folder: Path, report: Report) -> dict[str, int]:
    """Write ``part-<number>.parquet`` for each part that has live chunks: zstd, with page checksums.

    Return what was exported: chunks, their documents and tokens, pairs of a chunk and a neighbour, chunks with none.
    """
    own = opened.store.identity
    columns = _schema(opened.k, own.chunk_length, pa.uint16() if own.tokenizer.token_bytes == 2 else pa.uint32())
    counts = dict.fromkeys(("chunks", "documents", "tokens", "neighbours", "alone"), 0)
    part, last, writer = -1, -1, cast(Any, None)
    with ExitStack() as files:
        for block in read_blocks(opened):
            path = folder / f"part-{block.part:06d}.parquet"
            if block.part != part:
                files.close()
                part, last = block.part, -1
                writer = files.enter_context(pq.ParquetWriter(path, columns, **_PARQUET))
            there = block.found.ids != NO_NEIGHBOUR
            counts["chunks"] += len(block.ids)
            counts["documents"] += int((np.diff(block.doc, prepend=last) != 0).sum())  # the first may be counted
            counts["tokens"] += int(block.n_tokens.sum())
            counts["neighbours"] += int(there.sum())
            counts["alone"] += int((~there.any(axis=1)).sum())
            last = int(block.doc[-1])
            table = _table(opened, block, columns)
            disk.announce("write", path)
            writer.write_table(table)
            report(table.num_rows)
    return counts


@dataclass(frozen=True, slots=True)
class ExportedDatabase:
    """A database whose chunks the neighbours are; ``number`` is what the column ``databases`` has."""

    number: int
    table: str
    weight: float
    uuid: str
    commit: int


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What ``export`` wrote: live chunks, their documents and tokens, pairs of a chunk and a neighbour.

    ``alone`` chunks have no neighbour.
    """

    output: str
    store: str
    commit: int
    table: str
    k: int
    chunk_length: int
    databases: tuple[ExportedDatabase, ...]
    chunks: int
    documents: int
    tokens: int
    neighbours: int
    alone: int
    bytes: int


def export(root: str | Path, output: str | Path, *, name: str = "main", k: int | None = None) -> ExportResult:
    """Export all live chunks of the store ``root`` with their neighbours ``name`` into the new folder ``output``.

    ``k`` neighbours a chunk (default: the table's own).
    """
    target = check_place("OUTPUT", output)
    store = Store.open(root)
    opened = open_tables(store, name, k)
    _check_complete(opened, root)
    rows = sum(parts.part_entry(store, "chunks", part).rows for part in store.state.parts())
    total = rows - len(opened.tombstones.ids)
    if not total:
        raise UsageError(f"{root} has no chunk that is not purged: there is nothing to export")
    with new_folder(target) as folder:
        with counting("export", "chunk", total) as report:
            counts = write_export(opened, folder, report)
        disk.write(folder / TOKENIZER, store.tokenizer_json())
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
        databases = tuple(
            ExportedDatabase(number, member.table, member.weight, member.store.identity.uuid, member.store.state.number)
            for number, member in enumerate(opened.reader.members)
        )
        result = ExportResult(
            str(output), store.identity.uuid, store.state.number, name, opened.k, store.identity.chunk_length,
            databases, **counts, bytes=sum(files.values()),
        )  # fmt: skip
        tokenizer = store.identity.tokenizer
        about = {
            "tool": f"retrotool {version('retrotool')}", "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "tokenizer": {"name": tokenizer.name, "sha256": tokenizer.sha256, "vocabulary": tokenizer.vocabulary},
            "files": [{"name": name, "bytes": size} for name, size in files.items()],
        }  # fmt: skip
        shown = {key: value for key, value in asdict(result).items() if key not in ("output", "bytes")}
        disk.write(folder / MANIFEST, orjson.dumps({**shown, **about}, option=orjson.OPT_INDENT_2))
    return result


def _check_complete(opened: ExportedTables, root: str | Path) -> None:
    """``UsageError`` if some chunks that could have neighbours have no table yet: they would seem to have none."""
    store = opened.store
    missing = [part for part in store.state.parts() if part not in opened.tabled]
    chunks = count_keys_of(store, missing, opened.tombstones)
    if chunks:
        commands, embedded = [], set[str]()
        for member in opened.reader.members:
            if set(missing).issubset(int(slot) for slot in store.state.group("neighbours", member.table)):
                continue
            encoder = str(store.state.records[f"neighbours:{member.table}"]["encoder"])
            if encoder not in embedded and not set(missing).issubset(embedded_parts(store, encoder)):
                commands.append(embed_command(store, encoder))
                embedded.add(encoder)
            commands.append(table_command(store, member.table, member.store))
        shown = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise UsageError(
            f"{chunks:,} chunks of {root} have no neighbours {opened.reader.name!r} yet: those of parts {shown}",
            "Compute them: " + ", then: ".join(commands),
        )
