"""``retrotool purge STORE --affected NAME``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from retrotool.cli import output
from retrotool.cli.output import one_line

if TYPE_CHECKING:
    from retrotool.purge.affected import Asked
    from retrotool.purge.affected_run import AffectedChunk, AffectedCost, AffectedResult

_PARTS = 20


def run_affected(store: Path, name: str, purges: Sequence[str], out: Path | None, as_json: bool) -> None:
    """Tell which training chunks purges affected, and what that reads before."""
    from retrotool.purge import affected_run

    result = affected_run.affected(store, name, purges, out=out, begin=_tell_cost)
    output.show(result, as_json, _text)


def _tell_cost(cost: AffectedCost) -> None:
    if cost.parts:
        output.note(f"Reads {output.size(cost.bytes)}: the neighbours of {output.count(cost.parts, 'part')}.")


def _text(result: AffectedResult) -> str:
    if not result.purges:
        return "No purge stands: there is nothing to look for."
    first, saved = f"first {result.k}", f"{result.saved} saved"
    lines = [
        f"{output.count(result.in_k + result.following_in_k, 'chunk')} of {result.rows:,} had a purged chunk among the "
        f"{first} neighbours {result.name!r}, or behind one; "
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
        lines += ["The first of them (--out FILE writes all):", *map(_example, result.examples)]
    return "\n".join([*lines, *(line for one in result.purges for line in _untold(one))])


def _example(one: AffectedChunk) -> str:
    places = [(one.neighbour, "neighbour {}"), (one.continuation, "behind neighbour {}")]
    told = ", ".join(text.format(place) for place, text in places if place is not None)
    return f"  {one.chunk} of {one_line(one.document)}, {one_line(one.source)}: {told}"


def _untold(one: Asked) -> list[str]:
    """What can't be told of a purge any more."""
    lines = []
    if one.erased and one.within:
        what = (
            "is" if one.erased == one.chunks else f"is in part ({one.erased:,} of {output.count(one.chunks, 'chunk')})"
        )
        lines.append(
            f"Purge {one.purge} {what} erased, from these tables, too: whom that affected can't be told any more."
        )
    if one.since:
        lines.append(
            f"Purge {one.purge}: {one.since:,} of {output.count(one.parts, 'part')} were searched, or repaired, after "
            "it; what rows that were searched named before can't be told."
        )
    return lines
