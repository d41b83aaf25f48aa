"""``export``: a query store's chunks and neighbours, with text and tokens, for tools that know nothing of stores.

The output is a folder that is whole or not there (``atomic_dir``): Parquet files, the tokenizer as ``tokenizer.json``,
and ``export.json``, which has what was exported of what: stores and their commits, the table, k, counts and files. What
is purged later stays in an export; the commits say how old it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import orjson

from retrotool.cli.command_lines import embed_command, table_command
from retrotool.embed.search_scope import count_living_keys
from retrotool.engine.progress import counting
from retrotool.errors import UsageError
from retrotool.export.atomic_dir import check_place, new_folder
from retrotool.export.tables import ExportedTables, open_tables, write_export
from retrotool.neighbours.stage import database_of, members_of
from retrotool.store import disk
from retrotool.store.store import Store

MANIFEST, TOKENIZER = "export.json", "tokenizer.json"


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
    for one in (store, *opened.reader.databases):
        if target.is_relative_to(one.root.resolve()):
            raise UsageError(f"OUTPUT {output} is in the store {one.root}", "Name a folder outside of it.")
    _check_complete(opened, root)
    total = opened.total()
    if not total:
        raise UsageError(f"{root} has no chunk that is not purged: there is nothing to export")
    with new_folder(target) as folder:
        with counting("export", "chunk", total) as report:
            counts = write_export(opened, folder, report)
        disk.write(folder / TOKENIZER, store.tokenizer_json())
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
        result = ExportResult(
            str(output), store.identity.uuid, store.state.number, name, opened.k, store.identity.chunk_length,
            _databases(opened), counts.chunks, counts.documents, counts.tokens, counts.neighbours, counts.alone,
            sum(files.values()),
        )  # fmt: skip
        disk.write(folder / MANIFEST, _manifest(result, store, files))
    return result


def _databases(opened: ExportedTables) -> tuple[ExportedDatabase, ...]:
    members = members_of(opened.store, opened.reader.name)
    return tuple(
        ExportedDatabase(number, table, weight, database.identity.uuid, database.state.number)
        for number, ((table, weight), database) in enumerate(zip(members, opened.reader.databases, strict=True))
    )


def _manifest(result: ExportResult, store: Store, files: dict[str, int]) -> bytes:
    tokenizer = store.identity.tokenizer
    about = {
        "tool": f"retrotool {version('retrotool')}", "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "tokenizer": {"name": tokenizer.name, "sha256": tokenizer.sha256, "vocabulary": tokenizer.vocabulary},
        "files": [{"name": name, "bytes": size} for name, size in files.items()],
    }  # fmt: skip
    shown = {key: value for key, value in asdict(result).items() if key not in ("output", "bytes")}
    return orjson.dumps({**shown, **about}, option=orjson.OPT_INDENT_2)


def _check_complete(opened: ExportedTables, root: str | Path) -> None:
    """``UsageError`` if some chunks that could have neighbours have no table yet: they would seem to have none."""
    store = opened.store
    missing = [part for part in store.state.parts() if part not in opened.tabled]
    chunks = sum(count_living_keys(store, part, opened.tombstones) for part in missing)
    if chunks:
        name = opened.reader.name
        raise UsageError(
            f"{chunks:,} chunks of {root} have no neighbours {name!r} yet: those of parts {_few(missing)}",
            "Compute them: " + ", then: ".join(_commands(opened, root, missing)),
        )


def _few(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return shown if len(numbers) <= 8 else f"{shown} and {len(numbers) - 8} more"


def _commands(opened: ExportedTables, root: str | Path, missing: Sequence[int]) -> Iterator[str]:
    """Yield the commands that give the missing parts their tables."""
    store, embedded = opened.store, set[str]()
    for table, _ in members_of(store, opened.reader.name):
        tabled = {int(slot) for slot in store.state.group("neighbours", table)}
        if tabled.issuperset(missing):
            continue
        database, record = database_of(store, table)
        encoder = str(record["encoder"])
        vectors = {int(slot) for slot in store.state.group("embeddings", encoder)}
        if encoder not in embedded and not vectors.issuperset(missing):
            yield embed_command(store, root, encoder)
            embedded.add(encoder)
        yield table_command(store, table, database)
