"""``retrotool neighbours``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retrotool.cli import output
from retrotool.cli.options import (
    LEAST_MEMORY,
    DevicesOption,
    EncoderOption,
    IndexOption,
    Json,
    ShardOption,
    StoreArgument,
    parse_shard,
    parse_size,
)

if TYPE_CHECKING:
    from retrotool.commands.materialising import MaterialiseResult
    from retrotool.commands.neighbour_tables import NeighboursResult

EPILOG = """\b
Examples:
  retrotool neighbours store
  retrotool neighbours database --queries training --name wiki -k 2 --saved 20
  retrotool neighbours store --exact
  retrotool neighbours store --materialise
  retrotool neighbours store --shard 3/16"""


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
    exact: Annotated[
        bool,
        typer.Option(
            "--exact", help="Search exactly, without an index. So it is for few chunks where there is no index, too."
        ),
    ] = False,
    materialise: Annotated[
        bool,
        typer.Option(
            "--materialise", help="Also write the tokens of the K neighbours and of what follows them, for training."
        ),
    ] = False,
    encoder: EncoderOption = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What a block of queries may take, besides the tables.")
    ] = None,
    devices: DevicesOption = "auto",
    shard: ShardOption = None,
    as_json: Json = False,
) -> None:
    """Find the nearest chunks of every chunk, outside its own document.

    Nearest first, with squared L2 distances; -1 and infinity where there are too few. Across two stores a document
    is the same if its id is. Purged chunks are never found, and are masked in tables computed before; run it again to
    fill rows up that have fewer than K left. When the database has grown, run it again: only what is new is searched.

    --materialise is for a training loop that reads the tables with retrotool.RetroDataset. What it writes is made anew
    when the tables are, and where something of it was purged.
    """
    with output.errors(as_json):
        from retrotool import commands
        from retrotool.commands.neighbour_tables import SearchOptions

        size = None if memory is None else parse_size("--memory", memory, least=LEAST_MEMORY)
        search = SearchOptions(exact, encoder, size, devices, parse_shard(shard))
        result = commands.neighbours(
            store, queries=queries, k=k, saved=saved, name=name, index=index, search=search, materialise=materialise
        )
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
    by = f"index {result.index!r}" if result.index else "exact search"
    text = f"{done} ({result.name!r}: {result.saved} saved, {result.k} used, {by}, commit {result.commit})."
    if result.elsewhere:
        text += f"\n{output.count(result.elsewhere, 'part')} left to runs that are at work."
    if result.materialised is not None:
        text += "\n" + _materialised(result.materialised)
    return text


def _materialised(made: MaterialiseResult) -> str:
    what = f"{output.count(made.k, 'neighbour')} of {output.count(made.rows, 'chunk')}"
    done = f"{output.count(made.made, 'chunk')} by this run" if made.made else "all of it before"
    text = f"Materialised: {what}, {output.size(made.bytes)} ({done}, commit {made.commit})."
    return f"{text}\n{output.count(made.elsewhere, 'part')} left to runs that are at work." if made.elsewhere else text
