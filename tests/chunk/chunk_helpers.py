"""What the tests of ``chunk`` share: inputs in every format, the command in this process, and what is in a store."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from click.testing import Result
from stored import path_in_store, stored_files
from typer.testing import CliRunner

from retrotool import api
from retrotool.app import app
from retrotool.info.verify import Verification
from retrotool.store import parts
from retrotool.store.paths import DATA_KINDS
from retrotool.store.store import Store
from retrotool.store.sums import with_sums

LINE_FORMATS = ("jsonl", "jsonl.gz", "jsonl.zst")
TABLE_FORMATS = (*LINE_FORMATS, "parquet")
FORMATS = (*TABLE_FORMATS, "txt")

Row = dict[str, Any]


def as_line(row: Row | bytes) -> bytes:
    return row if isinstance(row, bytes) else json.dumps(row).encode()


def pack(data: bytes, name: str) -> bytes:
    """``data`` compressed as the name asks for."""
    if name.endswith(".gz"):
        return gzip.compress(data)
    return zstandard.compress(data) if name.endswith(".zst") else data


def write_rows(path: Path, rows: Sequence[Row | bytes]) -> Path:
    """Rows, or for formats of lines also raw lines, as a file of the format that the name asks for."""
    if path.name.endswith(".parquet"):
        names = dict.fromkeys(name for row in rows for name in row)
        table = pa.table({name: [row.get(name) for row in rows] for name in names})
        pq.write_table(table, path, row_group_size=100, write_page_checksum=True, use_dictionary=False)
    else:
        path.write_bytes(pack(b"".join(as_line(row) + b"\n" for row in rows), path.name))
    return path


def run_cli(*arguments: object) -> Result:
    """A command in this process; an error that is no error of ours is raised here."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def run_chunk(store: Path, *arguments: object) -> Result:
    return run_cli("chunk", store, *arguments, "--workers", 1)


def verified(store: Path) -> Verification:
    """The verification of a store, which must be fine and hold no left-overs of runs."""
    found = api.verify(store)
    assert found.problems == []
    left = [str(file) for folder in ("staging", "leases") for file in stored_files(store, f"{folder}/*")]
    left += unnamed_files(store)
    assert not left, left
    return found


def unnamed_files(store: Path) -> list[str]:
    """Data files that no commit names, as units leave them that are not committed."""
    live = {path for entry in Store.open(store).state.files() for path in with_sums(entry.path)}
    there = (path_in_store(store, file) for kind in DATA_KINDS for file in stored_files(store, f"{kind}/*.*"))
    return sorted(set(there) - live)


def quarantine(store: Path) -> list[tuple[str, int, str]]:
    """(input, line, reason) of every row that was rejected."""
    opened = Store.open(store)
    group = opened.state.group("quarantine")
    tables = [parts.read_parquet(opened, entry) for slot in group if (entry := group.get(slot)) is not None]
    return sorted((row["input"], row["line"], row["reason"]) for table in tables for row in table.to_pylist())


def documents(store: Path) -> list[Row]:
    """All rows of the documents files, in order of chunk ids; duplicates and those of pending parts included."""
    opened = Store.open(store)
    return [row for part in opened.state.all_parts() for row in parts.read_documents(opened, part).to_pylist()]
