"""A share of a purge's scan, for a job array: what is scanned is kept, and nothing is purged.

The jobs are at the same scan as the purge that is to follow: one that asks for the same finds it done. Each begins with
its own share of the parts, and goes on with what the others have not begun, so it is no matter if one of them dies.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from retrotool import engine
from retrotool.errors import UsageError
from retrotool.purge.selecting import Selectors
from retrotool.purge.selectors.scan import ScanStage
from retrotool.store import claims
from retrotool.store.session import writing
from retrotool.store.staging import Staged
from retrotool.store.store import Store


@dataclass(frozen=True, slots=True)
class ScanResult:
    """What a share of a scan did: ``parts`` scanned by this run, of ``of`` in the store.

    ``elsewhere`` are parts that other living runs are at. ``done``: all are scanned.
    """

    parts: int
    of: int
    elsewhere: int
    done: bool
    commit: int


def scan(root: str | Path, selectors: Selectors, shard: tuple[int, int]) -> ScanResult:
    """Scan the parts of job ``shard`` (i, n), i from 0, and then those that no other job has begun."""
    if not 0 <= shard[0] < shard[1]:
        raise UsageError(f"--shard {shard[0]}/{shard[1]}: of n jobs this is one from 0 to n - 1")
    store = Store.open(root)
    scanned = selectors.asked(store).scanned
    if not scanned:
        raise UsageError(
            "--shard shares the scan that selectors by content need, and none is given",
            "What is looked up (--ids, --documents, --where, --duplicates) is purged without it.",
        )
    stage = ScanStage(scanned, shard)
    parts = 0

    def count(_: Staged) -> bool:
        nonlocal parts
        parts += 1
        return False

    with writing(store) as run:
        engine.execute(stage, store, run, enough=count)
        store.refresh()
        held = claims.held(store.root, run.id)
        elsewhere = sum(task.key in held for task in stage.plan(store))
    return ScanResult(parts, len(store.state.parts()), elsewhere, stage.is_done(store), store.state.number)
