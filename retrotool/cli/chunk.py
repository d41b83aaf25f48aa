"""``retrotool chunk``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from retrotool.cli import output
from retrotool.cli.options import Json, StoreArgument
from retrotool.errors import EXIT_SET_ASIDE

if TYPE_CHECKING:
    from retrotool.commands.chunking import ChunkResult

EPILOG = """\b
Examples:
  retrotool chunk store corpus/*.jsonl.zst
  retrotool chunk store papers.parquet --text-field body --id-field doi --keep year

Exit codes: 0 done, 3 done with input set aside, 2 usage, 11 lost a race, 12 corrupt."""


def command(
    store: StoreArgument,
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help=".jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt, or folders of them.",
            show_default=False,
        ),
    ],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="T",
            help="A tokenizer.json, a model directory, or a hub name. Default: the store's; of a new store, minilm's.",
        ),
    ] = None,
    chunk_length: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens a chunk. Default: the store's; of a new store, 64.")
    ] = None,
    text_field: Annotated[str, typer.Option(metavar="F", help="Field that holds the text.")] = "text",
    id_field: Annotated[
        str, typer.Option(metavar="F", help="Field that holds the document's id; without one, a hash of the text.")
    ] = "id",
    keep: Annotated[
        list[str] | None, typer.Option(metavar="F", help="Field to keep as a column of documents; may be repeated.")
    ] = None,
    part_size: Annotated[int, typer.Option(metavar="N", help="Chunks after which a part is closed.")] = 1 << 20,
    workers: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Worker processes. Default: one a core.")
    ] = None,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Give up inputs of an interrupted run that are gone or changed.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Cut a corpus into chunks of 64 tokens, in Parquet.

    Makes the store if there is none, else adds to it; inputs that the store has already are skipped. What can't be
    read is set aside with file, line and reason. The result is the same whatever the number of workers, kills and
    resumes.
    """
    with output.errors(as_json):
        from retrotool import commands
        from retrotool.sources import Fields

        fields = Fields(text_field, id_field, tuple(keep or ()))
        result = commands.chunk(
            store, inputs, tokenizer=tokenizer, chunk_length=chunk_length, fields=fields, part_size=part_size,
            workers=workers or os.cpu_count() or 1, skip_missing=skip_missing,
        )  # fmt: skip
        output.show(result, as_json, _text)
        if result.set_aside:
            raise typer.Exit(EXIT_SET_ASIDE)


def _text(result: ChunkResult) -> str:
    lines = []
    if result.known_inputs:
        lines.append(f"{output.count(result.known_inputs, 'input')} skipped: in the store already.")
    if result.parts or not result.known_inputs:
        lines.append(
            f"{output.count(result.documents, 'document')}, {output.count(result.chunks, 'chunk')}, "
            f"{output.count(result.tokens, 'token')} in {output.count(result.parts, 'part')} (commit {result.commit})."
        )
    if result.set_aside:
        lines.append(f"{output.count(result.set_aside, 'row')} set aside:")
        rows = [
            (r.rows, r.reason, f"first: {r.input}" + (f", line {r.line:,}" if r.line else ""))
            for r in result.reasons[:10]
        ]
        lines.append(output.table(rows))
        if len(result.reasons) > 10:
            lines.append(f"  and {len(result.reasons) - 10:,} other reasons, in the store's quarantine/ files.")
    return "\n".join(lines)
