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
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from retrotool.cli.command_lines import command_line, table_command
from retrotool.cli.output import count
from retrotool.cli.result_files import check_place, new_folder
from retrotool.embed.search_scope import count_keys_of
from retrotool.engine.progress import counting
from retrotool.engine.task import Report
from retrotool.errors import CorruptError, UsageError, listed
from retrotool.index.searching import commands_to_index
from retrotool.neighbours.retrieved import Pieces, read_document_ids
from retrotool.neighbours.table_reader import Found, NeighbourReader, check_same_tokens
from retrotool.ranges import runs_up_to
from retrotool.store import disk, parts
from retrotool.store.neighbour_tables import NO_NEIGHBOUR
from retrotool.store.parts import ROW_GROUP, Chunks, Ids, format_id
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones, read_tombstones
from retrotool.tokenizers import Tokenizer, stored_tokenizer

HELD_BYTES = 128 << 20  # bytes of neighbour tokens that are looked up at once
TEXTS = 10 * ROW_GROUP  # neighbours of a row group, whose text is decoded at once
_REPEATED = ["document", "source", "neighbour_documents.list.element"]
_SETTINGS: dict[str, Any] = {"use_dictionary": _REPEATED, "write_page_checksum": True, "write_page_index": True}


def open_tables(store: Store, table: str | None = None, k: int | None = None) -> tuple[NeighbourReader, int]:
    """Open a neighbour table or mixture, for ``k`` neighbours per chunk; see ``export`` for the defaults.

    Raises ``UsageError`` if it, a database or k neighbours are missing, if a table is out of date, or if a
    database has another tokenizer or chunk length.
    """
    reader = NeighbourReader(store, table)
    k = reader.choose_k(k)
    check_same_tokens(store, reader.databases)
    for part in reader.parts():
        reader.entries(part)  # checks that the ids are still valid
    return reader, k


@dataclass(frozen=True, slots=True)
class Block:
    """The n live chunks ``rows`` of a row group, with the ids and sources of their documents."""

    ids: Ids
    rows: Ids
    chunks: Chunks
    documents: pa.Table
    found: Found  # neighbours [n, k]


def read_blocks(reader: NeighbourReader, k: int) -> Iterator[tuple[Block, Pieces, npt.NDArray[np.object_]]]:
    """Yield all live chunks by ascending id, in blocks that are not empty.

    With each come the tokens of its neighbours and their continuations [n · k], and the ids of the
    neighbours' documents [n · k], None without a neighbour.
    """
    own = reader.store.identity
    most = HELD_BYTES // (2 * k * own.chunk_length * own.tokenizer.token_bytes)
    for blocks in runs_up_to(most, _live_blocks(reader, k), lambda block: len(block.rows)):
        found = Found.joined([block.found for block in blocks])
        pieces = reader.pieces(found)
        wrong = (found.ids != NO_NEIGHBOUR) & (pieces.n_tokens[:, 0] == 0).reshape(found.ids.shape)
        if wrong.any():
            place = tuple(np.argwhere(wrong)[0])
            database, chunk = reader.databases[found.databases[place]].place, format_id(int(found.ids[place]))
            verify = ", then: ".join(command_line("verify", root) for root in (reader.store.place, database))
            what = f"the neighbours {reader.name!r} name chunk {chunk}, which is not in {database}"
            raise CorruptError(what, f"Find out more: {verify}")
        names = np.full(found.ids.size, None, np.object_)
        for number, database in enumerate(reader.databases):
            here = found.databases.ravel() == number
            names[here] = read_document_ids(database, found.ids.ravel()[here])
        start = 0
        for block in blocks:
            some = slice(start, start + block.found.ids.size)
            yield block, Pieces(pieces.tokens[some], pieces.n_tokens[some]), names[some]
            start = some.stop


def _live_blocks(reader: NeighbourReader, k: int) -> Iterator[Block]:
    store = reader.store
    tombstones, tabled = read_tombstones(store), frozenset(reader.parts())  # chunks of other parts have no neighbours
    for part in store.state.parts():
        # Combined, as ``take`` copies all chunks of a column each time.
        documents = parts.read_documents(store, part, ["id", "source"]).combine_chunks()
        for group in range(-(-parts.part_entry(store, "chunks", part).rows // ROW_GROUP)):
            chunks = parts.read_chunks(store, part, [group])
            ids = parts.chunk_ids(part, group * ROW_GROUP + np.arange(len(chunks)))
            live = np.flatnonzero((chunks.n_tokens > 0) & ~tombstones.contains(ids))
            if not len(live):
                continue
            found = reader.read(part, k, [group]) if part in tabled else Found.nothing(len(ids), k)
            if len(found.ids) != len(ids):
                of = f"the neighbours {reader.name!r} of part {part}"
                raise store.corrupt(f"{of} have {len(found.ids):,} rows, not {len(ids):,}")
            for rows in np.split(live, range(TEXTS // k, len(live), TEXTS // k)):
                named = documents.take(pa.array(chunks.doc[rows]))
                yield Block(ids[rows], rows, chunks, named, found.take(rows))


def _table(block: Block, pieces: Pieces, names: npt.NDArray[np.object_], tokenizer: Tokenizer) -> pa.Table:
    """Return the rows of a block in the columns of an export."""
    ids, chunks, rows = block.found.ids, block.chunks, block.rows
    tokens, n_tokens = chunks.tokens[rows], chunks.n_tokens[rows]
    near = {}
    for piece, name in enumerate(("neighbour", "continuation")):
        lengths = pieces.n_tokens[:, piece]
        decoded = tokenizer.decode_text(pieces.tokens[:, piece], lengths)
        text = np.where(lengths > 0, np.array(decoded, np.object_), np.array(None))
        near[f"{name}_text"] = _fixed(text.reshape(ids.shape), pa.string())
        near[f"{name}_tokens"] = _fixed(pieces.tokens[:, piece].reshape(*ids.shape, -1))
        near[f"{name}_lengths"] = _fixed(lengths.astype(np.int32).reshape(ids.shape))
    offsets = np.concatenate([[0], np.cumsum(n_tokens, dtype=np.int64)]).astype(np.int32)
    used = tokens[np.arange(tokens.shape[1]) < n_tokens[:, None]]
    return pa.table({
        "chunk": block.ids, "document": block.documents["id"], "source": block.documents["source"],
        "index": chunks.index[rows], "text": pa.array(tokenizer.decode_text(tokens, n_tokens), pa.string()),
        "tokens": pa.ListArray.from_arrays(pa.array(offsets), pa.array(used)),
        "neighbours": _fixed(ids), "distances": _fixed(block.found.distances),
        "databases": _fixed(np.where(ids == NO_NEIGHBOUR, -1, block.found.databases.astype(np.int16))),
        "neighbour_documents": _fixed(names.reshape(ids.shape), pa.string()), **near,
    })  # fmt: skip


def _fixed(values: npt.NDArray[Any], kind: pa.DataType | None = None) -> pa.Array:
    """Return values [n, k, ...] as n lists of fixed sizes."""
    array = pa.array(np.ascontiguousarray(values).reshape(-1), kind)
    for size in reversed(values.shape[1:]):
        array = pa.FixedSizeListArray.from_arrays(array, size)
    return array


def write_export(reader: NeighbourReader, k: int, folder: Path, report: Report) -> dict[str, int]:
    """Write ``part-<number>.parquet`` for each part with live chunks: zstd, with page checksums.

    Returns the counts that ``ExportResult`` has.
    """
    tokenizer = stored_tokenizer(reader.store)
    counts = dict.fromkeys(("chunks", "documents", "tokens", "neighbours", "without_neighbours"), 0)
    part, last, writer = -1, -1, cast(Any, None)
    with ExitStack() as files:
        for block, pieces, names in read_blocks(reader, k):
            table, chunks = _table(block, pieces, names, tokenizer), block.chunks
            path = folder / f"part-{chunks.part:06d}.parquet"
            if chunks.part != part:
                files.close()
                part, last = chunks.part, -1
                writer = files.enter_context(pq.ParquetWriter(path, table.schema, compression="zstd", **_SETTINGS))
            there, doc = block.found.ids != NO_NEIGHBOUR, chunks.doc[block.rows]
            counts["chunks"] += len(doc)
            counts["documents"] += int((np.diff(doc, prepend=last) != 0).sum())  # the first may be counted
            counts["tokens"] += int(chunks.n_tokens[block.rows].sum())
            counts["neighbours"] += int(there.sum())
            counts["without_neighbours"] += int((~there.any(axis=1)).sum())
            last = int(doc[-1])
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
    reader, k = open_tables(store, table, k)
    tombstones = read_tombstones(store)
    _check_complete(reader, tombstones)
    total = sum(parts.part_entry(store, "chunks", part).rows for part in store.state.parts()) - len(tombstones)
    if not total:
        raise UsageError(f"{root} has no live chunks to export")
    with new_folder(target) as folder:
        with counting("export", "chunk", total) as report:
            counts = write_export(reader, k, folder, report)
        disk.write(folder / "tokenizer.json", store.tokenizer_json())
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
        databases = tuple(
            ExportedDatabase(number, member.table, member.weight, member.store.identity.uuid, member.store.state.number)
            for number, member in enumerate(reader.members)
        )
        result = ExportResult(
            str(output), store.identity.uuid, store.state.number, reader.name, k,
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


def _check_complete(reader: NeighbourReader, tombstones: Tombstones) -> None:
    """Raise ``UsageError`` if a part with live keys has no table, as its chunks would get no neighbours."""
    store = reader.store
    missing = sorted(set(store.state.parts()) - set(reader.parts()))
    chunks = count_keys_of(store, missing, tombstones)
    if not chunks:
        return
    commands = list[str]()
    for member in reader.members:
        if not set(missing).issubset(int(slot) for slot in store.state.group("neighbours", member.table)):
            record = store.state.records[f"neighbours:{member.table}"]
            index = str(record["index"]) if member.within else ""  # else the new chunks are never found
            commands += commands_to_index(store, str(record["encoder"]), index or None)
            commands.append(table_command(store, member.table, member.store))
    raise UsageError(
        f"{count(chunks, 'chunk')} of {store.place} {'has' if chunks == 1 else 'have'} no neighbours "
        f"{reader.name!r} yet (part{'s' * (len(missing) > 1)} {listed(missing[:8], len(missing))})",
        "Compute them:\n" + "\n".join(f"  {command}" for command in dict.fromkeys(commands)),
    )
