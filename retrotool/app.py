"""The command line: finds the command of every capability by name.

A command is imported when it is run or shown, and imports heavy modules only when it runs.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from retrotool import interrupts
from retrotool.cli import output
from retrotool.cli.options import WORK, parse_shard
from retrotool.lazy import leave_pandas_out

_COMMANDS = (
    "build", "chunk", "embed", "index", "neighbours", "search", "documents", "show", "inspect", "leakage", "train",
    "evaluate", "purge", "undo", "erase", "receipt", "affected", "export", "info", "log", "verify", "repair", "plan",
    "doctor",
)  # fmt: skip
"""The commands in the order of ``--help``."""
_FOLDERS = {
    "documents": "inspect", "show": "inspect", "undo": "purge", "erase": "purge", "affected": "purge", "log": "info",
    "verify": "info", "doctor": "info",
}  # fmt: skip
"""The folder of each command whose folder has another name.

The module ``command`` of a folder has ``command`` and ``EPILOG``; or, if it has several commands, also
``undo_command`` and ``UNDO_EPILOG``.
"""
_WITHOUT_PYARROW = ("info", "log", "plan")
_CACHE = {
    "cache_dir": ("DIR", "Folder for copies of a bucket's files.  [default: ~/.cache/retrotool]", "RETROTOOL_CACHE"),
    "cache_size": ("SIZE", "Space for these copies.  [default: half of what is free]", "RETROTOOL_CACHE_SIZE"),
}
"""Metavar, help and variable of the options of all commands that may map files (``store.cache``)."""
_ENGINE = {
    "engine": ("local|ray", "Where to work: this machine, or a Ray cluster.  [default: local]", "RETROTOOL_ENGINE"),
    "ray_address": ("HOST:PORT", "Head of the cluster.  [default: this machine's cluster]", "RAY_ADDRESS"),
}
"""The same of the commands that run tasks (``engine``)."""
_SHARD = {
    "shard": (
        "I/N", "This is job I of N on the store, from 0: begin with that share of the work.", "RETROTOOL_SHARD"
    )
}  # fmt: skip
"""The same of those among them whose work several jobs can share."""
_WITH_TASKS = ("build", "chunk", "embed", "index", "neighbours", "purge", "erase", "verify", "repair")
_SHOWN: dict[str, Any] = {"rich_markup_mode": None, "pretty_exceptions_enable": False}


class _Group(TyperGroup):
    """Commands, imported when they are run or shown. With ``--json``, misuse is also reported as JSON."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        return list(_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        if cmd_name not in self.commands:
            module = importlib.import_module(f"retrotool.{_FOLDERS.get(cmd_name, cmd_name)}.command")
            single = typer.Typer(add_completion=False, **_SHOWN)
            function = getattr(module, f"{cmd_name}_command", None) or module.command
            epilog = getattr(module, f"{cmd_name.upper()}_EPILOG", None) or module.EPILOG
            single.command(cmd_name, cls=_Command, epilog=epilog)(function)
            self.commands[cmd_name] = typer.main.get_command(single)
            self.commands[cmd_name].name = cmd_name
            shared = _SHARD | _ENGINE if cmd_name in _WITH_TASKS else {}
            shared = shared if cmd_name in _WITHOUT_PYARROW else shared | _CACHE
            self.commands[cmd_name].params += [
                TyperOption(
                    param_decls=[f"--{name.replace('_', '-')}"], metavar=metavar, help=text, envvar=variable,
                    show_envvar=True, rich_help_panel=WORK,
                )
                for name, (metavar, text, variable) in shared.items()
            ]  # fmt: skip
        return self.commands[cmd_name]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write each command with the first paragraph of its help, not shortened."""
        help_of = {name: self.get_command(ctx, name).help or "" for name in self.list_commands(ctx)}
        with formatter.section("Commands"):
            formatter.write_dl([(name, " ".join(text.split("\n\n")[0].split())) for name, text in help_of.items()])

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            if (message := getattr(error, "format_message", None)) is not None:
                shown = output.visible(message())  # it may have the name of a hostile file
                error.format_message = lambda: shown  # type: ignore[attr-defined]
                if "--json" in sys.argv:
                    output.write_json_error(shown, "", int(getattr(error, "exit_code", 2)), True)
            raise


class _Command(TyperCommand):
    """A command that reports errors, runs without pandas, and groups its options by panel in the help."""

    def invoke(self, ctx: Any) -> Any:
        if self.name not in _WITHOUT_PYARROW:
            leave_pandas_out()
        cache, engine = (
            {name: value for name in options if (value := ctx.params.pop(name, None)) is not None}
            for options in (_CACHE, _ENGINE | _SHARD)
        )
        with output.errors(ctx.params["as_json"]):
            if cache:
                from retrotool.store.cache import use_cache

                use_cache(**cache)
            if self.name in _WITH_TASKS:
                from retrotool.engine import use_engine

                use_engine(**{**engine, "shard": parse_shard(engine.get("shard"))})
            return super().invoke(ctx)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, then options by panel; those without a panel, and the common panel, come last."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
                panels.setdefault(getattr(parameter, "rich_help_panel", None) or usual, []).append(record)
        for panel in sorted(panels, key=lambda name: (name == WORK, name == "Options")):
            with formatter.section(panel):
                formatter.write_dl(panels[panel])

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the arguments for the usage line, without typer's braces around required ones."""
        return [piece.removeprefix("{").removesuffix("}") for piece in super().collect_usage_pieces(ctx)]


app = typer.Typer(
    name="retrotool",
    cls=_Group,
    help="Build retrieval databases for language models with build, or with chunk, embed, index and neighbours; remove "
    "text with purge.\n\n"
    "Every command but plan takes the STORE first. A command that was interrupted or "
    "killed resumes when it is run again.",
    no_args_is_help=True,
    **_SHOWN,
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


def give_bars_room() -> None:
    """Set a size for tqdm, which draws nothing on terminals that report zero columns."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # stderr is not a terminal, closed or None
        if os.get_terminal_size(sys.stderr.fileno()).columns == 0:
            # tqdm reads these when it is imported.
            os.environ.setdefault("TQDM_NCOLS", "80")
            os.environ.setdefault("TQDM_NROWS", "24")


def main() -> None:
    """Run the console script."""
    interrupts.install()
    give_bars_room()
    app(prog_name="retrotool")
