"""``retrotool train``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

from retrotool.cli import output
from retrotool.cli.options import Device, Json, StoreArgument, first_device, opt

if TYPE_CHECKING:
    from retrotool.train.trainer import TrainResult

EPILOG = """\b
Examples:
  retrotool train store --config small.toml --out run
  retrotool train store --config small.toml --out run --devices cpu --json
Over 8 GPUs: torchrun --nproc-per-node 8 -m retrotool train store --config small.toml --out run"""


def command(
    store: StoreArgument,
    config: Annotated[str, opt("TOML file with sections [model], [data] and [optimiser].", metavar="FILE")],
    out: Annotated[str, opt("Folder for checkpoints and losses; a run that is there is resumed.", metavar="DIR")],
    devices: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train a RETRO model on a store, to validate its database or for research with small models.

    STORE is the training text; its tables name their databases. DIR gets losses.jsonl, with the loss of every
    step, and the last two checkpoints. The same command resumes exactly where the last one is; SIGTERM and
    Ctrl-C write one. For large models, use a trainer that shards them, with retrotool.RetroDataset.
    """
    from retrotool.train import trainer

    result = trainer.train(store, config=config, out=out, device=first_device(devices))
    if os.environ.get("RANK", "0") == "0":
        output.show(result, as_json, _text)


def _text(result: TrainResult) -> str:
    resumed = f", resumed after step {result.resumed:,}" if result.resumed else ""
    return (
        f"Trained {output.scaled(result.parameters)} parameters in {output.count(result.step, 'step')}{resumed}: "
        f"{output.count(result.tokens, 'token')}, loss {result.loss:.3f} nats, {result.bits_per_token:.3f} bits per "
        f"token.\nIn {result.output}: losses.jsonl, and the last checkpoints."
    )
