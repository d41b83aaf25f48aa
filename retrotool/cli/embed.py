"""``retrotool embed``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from retrotool.cli import output
from retrotool.cli.options import Device, Json, StoreArgument

if TYPE_CHECKING:
    from retrotool.commands.building import EmbedResult

EPILOG = """\b
Examples:
  retrotool embed store
  retrotool embed store --encoder models/bert-base-uncased --device cuda"""


def command(
    store: StoreArgument,
    encoder: Annotated[
        str,
        typer.Option(
            metavar="E", help="minilm (bundled, with the extra of that name), a model directory, or a hub name."
        ),
    ] = "minilm",
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto (float16 on a GPU, else float32), float32, float16 or bfloat16.")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Embed every chunk with a frozen BERT.

    Writes float16 vectors, one .npy a part. Parts that have embeddings of this encoder are left as they are.
    """
    with output.errors(as_json):
        from retrotool import commands

        output.show(commands.embed(store, encoder=encoder, device=device, dtype=dtype), as_json, _text)


def _text(result: EmbedResult) -> str:
    done = (
        f"{output.count(result.chunks, 'chunk')} embedded" if result.chunks else "Every chunk has its embedding already"
    )
    how = f"{result.dimension} dimensions, {result.pooling} pooling"
    return f"{done} (encoder {result.encoder}, {how}, commit {result.commit})."
