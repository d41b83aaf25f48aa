"""``retrotool export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from retrotool.cli import output
from retrotool.cli.options import Json, StoreArgument, arg, opt

if TYPE_CHECKING:
    from retrotool.export.run import ExportResult

EPILOG = """\b
Examples:
  retrotool export store exported
  retrotool export training for-duckdb --name wiki -k 10"""


def command(
    store: StoreArgument,
    folder: Annotated[Path, arg("Folder to make; it is whole, or not there.", metavar="OUTPUT")],
    name: Annotated[str, opt("Which neighbour tables of the store.", metavar="TABLE")] = "main",
    k: Annotated[int | None, opt("Neighbours a chunk.  [default: what the table gives]", "-k", metavar="K")] = None,
    as_json: Json = False,
) -> None:
    """Export the chunks of a store with their neighbours, text and tokens, as Parquet for other tools.

    STORE is the query store, whose chunks are trained on; its tables know their databases. OUTPUT gets a file a part,
    with a row a chunk, the tokenizer, and export.json, which says what was exported of which commit. What is purged is
    left out; a purge that comes later does not reach what was exported.
    """
    with output.errors(as_json):
        from retrotool.export import run as export_run

        output.show(export_run.export(store, folder, name=name, k=k), as_json, _text)


def _text(result: ExportResult) -> str:
    lines = [
        f"{output.count(result.chunks, 'chunk')} of {output.count(result.documents, 'document')} with "
        f"{output.count(result.neighbours, 'neighbour')} ({result.table!r}, at most {result.k} a chunk, "
        f"commit {result.commit}) in {result.output}: {output.size(result.bytes)}."
    ]
    if result.alone:
        lines.append(f"{output.count(result.alone, 'chunk')} without a neighbour.")
    lines.append(f"Open it with: polars.scan_parquet({str(Path(result.output) / '*.parquet')!r})")
    return "\n".join(lines)
