"""``retrotool neighbours``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from retrotool.cli import output
from retrotool.cli.command_lines import SAVED, K, command_line
from retrotool.cli.options import (
    LEAST_MEMORY,
    DevicesOption,
    EncoderOption,
    IndexOption,
    Json,
    NoWaitOption,
    StoreArgument,
    opt,
)
from retrotool.errors import UsageError
from retrotool.sizes import parse_size

if TYPE_CHECKING:
    from retrotool.neighbours.run import NeighboursResult

EPILOG = """\b
Examples:
  retrotool neighbours store
  retrotool neighbours database --queries training --name wiki -k 2 --saved 20
  retrotool neighbours store --exact --name exact
  retrotool neighbours store --name apart --max-overlap 0.5 --exclude-near-copies --exclude-source a
  retrotool neighbours database --queries training --name mixed --database database=1 --database training=2 --exact
  retrotool neighbours store --name reranked --rerank overlap
  retrotool neighbours store --materialise
  retrotool neighbours store --edit edits.jsonl
  retrotool neighbours store --shard 3/16"""


def command(
    store: StoreArgument,
    queries: Annotated[str | None, opt("Store of the query chunks.  [default: STORE]", metavar="STORE2")] = None,
    k: Annotated[int, opt("Neighbours per chunk that readers return by default.", "-k", metavar="K")] = K,
    saved: Annotated[int, opt("Neighbours per chunk to save, a reserve for later purges.", metavar="N")] = SAVED,
    name: Annotated[
        str | None, opt("Name of the table, which is stored in the query store.  [default: main]", metavar="NAME")
    ] = None,
    index: IndexOption = None,
    database: Annotated[
        list[str] | None,
        opt("Another database; its distances are divided by the weight W. Repeatable.", metavar="STORE[=W]"),
    ] = None,
    max_overlap: Annotated[
        float | None, opt("Exclude neighbours that share a run of more than R of a chunk's tokens.", metavar="R")
    ] = None,
    exclude_near_copies: Annotated[bool, opt("Exclude near copies of the chunk.", "--exclude-near-copies")] = False,
    exclude_source: Annotated[list[str] | None, opt("Exclude this source. Repeatable.", metavar="S")] = None,
    only_source: Annotated[list[str] | None, opt("Exclude all other sources. Repeatable.", metavar="S")] = None,
    no_filters: Annotated[bool, opt("Drop the filters of earlier runs.", "--no-filters")] = False,
    rerank: Annotated[
        Literal["overlap", "distance"] | None,
        opt(
            "Order what is saved by the tokens in common (BM25), or by distance again.  [default: distance]",
            metavar="overlap|distance",
        ),
    ] = None,
    exact: Annotated[bool, opt("Search exactly, without an index.", "--exact")] = False,
    materialise: Annotated[bool, opt("Also store the tokens of the K neighbours.", "--materialise")] = False,
    edit: Annotated[str | None, opt("Edit the table by the JSON lines in FILE instead.", metavar="FILE")] = None,
    encoder: EncoderOption = None,
    memory: Annotated[
        str | None,
        opt("Memory for vectors and queries, besides the tables.  [default: half of the machine's]", metavar="SIZE"),
    ] = None,
    devices: DevicesOption = "auto",
    no_wait: NoWaitOption = False,
    as_json: Json = False,
) -> None:
    """Find the nearest chunks of every chunk, outside its own document.

    A table has the neighbours of each chunk, nearest first, with squared L2 distances, padded with -1 and
    infinity. Documents of two stores are the same if their ids are. Purged chunks are never found, and are
    masked in existing tables. Run the command again after a purge to refill rows with fewer than K
    neighbours, and after the database has grown: only new chunks are searched. A run with another index
    replaces a table only if --name names it.

    Near copies have half or more of a chunk's runs of 8 tokens. A small store without an index is searched
    exactly. --database makes a mixture: one table per database, merged on reading; it can also give STORE a
    weight. Later runs keep databases, weights, filters and the order unless the options are given again.

    --rerank overlap does not search: of the saved neighbours of a chunk, those with more of its tokens come
    first, and rare tokens count more. Distances stay as they are.

    --materialise makes training with retrotool.RetroDataset faster. Later runs of this name keep the stored
    tokens up to date, with or without the option.

    With --edit, STORE is the store that has the table. Each line of FILE is a JSON object with a "chunk" and
    its "neighbours", those to "ban", or "reset": true, which undoes this. Later runs keep the edits.
    """
    from retrotool.engine import is_a_job
    from retrotool.neighbours import run as neighbours_run
    from retrotool.neighbours.edits import edit_neighbours
    from retrotool.neighbours.filters import FilterOptions
    from retrotool.neighbours.run import SearchOptions

    if edit is not None:
        filtering = (max_overlap, exclude_near_copies, exclude_source, only_source, no_filters)
        searching = (queries, index, database, exact, materialise, encoder, memory, rerank)
        if any((*filtering, *searching)) or (k, saved) != (K, SAVED):
            raise UsageError("--edit can't be combined with options other than --name")
        name = "main" if name is None else name
        done = edit_neighbours(store, edit, name=name)
        now = f"{output.count(done.rows, 'row')} set, {output.count(done.bans, 'ban')} (commit {done.commit})"
        output.show(done, as_json, lambda _: f"Edits of {name!r}: {now}.")
        return
    size = None if memory is None else parse_size("--memory", memory, least=LEAST_MEMORY)
    search = SearchOptions(exact, encoder, size, devices, not no_wait)
    excluded, only = tuple(exclude_source or ()), tuple(only_source or ())
    filters = FilterOptions(max_overlap, exclude_near_copies, excluded, only, no_filters)
    databases = [_weighed(text) for text in database or ()]
    result = neighbours_run.neighbours(
        store, queries=queries, k=k, saved=saved, name=name, index=index, search=search, filters=filters,
        databases=databases, materialise=materialise, rerank=rerank,
    )  # fmt: skip
    output.show(result, as_json, neighbours_text)
    if result.not_embedded:
        without = "which has no embedding" if result.not_embedded == 1 else "which have no embeddings"
        output.note(f"Without neighbours: {output.count(result.not_embedded, 'chunk')}, {without}.")
    if result.not_indexed:
        are = "is" if result.not_indexed == 1 else "are"
        chunks = output.count(result.not_indexed, "chunk")
        output.note(f"Not searchable yet: {chunks} of {store} that {are} not in the index.")
    for path in result.unaware:
        output.note(f"{path} is not writable, so it can't record this store: an erase there won't list it.")
    if result.queries and not (is_a_job() or result.next or result.in_other_runs or as_json):
        table = None if result.name == "main" else result.name
        output.note(f"Next: {command_line('inspect', queries or store, table=table)}")
    if result.next:
        output.note("Next:\n" + "\n".join(f"  {command}" for command in result.next))


def _by(index: str) -> str:
    return f"index {index!r}" if index else "exact search"


def _weighed(text: str) -> tuple[str, float | None]:
    path, equals, weight = text.rpartition("=")
    try:
        return (path, float(weight)) if equals and path else (text, None)
    except ValueError:
        return text, None  # a path with a "="


def neighbours_text(result: NeighboursResult) -> str:
    """Render a result of ``neighbours`` as text."""
    from retrotool.neighbours.filters import in_words

    found = f"Neighbours of {output.count(result.queries, 'chunk')} found"
    done = found if result.queries else "All embedded chunks have their neighbours"
    by = _by(result.index) if not result.mix else f"a mixture of {len(result.mix)} databases"
    text = f"{done} ({result.name!r}: {result.saved} saved, {result.k} used, {by}, commit {result.commit})."
    if result.mix:
        rows = [(one.database, f"{one.weight:g}", one.table, _by(one.index), one.queries) for one in result.mix]
        text += "\n" + output.table(rows, ("database", "weight", "table", "by", "chunks searched"))
    if result.left_out:
        text += f"\nNo longer in {result.name!r}, but kept as tables: {', '.join(result.left_out)}."
    if words := in_words(result.filters):
        kept = " (as before; --no-filters drops this)" if result.filters_kept else ""
        text += f"\nExcluded: {words}{kept}."
    if result.rerank:
        text += f"\nRe-ranked by {result.rerank} (--rerank distance undoes this)."
    if result.in_other_runs:
        text += f"\n{output.count(result.in_other_runs, 'part')} left to other running commands."
    if result.materialised:
        text += f"\nMaterialised: the tokens of the first {output.count(result.k, 'neighbour')} of each chunk."
    return text
