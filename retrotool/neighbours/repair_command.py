"""``retrotool purge STORE --repair``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from retrotool.cli import output

if TYPE_CHECKING:
    from retrotool.neighbours.repair_run import RepairCost, RepairResult, TableRepaired, TablesElsewhere


def run_repair(store: Path, name: str | None, dry_run: bool, as_json: bool) -> None:
    """Repair tables, and print what that costs before, and what it did. Exits as the first that could not be."""
    from retrotool.neighbours import repair_run

    result = repair_run.repair(store, name=name, dry_run=dry_run, begin=_tell_cost)
    output.show(result, as_json, _text)
    if result.refused:
        raise typer.Exit(result.refused[0].exit_code)


def _tell_cost(cost: RepairCost) -> None:
    if cost.files:
        of = ", ".join(map(repr, cost.tables))
        output.note(f"Reads {output.size(cost.bytes)}: {output.count(cost.files, 'part')} of the neighbours {of}.")


def _text(result: RepairResult) -> str:
    lines = [line for one in result.tables for line in _table(one, result.dry_run)]
    lines += [f"Not repaired: {one.error}. {one.advice}".rstrip() for one in result.refused]
    return "\n".join(lines + [_elsewhere(one) for one in result.consumers])


def _table(one: TableRepaired, dry_run: bool) -> list[str]:
    what = f"Neighbours {one.table!r} of {output.count(one.rows, 'chunk')} ({one.k} used of {one.saved} saved)"
    if not one.parts_read:
        lines = [f"{what}: nothing to repair, nothing was purged since."]
    else:
        rows = [("filled up from what is saved", one.filled)]
        rows.append(("to search again" if dry_run else "searched again", one.searched))
        if not dry_run:
            rows.append(("still short: there are no more", one.short))
        lines = [f"{what}: {one.touched:,} had purged ones among those saved.", output.table(rows)]
    if one.behind:
        lines.append(
            f"  {output.count(one.behind, 'part')} left as they are, as they lack more than what was purged. "
            f"Bring them up to date: {one.command}"
        )
    if one.elsewhere:
        lines.append(f"  {output.count(one.elsewhere, 'part')} left to runs that are at work")
    if one.stale:
        lines.append(f"  {output.count(one.stale, 'part')} materialised as they were before. Anew: {one.materialise}")
    return lines


def _elsewhere(one: TablesElsewhere) -> str:
    what = f"neighbours {one.table!r} of {one.path}"
    if not one.there:
        return f"Not looked at: {what}, which is not there now. Where it is, run: {one.command}"
    return f"Not touched: {what}, another store. Repair them: {one.command}"
