"""``retrotool search``."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Annotated

import typer

from retrotool.cli import output
from retrotool.cli.options import Device, Json, StoreArgument, check_utf8
from retrotool.errors import UsageError

EPILOG = """\b
Examples:
  retrotool search store "how do I open a file for reading?"
  retrotool search store "file objects" -k 3 --json"""


@dataclass(frozen=True, slots=True)
class Found:
    """One result."""

    id: int
    distance: float
    document: str
    text: str
    continuation: str | None


@dataclass(frozen=True, slots=True)
class Results:
    """What a search gives."""

    results: list[Found]


def command(
    store: StoreArgument,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What to search for.", show_default=False)],
    k: Annotated[int, typer.Option("-k", metavar="K", min=1, max=1000, help="How many chunks.")] = 5,
    index: Annotated[str, typer.Option(help="Index to search.")] = "main",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Show the chunks nearest to a text, with their continuations."""
    with output.errors(as_json):
        import retrotool

        if not text.strip():
            raise UsageError("TEXT is empty")
        check_utf8("TEXT", text)
        reader = retrotool.open(store)
        found = reader.search(text, k, index, reader.load_encoder(index, device))
        results = [
            Found(n.id, n.distance, n.chunk.document, n.chunk.text, n.continuation.text if n.continuation else None)
            for n in found
        ]
        output.show(Results(results), as_json, _text)


def _text(found: Results) -> str:
    if not found.results:
        return "Nothing found: the index has no living chunk."
    blocks = []
    for place, result in enumerate(found.results, 1):
        blocks.append(f"{place}. distance {result.distance:.4f}  chunk {result.id}  document {result.document}")
        blocks.append(_wrapped(result.text))
        if result.continuation is not None:
            blocks.append(_wrapped("… " + result.continuation, "     "))
    return "\n".join(blocks)


def _wrapped(text: str, indent: str = "   ") -> str:
    return textwrap.fill(" ".join(text.split()), 100, initial_indent=indent, subsequent_indent=indent)
