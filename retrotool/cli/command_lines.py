"""Command lines for advice: the next command after a result or an error."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retrotool.store.store import Store

K = 2  # default number of neighbours read from a table
SAVED = 20  # default number of neighbours saved
SHOWN = 5  # default number of chunks that ``search`` returns
COMPARED = 10  # neighbours that ``leakage`` compares a chunk with


def command_line(command: str, store: Store | str | Path, **options: object) -> str:
    """Return a command line, without unset options and names of the default table and ``Store``'s index."""
    place, index = str(store), None
    if isinstance(store, Store):
        place, index = store.place, store.state.records.get("default_index", "main")
    default = {"index": {"name": index}, "neighbours": {"name": "main", "index": index}}.get(command, {})
    given = [
        ("-k" if option == "k" else f"--{option}", str(value))
        for option, value in options.items()
        if value is not None and value != default.get(option)
    ]
    return shlex.join(["retrotool", command, place, *(word for pair in given for word in pair)])


def next_command(root: str | Path, done: str, made: str = "") -> str:
    """Return the command after ``done``, which ``made`` an encoder's vectors or an index.

    It is ``build`` if the store has what the next one makes of these, else that, under a name that is free.
    """
    store = Store.open(root)
    encoders, indexes, tables = (store.state.with_prefix(f"{kind}:") for kind in ("encoder", "index", "neighbours"))
    if done == "chunk":
        return command_line("build" if encoders else "embed", root)
    if done == "embed" and all(record["encoder"] != made for record in indexes.values()):
        return command_line("index", root, name=made if indexes else None, encoder=made if len(encoders) > 1 else None)
    if done == "index" and all(record.get("index") != made for record in tables.values()):
        return command_line("neighbours", store, index=made, name=made if tables else None)
    return command_line("build", root)


def neighbours_command(root: str | Path, queries: str | Path | None, name: str, again: Mapping[str, Any]) -> str:
    """Return the command that updates a table with the options ``again``: index, encoder, k and saved."""
    given = {option: again[option] for option, default in (("k", K), ("saved", SAVED)) if again[option] != default}
    # Named even if it is the default index: that may have changed since.
    how = ["--index", str(again["index"])] if again["index"] else ["--exact"]
    if not again["index"] and "encoder" in again:  # older records of dependents have no encoder
        how += ["--encoder", str(again["encoder"])]
    return f"{command_line('neighbours', root, queries=queries, **given, name=name)} {shlex.join(how)}"


def table_command(store: Store, table: str, database: Store | None) -> str:
    """Return the command that updates a table of ``store`` with its own options: others search all of it.

    ``database`` None: the command has a placeholder.
    """
    root = "DATABASE" if database is None else database.place
    queries = None if database is store else store.place
    return neighbours_command(root, queries, table, store.state.records[f"neighbours:{table}"])


def embed_command(store: Store, encoder: str, into: Store | None = None) -> str:
    """Return the command that embeds new chunks of a store with one of its encoders.

    ``into``: embed this store instead, under the same encoder name.
    """
    from retrotool.encoder import default_name
    from retrotool.tokenizers import BUNDLED

    record = store.state.records[f"encoder:{encoder}"]
    origin, pooling = str(record["origin"]), str(record["pooling"])
    source = {"from": "VECTORS"} if record.get("foreign") else {}
    given = pooling if record.get("overridden") else None
    dimension = int(record["dimension"]) if record.get("truncated") else None
    others = {} if into is None else into.state.with_prefix("encoder:")
    is_known = any(other["sha256"] == record["sha256"] for other in others.values())
    is_default = encoder == default_name(origin, given, dimension) and not is_known
    return command_line(
        "embed", (into or store).place, **source, encoder=None if origin == BUNDLED else origin,
        name=None if is_default else encoder, pooling=given, dimension=dimension,
    )  # fmt: skip
