"""``retrotool inspect``, ``documents`` and ``show``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from retrotool.cli import output
from retrotool.cli.command_lines import command_line
from retrotool.cli.options import Json, SourceOption, StoreArgument, TableOption, WhereOption, arg, check_utf8, opt
from retrotool.errors import UsageError

if TYPE_CHECKING:
    from retrotool.inspect.run import InspectedChunk, InspectedNeighbour, InspectResult, TableRead
    from retrotool.inspect.show import Shown
    from retrotool.reader import DocumentEntry
    from retrotool.tokenizers.tokenizer import Split

EPILOG = """\b
Examples:
  retrotool inspect store
  retrotool inspect store --chunk 0:4
  retrotool inspect store --document doc-7 -k 5
  retrotool inspect store --random 3 --seed 1 --json
  retrotool inspect store --random 1000 -k 10 --html neighbours.html"""
DOCUMENTS_EPILOG = """\b
Examples:
  retrotool documents store
  retrotool documents store --where "n_chunks > 1 and id like 'doc-%'" --limit 3
  retrotool documents store --purged --json
  retrotool documents store --source a --csv"""
SHOW_EPILOG = """\b
Examples:
  retrotool show store doc-7
  retrotool show store 0:4 --json"""
_LIMIT = 20
_COLUMNS = ("id", "source", "first_chunk", "n_chunks", "n_tokens", "input", "position", "state")


def command(
    store: StoreArgument,
    chunk: Annotated[str | None, opt("Show this chunk, by its part and row, or its id.", metavar="P:R")] = None,
    document: Annotated[str | None, opt("Show the chunks of this document.", metavar="ID")] = None,
    random: Annotated[int | None, opt("Show N random chunks.  [default: 3]", metavar="N", least=1)] = None,
    seed: Annotated[int | None, opt("Seed of the random choice.  [default: 0]", metavar="S", least=0)] = None,
    table: TableOption = None,
    k: Annotated[int | None, opt("Neighbours per chunk.  [default: the table's k]", "-k", metavar="K", least=1)] = None,
    html: Annotated[Path | None, opt("Write an HTML page to read and search.", metavar="FILE")] = None,
    as_json: Json = False,
) -> None:
    """Show chunks of a query store beside their neighbours, and mark the text that they share.

    For each neighbour and its continuation, the longest run of tokens in common with the chunk is found. A
    run of 5 or more tokens is marked in both texts, [[like this]]. r is its length divided by the length of a
    full chunk. --html writes the chunks to a page instead, which can hold a few thousand.
    """
    from retrotool.inspect import run as inspect_run
    from retrotool.inspect.run import Choice
    from retrotool.store.parts import parse_id

    if seed is not None and random is None:
        raise UsageError("--seed needs --random", "Give --random N, or leave --seed out.")
    number = parse_id(chunk) if chunk is not None else None
    if chunk is not None and number is None:
        raise UsageError(f"--chunk {chunk!r} is not a chunk id", "Give PART:ROW, such as 0:4, or a number.")
    if document is not None:
        check_utf8("--document", document)
    result = inspect_run.inspect(store, Choice(number, document, random, seed or 0), table=table, k=k, page=html)
    output.show(result, as_json, _text, styled=True)


def _text(result: InspectResult) -> str:
    text = output.laid_out(_paragraphs(result))
    return f"{text}\nPage: {output.visible(result.page)}" if result.page else text


def _paragraphs(result: InspectResult) -> Iterator[output.Paragraph]:
    several = len(result.tables) > 1
    name = f", neighbours {result.name!r}" if result.name else ""
    yield output.Paragraph(f"{result.store}{name}: {result.chosen}.")
    if not result.tables:
        yield output.Paragraph(f"No neighbours yet. Compute them: {command_line('neighbours', result.store)}", indent=2)
    for table in result.tables:
        yield output.Paragraph(_table(table, several), indent=2)
    if result.page:
        without = f", {result.without:,} without neighbours" if result.without else ""
        yield output.Paragraph(
            f"{output.count(result.shown, 'chunk')} with {output.count(result.neighbours, 'neighbour')}{without}; "
            f"{result.marked:,} of them with a common run of {result.marked_from} tokens or more."
        )
    for chunk in () if result.page else result.chunks:
        yield output.Paragraph()
        yield from _chunk(chunk, several, bool(result.tables))


def _table(table: TableRead, several: bool) -> str:
    how = f"index {table.index!r}" if table.index else "exact search"
    recall = f", recall@10 {table.recall_at_10:.4f}" if table.recall_at_10 is not None else ""
    weight = f", table {table.name!r}, weight {table.weight:g}" if several else ""
    unlike = "" if table.comparable else "; its tokens can't be compared with the store's"
    return f"database {table.database}, {how}{recall}{weight}{unlike}"


def _chunk(chunk: InspectedChunk, several: bool, has_tables: bool) -> Iterator[output.Paragraph]:
    yield output.Paragraph(*_from(chunk), output.count(chunk.n_tokens, "token"), after=6, style="bold")
    runs = groupby(chunk.segments(), lambda segment: bool(segment[1]))
    yield _marked([("".join(text for text, _ in some), marked) for marked, some in runs], 3)
    for rank, near in enumerate(chunk.neighbours, 1):
        yield from _shown_neighbour(near, rank, several)
    if not chunk.neighbours and has_tables:
        yield output.Paragraph(f"({chunk.why_none()})", indent=3)


def _shown_neighbour(near: InspectedNeighbour, rank: int, several: bool) -> Iterator[output.Paragraph]:
    database = [f"database {near.database}"] if several else []
    yield output.Paragraph(f"{rank}. distance {near.distance:.4f}", *_from(near), *database, after=6)
    if (common := near.common) is not None and common.marked:
        last, there = common.start + common.tokens - 1, common.start_in_neighbour + common.tokens - 1
        yield output.Paragraph(
            f"{output.count(common.tokens, 'token')} in common, r {common.r:.3f}: tokens {common.start} to {last} of "
            f"the chunk, {common.start_in_neighbour} to {there} here",
            indent=3,
        )
    yield _cut(near.marked_text(), 3)
    if near.continuation is not None:
        yield _cut(near.marked_continuation(), 5, "… ")


def _from(one: InspectedChunk | InspectedNeighbour) -> list[str]:
    from retrotool.store.parts import format_id

    source = [f"source {one.source}"] if one.source else []
    return [f"chunk {format_id(one.id)}", f"document {one.document}", *source, f"{one.index + 1:,} of {one.of:,}"]


def _cut(split: Split, indent: int, before: str = "") -> output.Paragraph:
    return _marked([(before + split.before, False), (split.run, bool(split.run)), (split.after, False)], indent)


def _marked(pieces: Iterable[tuple[str, bool]], indent: int) -> output.Paragraph:
    shown = output.Paragraph(indent=indent)
    for text, marked in pieces:
        shown.append(f"[[{text}]]" if marked else text, "bold yellow" if marked else "")
    return shown


def documents_command(
    store: StoreArgument,
    where: WhereOption = None,
    sources: SourceOption = None,
    purged: Annotated[bool, opt("List what is purged, also in part, and duplicates instead.", "--purged")] = False,
    limit: Annotated[int | None, opt("List N, 0: all.  [default: 20, as text]", metavar="N", least=0)] = None,
    as_csv: Annotated[bool, opt("Print CSV, with a column for each kept field.", "--csv")] = False,
    as_json: Json = False,
) -> None:
    """List the documents of a store, with source, size and kept fields.

    --where takes id, source, n_chunks, n_tokens, input, position and kept fields, as in purge --where. 20
    documents are listed as text, all as JSON or CSV.
    """
    from retrotool.reader import Reader
    from retrotool.store.expressions import with_sources
    from retrotool.store.store import Store

    if as_csv and as_json:
        raise UsageError("--csv and --json can't be combined", "Give one of them.")
    opened = Store.open(store)
    reader = Reader(opened)
    found = reader.documents(with_sources(opened, where, sources or ()), purged=purged)
    some = islice(found, _LIMIT if limit is None and not (as_csv or as_json) else limit or None)
    if as_csv:
        kept = reader.kept_fields()
        rows = ([*(getattr(one, name) for name in _COLUMNS), *map(one.kept.get, kept)] for one in some)
        output.show_csv([*_COLUMNS, *kept], rows)
        return
    output.show_each("documents", some, as_json, _document)
    if not as_json and next(found, None) is not None:
        output.note("There are more: --limit 0 lists all.")


def _document(one: DocumentEntry) -> str:
    kept = [f"{name} {value}" for name, value in one.kept.items() if value is not None]
    state = [one.state] if one.state != "live" else []
    sizes = [output.count(one.n_chunks, "chunk"), output.count(one.n_tokens, "token")]
    return "  ".join(map(output.one_line, [one.id, f"source {one.source}", *sizes, *state, *kept]))


def show_command(
    store: StoreArgument,
    name: Annotated[str, arg("A document's id, or a chunk: its part and row, or its number.", metavar="ID")],
    as_json: Json = False,
) -> None:
    """Show a document or a chunk: its text, where it is from, and what purged it.

    The text is what the tokenizer decodes; that of purged chunks is not shown.
    """
    from retrotool.inspect import show

    check_utf8("ID", name)
    found = show.show_item(store, name)
    output.show(found, as_json, lambda found: output.laid_out(_shown_paragraphs(found)), styled=True)


def _shown_paragraphs(found: Shown) -> Iterator[output.Paragraph]:
    from retrotool.store.parts import format_id

    one = found.document
    sizes = f"{output.count(one.n_chunks, 'chunk')}, {output.count(one.n_tokens, 'token')}, {one.state}"
    yield output.Paragraph(f"document {one.id or '(erased)'}", sizes, style="bold")
    about: dict[str, Any] = {"source": one.source, "input": one.input, "position": one.position, **one.kept}
    for name, value in about.items():
        if one.id and value is not None:
            yield output.Paragraph(name, str(value), indent=2)
    for purge, reason in found.purges.items():
        yield output.Paragraph(f"purge {purge}", reason, indent=2)
    for chunk in found.chunks:
        state = [] if chunk.state == "live" else [" ".join([chunk.state, *chunk.purges])]
        place, tokens = f"{chunk.index + 1:,} of {one.n_chunks:,}", output.count(chunk.n_tokens, "token")
        yield output.Paragraph()
        yield output.Paragraph(f"chunk {format_id(chunk.id)}", place, tokens, *state, style="bold")
        if chunk.text is not None:
            yield output.Paragraph(chunk.text, indent=3)
    for rank, near in enumerate(found.neighbours, 1):
        yield from _shown_neighbour(near, rank, near.database != found.store)
