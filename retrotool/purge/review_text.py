"""What a dry run of ``retrotool purge``, and a share of its scan, show in a terminal."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from retrotool.cli import output

if TYPE_CHECKING:
    from retrotool.purge.review import Count, Example, Touched
    from retrotool.purge.run import PurgeResult, ScanResult
    from retrotool.purge.select import Match

_AROUND, _SHOWN = 60, 160
_FIGURES = {"like": "distance", "classifier": "score"}
"""What selectors measure."""


def lines_of(store: Path, result: PurgeResult) -> list[str]:
    """The selection by selector, source and document, examples, what an erase would rewrite, and what to run then."""
    lines = [_match(match) for match in result.matches if len(result.matches) > 1]
    review = result.review
    if review is None or not result.chunks:
        return lines
    lines += _counts("by source", review.sources)
    lines += _counts("by document", review.documents)
    lines.append("  examples")
    lines += [_example(example) for example in review.examples]
    lines.append(f"  an erase would rewrite {_touched(review.touched)}")
    if result.out:
        command = shlex.join(["retrotool", "purge", str(store), "--ids", result.out])
        lines.append(f"Purge just these chunks: {output.one_line(command)} --reason ...")
    return lines


def _match(match: Match) -> str:
    name = f", {match.name}" if match.name else ""
    return f"  --{match.selector}{name}: {output.count(match.chunks, 'chunk')}"


def _counts(title: str, counts: Sequence[Count]) -> list[str]:
    width = max(len(f"{one.chunks:,}") for one in counts)
    return [f"  {title}", *(f"    {one.chunks:>{width},}  {output.one_line(one.name or '(none)')}" for one in counts)]


def _example(example: Example) -> str:
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


def _touched(touched: Touched) -> str:
    what = [output.count(touched.parts, "part")]
    what += [output.count(touched.shards, "index shard")] if touched.shards else []
    rows = output.count(touched.rows, "row")
    what += [f"{output.count(touched.tables, 'table')} of neighbours ({rows})"] if touched.tables else []
    time = f"about {touched.seconds:,.0f} s" if touched.seconds >= 1 else "less than a second"
    return f"at most {', '.join(what)}: {output.size(touched.bytes)}, {time}"


def show_scanned(result: ScanResult, as_json: bool) -> None:
    """Show what a share of a scan did, and how to go on."""
    output.show(result, as_json, _scanned)


def _scanned(result: ScanResult) -> str:
    lines = [f"Scanned {result.parts:,} of {output.count(result.of, 'part')}. Nothing was purged."]
    if result.elsewhere:
        are = "is" if result.elsewhere == 1 else "are"
        lines.append(f"{output.count(result.elsewhere, 'part')} {are} left to runs that are at work.")
    if result.done:
        lines.append("All are scanned. Go on with the same command, without --shard.")
    else:
        lines.append("When all jobs have ended, go on with the same command, without --shard: it scans what is left.")
    return "\n".join(lines)
