"""``retrotool export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from retrotool.cli import output
from retrotool.cli.options import Json, StoreArgument, TableOption, arg, opt

if TYPE_CHECKING:
    from retrotool.export.run import ExportResult

EPILOG = """\b
Examples:
  retrotool export store exported
  retrotool export training for-duckdb --table wiki -k 10"""


def command(
    store: StoreArgument,
    folder: Annotated[Path, arg("Folder to create. It appears only once it is complete.", metavar="OUTPUT")],
    table: TableOption = None,
    k: Annotated[int | None, opt("Neighbours per chunk.  [default: the table's k]", "-k", metavar="K")] = None,
    as_json: Json = False,
) -> None:
    """Export the chunks of a store with their neighbours, text and tokens, as Parquet for other tools.

    STORE is the query store; its tables name their databases. OUTPUT gets a Parquet file per part with a row
    per chunk, the tokenizer, and export.json, which records what was exported and from which commit. Purged
    chunks are left out; later purges do not reach an export.
    """
    from retrotool.export import run as export_run

    output.show(export_run.export(store, folder, table=table, k=k), as_json, _text)


def _text(result: ExportResult) -> str:
    lines = [
        f"{output.count(result.chunks, 'chunk')} of {output.count(result.documents, 'document')} with "
        f"{output.count(result.neighbours, 'neighbour')} ({result.table!r}, at most {result.k} a chunk, "
        f"commit {result.commit}) in {result.output}: {output.size(result.bytes)}."
    ]
    if result.without_neighbours:
        lines.append(f"{output.count(result.without_neighbours, 'chunk')} without neighbours.")
    folder, files = repr(result.output), repr(str(Path(result.output) / "*.parquet"))
    lines += ["Open it with one of:", f"  duckdb.read_parquet({files})", f"  polars.scan_parquet({files})"]
    lines.append(f"  pyarrow.dataset.dataset({folder}, exclude_invalid_files=True)")
    lines.append(f"  datasets.load_dataset('parquet', data_files={files}, split='train')")
    return "\n".join(lines)
