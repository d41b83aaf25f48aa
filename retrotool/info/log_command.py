"""``retrotool log``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from retrotool.cli import output
from retrotool.cli.options import Json, StoreArgument, opt

if TYPE_CHECKING:
    from retrotool.info.log_entries import LogEntry

EPILOG = """\b
Examples:
  retrotool log store
  retrotool log store --last 3
  retrotool log store --json

Each line has the commit's number, time, hash (12 digits; all with --json) and command, and the files that it added
(+), replaced (±) and removed (-), with their rows in parentheses. retrotool verify STORE --log checks the log."""

_HEADER = "commit  time (UTC)           hash          command     changes"


def command(
    store: StoreArgument,
    last: Annotated[int | None, opt("Show only the N newest commits.", "--last", metavar="N")] = None,
    as_json: Json = False,
) -> None:
    """Show the commits of a store, the newest last."""
    with output.errors(as_json):
        from retrotool.info import log_entries

        entries = log_entries.log_entries(store, last)
        if not as_json:
            typer.echo(_HEADER)
        output.show_each("commits", entries, as_json, _text)


def _text(entry: LogEntry) -> str:
    replaced = {kind for kind, counts in entry.added.items() if entry.removed.get(kind) == counts["files"]}
    done = [
        f"{'±' if kind in replaced else '+'}{counts['files']:,} {kind} ({counts['rows']:,})"
        for kind, counts in entry.added.items()
    ]
    done += [f"-{n:,} {kind}" for kind, n in entry.removed.items() if kind not in replaced]
    if not done:
        done = [f"set {key}" for key in entry.records]
    words = ", ".join(done)
    for purge in entry.purges:
        verb = {"erase": "erased ", "undo": "undid "}.get(entry.command, "")
        by = f" by {purge['who']}" if purge["who"] and entry.command != "erase" else ""
        words += f"; {verb}{purge['purge']}" + output.one_line(f"{by}: {purge['reason']}")
    return f"{entry.number:>6}  {entry.time[:19]}  {entry.sha256[:12]}  {entry.command:<11} {words}".rstrip()
