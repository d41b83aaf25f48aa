"""``retrotool documents`` and ``retrotool show``."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

from retrotool.cli import output
from retrotool.cli.options import Json, SourceOption, StoreArgument, WhereOption, arg, check_utf8, opt
from retrotool.errors import UsageError
from retrotool.inspect.command import shown_neighbour

if TYPE_CHECKING:
    from retrotool.inspect.show import Shown
    from retrotool.reader import DocumentEntry

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
    with output.errors(as_json):
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
    with output.errors(as_json):
        from retrotool.inspect import show

        check_utf8("ID", name)
        output.show(
            show.show_item(store, name), as_json, lambda found: output.laid_out(_paragraphs(found)), styled=True
        )


def _paragraphs(found: Shown) -> Iterator[output.Paragraph]:
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
        yield from shown_neighbour(near, rank, near.database != found.store)
