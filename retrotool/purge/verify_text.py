"""What ``retrotool purge STORE PURGE --verify`` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from retrotool.cli import output
from retrotool.errors import CorruptError

if TYPE_CHECKING:
    from pathlib import Path

    from retrotool.purge.proving import Receipt, VerifiedPurge


def show_verified(store: Path, result: VerifiedPurge, as_json: bool) -> None:
    """Print what was found of a purge; ``typer.Exit`` if anything was."""
    output.show(result, as_json, lambda result: _text(store, result))
    if not result.receipt.ok:
        raise typer.Exit(CorruptError.exit_code)


def _text(store: Path, result: VerifiedPurge) -> str:
    from retrotool.purge.receipt_page import STATES, verdict

    receipt = result.receipt
    lines = [f"Purge {receipt.purge} of {output.count(receipt.chunks, 'chunk')}: {STATES[receipt.state].lower()}."]
    rows = [(view.name, view.rows, view.found) for view in receipt.views]
    lines.append(output.table(rows, ("seen by", "rows", "found")))
    lines += [f"  {view.name}: {view.note}" for view in receipt.views if view.note]
    lines += _searched(receipt)
    if receipt.ok:
        lines.append(verdict(receipt))
    else:
        lines.append("NOT well:")
        lines += [f"  problem: {output.one_line(problem)}" for problem in receipt.problems]
    if receipt.state != "erased":
        lines.append(f"To erase it: retrotool purge {store} {receipt.purge} --erase")
    lines.append(f"Receipt: {result.json} and {result.page}")
    if result.salt:
        lines.append(f"For whoever is to check the hashes on it: {result.salt}")
    if result.commit is None:
        lines.append("The store can't be written to, so its log does not name the receipt.")
    return "\n".join(lines)


def _searched(receipt: Receipt) -> list[str]:
    searched = receipt.searched
    if searched is None:
        return []
    total = sum(searched.needles.values())
    lines = [
        f"  searched {output.count(searched.files, 'file')}, {output.size(searched.bytes)}, for {total:,} pieces of it"
    ]
    if searched.said_by_others:
        lines.append(f"  {searched.said_by_others:,} of them are other documents', which stay: they say them, too")
    return lines
