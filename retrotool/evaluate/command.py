"""``retrotool evaluate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from retrotool.cli import options, output
from retrotool.cli.command_lines import COMPARED
from retrotool.cli.options import Json, StoreArgument, opt

if TYPE_CHECKING:
    from retrotool.evaluate.bits_per_byte import BitsPerByte, RatioEstimate
    from retrotool.evaluate.run import EvaluateResult, TableResult

EPILOG = """\b
Examples:
  retrotool evaluate database --queries training --name wiki --model models/my-llama
  retrotool evaluate database --queries training --name wiki --name mixed --model models/my-llama -k 5 --limit 20"""

_SOURCES = 8


def command(
    store: StoreArgument,
    queries: Annotated[str, opt("Store of the evaluation text, with neighbours in STORE.", metavar="STORE2")],
    model: Annotated[
        str, opt("Directory of a causal model of transformers or of retrotool train, or a GGUF file.", metavar="DIR")
    ],
    name: Annotated[
        list[str] | None, opt("Table of neighbours; repeatable.  [default: main, or the only one]", metavar="NAME")
    ] = None,
    k: Annotated[
        int | None, opt("Neighbours per chunk.  [default: the table's]", "-k", metavar="K", least=1, most=40)
    ] = None,
    context: Annotated[
        int | None,
        opt("Tokens of the document before a chunk.  [default: up to 2,048, or as in training]", metavar="N", least=1),
    ] = None,
    limit: Annotated[
        int | None, opt("Score at most N chunks, drawn at random.  [default: all]", metavar="N", least=1)
    ] = None,
    seed: Annotated[int, opt("Seed of the random chunks.", metavar="N", least=0)] = 0,
    batch_size: Annotated[int, opt("Chunks that the model reads at once.", metavar="N", least=1)] = 8,
    devices: options.Device = "auto",
    dtype: Annotated[
        str,
        opt("auto (float32 on a CPU, else as the model was saved), float32, float16 or bfloat16.", metavar="DTYPE"),
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Measure what retrieval from the database STORE gives a language model, in bits per byte.

    The text of STORE2 is scored with retrieval on and off: all of it, chunks of which at most a share is
    copied from their ten nearest neighbours and continuations, and by source (the eight largest, see --json
    for all). Both stores need the tokenizer of the model.

    A causal model of transformers reads, for each chunk, the neighbours of the chunk before it, then the
    document up to the chunk. With retrieval off it reads as much of the document, but no neighbours.
    """
    from retrotool.evaluate import run as evaluate_run

    result = evaluate_run.evaluate(
        store, queries=queries, model=model, names=name or (), k=k, context=context, limit=limit, seed=seed,
        device=options.first_device(devices), dtype=dtype, batch_size=batch_size,
    )  # fmt: skip
    output.show(result, as_json, _text)


def _text(result: EvaluateResult) -> str:
    drawn = f" of {result.live_chunks:,} (seed {result.seed})" if result.chunks < result.live_chunks else ""
    documents = output.count(result.tables[0].all.documents, "document")
    about = (
        f"Bits per byte of {result.evaluation}, {output.count(result.chunks, 'chunk')}{drawn} of {documents}, by "
        f"{result.model}, {result.method}: k = {result.k}, up to {output.count(result.context, 'token')} of the "
        "document before a chunk."
    )
    rows = [_row("all", table, table.all) for table in result.tables]
    for share in result.tables[0].up_to:
        rows += [_row(f"copied <= {share}", table, table.up_to[share]) for table in result.tables]
    sources = result.tables[0].sources
    for source in sorted(sources, key=lambda name: -sources[name].chunks)[: _SOURCES if len(sources) > 1 else 0]:
        rows += [_row(f"source {output.one_line(source)}", table, table.sources[source]) for table in result.tables]
    header = ("text", "neighbours", "chunks", "retrieval on", "off", "on - off")
    few = [
        f"{table.name} has {table.compared} neighbours saved, so copied is what these have, not the nearest {COMPARED}."
        for table in result.tables if table.compared < COMPARED
    ]  # fmt: skip
    return "\n".join((about, output.table(rows, header, right=(3, 4, 5)), "±: 95 % confidence, by documents.", *few))


def _row(text: str, table: TableResult, one: BitsPerByte) -> tuple[str, str, int, str, str, str]:
    return text, table.name, one.chunks, _estimate(one.on), _estimate(one.off), _estimate(one.difference, "+")


def _estimate(one: RatioEstimate | None, sign: str = "") -> str:
    if one is None:
        return "-"
    margin = "" if one.high is None else f" ± {one.high - one.value:.4f}"
    return f"{one.value:{sign}.4f}{margin}"
