"""``retrotool erase``."""

from __future__ import annotations

import re
import shlex
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Annotated

from retrotool.cli import output
from retrotool.cli.options import Json, StoreArgument, arg, complete_purges, opt
from retrotool.errors import UsageError

if TYPE_CHECKING:
    from retrotool.neighbours.dependents import Dependent
    from retrotool.purge.erase import EraseResult
    from retrotool.purge.run import PurgeResult

EPILOG = """\b
Examples:
  retrotool erase store last --yes
  retrotool erase store p1a2b3c4d p5e6f7a8b --yes
  retrotool erase store --older-than 7d --dry-run"""

ASK_ABOVE = 0.01
_LISTED = 3
yes_option = Annotated[bool, opt("Don't ask before more than 1 % of the store is purged or erased.", "--yes")]


def command(
    store: StoreArgument,
    purges: Annotated[
        list[str] | None,
        arg("Ids of purges; last is the newest one.", metavar="[PURGE]...", complete=complete_purges),
    ] = None,
    older_than: Annotated[str | None, opt("All purges older than this, such as 7d or 12h.", metavar="AGE")] = None,
    dry_run: Annotated[bool, opt("Show what would be erased, and change nothing.", "--dry-run")] = False,
    retrain_index: Annotated[
        bool, opt("Then train all indexes again, without what was erased.", "--retrain-index")
    ] = False,
    yes: yes_option = False,
    as_json: Json = False,
) -> None:
    """Erase purged chunks: rewrite the files that hold their text, tokens and vectors.

    This can't be undone. An erase that was interrupted is resumed by running it again. Copies of the chunks that
    chunk rejected as duplicates are erased with them. Check the result with retrotool receipt.
    """
    with output.errors(as_json):
        from retrotool.purge.erase import erase, retrain_indexes

        if not purges and older_than is None:
            command = shlex.join(["retrotool", "purge", store])
            raise UsageError("no purge to erase was given", f"Give PURGE or --older-than AGE. List purges: {command}")
        age = None if older_than is None else _seconds(older_than)
        confirm = partial(confirmed, yes=yes, erase=True, stopped="Nothing was erased.", as_json=as_json)
        result = erase(store, purges or (), older_than=age, dry_run=dry_run, confirm=confirm)
        output.show(result, as_json, lambda result: _text(store, result, dry_run))
        if retrain_index and result.purges and not dry_run:
            for sentence in retrain_indexes(store):
                output.note(sentence)


def _seconds(age: str) -> float:
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
    advice = "Give for example 7d, 12h or 2w."
    if re.fullmatch(r"[0-9]+[smhdw]", age) is None:
        raise UsageError(f"--older-than {age!a} is not an age", advice)
    seconds = float(age[:-1]) * units[age[-1]]
    if seconds > time.time():
        raise UsageError(f"--older-than {age[:40]}: no purge is older than 1970", advice)
    return seconds


def _text(store: str, result: EraseResult, dry_run: bool) -> str:
    if not result.purges:
        return "Nothing to erase: no purge is that old."
    if dry_run:
        of = f"of {output.count(len(result.purges), 'purge')}: {', '.join(result.purges)}"
        return f"Would erase {output.count(result.unerased, 'chunk')}{copies_text(result)}, {of}. Nothing was changed."
    return "\n".join(erased_lines(store, result))


def erased_lines(store: str, result: PurgeResult | EraseResult) -> list[str]:
    """Describe what an erase did, what it did not reach, and the next commands."""
    lines = []
    if result.erased:
        done = f"{output.count(result.files_rewritten, 'file')} rewritten"
        if not result.files_rewritten:
            done = "they were erased before"
        lines.append(f"Erased {output.count(result.erased, 'chunk')}{copies_text(result)}; {done}.")
        receipts = [shlex.join(["retrotool", "receipt", store, purge]) for purge in result.purges[:_LISTED]]
        lines += [f"Check it: {command}" for command in receipts]
    lines += [f"Not reached: {what}." for what in result.not_reached]
    return lines + [dependent_text(one) for one in result.dependents]


def copies_text(result: PurgeResult | EraseResult) -> str:
    """Describe the copies that an erase includes; "" without any."""
    if not result.copies:
        return ""
    repeating = "rejected document that repeats" if result.copies == 1 else "rejected documents that repeat"
    return f", including those of {result.copies:,} {repeating} them"


def dependent_text(one: Dependent) -> str:
    """Describe neighbours in another store that an erase did not reach, and the command that updates them."""
    return (
        f"Not reached: neighbours {one.table!r} of {output.one_line(one.path)}, another store. They may contain ids "
        f"and text of erased chunks, which readers skip. Remove them: {one.command}"
    )


def confirmed(planned: PurgeResult | EraseResult, *, yes: bool, erase: bool, stopped: str, as_json: bool) -> bool:
    """Ask a person before more than ``ASK_ABOVE`` of a store is purged or erased; a no ends the command.

    ``UsageError`` where there is no terminal to ask on.
    """
    if yes or max(getattr(planned, "share", 0.0), planned.unerased_share) <= ASK_ABOVE:
        return True
    warning = _warning(planned, erase)
    if not sys.stdin.isatty():
        raise UsageError(warning, "More than 1 % needs --yes. Look at it first with --dry-run.")
    sys.stderr.write(f"{warning}. Continue? [y/N]: ")
    sys.stderr.flush()
    # typer's prompt can't tell Ctrl-C, which ends a command with another exit code, from an answer.
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        output.stop(stopped, as_json)
    return True


def _warning(planned: PurgeResult | EraseResult, erase: bool) -> str:
    does = []
    chunks, share = getattr(planned, "chunks", 0), getattr(planned, "share", 0.0)
    if chunks:
        does.append(f"purges {output.count(chunks, 'chunk')}, {share:.1%} of the store")
    if erase:
        share = f"{planned.unerased_share:.1%} of all chunks it ever had"
        does.append(f"erases {output.count(planned.unerased, 'chunk')} permanently, {share}")
    return f"This {', and '.join(does)}"
