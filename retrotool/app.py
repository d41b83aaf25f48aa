"""The command line: registers the command of every capability by name.

Commands import what is heavy when they run, so that ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from retrotool import interrupts
from retrotool.chunk import command as chunk_command
from retrotool.cli import output
from retrotool.embed import command as embed_command
from retrotool.export import command as export_command
from retrotool.index import command as index_command
from retrotool.info import command as info_command
from retrotool.info import log_command, verify_command
from retrotool.inspect import command as inspect_command
from retrotool.leakage import command as leakage_command
from retrotool.neighbours import command as neighbours_command
from retrotool.plan import command as plan_command
from retrotool.purge import command as purge_command
from retrotool.search import command as search_command


class _Group(TyperGroup):
    """Commands whose misuse, too, is told as JSON where that is asked for."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that is named."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            if "--json" in sys.argv and (told := getattr(error, "format_message", None)) is not None:
                output.tell_json(told(), "", int(getattr(error, "exit_code", 2)), True)
            raise


app = typer.Typer(
    name="retrotool",
    cls=_Group,
    help="Build retrieval databases for language models: chunk, embed, index, neighbours; "
    "and purge text out of them again.\n\n"
    "Every command but plan takes the STORE first (export: after the word for what is exported), can be killed at any "
    "moment, and goes on where it stopped when it is run again.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"retrotool {version('retrotool')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


_COMMANDS = {
    "chunk": chunk_command, "embed": embed_command, "index": index_command, "neighbours": neighbours_command,
    "inspect": inspect_command, "leakage": leakage_command, "purge": purge_command, "search": search_command,
    "info": info_command, "log": log_command, "verify": verify_command, "plan": plan_command,
}  # fmt: skip
for _name, _command in _COMMANDS.items():
    app.command(_name, epilog=_command.EPILOG)(_command.command)
app.add_typer(export_command.app, name="export")


def give_bars_room() -> None:
    """Have progress drawn on a terminal that says it has no room, as in some containers: tqdm would draw nothing."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no terminal, closed, or none at all
        if os.get_terminal_size(sys.stderr.fileno()).columns == 0:
            # Read when tqdm is imported.
            os.environ.setdefault("TQDM_NCOLS", "80")
            os.environ.setdefault("TQDM_NROWS", "24")


def main() -> None:
    """Entry point of the console script."""
    interrupts.install()
    give_bars_room()
    app(prog_name="retrotool")
