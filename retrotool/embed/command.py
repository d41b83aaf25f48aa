"""``retrotool embed``."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

from retrotool.cli import output
from retrotool.cli.options import DevicesOption, Json, ShardOption, StoreArgument, opt, parse_shard

if TYPE_CHECKING:
    from retrotool.embed.run import EmbedResult

EPILOG = """\b
Examples:
  retrotool embed store
  retrotool embed store --encoder models/bert-base-uncased --check
  retrotool embed store --encoder models/bert-base-uncased --name bert-cls --pooling cls
  retrotool embed store --dtype bfloat16 --devices cpu
  retrotool embed store --shard 3/16
  retrotool embed store --devices cuda:0,cuda:1"""

_WORTH_TELLING_SECONDS = 2.0


def command(
    store: StoreArgument,
    encoder: Annotated[
        str, opt("minilm (bundled, with the extra of that name), a model directory, or a hub name.", metavar="E")
    ] = "minilm",
    name: Annotated[
        str | None, opt("What the store calls the encoder.  [default: the name of its directory]", metavar="NAME")
    ] = None,
    pooling: Annotated[str, opt("auto (the model's own configuration, else mean), mean or cls.")] = "auto",
    devices: DevicesOption = "auto",
    dtype: Annotated[str, opt("auto (float16 on a GPU, else float32), float32, float16 or bfloat16.")] = "auto",
    batch_tokens: Annotated[
        int | None,
        opt("Tokens of a batch: the memory it takes.  [default: 65536 on a GPU, 2048 on a CPU]", metavar="N", least=1),
    ] = None,
    shard: ShardOption = None,
    check: Annotated[
        bool, opt("Hold 2,000 stored vectors against those of transformers in float32.", "--check")
    ] = False,
    as_json: Json = False,
) -> None:
    """Embed every chunk with a frozen BERT.

    Writes float16 vectors, one .npy a part. Parts that have embeddings of this encoder are left as they are, and so are
    those that another running embed is at. A model of the BERT family runs without padding, any other one through
    transformers. Which it is, and how near its vectors come to those of transformers in float32, is printed and kept.
    """
    with output.errors(as_json):
        from retrotool.embed import run as embed_run

        result = embed_run.embed(
            store,
            encoder=encoder,
            name=name,
            pooling=pooling,
            devices=devices,
            dtype=dtype,
            batch_tokens=batch_tokens,
            shard=parse_shard(shard),
            check=check,
        )
        output.show(result, as_json, lambda result: _text(result, str(store)))


def _text(result: EmbedResult, store: str) -> str:
    if result.chunks:
        done = f"{output.count(result.chunks, 'chunk')} embedded"
    elif result.elsewhere:
        done = "Nothing is left for this run"
    elif not result.embedded:
        return f"There are no chunks to embed. Add some: retrotool chunk {shlex.quote(store)} INPUT..."
    else:
        done = "Every chunk has its embedding already"
    how = f"{result.dimension} dimensions, {result.pooling} pooling"
    lines = [f"{done} (encoder {result.encoder}, {how}, commit {result.commit})."]
    if result.forward:
        devices = result.device if result.devices == 1 else f"{result.devices} × {result.device}"
        reason = f" ({result.why})" if result.why else ""
        lines.append(
            f"Forward: {result.forward}, {result.dtype}, on {devices}{reason}. "
            f"Least cosine with transformers in float32: {result.cosine:.5f}"
        )
    if result.seconds > _WORTH_TELLING_SECONDS:
        chunks, tokens = result.chunks / result.seconds, result.tokens / result.seconds
        busy = f"{100 * result.busy:.0f} % of the time was forward"
        lines.append(f"{chunks:,.0f} chunks/s, {tokens:,.0f} tokens/s; {busy}.")
    if result.elsewhere:
        are = "is" if result.elsewhere == 1 else "are"
        lines.append(
            f"{output.count(result.elsewhere, 'part')} {are} left to runs that are at work. "
            "Should one die, run the same command again."
        )
    if result.check:
        lines.append(
            f"Check of {output.count(result.check['sample'], 'stored vector')} against transformers in float32: "
            f"cosine {result.check['cosine_min']:.5f} or more, {result.check['cosine_mean']:.5f} on average, "
            f"recall@10 {result.check['recall_at_10']:.4f}"
        )
    return "\n".join(lines)
