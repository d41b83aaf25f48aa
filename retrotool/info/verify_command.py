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

Exit codes: 0 OK; 12 a problem was found, or concurrent erases kept removing files."""


def command(
    store: StoreArgument,
    log: Annotated[bool, opt("Check only the log, its chain, fold and checkpoints.", "--log")] = False,
    head: Annotated[
        str | None, opt("With --log: a head from an earlier check, which the log must contain.", metavar="SHA256")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check every checksum, row count and cross-reference of a store; name what repairs each problem.

    The printed hashes are equal for stores of equal content, however these were built: content (tokens of
    live chunks), ids (which chunk has which id), tombstones, embeddings, indexes, neighbours, and
    materialised neighbours.

    With --log, the hash of the last entry (head) is printed. Keep it elsewhere: anyone who can write to the
    store can rewrite the whole log, and only --head with a hash that you kept detects that.
    """
    with output.errors(as_json):
        if head is not None and not log:
            raise UsageError("--head needs --log")
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


def _verdict(found: LogVerification | Verification) -> str:
    return "OK" if found.ok else f"FAILED: {output.count(len(found.problems), 'problem')}"


def _log_text(found: LogVerification) -> str:
    checked = f"{output.count(found.commits, 'commit')}, {output.count(found.checkpoints, 'checkpoint')}"
    lines = [f"{checked}: {_verdict(found)}", *(f"  problem: {problem}" for problem in found.problems)]
    if found.kept is not None:
        lines.append(f"  kept  is commit {found.kept}: the log up to there is unchanged")
    if found.head:
        lines.append(f"  head  {found.head}")
    return "\n".join(lines)


def _text(found: Verification) -> str:
    from retrotool.info.problems import problem_lines

    checked = f"{output.count(found.files, 'file')}, {output.size(found.bytes)}, at commit {found.commit}"
    opened = checked if found.commit >= 0 else "The store can't be opened"
    lines = [f"{opened}: {_verdict(found)}", *problem_lines(found.problems)]
    if found.foreign:
        lines.append(f"  not checked: {output.count(len(found.foreign), 'file')} that retrotool did not make")
        lines += [f"    {output.one_line(path)}" for path in found.foreign]
    if found.unnamed:
        files = output.count(found.unnamed, "file")
        lines.append(
            f"  uncommitted: {files} of running or interrupted commands; the next writing command removes leftovers"
        )
    hashes = ("content", "ids", "tombstones", "embeddings", "indexes", "neighbours", "materialised")
    shown = {name: getattr(found, name) for name in hashes if getattr(found, name)}
    width = max(map(len, shown), default=0) + 1
    lines += [f"  {name:<{width}} {value}" for name, value in shown.items()]
    return "\n".join(lines)
