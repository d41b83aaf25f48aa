"""What ``retrotool purge STORE PURGE --verify`` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from retrotool.cli import output
from retrotool.errors import CorruptError

if TYPE_CHECKING:
    from pathlib import Path

    from retrotool.commands.proving import Receipt, VerifiedPurge

_STATES = {
    "erased": "purged and erased",
    "begun": "purged; an erase was begun, and is not at its end",
    "purged": "purged, not erased: its bytes are still in the files",
}


def show_verified(store: Path, result: VerifiedPurge, as_json: bool) -> None:
    """Print what was found of a purge; ``typer.Exit`` if anything was."""
    output.show(result, as_json, lambda result: _text(store, result))
    if not result.receipt.ok:
        raise typer.Exit(CorruptError.exit_code)


def _text(store: Path, result: VerifiedPurge) -> str:
    receipt = result.receipt
    lines = [f"Purge {receipt.purge} of {output.count(receipt.chunks, 'chunk')}: {_STATES[receipt.state]}."]
    rows = [(view.name, view.rows, view.found) for view in receipt.views]
    lines.append(output.table(rows, ("seen by", "rows", "found")))
    lines += [f"  {view.name}: {view.note}" for view in receipt.views if view.note]
    lines += _searched(receipt)
    if receipt.ok:
        lines.append("Nothing of it was found." if receipt.state == "erased" else "No command returns any of it.")
    else:
        lines.append("NOT well:")
        lines += [f"  problem: {problem}" for problem in receipt.problems]
    if receipt.state != "erased" or (receipt.searched and receipt.searched.left):
        lines.append(f"To erase what is left of it: retrotool purge {store} {receipt.purge} --erase")
    lines.append(f"Receipt: {result.json} and {result.page}")
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
        lines.append(f"  {searched.said_by_others:,} of them are also said by documents that stay, which may")
    return lines
