"""``retrotool verify``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from retrotool.cli import output
from retrotool.cli.options import Json, StoreArgument, opt
from retrotool.errors import CorruptError, UsageError

if TYPE_CHECKING:
    from retrotool.info.log_entries import LogVerification
    from retrotool.info.verify import Verification

EPILOG = """\b
Examples:
  retrotool verify store
  retrotool verify store --json
  retrotool verify store --log

Exit codes: 0 all is well, 12 something is not, or so much was erased meanwhile that it can't be told."""


def command(
    store: StoreArgument,
    log: Annotated[bool, opt("Check only the log, its chain, fold and checkpoints.", "--log")] = False,
    head: Annotated[
        str | None,
        opt(
            "With --log: the hash of a last entry, kept from an earlier check. The log must still have it.",
            "--head",
            metavar="SHA256",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check every checksum, row count and cross-reference of a store.

    The hashes are equal for stores of equal content, however they were made: content (what live chunks say), ids
    (which chunk is which), tombstones, embeddings, indexes, neighbours, and these materialised.

    With --log it tells the hash of the last entry. Keep it elsewhere: who can write the store can write the whole log
    anew, and only a hash that was kept, given as --head, finds that.
    """
    with output.errors(as_json):
        if head is not None and not log:
            raise UsageError("--head is a hash of the log", "Give it with --log.")
        found: LogVerification | Verification
        if log:
            from retrotool.info.log_entries import verify_log

            found = verify_log(store, head)
            output.show(found, as_json, _log_text)
        else:
            from retrotool.engine.progress import counting
            from retrotool.info import verify

            with counting("verify", "B", verify.bytes_to_verify(store)) as report:
                found = verify.verify(store, report)
            output.show(found, as_json, _text)
        if not found.ok:
            raise typer.Exit(CorruptError.exit_code)


def _log_text(found: LogVerification) -> str:
    well = "the chain is whole." if found.ok else "NOT well."
    lines = [f"{output.count(found.commits, 'commit')}, {output.count(found.checkpoints, 'checkpoint')}: {well}"]
    lines += [f"  problem: {problem}" for problem in found.problems]
    if found.kept is not None:
        lines.append(f"  kept  is commit {found.kept}: up to there it is the log that was checked then")
    if found.head:
        lines.append(f"  head  {found.head}")
    return "\n".join(lines)


def _text(found: Verification) -> str:
    lines = [
        f"{output.count(found.files, 'file')}, {output.size(found.bytes)}, at commit {found.commit}: "
        + ("all is well." if found.ok else "NOT well.")
        if found.commit >= 0 or found.ok
        else "The store can't be opened: NOT well."
    ]
    lines += [f"  problem: {problem}" for problem in found.problems]
    if found.foreign:
        lines.append(f"  not checked: {output.count(len(found.foreign), 'file')} that retrotool did not make")
        lines += [f"    {output.one_line(path)}" for path in found.foreign]
    if found.unnamed:
        lines.append(
            f"  not named by a commit: {output.count(found.unnamed, 'file')} of commands that are running, or were "
            "interrupted; the next command that writes removes those of the latter"
        )
    hashes = ("content", "ids", "tombstones", "embeddings", "indexes", "neighbours", "materialised")
    shown = {name: getattr(found, name) for name in hashes if getattr(found, name)}
    width = max(map(len, shown), default=0) + 1
    lines += [f"  {name:<{width}} {value}" for name, value in shown.items()]
    return "\n".join(lines)
