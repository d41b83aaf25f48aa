"""What ``retrotool purge STORE PURGE --restore`` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from retrotool.cli import output

if TYPE_CHECKING:
    from retrotool.purge.undo_run import RestoreResult, TablesLack


def show_restored(result: RestoreResult, as_json: bool) -> None:
    """Print what taking a purge back did, and what has to be run after it."""
    output.show(result, as_json, _text)


def _text(result: RestoreResult) -> str:
    again = "is living again" if result.chunks == 1 else "are living again"
    lines = [
        f"Took purge {result.purge} back: {output.count(result.chunks, 'chunk')}, "
        f"{output.count(result.documents, 'whole document')}, {again} (commit {result.commit})."
    ]
    if result.still_purged:
        by = f": {', '.join(result.named_by)} took them, too" if result.named_by else ", as they repeat others"
        lines.append(f"Still purged: {output.count(result.still_purged, 'chunk')} of it{by}.")
    if result.repeats:
        lines.append(
            f"There twice now: {output.count(result.repeats, 'document')}, as another with its id has come since."
        )
    return "\n".join([*lines, *map(_tables, result.tables)])


def _tables(one: TablesLack) -> str:
    what = f"neighbours {one.table!r} of {one.path}"
    if not one.there:
        return f"Not looked at: {what}, or their database: another store. Bring them up to date: {one.command}"
    return f"Made meanwhile: {what}, in {output.count(one.parts, 'part')}. Bring them up to date: {one.command}"
