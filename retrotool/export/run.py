"""``export neighbours``: a query store's neighbour tables, with all tokens, for tools that know nothing of stores.

The output is a folder that is whole or not there (``new_folder``). In it ``export.json`` tells what was exported of
what: stores and their commits, the table, k, tokens, counts and files. What is purged later stays in it; that file
tells how old an export is.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson
from tqdm import tqdm

from retrotool import interrupts
from retrotool.embed.counting import command_line, embed_command
from retrotool.embed.search_scope import count_living_keys
from retrotool.engine.task import Report
from retrotool.errors import UsageError
from retrotool.export.handover import Counts, Handover, open_handover
from retrotool.export.handover_retro import CHUNKS, KNN, PAD, SEQ, RetroWriter, tokens_of
from retrotool.export.handover_tables import write_parquet, write_saved_dataset
from retrotool.export.new_folder import check_place, new_folder
from retrotool.export.retro_rows import lay_out
from retrotool.index.exact import NO_INDEX
from retrotool.neighbours.stage import database_of, members_of
from retrotool.store import disk
from retrotool.store.store import Store

RETRO_PYTORCH, HUGGINGFACE, PARQUET = "retro-pytorch", "huggingface", "parquet"
FORMATS = (RETRO_PYTORCH, HUGGINGFACE, PARQUET)
MANIFEST = "export.json"
SCRIPT = "load.py"
SEQUENCE_LENGTH = 2048


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
    """What ``export neighbours`` wrote: living chunks, their documents and tokens, pairs of a chunk and a neighbour.

    ``alone`` chunks have no neighbour. ``details`` are what a reader of the format must know; ``load`` is Python that
    opens it.
    """

    output: str
    format: str
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
    details: dict[str, Any] = field(default_factory=dict)
    load: str = ""


def export_neighbours(
    root: str | Path,
    output: str | Path,
    *,
    format: str,  # noqa: A002
    name: str = "main",
    k: int | None = None,
    sequence_length: int | None = None,
) -> ExportResult:
    """Export the neighbours ``name`` of all living chunks of the store ``root`` into the new folder ``output``.

    ``k`` neighbours a chunk (default: the table's own); ``sequence_length`` in tokens, for RETRO-pytorch alone.
    """
    if format not in FORMATS:
        raise UsageError(f"--format {format} is none of {', '.join(FORMATS)}")
    if sequence_length is not None and format != RETRO_PYTORCH:
        raise UsageError(f"--sequence-length is for {RETRO_PYTORCH}: other formats have no sequences")
    target = check_place("OUTPUT", output)
    store = Store.open(root)
    handover = open_handover(store, name, k)
    for one in (store, *handover.reader.databases):
        if target.is_relative_to(one.root.resolve()):
            raise UsageError(f"OUTPUT {output} lies in the store {one.root}", "Name a folder outside of it.")
    length = store.identity.chunk_length
    seq_chunks, rest = divmod(SEQUENCE_LENGTH if sequence_length is None else sequence_length, length)
    if format == RETRO_PYTORCH and (seq_chunks < 1 or rest):
        raise UsageError(f"--sequence-length {sequence_length} is no multiple of the {length} tokens of a chunk")
    _check_complete(handover, root)
    if not handover.total():
        raise UsageError(f"{root} has no chunk that is not purged: there is nothing to export")
    with new_folder(target) as folder:
        if format == RETRO_PYTORCH:
            counts, details, load = _retro_pytorch(handover, folder, seq_chunks)
        else:
            counts, details, load = _tables(handover, folder, format)
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
        result = ExportResult(
            str(output), format, store.identity.uuid, store.state.number, name, handover.k, length,
            _databases(handover), counts.chunks, counts.documents, counts.tokens, counts.neighbours, counts.alone,
            sum(files.values()), details, load.format(folder=str(output), files=str(Path(output) / "*.parquet")),
        )  # fmt: skip
        disk.write(folder / MANIFEST, _manifest(result, store, files))
    return result


def _databases(handover: Handover) -> tuple[ExportedDatabase, ...]:
    members = members_of(handover.store, handover.reader.name)
    return tuple(
        ExportedDatabase(number, table, weight, database.identity.uuid, database.state.number)
        for number, ((table, weight), database) in enumerate(zip(members, handover.reader.databases, strict=True))
    )


def _manifest(result: ExportResult, store: Store, files: dict[str, int]) -> bytes:
    """All of the result but where it lay and how it is opened there; and when, by what, of which tokenizer."""
    told = {key: value for key, value in asdict(result).items() if key not in ("output", "load", "bytes")}
    tokenizer = store.identity.tokenizer
    about = {
        "tool": f"retrotool {version('retrotool')}", "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "tokenizer": {"name": tokenizer.name, "sha256": tokenizer.sha256, "vocabulary": tokenizer.vocabulary},
        "files": [{"name": name, "bytes": size} for name, size in files.items()],
    }  # fmt: skip
    return orjson.dumps({**told, **about}, option=orjson.OPT_INDENT_2)


def _check_complete(handover: Handover, root: str | Path) -> None:
    """``UsageError`` if some chunks that could have neighbours have no table yet: they would seem to have none."""
    store = handover.store
    missing = [part for part in store.state.parts() if part not in handover.tabled]
    chunks = sum(count_living_keys(store, part, handover.tombstones) for part in missing)
    if chunks:
        name = handover.reader.name
        raise UsageError(
            f"{chunks:,} chunks of {root} have no neighbours {name!r} yet: those of parts {_few(missing)}",
            "Compute them: " + ", then: ".join(_commands(handover, root, missing)),
        )


def _few(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return shown if len(numbers) <= 8 else f"{shown} and {len(numbers) - 8} more"


def _commands(handover: Handover, root: str | Path, missing: Sequence[int]) -> Iterator[str]:
    """The commands that give the missing parts their tables."""
    store = handover.store
    embedded = set[str]()
    for table, _ in members_of(store, handover.reader.name):
        database, record = database_of(store, table)
        tabled = {int(slot) for slot in store.state.group("neighbours", table)}
        if tabled.issuperset(missing):
            continue
        encoder = str(record["encoder"])
        vectors = {int(slot) for slot in store.state.group("embeddings", encoder)}
        if encoder not in embedded and not vectors.issuperset(missing):
            yield embed_command(store, root, encoder)
            embedded.add(encoder)
        exact = record["index"] == NO_INDEX
        several = exact and len(database.state.names("embeddings")) > 1
        line = command_line(
            "neighbours",
            root if database is store else record["path"],
            queries=None if database is store else root,
            name=table,
            k=record["k"],
            saved=record["saved"],
            index=None if exact else record["index"],
            encoder=encoder if several else None,
        )
        yield f"{line} --exact" if exact else line


@contextmanager
def _progress(doing: str, total: int) -> Iterator[Report]:
    with tqdm(total=total, unit="chunk", desc=doing, disable=None, delay=2, file=sys.stderr) as bar:

        def told(n: int) -> None:
            interrupts.check()
            bar.update(n)

        yield told


_Written = tuple[Counts, dict[str, Any], str]
"""What was written, what its reader must know, and code that opens it in ``{folder}``."""


def _tables(handover: Handover, folder: Path, format: str) -> _Written:  # noqa: A002
    with _progress("export", handover.total()) as report:
        if format == PARQUET:
            counts, names = write_parquet(handover, folder, report)
            return counts, {"files": len(names)}, _LOAD_PARQUET
        counts, names = write_saved_dataset(handover, folder, report, _fingerprint(handover))
        return counts, {"files": len(names)}, _LOAD_HUGGINGFACE


def _fingerprint(handover: Handover) -> str:
    """Stands for what is exported: the same stores at the same commits, table and k give the same."""
    stores = [(store.identity.uuid, store.state.head) for store in (handover.store, *handover.reader.databases)]
    told = repr((stores, members_of(handover.store, handover.reader.name), handover.k))
    return hashlib.blake2b(told.encode(), digest_size=8).hexdigest()


def _retro_pytorch(handover: Handover, folder: Path, seq_chunks: int) -> _Written:
    length = handover.store.identity.chunk_length
    tokens = tokens_of(handover.store)
    with _progress("number", handover.total()) as report:
        layout = lay_out(handover, seq_chunks, report)
    writer = RetroWriter(handover, layout, tokens, seq_chunks)
    with _progress("export", sum(section.chunks for section in layout.sections)) as report:
        writer.write(folder, report)
    arguments = {
        "num_chunks": layout.rows, "chunk_size": length, "seq_len": seq_chunks * length,
        "num_sequences": writer.sequences, "num_neighbors": handover.k, "eos_id": tokens.end, "pad_id": PAD,
    }  # fmt: skip
    paths = {"chunk_memmap_path": CHUNKS, "chunk_nn_memmap_path": KNN, "seq_memmap_path": SEQ}
    details = {
        "arguments": {**arguments, **paths}, "num_tokens": tokens.total, "token_shift": tokens.shift,
        "query_rows": layout.queries.rows, "database_chunks": sum(section.chunks for section in layout.sections[1:]),
        "documents_with_databases": writer.documents,
    }  # fmt: skip
    script = _retro_script(details)
    disk.write(folder / SCRIPT, script.format(folder="Path(__file__).resolve().parent").encode())
    return writer.counts, details, script.format(folder="Path({folder!r})")


def _retro_script(details: dict[str, Any]) -> str:
    given = details["arguments"]
    values = [f'folder / "{value}"' if name.endswith("_path") else value for name, value in given.items()]
    return "\n".join([
        "from pathlib import Path",
        "",
        "from retro_pytorch import RETRODataset",
        "",
        "folder = {folder}",
        "dataset = RETRODataset(",
        *(f"    {name}={value}," for name, value in zip(given, values, strict=True)),
        ")",
        f"# For a model such as: RETRO(num_tokens={details['num_tokens']}, chunk_size={given['chunk_size']}, "
        f"max_seq_len={given['seq_len']}, pad_id={PAD})",
        "",
    ])  # fmt: skip


_LOAD_HUGGINGFACE = """\
import datasets

dataset = datasets.load_from_disk({folder!r})
"""
_LOAD_PARQUET = """\
import polars

chunks = polars.scan_parquet({files!r})
"""
