"""``retrotool export``: the group of the commands that hand a store over to other tools."""

from __future__ import annotations

import typer

from retrotool.cli import export_neighbours

app = typer.Typer(
    help="Hand a store over to other tools.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("neighbours", epilog=export_neighbours.EPILOG)(export_neighbours.command)


@app.callback()
def _group() -> None:
    # With one command alone Typer would make no group of it.
    pass
