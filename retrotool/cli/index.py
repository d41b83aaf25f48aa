"""``retrotool index``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from retrotool.cli import output
from retrotool.cli.options import EncoderOption, Json, StoreArgument

if TYPE_CHECKING:
    from retrotool.commands.building import IndexResult

EPILOG = """\b
Examples:
  retrotool index store
  retrotool index store --name precise --target-recall 0.99"""


def command(
    store: StoreArgument,
    name: Annotated[str, typer.Option(help="Name of the index.")] = "main",
    target_recall: Annotated[float, typer.Option(metavar="R", help="Share of the true 10 nearest to find.")] = 0.95,
    encoder: EncoderOption = None,
    as_json: Json = False,
) -> None:
    """Build the nearest-neighbour index, and measure its true recall.

    Exact for small stores, an inverted file above. Parts that were embedded since are added. The recall is that of
    random chunks against exact search over all that is indexed, their own documents left out.
    """
    with output.errors(as_json):
        from retrotool import commands

        result = commands.index(store, name=name, encoder=encoder, target_recall=target_recall)
        output.show(result, as_json, _text)
        if result.not_embedded:
            output.note(f"Not indexed: {output.count(result.not_embedded, 'chunk')} without embeddings. Next:")
            output.note("\n".join(f"  {command}" for command in result.next))


def _text(result: IndexResult) -> str:
    lists = f"{result.nlist:,} lists, {result.nprobe:,} probed" if result.nlist else "exact"
    lines = [
        f"Index {result.name!r}: {output.count(result.vectors, 'vector')} of {result.encoder}, "
        f"{result.kind} ({lists}), {result.bytes_per_vector:,.0f} bytes a vector, "
        f"{output.count(result.shards, 'shard')} (commit {result.commit}).",
        f"True recall@10: {result.recall_at_10:.4f} ± {result.recall_error:.4f}",
    ]
    if len(result.curve) > 1:
        lines.append(output.table([(p.nprobe, p.recall, p.error) for p in result.curve], ("nprobe", "recall@10", "±")))
    return "\n".join(lines)
