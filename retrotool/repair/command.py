"""``retrotool repair``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from retrotool.cli import output
from retrotool.cli.options import DevicesOption, Json, StoreArgument, opt
from retrotool.errors import CorruptError

if TYPE_CHECKING:
    from retrotool.repair.run import RepairResult

EPILOG = """\b
Examples:
  retrotool repair store
  retrotool repair store --dry-run --json
  retrotool repair store --shard 3/16

Exit codes: 0 nothing is damaged, or not any more; 12 something is."""


def command(
    store: StoreArgument,
    dry_run: Annotated[bool, opt("Only print what is damaged, and what can be rebuilt.", "--dry-run")] = False,
    devices: DevicesOption = "auto",
    as_json: Json = False,
) -> None:
    """Rebuild damaged embeddings, indexes and neighbours from the chunks.

    Reads the store like verify, before and after. Sound files stay as they are, and a damaged one is replaced
    in one commit, so it can be interrupted and run again. Documents, chunks, purges and the log can't be
    rebuilt: for these it prints what is lost, and what to restore from a backup.

    With --shard, each job verifies and repairs its share of the files, and what these are made from.
    """
    from retrotool.repair import run as repair_run

    result = repair_run.repair(store, dry_run=dry_run, devices=devices)
    output.show(result, as_json, lambda result: _text(result, dry_run))
    output.exit_if(not result.ok, CorruptError.exit_code)


def _text(result: RepairResult, dry_run: bool) -> str:
    from retrotool.info.problems import problem_lines

    lines = []
    for one in result.repaired:
        removed = "removed: the index was trained again" if one.path.startswith("index/") else "removed: not needed"
        how = "restored bit for bit" if one.same else "rebuilt" if one.replacement else removed
        lines.append(f"{one.path}: {how}")
    if result.ok:
        now, share = " any more" if lines else "", f" in share {result.shard}" if result.shard else ""
        lines.append(f"Nothing is damaged{now}{share} (commit {result.commit}).")
        if result.shard and any(one.replacement and not one.same for one in result.repaired):
            lines.append("Next: retrotool verify, as other jobs may have files that were made from what was rebuilt.")
        return "\n".join(lines)
    left = output.count(len(result.remaining), "problem")
    lines.append(f"{left} found; nothing was changed:" if dry_run else f"FAILED: {left} left:")
    return "\n".join([*lines, *problem_lines(result.remaining)])
