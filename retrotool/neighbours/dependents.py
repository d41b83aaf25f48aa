"""Record which other stores have neighbours in a database.

``neighbours`` adds a record to the database when it makes tables in another store. A database never changes
these stores: an erase lists them, each with the command that removes erased chunks from its tables. Until
then readers mask them, as they read tables only through the tombstones of the database
(``neighbours.table_reader``).

A record is a hint: the store may have been moved or deleted since, and a read-only database has no records.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from retrotool.cli.command_lines import neighbours_command
from retrotool.errors import RetrotoolError, StorageError
from retrotool.store.leases import Run
from retrotool.store.log import Draft
from retrotool.store.state import State
from retrotool.store.store import Store

PREFIX = "dependent:"


@dataclass(frozen=True, slots=True)
class Dependent:
    """A store with neighbours in the database, at its last known ``path``."""

    path: str
    uuid: str
    table: str
    since: str  # UTC time of the first record
    command: str  # updates the tables


def dependents(database: Store) -> list[Dependent]:
    """Return the stores that have neighbours in a database, by its records; none of them is opened."""
    return [
        Dependent(
            record["uri"], record["uuid"], record["table"], record["since"],
            neighbours_command(database.place, record["uri"], record["table"], record["again"]),
        )
        for record in database.state.with_prefix(PREFIX).values()
    ]  # fmt: skip


def register_dependent(database: Store, queries: Store, table: str, again: Mapping[str, Any]) -> bool:
    """Record in a database that ``queries`` has neighbours in it; return False if it is not writable.

    ``again``: index, encoder, k and saved of the tables. Removes records of the store's former paths.
    """
    uri, uuid = queries.uri, queries.identity.uuid
    place = hashlib.blake2b(uri.encode("utf-8", "surrogateescape"), digest_size=4).hexdigest()
    key = f"{PREFIX}{uuid}:{table}:{place}"
    now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")

    def build(state: State) -> Draft | None:
        old = state.records.get(key, {"since": now})
        record = {"uri": uri, "uuid": uuid, "table": table, "since": old["since"], "again": dict(again)}
        if record == old:
            return None
        others = [other for other in state.records if other.startswith(f"{PREFIX}{uuid}:{table}:") and other != key]
        moved = {other: None for other in others if not _is_there(state.records[other])}
        return Draft("neighbours", {"dependent": table}, records={key: record, **moved})

    try:
        if build(database.refresh()) is not None:
            with Run(database.storage) as run:
                database.commit(run, build)
    except (StorageError, PermissionError):
        return False
    return True


def _is_there(record: Mapping[str, Any]) -> bool:
    try:
        return Store.open(record["uri"]).identity.uuid == str(record["uuid"])
    except (RetrotoolError, OSError):
        return False
