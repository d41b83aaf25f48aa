"""``retrotool export``: the group of the commands that hand a store over to other tools."""

from __future__ import annotations

import shlex
from typing import Any

import typer
from typer.core import TyperGroup

from retrotool.export import export_neighbours_command


class _Group(TyperGroup):
    """Commands whose name is easily left out, as all others take the store first."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command; the error for one that is none says what comes first."""
        try:
            return super().resolve_command(ctx, args)
        except Exception as error:
            if isinstance(told := getattr(error, "message", None), str):
                name = shlex.quote(args[0])
                hint = f"What is exported comes first: retrotool export neighbours {name} OUTPUT --format FORMAT"
                error.message = f"{told} {hint}"  # type: ignore[attr-defined]
            raise


app = typer.Typer(
    cls=_Group,
    help="Hand a store over to other tools.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("neighbours", epilog=export_neighbours_command.EPILOG)(export_neighbours_command.command)


@app.callback()
def _group() -> None:
    # With one command alone Typer would make no group of it.
    pass
