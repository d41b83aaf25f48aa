"""What ``retrotool purge`` shows of a purge, a share of its scan, an erase and an undo, and asks before."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from retrotool.cli import output
from retrotool.errors import UsageError

if TYPE_CHECKING:
    from retrotool.neighbours.dependents import Dependent
    from retrotool.purge.affected import AffectedChunk, AffectedCounts, AffectedResult, AskedPurge
    from retrotool.purge.erase import EraseResult
    from retrotool.purge.run import Count, Example, PurgeResult, ScanResult, Touched
    from retrotool.purge.undo import UndoResult

_LISTED = 3
_PARTS = 20
_AROUND, _SHOWN = 60, 160
_FIGURES = {"like": "distance", "classifier": "score"}
"""What selectors measure."""


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


def purged(store: str, result: PurgeResult, erase: bool) -> str:
    """What a purge did, or would do."""
    documents = output.count(result.documents, "whole document")
    what = f"{output.count(result.chunks, 'chunk')} ({result.share:.2%} of the store), {documents}"
    before = f"; {result.already_purged:,} more were purged before" if result.already_purged else ""
    if result.dry_run:
        lines = [f"Would purge {what}{before}. Nothing was purged."]
        if erase:
            lines.append(f"Would erase {output.count(result.unerased, 'chunk')}{_copies(result)}.")
        return "\n".join([*lines, *_review(store, result), *_same_text(store, result)])
    lines = []
    if not result.purge and not result.erased:
        lines.append(f"Nothing to purge{before}.")
    if result.purge and (result.chunks or not result.erased):
        lines.append(f"Purged {what}{before} (purge {result.purge}, commit {result.commit}).")
    if result.blocked and not result.chunks:
        lines.append(f"New on the block list: {result.blocked:,} (hashes of ids, texts and tokens).")
    return "\n".join(lines + _about_erased(store, result) + _same_text(store, result))


def _same_text(store: str, result: PurgeResult) -> list[str]:
    """Which documents stay with a text that was selected, and what to run."""
    same = result.same_text
    if not same.documents:
        return []
    names = ", ".join(map(output.one_line, same.first))
    live = f"as {names}" if same.documents == len(same.first) else f"in {same.documents:,} documents: {names}, …"
    given = [word for name in same.first for word in ("--document", name)]
    command = output.one_line(shlex.join(["retrotool", "purge", str(store), *given]))
    return [f"The same text is live {live}. To take it there: {command} --reason ..."]


def erased(store: str, result: EraseResult) -> str:
    """What an erase of earlier purges did."""
    if not result.purges:
        return "Nothing to erase: no purge is as old as that."
    return "\n".join(_about_erased(store, result))


def _about_erased(store: str, result: PurgeResult | EraseResult) -> list[str]:
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
    return f", those of {result.copies:,} rejected {repeating} them included"


def dependent(one: Dependent) -> str:
    """What an erase did not reach in another store, and the command that takes it out there."""
    return (
        f"Not reached: neighbours {one.table!r} of {output.one_line(one.path)}, another store. They may name what was "
        f"erased, which readers mask. Take it out there: {one.command}"
    )


def affected_text(result: AffectedResult) -> str:
    """Which training chunks name purged chunks."""
    if not result.purges:
        return "Nothing was purged: there is nothing to look for."
    first, saved = f"first {result.k}", f"{result.saved} saved"
    lines = [
        f"{output.count(result.in_k + result.following_in_k, 'chunk')} of {result.rows:,} have a purged chunk among "
        f"the {first} neighbours {result.name!r}, or behind one; "
        f"{result.in_saved + result.following_in_saved:,} among the {saved}."
    ]
    every: list[tuple[object, AffectedCounts]] = [(part.part, part) for part in result.parts[:_PARTS]]
    every += [("all", result)] if len(result.parts) > 1 else []
    rows = [(part, n.rows, n.in_k, n.following_in_k, n.in_saved, n.following_in_saved) for part, n in every]
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
    if one.erased:
        return [f"Purge {one.purge} is erased, from these tables, too: which chunks named it is no longer known."]
    if one.since:
        return [
            f"Purge {one.purge}: {one.since:,} of {output.count(one.parts, 'part')} were searched after it; what rows "
            "that were searched again named before is no longer known."
        ]
    return []


def _review(store: str, result: PurgeResult) -> list[str]:
    """The selection by selector, source and document, examples, what an erase would rewrite, and what to run then."""
    lines = [
        f"  --{', '.join(filter(None, (match.selector, match.name)))}: {output.count(match.chunks, 'chunk')}"
        for match in result.matches
        if len(result.matches) > 1
    ]
    review = result.review
    if review is None or not result.chunks:
        return lines
    lines += _counts("by source", review.sources)
    lines += _counts("by document", review.documents)
    lines.append("  examples")
    lines += [_marked(example) for example in review.examples]
    lines.append(f"  an erase would rewrite {_rewritten(review.touched)}")
    if result.out:
        command = shlex.join(["retrotool", "purge", str(store), "--ids", result.out])
        lines.append(f"Purge just these chunks: {output.one_line(command)} --reason ...")
    return lines


def _counts(title: str, counts: Sequence[Count]) -> list[str]:
    width = max(len(f"{one.chunks:,}") for one in counts)
    return [f"  {title}", *(f"    {one.chunks:>{width},}  {output.one_line(one.name or '(none)')}" for one in counts)]


def _marked(example: Example) -> str:
    """A chunk's text around the match, which stands in [[...]]."""
    text, begin, end = example.text, example.begin, example.end
    if end > begin:
        low, high = max(begin - _AROUND, 0), min(end + _AROUND, len(text))
        shown = f"{text[low:begin]}[[{text[begin:end]}]]{text[end:high]}"
        shown = ("…" if low else "") + shown + ("…" if high < len(text) else "")
    else:
        shown = text[:_SHOWN] + ("…" if len(text) > _SHOWN else "")
    figure = "" if example.figure is None else f", {_FIGURES.get(example.selector, 'figure')} {example.figure:.4f}"
    return f"    {example.chunk} of {output.one_line(example.document)}{figure}: {output.one_line(shown)}"


def _rewritten(touched: Touched) -> str:
    what = [output.count(touched.parts, "part")]
    what += [output.count(touched.shards, "index shard")] if touched.shards else []
    rows = output.count(touched.rows, "row")
    what += [f"{output.count(touched.tables, 'table')} of neighbours ({rows})"] if touched.tables else []
    time = f"about {touched.seconds:,.0f} s" if touched.seconds >= 1 else "less than a second"
    return f"at most {', '.join(what)}: {output.size(touched.bytes)}, {time}"


def scanned(result: ScanResult) -> str:
    """What a share of a scan did, and how to go on."""
    lines = [f"Scanned {result.parts:,} of {output.count(result.of, 'part')}. Nothing was purged."]
    if result.elsewhere:
        are = "is" if result.elsewhere == 1 else "are"
        lines.append(f"{output.count(result.elsewhere, 'part')} {are} left to runs that are at work.")
    if result.done:
        lines.append("All are scanned. Go on with the same command, without --shard.")
    else:
        lines.append("When all jobs have ended, go on with the same command, without --shard: it scans what is left.")
    return "\n".join(lines)


def undone(result: UndoResult) -> str:
    """What an undo did, and what has to be run after it."""
    again = "is live again" if result.chunks == 1 else "are live again"
    lines = [
        f"Undid purge {result.purge}: {output.count(result.chunks, 'chunk')}, "
        f"{output.count(result.documents, 'whole document')}, {again} (commit {result.commit})."
    ]
    if result.still_purged:
        by = f": {', '.join(result.named_by)} took them, too" if result.named_by else ", as they repeat others"
        lines.append(f"Still purged: {output.count(result.still_purged, 'chunk')} of it{by}.")
    if result.repeats:
        lines.append(
            f"There twice now: {output.count(result.repeats, 'document')}, as another with its id has come since."
        )
    if result.next:
        lines.append("Neighbours that were found while it was purged lack what it had. Bring them up to date:")
        lines += [f"  {command}" for command in result.next]
    return "\n".join(lines)
