"""Arguments that several commands share."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrotool.errors import UsageError

if TYPE_CHECKING:
    from retrotool.store.state import State

WORK = "Execution (common to all commands that have these)"
"""The panel of options for where and how work is done; each can be set by an environment variable."""
Completion = Callable[..., list[str]]


def opt(
    help: str,  # noqa: A002  as typer has it
    *names: str,
    metavar: str | None = None,
    panel: str | None = None,
    least: float | None = None,
    most: float | None = None,
    complete: Completion | None = None,
) -> Any:
    """Return a typer option; its default is shown, unless it is None or False.

    ``names``: by default "--" and the parameter's name. ``panel``: its heading in the help. ``least`` and
    ``most``: bounds of a number. ``complete``: lists values for the shell.
    """
    return typer.Option(
        *names, help=help, metavar=metavar, rich_help_panel=panel, min=least, max=most, autocompletion=complete
    )


def arg(help: str, *, metavar: str, complete: Completion | None = None) -> Any:  # noqa: A002
    """Return a typer argument; ``complete`` lists values for the shell."""
    return typer.Argument(metavar=metavar, help=help, show_default=False, autocompletion=complete)


def complete_stores(incomplete: str) -> list[str]:
    """Return the stores, and the folders that may contain some, that begin with ``incomplete``."""
    from retrotool.store.identity import FILE

    folder = Path(os.path.expanduser(incomplete))  # noqa: PTH111  a trailing / counts
    above = folder if incomplete.endswith("/") else folder.parent
    with contextlib.suppress(OSError):
        found = [one for one in above.iterdir() if one.is_dir() and str(one).startswith(str(folder))]
        return sorted(str(one) if (one / FILE).exists() else f"{one}/" for one in found)
    return []


def _completer(names: Callable[[State], Iterable[str]]) -> Completion:
    """Return the completion of names that the state of the command's store has."""

    def complete(context: typer.Context, incomplete: str) -> list[str]:
        from retrotool.errors import RetrotoolError
        from retrotool.store.store import Store

        # Before an option without its value, arguments are not parsed. STORE is the first after the command.
        line = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS", "")
        with contextlib.suppress(RetrotoolError, OSError, ValueError, IndexError):
            store = context.params.get("store") or shlex.split(line)[2]
            return [name for name in names(Store.open(store).state) if name.startswith(incomplete)]
        return []

    return complete


complete_purges = _completer(lambda state: ["last", *state.with_prefix("purge:")])
_complete_indexes = _completer(lambda state: state.names("index"))
_complete_tables = _completer(lambda state: state.with_prefix("neighbours:"))
_complete_encoders = _completer(lambda state: state.names("embeddings"))

StoreArgument = Annotated[str, arg("Directory of the store.", metavar="STORE", complete=complete_stores)]
PurgeId = Annotated[str, arg("Id of the purge; last is the newest one.", metavar="PURGE", complete=complete_purges)]
Json = Annotated[bool, opt("Print one JSON object on stdout.", "--json")]
EncoderOption = Annotated[
    str | None,
    opt("Encoder whose embeddings to use, if the store has several.", metavar="NAME", complete=_complete_encoders),
]
WhereOption = Annotated[
    str | None, opt("Only documents for which this expression over their columns is true.", metavar="EXPRESSION")
]
SourceOption = Annotated[
    list[str] | None, opt("Only documents of this source; may be repeated.", "--source", metavar="SOURCE")
]
IndexOption = Annotated[
    str | None,
    opt("Index to search.  [default: the default index, else main]", metavar="NAME", complete=_complete_indexes),
]


def _work(text: str, name: str, metavar: str | None, least: int | None = None) -> Any:
    variable = f"RETROTOOL_{name.upper().replace('-', '_')}"
    return typer.Option(f"--{name}", help=text, metavar=metavar, rich_help_panel=WORK, envvar=variable, min=least)


DevicesOption = Annotated[
    str,
    _work(
        "auto (every GPU, else the CPU), cpu, cuda, cuda:N; several with commas, one process each.", "devices", "D,..."
    ),
]
TableOption = Annotated[
    str | None,
    opt("Table to read.  [default: main, or the only one]", "--table", metavar="NAME", complete=_complete_tables),
]
Device = Annotated[str, _work("auto (a GPU if there is one), cpu, cuda or cuda:N.", "devices", "D")]
NoWaitOption = Annotated[
    bool, _work("Exit with 14 instead of waiting, if other runs are doing the rest of the work.", "no-wait", None)
]
WorkersOption = Annotated[int | None, _work("Worker processes.  [default: one per core]", "workers", "N", least=1)]
ScratchOption = Annotated[str | None, _work("Folder for scratch files.  [default: the system's]", "scratch", "DIR")]
ExactTokenizer = Annotated[
    bool, _work("Use only the tokenizers library, from now on; many times slower.", "exact-tokenizer", None)
]

LEAST_MEMORY = 16 << 20  # the smallest ``--memory``, in bytes
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", "0": "\0", "f": "\f"}


def parse_shard(text: str | None) -> tuple[int, int] | None:
    """Parse ``i/n`` to (i, n)."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,18})/(\d{1,18})", text)
    if match is None:
        raise UsageError(f"--shard {text}: not a job number and a number of jobs", "Give for example 3/16.")
    return int(match[1]), int(match[2])


def parse_count(option: str, text: str) -> int:
    """Parse a count such as ``1.75T``, ``300B`` (or ``300G``), ``20M``, ``500k``, ``1e9`` or ``4096``."""
    count = int(parse_number(option, text))
    if count < 1:
        raise UsageError(f"{option} {text}: not a positive number", "Give for example 1.75T, 20M or 4096.")
    return count


def parse_number(option: str, text: str) -> Fraction:
    """Parse a number as ``parse_count`` does, with its fraction."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d\d?)?)\s*([kmbgt])?", text.strip().lower())
    if match is None:
        raise UsageError(f"{option} {text}: not a positive number", "Give for example 1.75T, 20M or 4096.")
    return Fraction(match[1]) * _COUNTS[match[2] or ""]


def first_device(devices: str) -> str:
    """Return the first of several devices: the environment variable may name more than a command uses."""
    return devices.split(",")[0]


def at_file(text: str) -> str | Path:
    """Return the path of ``@FILE``, else the text; ``@@`` escapes an @ at its beginning."""
    return Path(text[1:]) if text.startswith("@") and not text.startswith("@@") else text.removeprefix("@")


def at_files(several: Sequence[str] | None) -> tuple[str | Path, ...]:
    """Return ``at_file`` of each."""
    return tuple(map(at_file, several or ()))


def unescape(text: str) -> str:
    r"""Replace the backslash escapes ``\n``, ``\t``, ``\r``, ``\f``, ``\0`` and ``\\``."""
    return re.sub(r"\\([ntrf0\\])", lambda match: _ESCAPES[match[1]], text)


def check_utf8(option: str, text: str) -> None:
    """Raise ``UsageError`` for text that is not UTF-8: the shell passes any bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{option} {text!a} is not UTF-8") from None


def read_given_file(option: str, path: str | Path) -> str:
    """Read a file, or standard input ("-"), in UTF-8 with or without a byte order mark.

    ``UsageError`` if it can't be read, with the line that is not UTF-8.
    """
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"{option} {path} can't be read: {error.strerror or error}", "Name another file.") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{option} {path} can't be read: line {line:,} is not UTF-8", "Save it as UTF-8.") from error


def read_given_lines(option: str, path: str | Path, what: str) -> tuple[str, ...]:
    """Read the lines of a file, without line ends; ``UsageError`` if all are blank, so it has no ``what``."""
    lines = tuple(line.removesuffix("\r") for line in read_given_file(option, path).split("\n"))
    if not any(map(str.strip, lines)):
        raise UsageError(f"{option} {path} has no {what}", f"Give a file with one {what} per line.")
    return lines
