"""``retrotool leakage``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from retrotool.cli import output
from retrotool.cli.command_lines import COMPARED
from retrotool.cli.options import IndexOption, Json, StoreArgument, opt

if TYPE_CHECKING:
    from retrotool.leakage.run import LeakageResult

EPILOG = """\b
Examples:
  retrotool leakage database --evaluation training
  retrotool leakage database --evaluation training --output leakage.parquet"""

_SOURCES = 8


def command(
    store: StoreArgument,
    evaluation: Annotated[str, opt("Store of the evaluation text.", metavar="STORE2")],
    index: IndexOption = None,
    neighbours: Annotated[
        int, opt("Neighbours that a chunk is compared with.", metavar="N", least=1, most=100)
    ] = COMPARED,
    file: Annotated[Path | None, opt("Write each chunk's r to a Parquet file.", "--output", metavar="FILE")] = None,
    as_json: Json = False,
) -> None:
    """Show how much of an evaluation store the database has word for word.

    For each evaluation chunk, r is the longest run of tokens that it has in common with one of its 10 nearest
    neighbours and their continuations, over the 64 tokens of a chunk. Evaluate a model on chunks with r up to some
    share, to tell what it has learnt from what it copies. Documents of the same id in the database count.
    """
    with output.errors(as_json):
        from retrotool.leakage import run as leakage_run

        result = leakage_run.leakage(store, evaluation=evaluation, index=index, neighbours=neighbours, output=file)
        output.show(result, as_json, _text)


def _text(result: LeakageResult) -> str:
    lines = [
        f"{output.count(result.chunks, 'chunk')} of {result.evaluation} against {result.database}, index "
        f"{result.index!r}: mean r {result.mean:.3f}; half or more in common {100 * result.half:.1f} %, "
        f"all of it {100 * result.whole:.1f} %."
    ]
    if not result.chunks:
        return "No chunk to compare with the database: the evaluation store has no embedded chunk that is not purged."
    lines.append(output.table([(a, share) for a, share in result.up_to.items()], ("r up to", "share of chunks")))
    if len(result.sources) > 1:
        rows = [(s.source, s.chunks, s.mean, s.half, s.whole) for s in result.sources[:_SOURCES]]
        lines.append(output.table(rows, ("source", "chunks", "mean r", "r >= 1/2", "r = 1")))
        if len(result.sources) > _SOURCES:
            lines.append(f"and {output.count(len(result.sources) - _SOURCES, 'source')} with less, see --json")
    lines += [f"Each chunk's r: {result.output}"] if result.output else []
    return "\n".join(lines)
