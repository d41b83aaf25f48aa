"""``retrotool build``."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from retrotool.cli import output
from retrotool.cli.options import DevicesOption, Json, ScratchOption, StoreArgument, WorkersOption, arg, opt
from retrotool.errors import EXIT_REJECTED
from retrotool.scratch import use_scratch

if TYPE_CHECKING:
    from retrotool.build.run import Step

EPILOG = """\b
Examples:
  retrotool build store corpus/
  retrotool build store
  retrotool build store papers.parquet --text-field body --id-field doi --existing replace

Exit codes: as those of chunk."""


def command(
    store: StoreArgument,
    inputs: Annotated[
        list[str] | None, arg("Files, folders, patterns or URIs to add; - is standard input.", metavar="[INPUT]...")
    ] = None,
    tokenizer: Annotated[str | None, opt("As for chunk; only for a new store.", metavar="T")] = None,
    encoder: Annotated[
        str | None, opt("As for embed; only for a store without embeddings.  [default: minilm]", metavar="ENCODER")
    ] = None,
    text_field: Annotated[str, opt("Field with the text.", metavar="F")] = "text",
    id_field: Annotated[str | None, opt("Field with the document's id, as for chunk.", metavar="F")] = None,
    keep: Annotated[list[str] | None, opt("Field to store as a column of documents; repeatable.", metavar="F")] = None,
    existing: Annotated[
        Literal["skip", "replace", "fail", "mirror"] | None,
        opt("Documents of which the store has another text, as for chunk.", metavar="skip|replace|fail|mirror"),
    ] = None,
    exclude: Annotated[list[str] | None, opt("Leave out files, as for chunk; repeatable.", metavar="PATTERN")] = None,
    dry_run: Annotated[bool, opt("Print the commands, and run none.", "--dry-run")] = False,
    devices: DevicesOption = "auto",
    scratch: ScratchOption = None,
    workers: WorkersOption = None,
    as_json: Json = False,
) -> None:
    """Bring a store up to date: chunk new input, then embed, index and find neighbours.

    Prints the commands that it runs, which are those to run by hand for more options. Each resumes and does
    only what is new, for every encoder, index and table of neighbours of the store, with their own settings.
    A store that has none gets the default ones.
    """
    from retrotool.build import run as build_run
    from retrotool.chunk.chunk_plan import ChunkOptions
    from retrotool.sources import Fields

    use_scratch(scratch)
    fields = Fields(text=text_field, id="id" if id_field is None else id_field, keep=tuple(keep or ()))
    options = ChunkOptions(
        fields=fields, require_id=id_field is not None, workers=workers or os.cpu_count() or 1, existing=existing,
        exclude=tuple(exclude or ()), note=output.note,
    )  # fmt: skip
    given = build_run.BuildOptions(tokenizer, options, encoder, devices)
    given_inputs = tuple(inputs or ())
    if dry_run:
        plan = build_run.plan_build(store, given_inputs, given)
        output.show(plan, as_json, lambda plan: "\n".join(plan.commands))
        return
    result = build_run.build(
        store, given_inputs, given,
        before=lambda plan: output.note("Running:\n" + "\n".join(f"  {line}" for line in plan.commands)),
        after=lambda step, result: None if as_json else _show(store, step, result),
    )  # fmt: skip
    if as_json:
        output.show(result, True, str)
    output.exit_if(result.chunk is not None and (result.chunk.rejected or result.chunk.stopped), EXIT_REJECTED)


def _show(store: str, step: Step, result: Any) -> None:
    """Print the result of a step as its command does."""
    from retrotool.chunk.command import chunk_text
    from retrotool.embed.command import embed_text
    from retrotool.index.command import index_text
    from retrotool.neighbours.command import neighbours_text

    texts: dict[str, Callable[[Any], str]] = {
        "chunk": partial(chunk_text, store), "embed": partial(embed_text, store), "index": index_text,
        "neighbours": neighbours_text,
    }  # fmt: skip
    output.show(result, False, texts[step.command])
