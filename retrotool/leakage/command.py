"""``retrotool leakage``."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from retrotool.cli import output
from retrotool.cli.command_lines import COMPARED
from retrotool.cli.options import IndexOption, Json, StoreArgument, opt

if TYPE_CHECKING:
    from retrotool.leakage.run import LeakageResult

EPILOG = """\b
Examples:
  retrotool leakage database --queries training
  retrotool leakage database --queries training --out leakage.parquet"""

_SOURCES = 8


def command(
    store: StoreArgument,
    queries: Annotated[str, opt("Store of the evaluation text.", metavar="STORE2")],
    index: IndexOption = None,
    k: Annotated[int, opt("Neighbours to compare each chunk with.", "-k", metavar="K", least=1, most=100)] = COMPARED,
    out: Annotated[Path | None, opt("Parquet file for each chunk's r and neighbour.", metavar="FILE")] = None,
    as_json: Json = False,
) -> None:
    """Measure how much of an evaluation store's text the database STORE contains word for word.

    For each evaluation chunk, r is the longest run of tokens in common with one of its K nearest neighbours
    and their continuations, divided by the length of a full chunk. Evaluating a model only on chunks with a
    low r separates what it has learnt from what it copies. In short chunks r is low even if all is copied:
    the copied share is the run divided by the chunk's own length. Documents with the same id in the database
    count as well.
    """
    from retrotool.leakage import run as leakage_run

    result = leakage_run.leakage(store, queries=queries, index=index, k=k, out=out)
    output.show(result, as_json, _text)


def _text(result: LeakageResult) -> str:
    if not result.chunks:
        return "Nothing to compare with the database: the evaluation store has no live embedded chunk."
    rows = [(a, share, result.copied_up_to[a]) for a, share in result.up_to.items()]
    lines = [
        f"{output.count(result.chunks, 'chunk')} of {result.evaluation} compared with {result.database} (index "
        f"{result.index!r}): mean r {result.mean:.3f}; half or more in common {100 * result.half:.1f} %, "
        f"all of it {100 * result.whole:.1f} %.",
        f"By a chunk's own length: mean copied share {result.copied:.3f}; half or more copied "
        f"{100 * result.copied_half:.1f} %, all of it {100 * result.copied_whole:.1f} %.",
        output.table(rows, ("up to", "share of chunks by r", "by copied share")),
    ]
    if len(result.sources) > 1:
        header = ("source", "chunks", "mean r", "r >= 1/2", "r = 1", "mean copied", "copied >= 1/2", "copied = 1")
        lines.append(output.table([astuple(one) for one in result.sources[:_SOURCES]], header))
        if len(result.sources) > _SOURCES:
            lines.append(f"and {output.count(len(result.sources) - _SOURCES, 'source')} with a lower r, see --json")
    lines += [f"Each chunk's r: {result.output}"] if result.output else []
    return "\n".join(lines)
