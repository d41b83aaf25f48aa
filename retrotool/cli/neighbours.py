"""``retrotool neighbours``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retrotool.cli import output
from retrotool.cli.options import IndexOption, Json, StoreArgument

if TYPE_CHECKING:
    from retrotool.commands.building import NeighboursResult

EPILOG = """\b
Examples:
  retrotool neighbours store
  retrotool neighbours database --queries training --name wiki -k 2 --saved 20"""


def command(
    store: StoreArgument,
    queries: Annotated[
        Path | None,
        typer.Option(metavar="STORE2", help="Store of the query chunks. Default: STORE itself.", show_default=False),
    ] = None,
    k: Annotated[int, typer.Option("-k", metavar="K", help="Neighbours that reading gives by default.")] = 2,
    saved: Annotated[int, typer.Option(metavar="N", help="Neighbours to save, a reserve against later purges.")] = 20,
    name: Annotated[str, typer.Option(help="Name of the neighbour tables, which lie in the query store.")] = "main",
    index: IndexOption = None,
    as_json: Json = False,
) -> None:
    """Find the nearest chunks of every chunk, outside its own document.

    Nearest first, with squared L2 distances; -1 and infinity where there are too few. Across two stores a document
    is the same if its id is. Purged chunks are never found, and are masked in tables computed before; run it again to
    fill rows up that have fewer than K left.
    """
    with output.errors(as_json):
        from retrotool import commands

        result = commands.neighbours(store, queries=queries, k=k, saved=saved, name=name, index=index)
        output.show(result, as_json, _text)
        if result.not_embedded:
            output.note(f"Without neighbours: {output.count(result.not_embedded, 'chunk')} that have no embeddings.")
        if result.not_indexed:
            output.note(
                f"Never found: {output.count(result.not_indexed, 'chunk')} of {store} that are not in the index."
            )
        if result.next:
            output.note("Next:\n" + "\n".join(f"  {command}" for command in result.next))


def _text(result: NeighboursResult) -> str:
    done = (
        f"Neighbours of {output.count(result.queries, 'chunk')} found"
        if result.queries
        else "Every chunk has its neighbours already"
    )
    how = f"{result.saved} saved, {result.k} used, index {result.index!r}"
    return f"{done} ({result.name!r}: {how}, commit {result.commit})."
