"""``retrotool export neighbours``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retrotool.cli import output
from retrotool.cli.options import Json, StoreArgument

if TYPE_CHECKING:
    from retrotool.export.run import ExportResult

EPILOG = """\b
Examples:
  retrotool export neighbours store for-datasets --format huggingface
  retrotool export neighbours training for-duckdb --format parquet --name wiki -k 10
  retrotool export neighbours store for-retro --format retro-pytorch --sequence-length 1024"""


def command(
    store: StoreArgument,
    folder: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="Folder to make; it is whole, or not there.", show_default=False)
    ],
    format: Annotated[  # noqa: A002
        str,
        typer.Option(metavar="FORMAT", help="retro-pytorch, huggingface or parquet.", show_default=False),
    ],
    name: Annotated[str, typer.Option(metavar="TABLE", help="Which neighbour tables of the store.")] = "main",
    k: Annotated[
        int | None, typer.Option("-k", metavar="K", help="Neighbours a chunk.  [default: what the table gives]")
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(metavar="N", help="Tokens of a sequence, for retro-pytorch.  [default: 2048]"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Export the chunks of a store with their neighbours, tokens and all, for other tools.

    STORE is the query store, whose chunks are trained on; its tables know their databases. huggingface: a dataset
    that load_from_disk opens. parquet: a file a part. Both have a row a chunk. retro-pytorch: the files of
    RETRODataset, in which the chunks of databases stand behind those of STORE. What is purged is left out; a purge
    that comes later does not reach what was exported.
    """
    with output.errors(as_json):
        from retrotool.export import run as export_run

        result = export_run.export_neighbours(
            store, folder, format=format, name=name, k=k, sequence_length=sequence_length
        )
        output.show(result, as_json, _text)


def _text(result: ExportResult) -> str:
    lines = [
        f"{output.count(result.chunks, 'chunk')} of {output.count(result.documents, 'document')} with "
        f"{output.count(result.neighbours, 'neighbour')} ({result.table!r}, at most {result.k} a chunk, "
        f"commit {result.commit}) in {result.output}: {result.format}, {output.size(result.bytes)}."
    ]
    if result.alone:
        lines.append(f"{output.count(result.alone, 'chunk')} without a neighbour.")
    lines += ["Open it with:", *(f"  {line}".rstrip() for line in result.load.splitlines())]
    return "\n".join(lines)
