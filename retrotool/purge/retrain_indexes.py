"""``purge --erase --retrain-index``: training indexes anew, for whoever wants centroids and codebooks without a victim.

Centroids, codebooks and rotations are means over thousands of vectors; an erase leaves them as they are. Cost: that of
building the indexes.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from retrotool.cli.command_lines import table_command
from retrotool.embed.search_scope import is_same_directory
from retrotool.errors import UsageError
from retrotool.index.generations import index_key
from retrotool.index.run import Options, index
from retrotool.neighbours.stage import database_of
from retrotool.store.store import Store

_PLAIN = ("Flat", "SQfp16")
"""Factories of indexes that learn nothing from vectors."""


def retrain_indexes(root: str | Path) -> Iterator[str]:
    """Train every index anew that has learned anything; what was done, and what to run then, as sentences."""
    store = Store.open(root)
    trained = [
        name
        for name in store.state.names("index")
        if str(store.state.records.get(index_key(name), {}).get("factory")) not in _PLAIN
    ]
    for name in trained:
        try:
            result = index(root, name=name, options=Options(retrain=True))
        except UsageError as error:  # too few vectors are left for as many lists, perhaps
            again = shlex.join(["retrotool", "index", str(root), "--name", name, "--retrain"])
            yield f"Index {name!r} is as it was: {error}. {error.advice} With: {again}"
        else:
            yield f"Index {name!r} was trained anew, with {result.vectors:,} vectors."
    store.refresh()
    for table, record in store.state.with_prefix("neighbours:").items():
        if record.get("index") in trained:
            database = database_of(store, table)[0]
            if is_same_directory(store, database):
                again = table_command(store, table, database)
                yield f"Neighbours {table!r} are of the old training. Compute them anew: {again}"
