"""One renderer for all commands: a result as JSON on stdout, or as text; errors and progress go to stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import orjson
import typer

from retrotool.errors import EXIT_INTERRUPTED, RetrotoolError


def show(result: Any, as_json: bool, text: Callable[[Any], str]) -> None:
    """Print a result (a dataclass): one JSON object on stdout, or ``text`` of it."""
    if as_json:
        fields = asdict(result)
        sys.stdout.write(orjson.dumps(fields, default=str, option=orjson.OPT_SERIALIZE_NUMPY).decode() + "\n")
    else:
        typer.echo(text(result))


def table(rows: Sequence[Sequence[object]], header: Sequence[str] = ()) -> str:
    """Rows as columns of equal width; numbers to the right."""
    cells = [[_cell(value) for value in row] for row in ([header] if header else []) + [list(row) for row in rows]]
    if not cells:
        return ""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    right = [bool(rows) and isinstance(rows[0][i], int | float) for i in range(len(widths))]
    lines = []
    for row in cells:
        columns = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        lines.append("  " + "  ".join(columns).rstrip())
    return "\n".join(lines)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def count(n: int, what: str) -> str:
    """``1 part``, ``2 parts``."""
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def size(n: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n < 1000 or unit == "TB":
            break
        n /= 1000
    return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"


def note(message: str) -> None:
    """Tell a person something that is no result."""
    typer.echo(message, err=True)


@contextmanager
def errors(as_json: bool) -> Iterator[None]:
    """Turn errors of ours into a message and an exit code; with ``--json`` also into an object on stdout."""
    try:
        yield
    except RetrotoolError as error:
        note(f"error: {error}")
        if error.advice:
            note(error.advice)
        if as_json:
            # A path that is not UTF-8 must not keep an error from being told.
            message = str(error).encode("utf-8", "backslashreplace").decode()
            fields = {"error": message, "advice": error.advice, "exit_code": error.exit_code}
            sys.stdout.write(orjson.dumps(fields).decode() + "\n")
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        note("interrupted: what is finished is kept; run the same command again to go on.")
        raise typer.Exit(EXIT_INTERRUPTED) from None
