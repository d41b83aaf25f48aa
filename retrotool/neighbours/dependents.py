"""Who uses a database: other stores whose chunks have neighbours in it.

``neighbours`` leaves a record in the database whenever it makes tables of another store, so that an erase in the
database can say where ids of what it erased, or text, may be left. The ids are never returned, as whoever reads those
tables goes through the database's tombstones; ``neighbours`` takes them out of the tables when it is run again.

A record is a claim, not a lock: a store may have moved or have been deleted since, and a database that can't be written
knows nothing of its consumers.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from retrotool.errors import RetrotoolError, StorageError
from retrotool.neighbours.stage import members_of
from retrotool.store import tables
from retrotool.store.log import Draft
from retrotool.store.parts import ROW_GROUP
from retrotool.store.runs import Run
from retrotool.store.state import State
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones

PREFIX = "consumer:"
_NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True, slots=True)
class Consumer:
    """A store that has neighbours in the database: where it was, its ``uuid``, the name of the tables.

    ``since``: when it was noted, UTC. ``materialised``: texts of neighbours were written beside the tables. ``again``:
    the options that the same ``neighbours`` takes.
    """

    path: str
    uuid: str
    table: str
    since: str
    materialised: bool
    again: Mapping[str, Any]

    def open(self) -> Store | None:
        """The store, if it is there."""
        try:
            store = Store.open(self.path)
        except (RetrotoolError, OSError):
            return None
        return store if store.identity.uuid == self.uuid else None


def consumers(state: State) -> list[Consumer]:
    """The stores that are known to have neighbours in a database."""
    return [_consumer(record) for record in state.with_prefix(PREFIX).values()]


def _consumer(record: Mapping[str, Any]) -> Consumer:
    names = ("path", "uuid", "table", "since", "materialised", "again")
    return Consumer(**{name: record[name] for name in names})


def register(
    database: Store, queries: Store, table: str, again: Mapping[str, Any], *, materialised: bool = False
) -> bool:
    """Note in a database that ``queries`` has neighbours ``table`` in it; False if it can't be written.

    What is noted already is left as it is, and ``materialised`` once it is true. Where the same store was noted at
    another place, and is there no more, that note goes.
    """
    path, uuid = str(queries.root.absolute()), queries.identity.uuid
    key = (
        f"{PREFIX}{uuid}:{table}:{hashlib.blake2b(path.encode('utf-8', 'surrogateescape'), digest_size=4).hexdigest()}"
    )
    since = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")

    def build(state: State) -> Draft | None:
        old = state.records.get(key, {"since": since, "materialised": False})
        record = {
            "path": path, "uuid": uuid, "table": table, "since": old["since"],
            "materialised": old["materialised"] or materialised, "again": dict(again),
        }  # fmt: skip
        if record == old:
            return None
        moved = [other for other in state.records if other.startswith(f"{PREFIX}{uuid}:{table}:") and other != key]
        gone = {other: None for other in moved if _consumer(state.records[other]).open() is None}
        return Draft("neighbours", {"consumer": table}, records={key: record, **gone})

    try:
        if build(database.refresh()) is not None:
            with Run(database.root) as run:
                database.commit(run, build)
    except StorageError:
        return False
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        return False
    return True


@dataclass(frozen=True, slots=True)
class Holding:
    """A consumer after an erase: its store, None if it is not where it was; whether its tables name what was erased."""

    consumer: Consumer
    store: Store | None
    names_erased: bool


def holding(database: Store, erased: Tombstones, report: Callable[[int], object]) -> Iterator[Holding]:
    """The consumers in which ids of erased chunks are left, or text may be, or that can't be looked at.

    Reads their tables, until one of a consumer names such a chunk; ``report`` is told of each file. Whoever is to
    rewrite what a consumer has finds it here, opened.
    """
    for consumer in consumers(database.state):
        store = consumer.open()
        if store is None:
            yield Holding(consumer, None, False)
            continue
        found = _names(store, consumer.table, database, erased, report)
        if found is not None and (found or consumer.materialised):
            yield Holding(consumer, store, found)


def is_of_this(store: Store, table: str, database: Store) -> bool:
    """Whether neighbours of a store are of a database as it lies there, not of a copy of it at another place."""
    for name, _ in members_of(store, table):
        record = store.state.records.get(f"neighbours:{name}", {})
        there = Path(str(record.get("path", "")))
        if record.get("database") == database.identity.uuid and there.is_dir() and there.samefile(database.root):
            return True
    return False


def _names(
    store: Store, table: str, database: Store, erased: Tombstones, report: Callable[[int], object]
) -> bool | None:
    """Whether tables of a store name an erased chunk of a database; None if none of them is of it any more."""
    names = [name for name, _ in members_of(store, table)]
    records = {name: store.state.records.get(f"neighbours:{name}") for name in names}
    own = [name for name, record in records.items() if record and record["database"] == database.identity.uuid]
    if not own:
        return None
    for name in own:
        for slot in store.state.group("neighbours", name):
            entry = store.state.file("neighbours", slot, name)
            for group in range(-(-entry.rows // ROW_GROUP) if entry is not None else 0):
                assert entry is not None
                if erased.contains(tables.read_table(store, entry, [group]).ids).any():
                    return True
            report(1)
    return False


def table_files(database: Store) -> int:
    """How many files ``holding`` may have to read."""
    opened = [(consumer, consumer.open()) for consumer in consumers(database.state)]
    return sum(len(store.state.group("neighbours", consumer.table)) for consumer, store in opened if store is not None)
