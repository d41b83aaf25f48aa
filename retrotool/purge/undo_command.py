"""``retrotool undo``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from retrotool.cli import output
from retrotool.cli.options import Json, StoreArgument, arg, complete_purges, opt

if TYPE_CHECKING:
    from retrotool.purge.undo import UndoResult

EPILOG = """\b
Examples:
  retrotool undo store last --reason "the wrong list"
  retrotool undo store p1a2b3c4d --reason "the wrong list\""""


def command(
    store: StoreArgument,
    purge: Annotated[str, arg("Id of the purge; last is the newest one.", metavar="PURGE", complete=complete_purges)],
    reason: Annotated[str, opt("Why. It stays in the log forever, so it must not name a person.", metavar="TEXT")],
    as_json: Json = False,
) -> None:
    """Undo a purge that has not been erased: its chunks are live again."""
    with output.errors(as_json):
        from retrotool.purge.undo import undo

        output.show(undo(store, purge, reason=reason), as_json, _text)


def _text(result: UndoResult) -> str:
    again = "is live again" if result.chunks == 1 else "are live again"
    lines = [
        f"Undid purge {result.purge}: {output.count(result.chunks, 'chunk')}, "
        f"{output.count(result.documents, 'whole document')}, {again} (commit {result.commit})."
    ]
    if result.still_purged:
        by = f": {', '.join(result.named_by)} purged them, too" if result.named_by else ", because they repeat others"
        lines.append(f"Still purged: {output.count(result.still_purged, 'chunk')} of it{by}.")
    if result.repeats:
        has = "document has" if result.repeats == 1 else "documents have"
        lines.append(f"{result.repeats:,} {has} the id of another that was added since: both are live now.")
    if result.next:
        lines.append("Neighbours that were found while it was purged lack its chunks. Update them:")
        lines += [f"  {command}" for command in result.next]
    return "\n".join(lines)
