"""What ``retrotool purge`` shows of a purge and of an erase, and asks before."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from retrotool.cli import output
from retrotool.errors import UsageError
from retrotool.purge.review_text import lines_of

if TYPE_CHECKING:
    from retrotool.neighbours.dependents import Dependent
    from retrotool.purge.affected import AffectedChunk, AffectedResult, AskedPurge
    from retrotool.purge.erase_run import EraseResult
    from retrotool.purge.run import PurgeResult

_LISTED = 3
_PARTS = 20


def warning(planned: PurgeResult | EraseResult, erase: bool) -> str:
    """What is about to happen."""
    does = []
    chunks, share = getattr(planned, "chunks", 0), getattr(planned, "share", 0.0)
    if chunks:
        does.append(f"purges {output.count(chunks, 'chunk')}, {share:.1%} of the store")
    if erase:
        share = f"{planned.unerased_share:.1%} of all it ever had"
        does.append(f"erases {output.count(planned.unerased, 'chunk')} for good, {share}")
    return f"This {', and '.join(does)}."


def agrees(warned: str) -> bool:
    """Ask a person; ``UsageError`` if none is there."""
    if not sys.stdin.isatty():
        raise UsageError(warned.removesuffix("."), "Above 1 % it wants --yes. See what it is with --dry-run.")
    sys.stderr.write(f"{warned} Go on? [y/N]: ")
    sys.stderr.flush()
    # Not typer's own: it can't tell Ctrl-C, which ends a command with another exit code, from an answer.
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def purged(store: Path, result: PurgeResult, erase: bool) -> str:
    """What a purge did, or would do."""
    documents = output.count(result.documents, "whole document")
    what = f"{output.count(result.chunks, 'chunk')} ({result.share:.2%} of the store), {documents}"
    before = f"; {result.already_purged:,} more were purged before" if result.already_purged else ""
    if result.dry_run:
        lines = [f"Would purge {what}{before}. Nothing was purged."]
        if erase:
            lines.append(f"Would erase {output.count(result.unerased, 'chunk')}{_copies(result)}.")
        return "\n".join([*lines, *lines_of(store, result), *_same_text(store, result)])
    lines = []
    if not result.purge and not result.erased:
        lines.append(f"Nothing to purge{before}.")
    if result.purge and (result.chunks or not result.erased):
        lines.append(f"Purged {what}{before} (purge {result.purge}, commit {result.commit}).")
    if result.blocked and not result.chunks:
        lines.append(f"New on the block list: {result.blocked:,} (hashes of ids, texts and tokens).")
    return "\n".join(lines + _about_erased(store, result) + _same_text(store, result))


def _same_text(store: Path, result: PurgeResult) -> list[str]:
    """Which documents stay with a text that was selected, and what to run."""
    same = result.same_text
    if not same.documents:
        return []
    names = ", ".join(map(output.one_line, same.first))
    living = f"as {names}" if same.documents == len(same.first) else f"in {same.documents:,} documents: {names}, …"
    given = [word for name in same.first for word in ("--document", name)]
    command = output.one_line(shlex.join(["retrotool", "purge", str(store), *given]))
    return [f"The same text is living {living}. To take it there: {command} --reason ..."]


def erased(store: Path, result: EraseResult) -> str:
    """What an erase of earlier purges did."""
    if not result.purges:
        return "Nothing to erase: no purge is as old as that."
    return "\n".join(_about_erased(store, result))


def _about_erased(store: Path, result: PurgeResult | EraseResult) -> list[str]:
    """What an erase did; nothing if there was none."""
    lines = []
    if result.erased:
        done = f"{output.count(result.files_rewritten, 'file')} rewritten"
        if not result.files_rewritten:
            done = "they were erased before"
        lines.append(f"Erased {output.count(result.erased, 'chunk')}{_copies(result)}; {done}.")
        lines += [f"Check it: retrotool purge {store} {purge} --verify" for purge in result.purges[:_LISTED]]
    lines += [f"Not reached: {what}." for what in result.not_reached]
    return lines + [dependent(one) for one in result.dependents]


def _copies(result: PurgeResult | EraseResult) -> str:
    if not result.copies:
        return ""
    repeating = "document that repeats" if result.copies == 1 else "documents that repeat"
    return f", those of {result.copies:,} set-aside {repeating} them included"


def dependent(one: Dependent) -> str:
    """What an erase did not reach in another store, and the command that takes it out there."""
    return (
        f"Not reached: neighbours {one.table!r} of {output.one_line(one.path)}, another store. They may name what was "
        f"erased, which readers mask. Take it out there: {one.command}"
    )


def affected(result: AffectedResult) -> str:
    """Which training chunks name purged chunks."""
    if not result.purges:
        return "Nothing was purged: there is nothing to look for."
    first, saved = f"first {result.k}", f"{result.saved} saved"
    lines = [
        f"{output.count(result.in_k + result.following_in_k, 'chunk')} of {result.rows:,} have a purged chunk among "
        f"the {first} neighbours {result.name!r}, or behind one; "
        f"{result.in_saved + result.following_in_saved:,} among the {saved}."
    ]
    rows: list[tuple[object, ...]] = [
        (part.part, part.rows, part.in_k, part.following_in_k, part.in_saved, part.following_in_saved)
        for part in result.parts[:_PARTS]
    ]
    if len(result.parts) > 1:
        total = (result.rows, result.in_k, result.following_in_k, result.in_saved, result.following_in_saved)
        rows.append(("all", *total))
    lines.append(output.table(rows, ("part", "chunks", first, "behind one", saved, "behind one")))
    if len(result.parts) > _PARTS:
        lines.append(f"  and {output.count(len(result.parts) - _PARTS, 'part')} more, see --json")
    if result.purged:
        lines.append(f"Not counted: {output.count(result.purged, 'chunk')} that are purged themselves.")
    if result.out:
        lines.append(f"All of them: {result.out}")
    elif result.examples:
        lines += ["The first of them (--out FILE writes all):", *map(_affected_chunk, result.examples)]
    return "\n".join([*lines, *(line for one in result.purges for line in _not_found(one))])


def _affected_chunk(one: AffectedChunk) -> str:
    places = [(one.neighbour, "neighbour {}"), (one.continuation, "behind neighbour {}")]
    named = ", ".join(text.format(place) for place, text in places if place is not None)
    return f"  {one.chunk} of {output.one_line(one.document)}, {output.one_line(one.source)}: {named}"


def _not_found(one: AskedPurge) -> list[str]:
    """What tables no longer have of a purge."""
    if one.erased:
        return [f"Purge {one.purge} is erased, from these tables, too: which chunks named it is no longer known."]
    if one.since:
        return [
            f"Purge {one.purge}: {one.since:,} of {output.count(one.parts, 'part')} were searched after it; what rows "
            "that were searched again named before is no longer known."
        ]
    return []
