"""``export``: a query store's live chunks with neighbours, text and tokens, for tools that don't read stores.

The output folder appears only once it is complete. It has Parquet files, ``tokenizer.json``, and
``export.json``, which records the stores, their commits, the table, k, counts and files. Each store is read
at one commit, through its tombstones. Later purges do not reach an export.

Cost: neighbours are spread over most row groups of the databases, so they are looked up for as many chunks at
once as have ``HELD_BYTES`` of neighbour tokens. A database is read about (chunks · k · 2 · bytes per chunk) /
``HELD_BYTES`` times. Memory: about four times ``HELD_BYTES``, a part of the database, a part's documents, and
the text of a row group, which has at most ``TEXTS`` neighbours.
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

from retrotool.cli.command_lines import command_line, embed_command, table_command
from retrotool.cli.output import count
from retrotool.cli.result_files import check_place, new_folder
from retrotool.embed.search_scope import count_keys_of, embedded_parts
from retrotool.engine.progress import counting
from retrotool.engine.task import Report
from retrotool.errors import CorruptError, UsageError
from retrotool.neighbours.retrieved import Pieces, read_document_ids
from retrotool.neighbours.table_reader import Found, NeighbourReader, check_same_tokens
from retrotool.store import disk, parts
from retrotool.store.neighbour_tables import NO_NEIGHBOUR
from retrotool.store.parts import ROW_GROUP, Ids, format_id
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones, read_tombstones
from retrotool.tokenizers import Tokenizer, stored_tokenizer

HELD_BYTES = 128 << 20  # bytes of neighbour tokens that are looked up at once
TEXTS = 10 * ROW_GROUP  # neighbours of a row group, whose text is decoded at once
_REPEATED = ["document", "source", "neighbour_documents.list.element"]
_SETTINGS: dict[str, Any] = {"use_dictionary": _REPEATED, "write_page_checksum": True, "write_page_index": True}


@dataclass(frozen=True, slots=True)
class ExportedTables:
    """What is exported: the live chunks of ``store`` and, through ``reader``, k neighbours of each."""

    store: Store
    reader: NeighbourReader
    tokenizer: Tokenizer
    tombstones: Tombstones  # of the store
    tabled: frozenset[int]  # parts that have tables; other chunks have no neighbours
    k: int

    def found(self, part: int, group: int, rows: int) -> Found:
        """Return the neighbours [rows, k] of all rows of a row group, including purged rows."""
        if part in self.tabled:
            found = self.reader.read(part, self.k, [group])
            if len(found.ids) == rows:
                return found
            raise self.store.corrupt(
                f"the neighbours {self.reader.name!r} of part {part} have {len(found.ids):,} rows, not {rows:,}"
            )
        return Found.nothing(rows, self.k)


def open_tables(store: Store, table: str | None = None, k: int | None = None) -> ExportedTables:
    """Open a neighbour table or mixture, for ``k`` neighbours per chunk; see ``export`` for the defaults.

    Raises ``UsageError`` if it, a database or k neighbours are missing, if a table is out of date, or if a
    database has another tokenizer or chunk length.
    """
    reader = NeighbourReader(store, table)
    k = reader.choose_k(k)
    check_same_tokens(store, reader.databases)
    tabled = reader.parts()
    for part in tabled:
        reader.entries(part)  # checks that the ids are still valid
    return ExportedTables(store, reader, stored_tokenizer(store), read_tombstones(store), frozenset(tabled), k)


@dataclass(frozen=True, slots=True)
class Block:
    """The n live chunks of a row group, with the ids and sources of their documents."""

    part: int
    ids: Ids
    doc: npt.NDArray[np.int32]
    documents: pa.ChunkedArray
    sources: pa.ChunkedArray
    index: npt.NDArray[np.int32]  # [n], positions in the documents
    tokens: npt.NDArray[Any]  # [n, chunk_length], zero-padded
    n_tokens: npt.NDArray[np.int32]  # [n]
    found: Found  # neighbours [n, k]
    pieces: Pieces  # their tokens and continuations [n · k]
    found_in: npt.NDArray[np.object_]  # ids of their documents [n · k]; None: no neighbour


def read_blocks(opened: ExportedTables) -> Iterator[Block]:
    """Yield all live chunks by ascending id, in blocks that are not empty."""
    store, k = opened.store, opened.k
    most = HELD_BYTES // (2 * k * store.identity.chunk_length * store.identity.tokenizer.token_bytes) - ROW_GROUP
    waiting, held = list[Block](), 0
    for part in store.state.parts():
        # Combined, as ``take`` copies all chunks of a column each time.
        documents = parts.read_documents(store, part, ["id", "source"]).combine_chunks()
        for group in range(-(-parts.part_entry(store, "chunks", part).rows // ROW_GROUP)):
            chunks = parts.read_chunks(store, part, [group])
            ids = parts.chunk_ids(part, group * ROW_GROUP + np.arange(len(chunks)))
            live = np.flatnonzero((chunks.n_tokens > 0) & ~opened.tombstones.contains(ids))
            if not len(live):
                continue
            found = opened.found(part, group, len(chunks))
            for rows in np.split(live, range(TEXTS // k, len(live), TEXTS // k)):
                named = documents.take(pa.array(chunks.doc[rows]))
                waiting.append(Block(
                    part, ids[rows], chunks.doc[rows], named["id"], named["source"], chunks.index[rows],
                    chunks.tokens[rows], chunks.n_tokens[rows], found.take(rows), Pieces.none(store, 0), np.array([]),
                ))  # fmt: skip
            held += len(live)
            if held > most:
                yield from _with_pieces(opened, waiting)
                waiting, held = [], 0
    if waiting:
        yield from _with_pieces(opened, waiting)


def _with_pieces(opened: ExportedTables, blocks: list[Block]) -> Iterator[Block]:
    every = [block.found for block in blocks]
    columns = ([one.ids, one.distances, one.databases] for one in every)
    found = Found(*map(np.concatenate, zip(*columns, strict=True)))
    pieces = opened.reader.pieces(found)
    wrong = (found.ids != NO_NEIGHBOUR) & (pieces.n_tokens[:, 0] == 0).reshape(found.ids.shape)
    if wrong.any():
        place = tuple(np.argwhere(wrong)[0])
        database, chunk = opened.reader.databases[found.databases[place]].place, format_id(int(found.ids[place]))
        raise CorruptError(
            f"the neighbours {opened.reader.name!r} name chunk {chunk}, which is not in {database}",
            f"Find out more: {command_line('verify', opened.store.place)}, then: {command_line('verify', database)}",
        )
    names = np.full(found.ids.size, None, np.object_)
    for number, database in enumerate(opened.reader.databases):
        here = found.databases.ravel() == number
        names[here] = read_document_ids(database, found.ids.ravel()[here])
    start = 0
    for block in blocks:
        some = slice(start, start + block.found.ids.size)
        yield replace(block, pieces=Pieces(pieces.tokens[some], pieces.n_tokens[some]), found_in=names[some])
        start = some.stop


def _schema(k: int, chunk_length: int, token: pa.DataType) -> pa.Schema:
    tokens = pa.list_(pa.list_(token, chunk_length), k)
    lengths, texts = pa.list_(pa.int32(), k), pa.list_(pa.string(), k)
    return pa.schema([
        ("chunk", pa.int64()), ("document", pa.string()), ("source", pa.string()), ("index", pa.int32()),
        ("text", pa.string()), ("tokens", pa.list_(token)),
        ("neighbours", pa.list_(pa.int64(), k)), ("distances", pa.list_(pa.float32(), k)),
        ("databases", pa.list_(pa.int16(), k)), ("neighbour_documents", texts),
        ("neighbour_text", texts), ("neighbour_tokens", tokens), ("neighbour_lengths", lengths),
        ("continuation_text", texts), ("continuation_tokens", tokens), ("continuation_lengths", lengths),
    ])  # fmt: skip


def _table(opened: ExportedTables, block: Block, schema: pa.Schema) -> pa.Table:
    ids = block.found.ids
    tokens = block.pieces.tokens.reshape(*ids.shape, 2, -1)
    lengths = block.pieces.n_tokens.reshape(*ids.shape, 2)
    databases = np.where(ids == NO_NEIGHBOUR, -1, block.found.databases.astype(np.int16))
    flat = block.pieces
    texts = [opened.tokenizer.decode_text(flat.tokens[:, piece], flat.n_tokens[:, piece]) for piece in (0, 1)]
    text, following = np.where(flat.n_tokens.T > 0, np.array(texts, np.object_), np.array(None))
    columns = [
        pa.array(block.ids), block.documents, block.sources, pa.array(block.index),
        opened.tokenizer.decode_text(block.tokens, block.n_tokens),
        _lists(block.tokens, block.n_tokens, schema.field("tokens").type),
        *(_fixed(values, schema.field(name).type) for name, values in (
            ("neighbours", ids), ("distances", block.found.distances), ("databases", databases),
            ("neighbour_documents", block.found_in),
            ("neighbour_text", text), ("neighbour_tokens", tokens[:, :, 0]), ("neighbour_lengths", lengths[:, :, 0]),
            ("continuation_text", following),
            ("continuation_tokens", tokens[:, :, 1]), ("continuation_lengths", lengths[:, :, 1]),
        )),
    ]  # fmt: skip
    return pa.table(columns, schema=schema)


def _fixed(values: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    sizes = []
    while pa.types.is_fixed_size_list(kind):
        sizes.append(kind.list_size)
        kind = kind.value_type
    array = pa.array(np.ascontiguousarray(values, kind.to_pandas_dtype()).reshape(-1), kind)
    for size in reversed(sizes):
        array = pa.FixedSizeListArray.from_arrays(array, size)
    return array


def _lists(tokens: npt.NDArray[Any], n_tokens: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    used = np.arange(tokens.shape[1]) < n_tokens[:, None]
    offsets = np.concatenate([[0], np.cumsum(n_tokens, dtype=np.int64)]).astype(np.int32)
    values = pa.array(tokens[used].astype(kind.value_type.to_pandas_dtype()))
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def write_export(opened: ExportedTables, folder: Path, report: Report) -> dict[str, int]:
    """Write ``part-<number>.parquet`` for each part with live chunks: zstd, with page checksums.

    Returns the counts that ``ExportResult`` has.
    """
    own = opened.store.identity
    columns = _schema(opened.k, own.chunk_length, pa.uint16() if own.tokenizer.token_bytes == 2 else pa.uint32())
    counts = dict.fromkeys(("chunks", "documents", "tokens", "neighbours", "without_neighbours"), 0)
    part, last, writer = -1, -1, cast(Any, None)
    with ExitStack() as files:
        for block in read_blocks(opened):
            path = folder / f"part-{block.part:06d}.parquet"
            if block.part != part:
                files.close()
                part, last = block.part, -1
                writer = files.enter_context(pq.ParquetWriter(path, columns, compression="zstd", **_SETTINGS))
            there = block.found.ids != NO_NEIGHBOUR
            counts["chunks"] += len(block.ids)
            counts["documents"] += int((np.diff(block.doc, prepend=last) != 0).sum())  # the first may be counted
            counts["tokens"] += int(block.n_tokens.sum())
            counts["neighbours"] += int(there.sum())
            counts["without_neighbours"] += int((~there.any(axis=1)).sum())
            last = int(block.doc[-1])
            table = _table(opened, block, columns)
            disk.announce("write", path)
            writer.write_table(table)
            report(table.num_rows)
    return counts


@dataclass(frozen=True, slots=True)
class ExportedDatabase:
    """A database of the neighbours; ``number`` is its value in the column ``databases``."""

    number: int
    table: str
    weight: float
    uuid: str
    commit: int


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What ``export`` wrote, see ``docs/json.md``."""

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
    without_neighbours: int
    bytes: int


def export(root: str | Path, output: str | Path, *, table: str | None = None, k: int | None = None) -> ExportResult:
    """Export all live chunks of a store, with ``k`` neighbours each, into the new folder ``output``.

    ``table`` is by default main, or the only one; ``k`` is by default the table's.
    """
    target = check_place("OUTPUT", output)
    store = Store.open(root)
    opened = open_tables(store, table, k)
    _check_complete(opened)
    rows = sum(parts.part_entry(store, "chunks", part).rows for part in store.state.parts())
    total = rows - len(opened.tombstones.ids)
    if not total:
        raise UsageError(f"{root} has no live chunks to export")
    with new_folder(target) as folder:
        with counting("export", "chunk", total) as report:
            counts = write_export(opened, folder, report)
        disk.write(folder / "tokenizer.json", store.tokenizer_json())
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
        databases = tuple(
            ExportedDatabase(number, member.table, member.weight, member.store.identity.uuid, member.store.state.number)
            for number, member in enumerate(opened.reader.members)
        )
        result = ExportResult(
            str(output), store.identity.uuid, store.state.number, opened.reader.name, opened.k,
            store.identity.chunk_length, databases, **counts, bytes=sum(files.values()),
        )  # fmt: skip
        tokenizer = store.identity.tokenizer
        about = {
            "tool": f"retrotool {version('retrotool')}", "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "tokenizer": {"name": tokenizer.name, "sha256": tokenizer.sha256, "vocabulary": tokenizer.vocabulary},
            "files": [{"name": name, "bytes": size} for name, size in files.items()],
        }  # fmt: skip
        shown = {key: value for key, value in asdict(result).items() if key not in ("output", "bytes")}
        disk.write(folder / "export.json", orjson.dumps({**shown, **about}, option=orjson.OPT_INDENT_2))
    return result


def _check_complete(opened: ExportedTables) -> None:
    """Raise ``UsageError`` if a part with live keys has no table, as its chunks would get no neighbours."""
    store = opened.store
    missing = [part for part in store.state.parts() if part not in opened.tabled]
    chunks = count_keys_of(store, missing, opened.tombstones)
    if not chunks:
        return
    commands = list[str]()
    for member in opened.reader.members:
        if set(missing).issubset(int(slot) for slot in store.state.group("neighbours", member.table)):
            continue
        record = store.state.records[f"neighbours:{member.table}"]
        if not set(missing).issubset(embedded_parts(store, str(record["encoder"]))):
            commands.append(embed_command(store, str(record["encoder"])))
        if member.within and record["index"]:  # else the new chunks are never found
            commands.append(command_line("index", store, name=str(record["index"])))
        commands.append(table_command(store, member.table, member.store))
    shown = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
    raise UsageError(
        f"{count(chunks, 'chunk')} of {store.place} {'has' if chunks == 1 else 'have'} no neighbours "
        f"{opened.reader.name!r} yet (part{'s' * (len(missing) > 1)} {shown})",
        "Compute them:\n" + "\n".join(f"  {command}" for command in dict.fromkeys(commands)),
    )
