"""``retrotool purge``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retrotool.cli import output
from retrotool.cli.options import Json, StoreArgument
from retrotool.cli.purge_affected import run_affected
from retrotool.cli.purge_repair import run_repair
from retrotool.cli.purge_restore import show_restored
from retrotool.cli.purge_review import lines_of
from retrotool.errors import UsageError

if TYPE_CHECKING:
    from retrotool.commands.erasing import ConsumerLeft, EraseResult
    from retrotool.commands.purging import PurgeResult

EPILOG = """\b
Examples:
  retrotool purge store --documents takedown.txt --reason "request 17" --dry-run
  retrotool purge store --documents takedown.txt --reason "request 17" --erase --yes
  retrotool purge store --where "source = 'forum' and year < 2020" --reason "licence" --yes
  retrotool purge store --affected main --out affected.jsonl
  retrotool purge store --repair
  retrotool purge store --older-than 7d --erase --yes"""

ASK_ABOVE = 0.01

_BY = "What to purge (any of these; with --and what all of them mean)"


def command(
    store: StoreArgument,
    purges: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PURGE]...",
            help="With --erase, --restore or --affected: purges that were made before.",
            show_default=False,
        ),
    ] = None,
    reason: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="Why. Stays in the log for ever, so it must name no person.", show_default=False
        ),
    ] = None,
    ids: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Chunk ids, one a line.", show_default=False, rich_help_panel=_BY),
    ] = None,
    chunk: Annotated[
        list[int] | None,
        typer.Option(metavar="ID", help="A chunk id; may be repeated.", show_default=False, rich_help_panel=_BY),
    ] = None,
    documents: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Document ids, one a line.", show_default=False, rich_help_panel=_BY),
    ] = None,
    document: Annotated[
        list[str] | None,
        typer.Option(metavar="ID", help="A document id; may be repeated.", show_default=False, rich_help_panel=_BY),
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(
            metavar="EXPR",
            help="Expression over document columns, such as \"source = 'x'\".",
            show_default=False,
            rich_help_panel=_BY,
        ),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            metavar="RE",
            help="RE2 pattern over the text of documents: the chunks that a match touches.",
            show_default=False,
            rich_help_panel=_BY,
        ),
    ] = None,
    patterns: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="RE2 patterns, one a line.", show_default=False, rich_help_panel=_BY),
    ] = None,
    terms: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Words and names, one a line, as whole words.",
            show_default=False,
            rich_help_panel=_BY,
        ),
    ] = None,
    pii: Annotated[
        str | None,
        typer.Option(
            metavar="KINDS",
            help="Personal data: all, or some of email,phone,ip-address,iban,payment-card,key.",
            show_default=False,
            rich_help_panel=_BY,
        ),
    ] = None,
    near_duplicates_of: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Copies of these chunks (ids, one a line), also shifted or changed a little.",
            show_default=False,
            rich_help_panel=_BY,
        ),
    ] = None,
    contaminates: Annotated[
        Path | None,
        typer.Option(
            metavar="STORE",
            help="Documents like one of this evaluation store: 13-gram Jaccard of 0.8 or more.",
            show_default=False,
            rich_help_panel=_BY,
        ),
    ] = None,
    duplicates: Annotated[
        bool, typer.Option("--duplicates", help="Chunks that repeat one before them.", rich_help_panel=_BY)
    ] = False,
    every: Annotated[bool, typer.Option("--and", help="Only what all of these mean.", rich_help_panel=_BY)] = False,
    whole_documents: Annotated[
        bool,
        typer.Option("--whole-documents", help="All chunks of the documents that are touched.", rich_help_panel=_BY),
    ] = False,
    allow_lossy: Annotated[
        bool,
        typer.Option(
            "--allow-lossy", help="Look at text also where the tokenizer loses case or spacing.", rich_help_panel=_BY
        ),
    ] = False,
    who: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Who purges, for the log. Default: the user.", show_default=False),
    ] = None,
    apply: Annotated[
        str | None,
        typer.Option(
            metavar="SELECTION", help="Purge just what a --dry-run showed, and called so.", show_default=False
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be purged, and purge nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask above 1 % of the store.")] = False,
    erase: Annotated[
        bool,
        typer.Option("--erase", help="Rewrite the files that hold what is purged, or PURGE... Can't be undone."),
    ] = False,
    older_than: Annotated[
        str | None,
        typer.Option(
            metavar="AGE", help="With --erase: all purges that are older, such as 7d or 12h.", show_default=False
        ),
    ] = None,
    restore: Annotated[bool, typer.Option("--restore", help="Take PURGE back, as long as it is not erased.")] = False,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Search again for rows of neighbours that purges have left with fewer than K."),
    ] = False,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="With --repair: only these neighbours. Default: all.", show_default=False),
    ] = None,
    affected: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Tell which chunks with neighbours NAME had chunks of PURGE... among them. Default: of all purges.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --affected: write them all, as JSON lines.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Take chunks out: never returned again from the moment this ends.

    Purged chunks are left out of search, neighbours (also those computed before) and continuations. With --erase
    their text, tokens and vectors are rewritten away; bare chunk ids remain.
    """
    with output.errors(as_json):
        from retrotool import commands

        selectors = commands.Selectors(
            ids=ids, chunk=tuple(chunk or ()), documents=documents, document=tuple(document or ()), where=where,
            pattern=pattern, patterns=patterns, terms=terms, pii=commands.kinds_of(pii),
            near_duplicates_of=near_duplicates_of, contaminates=contaminates, duplicates=duplicates, every=every,
            whole_documents=whole_documents, allow_lossy=allow_lossy,
        )  # fmt: skip
        other = selectors != commands.Selectors() or erase or restore or bool(apply or older_than or reason or who)
        if repair:
            if other or purges or affected is not None or out is not None:
                raise UsageError("--repair goes with --name, --dry-run and --json", "See: retrotool purge --help")
            run_repair(store, name, dry_run, as_json)
            return
        if affected is not None:
            if other or name is not None or dry_run:
                raise UsageError("--affected goes with PURGE..., --out and --json", "See: retrotool purge --help")
            run_affected(store, affected, purges or (), out, as_json)
            return
        if name is not None or out is not None:
            given, of = ("--name", "--repair") if name is not None else ("--out", "--affected")
            raise UsageError(f"{given} goes with {of}", "See: retrotool purge --help")
        declined = False

        def confirm(planned: PurgeResult | EraseResult) -> bool:
            nonlocal declined
            if yes or max(getattr(planned, "share", 0.0), planned.unerased_share) <= ASK_ABOVE:
                return True
            declined = not _agrees(_warning(planned, erase))
            return not declined

        if restore:
            if len(purges or ()) != 1 or selectors != commands.Selectors() or dry_run or erase or apply or older_than:
                raise UsageError("--restore takes one purge back, and nothing else", "See: retrotool purge --help")
            show_restored(commands.restore(store, (purges or [""])[0], reason=_given(reason), who=who), as_json)
            return
        if purges or older_than is not None:
            if selectors != commands.Selectors() or dry_run or not erase:
                raise UsageError(
                    "PURGE and --older-than name purges that were made before, which can be erased with --erase alone",
                    "See: retrotool purge --help",
                )
            age = None if older_than is None else _seconds(older_than)
            erased = commands.erase(store, purges or (), older_than=age, confirm=confirm)
            if declined:
                output.stop("Nothing was erased.", as_json)
            output.show(erased, as_json, lambda result: _erased_text(store, result))
            left = erased.left
        else:
            if apply is not None and selectors != commands.Selectors():
                raise UsageError("--apply takes what was reviewed, and no selectors", "See: retrotool purge --help")
            result = commands.purge(
                store,
                selectors,
                reason=_given(reason),
                who=who,
                apply=apply,
                dry_run=dry_run,
                erase=erase,
                confirm=confirm,
            )
            if declined:
                output.stop("Nothing was purged.", as_json)
            output.show(result, as_json, lambda result: _text(store, result, erase))
            left = result.left
        for sentence in left:
            output.note(sentence)


def _given(reason: str | None) -> str:
    if reason is None:
        raise UsageError("--reason is missing", "Say why, in words that name no person: it stays in the log.")
    return reason


def _seconds(age: str) -> float:
    """An age such as 7d as seconds."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
    number, unit = age[:-1], age[-1:]
    if unit not in units or not number.isdecimal():
        raise UsageError(f"--older-than {age!r} is no age", "Give for example 7d, 12h or 2w.")
    return float(int(number) * units[unit])


def _warning(planned: PurgeResult | EraseResult, erase: bool) -> str:
    """What is about to happen."""
    does = []
    chunks, share = getattr(planned, "chunks", 0), getattr(planned, "share", 0.0)
    if chunks:
        does.append(f"purges {output.count(chunks, 'chunk')}, {share:.1%} of the store")
    if erase:
        share = f"{planned.unerased_share:.1%} of all it ever had"
        does.append(f"erases {output.count(planned.unerased, 'chunk')} for good, {share}")
    return f"This {', and '.join(does)}."


def _agrees(warning: str) -> bool:
    """Ask a person; ``UsageError`` if none is there."""
    if not sys.stdin.isatty():
        raise UsageError(warning.removesuffix("."), "Above 1 % it wants --yes. See what it is with --dry-run.")
    sys.stderr.write(f"{warning} Go on? [y/N]: ")
    sys.stderr.flush()
    # Not typer's own: it can't tell Ctrl-C, which ends a command with another exit code, from an answer.
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _text(store: Path, result: PurgeResult, erase: bool) -> str:
    documents = output.count(result.documents, "whole document")
    what = f"{output.count(result.chunks, 'chunk')} ({result.share:.2%} of the store), {documents}"
    before = f"; {result.already_purged:,} more were purged before" if result.already_purged else ""
    if result.dry_run:
        lines = [f"Would purge {what}{before}. Nothing was purged."]
        if erase:
            lines.append(f"Would erase {output.count(result.unerased, 'chunk')}{_copies(result)}.")
        return "\n".join([*lines, *lines_of(store, result)])
    lines = []
    if not result.purge and not result.erased:
        lines.append(f"Nothing to purge{before}.")
    if result.purge and (result.chunks or not result.erased):
        lines.append(f"Purged {what}{before} (purge {result.purge}, commit {result.commit}).")
    if result.blocked and not result.chunks:
        lines.append(f"New on the block list: {result.blocked:,} (ids and texts).")
    return "\n".join(lines + _about_erased(store, result))


def _erased_text(store: Path, result: EraseResult) -> str:
    if not result.purges:
        return "Nothing to erase: no purge is as old as that."
    return "\n".join(_about_erased(store, result))


def _about_erased(store: Path, result: PurgeResult | EraseResult) -> list[str]:
    """What an erase did; nothing if there was none."""
    lines = []
    if result.erased:
        lines.append(
            f"Erased {output.count(result.erased, 'chunk')}{_copies(result)}; "
            f"{output.count(result.files_rewritten, 'file')} rewritten. Check: retrotool verify {store}"
        )
    lines += [f"Not reached: {what}." for what in result.not_reached]
    return lines + [_consumer(one) for one in result.consumers]


def _copies(result: PurgeResult | EraseResult) -> str:
    if not result.copies:
        return ""
    repeating = "document that repeats" if result.copies == 1 else "documents that repeat"
    return f", those of {result.copies:,} set-aside {repeating} them included"


def _consumer(one: ConsumerLeft) -> str:
    """What an erase left in another store."""
    what = f"neighbours {one.table!r} of {one.path}"
    if not one.there:
        return f"Not looked at: {what}, which is not there now. Where it is, run: {one.command}"
    lines = []
    if one.rewritten:
        lines.append(f"Erased its text in {one.path}, too: {output.count(one.rewritten, 'file')} rewritten.")
    if one.names:
        lines.append(
            f"Left: {what} name what was erased, which is masked when they are read. Take it out: {one.command}"
        )
    if one.materialised:
        lines.append(f"Left: the texts written with {what} may hold its text: they are of a copy, or can't be written.")
    return "\n".join(lines)
