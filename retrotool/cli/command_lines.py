"""Command lines that come next, for results and for the advice of errors."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retrotool.store.store import Store

K = 2
"""Neighbours that reading a table gives, if nothing else is asked for."""
SAVED = 20
"""Neighbours that are saved."""
SHOWN = 5
"""Chunks that a search for a text gives."""
COMPARED = 10
"""Neighbours that ``leakage`` compares a chunk with."""


def command_line(command: str, root: str | Path, **options: object) -> str:
    """Return a command line, without the options that have their default: an index and tables are called main."""
    called = ("name", "index") if command in ("index", "neighbours") else ()
    given = [
        ("-k" if option == "k" else f"--{option}", str(value))
        for option, value in options.items()
        if value is not None and not (value == "main" and option in called)
    ]
    return shlex.join(["retrotool", command, str(root), *(word for pair in given for word in pair)])


def neighbours_command(root: str | Path, queries: str | Path | None, name: str, again: Mapping[str, Any]) -> str:
    """Return the command that brings tables up to date that were made with ``again``: index, encoder, k and saved."""
    given = {option: again[option] for option, usual in (("k", K), ("saved", SAVED)) if again[option] != usual}
    # Named also where it is the usual one: that may have changed.
    how = ["--index", str(again["index"])] if again["index"] else ["--exact"]
    if not again["index"] and "encoder" in again:  # records of dependents did not have it before
        how += ["--encoder", str(again["encoder"])]
    return f"{command_line('neighbours', root, queries=queries, **given, name=name)} {shlex.join(how)}"


def table_command(store: Store, table: str, database: Store | None) -> str:
    """Return the command that brings a table of ``store`` up to date, with its options: others search all of it again.

    ``database`` None: the reader of the command has to name it.
    """
    root = "DATABASE" if database is None else database.place
    queries = None if database is store else store.place
    return neighbours_command(root, queries, table, store.state.records[f"neighbours:{table}"])


def embed_command(store: Store, encoder: str, into: Store | None = None) -> str:
    """Return the command that embeds what is new in a store with an encoder that it knows.

    ``into``: in this store instead, under the same name, even if it knows the encoder by another one.
    """
    from retrotool.encoder import plain_name
    from retrotool.tokenizers import BUNDLED

    record = store.state.records[f"encoder:{encoder}"]
    origin, pooling = str(record["origin"]), str(record["pooling"])
    overridden = bool(record.get("overridden"))
    plain = f"{plain_name(origin)}-{pooling}" if overridden else plain_name(origin)
    others = {} if into is None else into.state.with_prefix("encoder:")
    is_known = any(other["sha256"] == record["sha256"] for other in others.values())
    return command_line(
        "embed",
        (into or store).place,
        encoder=None if origin == BUNDLED else origin,
        name=None if encoder == plain and not is_known else encoder,
        pooling=pooling if overridden else None,
    )
