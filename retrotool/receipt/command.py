"""``retrotool receipt``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from retrotool.cli import output
from retrotool.cli.options import Json, PurgeId, StoreArgument, opt
from retrotool.errors import CorruptError

if TYPE_CHECKING:
    from retrotool.receipt.run import Receipt, VerifiedPurge

EPILOG = """\b
Examples:
  retrotool receipt store last
  retrotool receipt store p1a2b3c4d --out receipts

Exit codes: 0 nothing of the purge is left; 2 usage; 12 something is left, or can't be checked. A purge that is
not erased ends with 12."""


def command(
    store: StoreArgument,
    purge: PurgeId,
    out: Annotated[Path, opt("Folder for the receipt; made if it does not exist.", metavar="DIR")] = Path(),
    as_json: Json = False,
) -> None:
    """Check that nothing of a purge is left, and write a receipt.

    Every file of the store that can hold something of an erased purge is decoded, and every read path is
    exercised. The receipt is a JSON file, receipt-PURGE.json, and a page to print, receipt-PURGE.html.
    """
    from retrotool.receipt import run as receipt_run

    result = receipt_run.verify_purge(store, purge, out=out)
    output.show(result, as_json, lambda result: _text(store, result))
    output.exit_if(not result.receipt.ok, CorruptError.exit_code)


def _text(store: str, result: VerifiedPurge) -> str:
    from retrotool.receipt.run import STATES, verdict

    receipt = result.receipt
    lines = [f"Purge {receipt.purge} of {output.count(receipt.chunks, 'chunk')}: {STATES[receipt.state]}."]
    kinds = [(one.kind, one.files, one.rows, one.left) for one in receipt.files.kinds if one.files]
    lines.append(output.table(kinds, ("decoded", "files", "rows", "left")))
    paths = [(path.name, path.rows, path.found) for path in receipt.read_paths]
    lines.append(output.table(paths, ("read by", "rows", "found")))
    lines += [f"  {path.name}: {output.one_line(path.note)}" for path in receipt.read_paths if path.note]
    lines += [f"  {line}" for line in _about_files(receipt)]
    unknown = [one.line for one in receipt.bucket if one.status == "unknown"]
    lines += [f"not checked: {output.one_line(line)}" for line in unknown]
    lines.append(f"{'OK. ' if receipt.ok and not unknown else ''}{verdict(receipt)}")
    lines += [f"  problem: {output.one_line(problem)}" for problem in receipt.problems]
    if receipt.state != "erased":
        lines.append(f"To erase it: {shlex.join(['retrotool', 'erase', store, receipt.purge])}")
    lines.append(f"Receipt: {result.json} and {result.page}")
    if result.commit is None:
        lines.append("The store is read-only, so its log does not record the receipt.")
    return "\n".join(lines)


def _about_files(receipt: Receipt) -> list[str]:
    durable = "durably" if receipt.files.synced else "but that could not be made durable"
    absent = output.count(receipt.files.replaced - len(receipt.files.present), "file")
    lines = [f"{absent} that left the store before: absent, {durable}"]
    if unknown := receipt.files.unknown:
        lines.append(f"not checked: {output.count(len(unknown), 'file')} that no commit names")
        sizes = ["a link" if one.link else output.size(one.bytes) for one in unknown]
        lines += [f"  {output.one_line(one.path)} ({size})" for one, size in zip(unknown, sizes, strict=True)]
    if receipt.files.in_progress:
        lines.append(f"not checked: {output.count(receipt.files.in_progress, 'file')} of running commands")
    return lines
