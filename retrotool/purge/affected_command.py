"""``retrotool affected``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from retrotool.cli import output
from retrotool.cli.chunk_ids import format_id
from retrotool.cli.options import Json, StoreArgument, arg, complete_tables, opt

if TYPE_CHECKING:
    from retrotool.purge.affected import AffectedChunk, AffectedCounts, AffectedResult, AskedPurge

EPILOG = """\b
Examples:
  retrotool affected store
  retrotool affected training --table wiki --out affected.jsonl"""

_PARTS = 20


def command(
    store: StoreArgument,
    purges: Annotated[
        list[str] | None, arg("Ids of purges of the database; last is the newest. Default: all.", metavar="[PURGE]...")
    ] = None,
    table: Annotated[str, opt("Neighbour tables of the store.", metavar="NAME", complete=complete_tables)] = "main",
    out: Annotated[Path | None, opt("Write all affected chunks here, as JSON lines.", metavar="FILE")] = None,
    as_json: Json = False,
) -> None:
    """List the training chunks that have purged chunks among their neighbours.

    STORE is the query store, which has the tables. Text of a purged chunk may have reached a model through
    these training chunks. Nothing of the purged chunks is shown.
    """
    with output.errors(as_json):
        from retrotool.purge.affected import affected

        output.show(affected(store, table, purges or (), out=out), as_json, _text)


def _text(result: AffectedResult) -> str:
    if not result.purges:
        return "Nothing was purged, so no chunk is affected."
    first, saved = f"first {result.k}", f"{result.saved} saved"
    lines = [
        f"{output.count(result.in_k + result.following_in_k, 'chunk')} of {result.rows:,} have a purged chunk among "
        f"the {first} neighbours {result.table!r}, or following one; "
        f"{result.in_saved + result.following_in_saved:,} among the {saved}."
    ]
    every: list[tuple[object, AffectedCounts]] = [(part.part, part) for part in result.parts[:_PARTS]]
    every += [("all", result)] if len(result.parts) > 1 else []
    rows = [(part, n.rows, n.in_k, n.following_in_k, n.in_saved, n.following_in_saved) for part, n in every]
    lines.append(output.table(rows, ("part", "chunks", first, "following", saved, "following")))
    if len(result.parts) > _PARTS:
        lines.append(f"  and {output.count(len(result.parts) - _PARTS, 'more part')}, see --json")
    if result.purged:
        lines.append(f"Not counted: {output.count(result.purged, 'chunk')}, purged as well.")
    if result.out:
        lines.append(f"All of them: {result.out}")
    elif result.examples:
        lines += ["The first of them (--out FILE writes all):", *map(_affected_chunk, result.examples)]
    return "\n".join([*lines, *(line for one in result.purges for line in _not_found(one))])


def _affected_chunk(one: AffectedChunk) -> str:
    places = [(one.neighbour, "neighbour {}"), (one.continuation, "following neighbour {}")]
    named = ", ".join(text.format(format_id(place)) for place, text in places if place is not None)
    return f"  {format_id(one.chunk)} of {output.one_line(one.document)}, {output.one_line(one.source)}: {named}"


def _not_found(one: AskedPurge) -> list[str]:
    if one.erased:
        return [f"Purge {one.purge} is erased, from these tables as well: which chunks it affected is not known."]
    if one.since:
        return [
            f"Purge {one.purge}: {one.since:,} of {output.count(one.parts, 'part')} were searched after it; what their "
            "rows contained before is not known."
        ]
    return []
