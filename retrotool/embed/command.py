"""``retrotool embed``."""

from __future__ import annotations

import shlex
from functools import partial
from typing import TYPE_CHECKING, Annotated

from retrotool.cli import output
from retrotool.cli.command_lines import next_command
from retrotool.cli.options import DevicesOption, Json, NoWaitOption, StoreArgument, opt

if TYPE_CHECKING:
    from retrotool.embed.run import EmbedResult

EPILOG = """\b
Examples:
  retrotool embed store
  retrotool embed store --encoder models/bert-base-uncased --check
  retrotool embed store --encoder models/bert-base-uncased --name bert-cls --pooling cls
  retrotool embed store --dtype bfloat16 --devices cpu
  retrotool embed store --shard 3/16
  retrotool embed store --no-wait
  retrotool embed store --devices cuda:0,cuda:1
  retrotool embed store --engine ray
  retrotool embed store --from vectors.parquet --encoder their-model"""

_MIN_SECONDS_FOR_RATE = 2.0


def command(
    store: StoreArgument,
    encoder: Annotated[
        str, opt("minilm (bundled, in the extra of that name), a model directory, or a hub name.", metavar="ENCODER")
    ] = "minilm",
    vectors: Annotated[
        str | None,
        opt(
            "Store vectors that the model ENCODER made elsewhere: .npy, Parquet, a folder or pattern.",
            "--from",
            metavar="VECTORS",
        ),
    ] = None,
    name: Annotated[
        str | None, opt("Name of the encoder in the store.  [default: the name of its directory]", metavar="NAME")
    ] = None,
    pooling: Annotated[
        str, opt("auto (from the model's configuration, else mean), mean, cls or lasttoken.", metavar="POOLING")
    ] = "auto",
    dimension: Annotated[
        int | None, opt("Keep the first N numbers of each vector (Matryoshka encoders).", metavar="N", least=1)
    ] = None,
    devices: DevicesOption = "auto",
    dtype: Annotated[
        str, opt("auto (float16 on a GPU, else float32), float32, float16 or bfloat16.", metavar="DTYPE")
    ] = "auto",
    no_wait: NoWaitOption = False,
    check: Annotated[bool, opt("Compare 2,000 stored vectors with transformers in float32.", "--check")] = False,
    as_json: Json = False,
) -> None:
    """Embed every chunk with a frozen encoder, such as BERT.

    Writes float16 vectors, one .npy file per part. Skips parts that are already embedded with this encoder.
    Waits for parts that another running embed has begun; with --shard, only for those of its share.

    BERT-like models run without padding, others through transformers. Prints and records which was used, and
    how close its vectors are to those of transformers in float32.

    --from stores vectors made elsewhere: in .npy files by part and row, of all chunks or of those without; in
    Parquet files with a column that names the chunk of each.
    """
    from retrotool.embed import run as embed_run
    from retrotool.engine import is_a_job

    result = embed_run.embed(
        store, encoder=encoder, name=name, pooling=pooling, dimension=dimension, devices=devices, dtype=dtype,
        check=check, vectors=vectors, wait=not no_wait,
    )  # fmt: skip
    output.show(result, as_json, partial(embed_text, str(store)))
    if result.chunks and not (is_a_job() or result.in_other_runs or as_json):
        output.note(f"Next: {next_command(store, 'embed', result.encoder)}")


def embed_text(store: str, result: EmbedResult) -> str:
    """Render a result of ``embed`` as text."""
    if result.chunks:
        done = f"{output.count(result.chunks, 'chunk')} {'given vectors' if result.foreign else 'embedded'}"
    elif result.in_other_runs:
        done = "Nothing is left for this run"
    elif not result.embedded:
        return f"No chunks to embed. Add some with: retrotool chunk {shlex.quote(store)} INPUT..."
    else:
        done = "Every chunk has its embedding already"
    how = f"{result.dimension} dimensions, " + ("made elsewhere" if result.foreign else f"{result.pooling} pooling")
    lines = [f"{done} (encoder {result.encoder}, {how}, commit {result.commit})."]
    if result.forward:
        devices = result.device if result.devices == 1 else f"{result.devices} × {result.device}"
        reason, gelu = f" ({result.why})" if result.why else "", f", {result.gelu} GELU" if result.gelu else ""
        lines.append(
            f"Forward: {result.forward}, {result.dtype}{gelu}, on {devices}{reason}. "
            f"Least cosine with transformers in float32: {result.cosine:.5f}"
        )
    if result.seconds > _MIN_SECONDS_FOR_RATE:
        chunks, tokens = result.chunks / result.seconds, result.tokens / result.seconds
        busy = f"forward {100 * result.busy:.0f} % of the time"
        lines.append(f"Without loading: {chunks:,.0f} chunks/s, {tokens:,.0f} tokens/s; {busy}.")
    if result.in_other_runs:
        are = "is" if result.in_other_runs == 1 else "are"
        lines.append(
            f"{output.count(result.in_other_runs, 'part')} {are} being embedded by other runs. "
            "If one fails, run the same command again."
        )
    if result.check:
        lines.append(
            f"Check of {output.count(result.check['sample'], 'stored vector')} against transformers in float32: "
            f"cosine {result.check['cosine_min']:.5f} or more, {result.check['cosine_mean']:.5f} on average, "
            f"recall@10 {result.check['recall_at_10']:.4f}"
        )
    return "\n".join(lines)
