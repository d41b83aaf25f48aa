"""``retrotool doctor``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from retrotool.cli import output
from retrotool.cli.options import Json, arg, complete_stores

if TYPE_CHECKING:
    from retrotool.info.doctor import Diagnosis

EPILOG = """\b
Examples:
  retrotool doctor
  retrotool doctor store --json

Exit codes: 0 nothing is broken; 1 something is."""


def command(
    store: Annotated[
        str | None, arg("Directory of a store, to check its place too.", metavar="[STORE]", complete=complete_stores)
    ] = None,
    as_json: Json = False,
) -> None:
    """Check this machine for what makes commands slow or stop: packages, devices, limits, disks.

    With STORE, also measures how long a durable write takes there, and compares the clocks.
    """
    with output.errors(as_json):
        from retrotool.info import doctor

        found = doctor.doctor(store)
        output.show(found, as_json, _text)
        if not found.ok:
            raise typer.Exit(output.EXIT_FAILED)


def _text(found: Diagnosis) -> str:
    width = max(len(check.name) for check in found.checks)
    lines = []
    for check in found.checks:
        lines.append(f"{check.status:<4}  {check.name:<{width}}  {check.found}")
        lines += [f"{'':{width + 8}}{check.advice}"] if check.advice else []
    return "\n".join(lines)
