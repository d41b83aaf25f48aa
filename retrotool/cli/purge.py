"""``retrotool purge``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retrotool.cli import output
from retrotool.cli.options import Json, StoreArgument
from retrotool.errors import UsageError

if TYPE_CHECKING:
    from retrotool.commands.purging import PurgeResult

EPILOG = """\b
Examples:
  retrotool purge store --documents takedown.txt --reason "request 17" --dry-run
  retrotool purge store --documents takedown.txt --reason "request 17" --erase --yes
  retrotool purge store --where "source = 'forum' and year < 2020" --reason "licence" --yes"""

ASK_ABOVE = 0.01


def command(
    store: StoreArgument,
    reason: Annotated[
        str,
        typer.Option(
            metavar="TEXT", help="Why. Stays in the log for ever, so it must name no person.", show_default=False
        ),
    ],
    ids: Annotated[Path | None, typer.Option(metavar="FILE", help="Chunk ids, one a line.", show_default=False)] = None,
    documents: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Document ids, one a line.", show_default=False)
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(
            metavar="EXPR", help="Expression over document columns, such as \"source = 'x'\".", show_default=False
        ),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(metavar="RE", help="RE2 pattern over the decoded text of each chunk.", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be purged, and change nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask above 1 % of the store.")] = False,
    erase: Annotated[
        bool, typer.Option("--erase", help="Also rewrite the files that hold the chunks. Can't be undone.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Take chunks out: never returned again from the moment this ends.

    Purged chunks are left out of search, neighbours (also those computed before) and continuations. With --erase
    their text, tokens and vectors are rewritten away; bare chunk ids remain.
    """
    with output.errors(as_json):
        from retrotool import commands

        given = {"ids": ids, "documents": documents, "where": where, "pattern": pattern}
        chosen = [(kind, str(value)) for kind, value in given.items() if value is not None]
        if len(chosen) != 1:
            raise UsageError("give one of --ids, --documents, --where and --pattern", "See: retrotool purge --help")

        def confirm(planned: PurgeResult) -> bool:
            if yes or planned.share <= ASK_ABOVE:
                return True
            question = f"This purges {planned.chunks:,} chunks, {planned.share:.1%} of the store. Go on?"
            if not sys.stdin.isatty():
                raise UsageError(
                    question.removesuffix(" Go on?"), "Above 1 % it wants --yes. See what it is with --dry-run."
                )
            return typer.confirm(question, err=True)

        result = commands.purge(store, *chosen[0], reason=reason, dry_run=dry_run, erase=erase, confirm=confirm)
        output.show(result, as_json, lambda result: _text(store, result))


def _text(store: Path, result: PurgeResult) -> str:
    documents = output.count(result.documents, "whole document")
    what = f"{output.count(result.chunks, 'chunk')} ({result.share:.2%} of the store), {documents}"
    before = f"; {result.already_purged:,} more were purged before" if result.already_purged else ""
    if result.dry_run:
        lines = [f"Would purge {what}{before}. Nothing was changed."]
        lines += ["First chunks: " + ", ".join(map(str, result.examples))] if result.examples else []
        return "\n".join(lines)
    if not result.purge and not result.erased:
        return f"Nothing to purge{before}."
    lines = [f"Purged {what}{before} (purge {result.purge}, commit {result.commit})."] if result.purge else []
    if result.blocked and not result.chunks:
        lines.append(f"New on the block list: {result.blocked:,} (ids and texts).")
    if result.erased:
        lines.append(
            f"Erased {output.count(result.erased, 'chunk')}; {output.count(result.files_rewritten, 'file')} rewritten. "
            f"Check: retrotool verify {store}"
        )
    return "\n".join(lines)
