"""``retrotool neighbours``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from retrotool.cli import output
from retrotool.cli.command_lines import SAVED, K
from retrotool.cli.options import (
    LEAST_MEMORY,
    DevicesOption,
    EncoderOption,
    IndexOption,
    Json,
    ShardOption,
    StoreArgument,
    opt,
    parse_shard,
    parse_size,
)

if TYPE_CHECKING:
    from retrotool.neighbours.run import NeighboursResult

EPILOG = """\b
Examples:
  retrotool neighbours store
  retrotool neighbours database --queries training --name wiki -k 2 --saved 20
  retrotool neighbours store --exact
  retrotool neighbours store --name apart --max-overlap 0.5 --exclude-near-copies --exclude-source a
  retrotool neighbours database --queries training --name mixed --database database=1 --database training=2 --exact
  retrotool neighbours store --materialise
  retrotool neighbours store --shard 3/16"""


def command(
    store: StoreArgument,
    queries: Annotated[str | None, opt("Store of the query chunks. Default: STORE itself.", metavar="STORE2")] = None,
    k: Annotated[int, opt("Neighbours that reading gives by default.", "-k", metavar="K")] = K,
    saved: Annotated[int, opt("Neighbours to save, a reserve against later purges.", metavar="N")] = SAVED,
    name: Annotated[str, opt("Name of the neighbour tables, which lie in the query store.")] = "main",
    index: IndexOption = None,
    database: Annotated[
        list[str] | None,
        opt(
            "Further database, and its weight: distances are divided by it. Repeatable. STORE may be named, too.",
            metavar="STORE[=W]",
        ),
    ] = None,
    max_overlap: Annotated[
        float | None,
        opt(
            "Leave out neighbours with more than this share of a chunk's tokens in a row in common with it.",
            metavar="R",
        ),
    ] = None,
    exclude_near_copies: Annotated[
        bool, opt("Leave out what has half or more of a chunk's runs of 8 tokens.", "--exclude-near-copies")
    ] = False,
    exclude_source: Annotated[
        list[str] | None, opt("Leave out documents of this source. Repeatable.", metavar="S")
    ] = None,
    only_source: Annotated[
        list[str] | None, opt("Leave out documents of any other source. Repeatable.", metavar="S")
    ] = None,
    no_filters: Annotated[
        bool, opt("Forget what was to be left out before; without it that is kept.", "--no-filters")
    ] = False,
    exact: Annotated[
        bool, opt("Search exactly, without an index. So it is for few chunks where there is no index, too.", "--exact")
    ] = False,
    materialise: Annotated[
        bool, opt("Also store the tokens of the K neighbours and of what follows them, for training.", "--materialise")
    ] = False,
    encoder: EncoderOption = None,
    memory: Annotated[str | None, opt("What a block of queries may take, besides the tables.", metavar="SIZE")] = None,
    devices: DevicesOption = "auto",
    shard: ShardOption = None,
    as_json: Json = False,
) -> None:
    """Find the nearest chunks of every chunk, outside its own document.

    Nearest first, with squared L2 distances; -1 and infinity where there are too few. Across two stores a document
    is the same if its id is. Purged chunks are never found, and are masked in tables computed before; run it again to
    fill rows up that have fewer than K left. When the database has grown, run it again: only what is new is searched.
    With --database it is a mixture: a table of each database, merged when they are read. A later run without these
    options keeps the databases, their weights, and what is left out.

    --materialise is for a training loop that reads the tables with retrotool.RetroDataset. What it writes is kept up to
    date by later runs of this name, with or without the option.
    """
    with output.errors(as_json):
        from retrotool.neighbours import run as neighbours_run
        from retrotool.neighbours.filters import FilterOptions
        from retrotool.neighbours.run import SearchOptions

        size = None if memory is None else parse_size("--memory", memory, least=LEAST_MEMORY)
        search = SearchOptions(exact, encoder, size, devices, parse_shard(shard))
        filters = FilterOptions(
            max_overlap, exclude_near_copies, tuple(exclude_source or ()), tuple(only_source or ()), no_filters
        )
        databases = [_weighed(text) for text in database or ()]
        result = neighbours_run.neighbours(
            store, queries=queries, k=k, saved=saved, name=name, index=index, search=search, filters=filters,
            databases=databases, materialise=materialise,
        )  # fmt: skip
        output.show(result, as_json, _text)
        if result.not_embedded:
            output.note(f"Without neighbours: {output.count(result.not_embedded, 'chunk')} that have no embeddings.")
        if result.not_indexed:
            output.note(
                f"Never found: {output.count(result.not_indexed, 'chunk')} of {store} that are not in the index."
            )
        for path in result.unaware:
            output.note(f"{path} can't be written, so it has no record of this store: an erase there won't list it.")
        if result.next:
            output.note("Next:\n" + "\n".join(f"  {command}" for command in result.next))


def _by(index: str) -> str:
    return f"index {index!r}" if index else "exact search"


def _weighed(text: str) -> tuple[str, float | None]:
    """A database and its weight of ``STORE`` or ``STORE=WEIGHT``."""
    path, equals, weight = text.rpartition("=")
    try:
        return (path, float(weight)) if equals and path else (text, None)
    except ValueError:
        return text, None  # a path that has a =


def _text(result: NeighboursResult) -> str:
    from retrotool.neighbours.filters import in_words

    done = (
        f"Neighbours of {output.count(result.queries, 'chunk')} found"
        if result.queries
        else "Every chunk has its neighbours already"
    )
    by = _by(result.index) if not result.mix else f"a mixture of {len(result.mix)} databases"
    text = f"{done} ({result.name!r}: {result.saved} saved, {result.k} used, {by}, commit {result.commit})."
    if result.mix:
        rows = [(one.database, f"{one.weight:g}", one.table, _by(one.index), one.queries) for one in result.mix]
        text += "\n" + output.table(rows, ("database", "weight", "table", "by", "chunks searched"))
    if result.left_out:
        text += f"\nNo longer in {result.name!r}, but there under their own names: {', '.join(result.left_out)}."
    if words := in_words(result.filters):
        kept = " (as before; --no-filters forgets it)" if result.filters_kept else ""
        text += f"\nLeft out: {words}{kept}."
    if result.elsewhere:
        text += f"\n{output.count(result.elsewhere, 'part')} left to runs that are at work."
    if result.materialised:
        text += f"\nMaterialised: the tokens of the first {output.count(result.k, 'neighbour')} of each chunk."
    return text
