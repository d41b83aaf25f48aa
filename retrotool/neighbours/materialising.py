"""``neighbours --materialise``: the tokens of all neighbours, beside the text that they are for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from retrotool import engine, memory
from retrotool.encoder.devices import cores
from retrotool.errors import UsageError
from retrotool.neighbours.materialise import BLOCK_BYTES, MaterialiseStage
from retrotool.store import claims
from retrotool.store.log import Draft
from retrotool.store.session import writing
from retrotool.store.state import State
from retrotool.store.store import Store

_ROWS_A_WORKER = 1 << 17
"""A worker process takes seconds to start: as long as it takes to do so many rows."""


@dataclass(frozen=True, slots=True)
class MaterialiseResult:
    """What there is now of the neighbours ``name``: k of each of so many rows, in so many parts.

    ``made`` are the rows that this run did; ``elsewhere`` parts are left to other runs.
    """

    name: str
    k: int
    rows: int
    parts: int
    bytes: int
    made: int
    commit: int
    elsewhere: int = 0


def materialise(
    root: str | Path, *, name: str = "main", workers: int | None = None, shard: tuple[int, int] | None = None
) -> MaterialiseResult:
    """Write the tokens of the neighbours ``name`` (a table, or a mixture) that the store ``root`` has.

    ``workers``: processes, each of which takes about 1.5 GiB; default: as many as cores and memory allow.
    """
    store = Store.open(root)
    stage = MaterialiseStage(name, shard)
    with writing(store) as run:
        made = sum(task.weight for task in stage.plan(store))
        store.commit(run, lambda state: _without_tables(state, name))
        engine.execute(stage, store, run, workers=workers or _workers(made))
        store.refresh()
        held = claims.held(store.root, run.id)
        elsewhere = sum(task.key in held for task in stage.plan(store))
    state = store.refresh()
    group = state.group("materialised", name)
    entries = [entry for slot in group if (entry := group.get(slot)) is not None]
    if not entries and not elsewhere:
        raise UsageError(f"{root} has no part with neighbours {name!r}", "Compute them: retrotool neighbours")
    k = int((entries[0].about or {})["k"]) if entries else 0
    rows, size = sum(entry.rows for entry in entries), sum(entry.bytes for entry in entries)
    return MaterialiseResult(name, k, rows, len(entries), size, made, state.number, elsewhere)


def _without_tables(state: State, name: str) -> Draft | None:
    """The commit that takes files away of parts that have no tables any more: nothing would ever replace them."""
    group, record = state.group("materialised", name), state.records.get(f"neighbours:{name}", {})
    tables = [set(state.group("neighbours", str(one["table"]))) for one in record.get("mix", [{"table": name}])]
    gone = [group.get(slot) for slot in group if not all(slot in slots for slots in tables)]
    paths = tuple(entry.path for entry in gone if entry is not None)
    return Draft("materialise", {"name": name}, remove=paths) if paths else None


def _workers(rows: int) -> int:
    """Processes for so many rows: as many as there are cores, half the memory allows, and starting pays for."""
    return max(1, min(cores(), memory.of_machine() // 2 // (3 * BLOCK_BYTES), rows // _ROWS_A_WORKER))
