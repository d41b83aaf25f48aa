"""Print results as JSON or text on stdout, and errors and notes on stderr."""

from __future__ import annotations

import csv
import itertools
import os
import re
import shutil
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, NoReturn

import orjson
import typer

from retrotool.errors import EXIT_INTERRUPTED, RetrotoolError

EXIT_FAILED = 1
# Documents are hostile: escapes of characters that move the cursor, colour the terminal, break lines or
# change the text direction; and of what is not UTF-8, such as in a path.
_CONTROLS = {number: f"\\x{number:02x}" for number in (*range(0x20), *range(0x7F, 0xA0))}
_BEYOND = (0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x2070), *range(0xD800, 0xE000))
_CONTROLS |= {number: f"\\u{number:04x}" for number in _BEYOND}
_IN_JSON = {number: f"\\u{number:04x}" for number in _CONTROLS if number >= 0x7F}
"""The same for JSON, where characters below 0x20 are escaped already; readers get the characters."""
_INSIDE = {number: shown for number, shown in _CONTROLS.items() if chr(number) not in "\t\n"}


def show(result: Any, as_json: bool, text: Callable[[Any], str], *, styled: bool = False) -> None:
    """Print a result (a dataclass) on stdout: as one JSON object, or as ``text`` of it.

    Control characters are escaped, unless the text is ``styled`` and was escaped before.
    """
    if as_json:
        sys.stdout.write(_json(asdict(result)) + "\n")
    else:
        typer.echo(text(result) if styled else visible(text(result)))


def visible(text: str) -> str:
    """Escape control characters, except tabs and line breaks."""
    return text.translate(_INSIDE)


def one_line(text: str) -> str:
    """Return a text as one line: white space becomes a space, control characters are escaped."""
    return re.sub(r"\s+", " ", text).translate(_CONTROLS)


def show_each(name: str, results: Iterable[Any], as_json: bool, text: Callable[[Any], str]) -> None:
    """Print results (dataclasses) as they come: one JSON object with a list ``name``, or lines of ``text``.

    An error ends the command as usual; the JSON object then also has the fields of the error.
    """
    if not as_json:
        for result in results:
            sys.stdout.write(visible(text(result)) + "\n")
        sys.stdout.flush()
        return
    sys.stdout.write(f'{{"{name}":[')
    separator, ending = "", {}
    try:
        for result in results:
            sys.stdout.write(separator + _json(asdict(result)))
            separator = ","
    except RetrotoolError as error:
        ending = {"error": str(error), "advice": error.advice, "exit_code": error.exit_code}
        _exit_with(str(error), error.advice, error.exit_code)
    finally:
        sys.stdout.write("]" + (f",{_json(ending)[1:]}" if ending else "}") + "\n")


def show_csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    r"""Print CSV (RFC 4180, ``\n`` line ends); booleans are true or false, control characters are escaped."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    for row in itertools.chain([header], rows):
        cells = (str(cell).lower() if isinstance(cell, bool) else cell for cell in row)
        writer.writerow([visible(cell) if isinstance(cell, str) else cell for cell in cells])


def _json(fields: dict[str, Any]) -> str:
    try:
        data = orjson.dumps(fields, default=str, option=orjson.OPT_SERIALIZE_NUMPY)
    except orjson.JSONEncodeError:  # for example a path that is not UTF-8
        data = orjson.dumps(_all_printable(fields), default=str, option=orjson.OPT_SERIALIZE_NUMPY)
    return data.decode().translate(_IN_JSON)


def _all_printable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_all_printable(key): _all_printable(inner) for key, inner in value.items()}
    return [_all_printable(inner) for inner in value] if isinstance(value, list | tuple) else value


def table(rows: Sequence[Sequence[object]], header: Sequence[str] = (), *, right: Collection[int] = ()) -> str:
    """Format rows as a table; numbers and the columns ``right`` are aligned to the right.

    In a terminal a line separates the header, and long cells wrap. Elsewhere it is plain text of any width.
    """
    cells = [[_cell(value) for value in row] for row in ([header] if header else []) + [list(row) for row in rows]]
    if not cells:
        return ""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    to_right = [i in right or (bool(rows) and isinstance(rows[0][i], int | float)) for i in range(len(widths))]
    if sys.stdout.isatty():
        return _ruled(cells, to_right, bool(header))
    lines = []
    for row in cells:
        columns = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, to_right, strict=True)]
        lines.append("  " + "  ".join(columns).rstrip())
    return "\n".join(lines)


def _ruled(cells: Sequence[Sequence[str]], to_right: Sequence[bool], header: bool) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD if header else None, show_header=header, pad_edge=False)
    for name, right in zip(cells[0], to_right, strict=True):
        shown.add_column(Text(name) if header else "", justify="right" if right else "left")
    for row in cells[header:]:
        shown.add_row(*map(Text, row))
    console = Console(color_system=None)
    with console.capture() as captured:
        console.print(shown)
    return "\n".join(line.rstrip() for line in captured.get().strip("\n").splitlines())


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


class Paragraph:
    """Text of documents to lay out in lines; white space becomes a space, control characters are escaped.

    It begins with ``fields`` in one style, two spaces apart. The first line is indented by ``indent``
    columns, the others by ``after`` (default: the same).
    """

    def __init__(self, *fields: str, indent: int = 0, after: int | None = None, style: str = "") -> None:
        from rich.text import Text

        self.text, self.indent, self.after = Text(), indent, indent if after is None else after
        self.text.append("  ".join(map(one_line, fields)), style)

    def append(self, text: str, style: str = "") -> None:
        """Append text in a style of rich, such as "bold yellow"."""
        self.text.append(one_line(text), style)


def line_width() -> int:
    """Return the width of a line: that of the terminal (COLUMNS overrides it), 100 without one."""
    return max(20, shutil.get_terminal_size((100, 24)).columns)


def laid_out(paragraphs: Iterable[Paragraph]) -> str:
    """Return paragraphs in lines of the terminal's width, styled if it has colours."""
    from rich.console import Console

    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    console = Console(force_terminal=colours, color_system="standard" if colours else None)
    with console.capture() as captured:
        for one in paragraphs:
            for i, line in enumerate(one.text.wrap(console, line_width() - max(one.indent, one.after))):
                line.rstrip()
                line.pad_left(one.after if i else one.indent)
                console.print(line, soft_wrap=True)
    return captured.get().removesuffix("\n")


def count(n: int, what: str) -> str:
    """Return a number with its noun: ``1 part``, ``2 parts``."""
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def scaled(n: float, unit: str = "") -> str:
    """Return a number in three digits: ``1.75T``; with a unit such as `` B/s``, ``21.5 MB/s``."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if n < 999.5 or prefix == "P":
            break
        n /= 1000
    digits = f"{n:,.0f}" if n >= 99.95 else f"{n:.3g}"
    space = " " if unit.startswith(" ") else ""
    return f"{digits}{space}{prefix}{unit.lstrip()}"


def size(n: float) -> str:
    """Return bytes as text, such as ``12.3 GB``."""
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if n < 1000 or unit == "PB":
            break
        n /= 1000
    return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"


def note(message: str) -> None:
    """Print a message on stderr."""
    typer.echo(visible(message), err=True)


def exit_if(failed: object, exit_code: int) -> None:
    """End the command with ``exit_code`` if it failed, although it has a result."""
    if failed:
        raise typer.Exit(exit_code)


def stop(message: str, as_json: bool) -> NoReturn:
    """End a command that the user declined to continue, with exit code 1."""
    note(message)
    write_json_error(message, "", EXIT_FAILED, as_json)
    raise typer.Exit(EXIT_FAILED)


@contextmanager
def errors(as_json: bool) -> Iterator[None]:
    """Report a ``RetrotoolError``, or an ``OSError`` that names a file, and exit with its code.

    With ``--json`` the error is also an object on stdout. Any other exception is a bug and shows its
    traceback.
    """
    try:
        yield
    except RetrotoolError as error:
        _exit_with(str(error), error.advice, error.exit_code, as_json)
    except OSError as error:
        if error.filename is None or error.strerror is None:
            raise
        _exit_with(f"{os.fsdecode(error.filename)}: {error.strerror}", "", EXIT_FAILED, as_json)
    except KeyboardInterrupt:
        note("interrupted: what is finished is kept. Run the same command again to resume.")
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _exit_with(message: str, advice: str, exit_code: int, as_json: bool = False) -> NoReturn:
    note(f"error: {message}")
    if advice:
        note(advice)
    write_json_error(message, advice, exit_code, as_json)
    raise typer.Exit(exit_code) from None


def write_json_error(message: str, advice: str, exit_code: int, as_json: bool) -> None:
    """Print an error as JSON on stdout, if ``as_json``."""
    if as_json:
        sys.stdout.write(_json({"error": message, "advice": advice, "exit_code": exit_code}) + "\n")
