"""``retrotool train``: train a ``RetroModel`` on a store, in one process or in those that torchrun starts.

It serves to validate databases and to train small models for research. At scale, use a trainer that shards
its model, with ``RetroDataset``.

* A run that is stopped and resumed is equal to one that was not; on a CPU, to the last bit.
* Losses and gradients are means over the tokens of a step, so it does not matter how its sequences are
  divided into batches and processes.
* Neighbours of a document's last chunk are not used for the document that follows it in a sequence.
* SIGTERM and Ctrl-C end a run after the current step, with a checkpoint.

Memory: four times the weights in float32, and the activations of a batch. Each step waits for its loss.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from retrotool import interrupts
from retrotool.cli.result_files import check_outside
from retrotool.encoder.devices import check_device, pick_device
from retrotool.engine.progress import counting
from retrotool.errors import RetrotoolError, UsageError
from retrotool.store.store import Store
from retrotool.train.dataset import Item, RetroDataset
from retrotool.train.retro_model import RetroConfig, RetroModel, nats_of, targets_of
from retrotool.train.training_config import OptimiserConfig, parse_section, read_training_config
from retrotool.train.training_folder import TrainingFolder

LOSSES_SECONDS = 10.0  # between two writes of losses.jsonl, which is also written with each checkpoint
_KEPT = ("tokenizer", "table")  # besides the model, what a resumed run must have again
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW has of each weight


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Result of ``train``; ``loss`` is that of the last step, in nats per token."""

    output: str
    parameters: int
    resumed: int  # step of the checkpoint that it began with; 0: none
    step: int
    tokens: int
    loss: float
    bits_per_token: float


@contextmanager
def joined_ranks(device: str) -> Iterator[str]:
    """Join the processes that torchrun started, if it did; yield the device of this one.

    ``auto`` and ``cuda`` mean a GPU for each. ``UsageError`` if a variable of torchrun is missing.
    """
    check_device(device)
    started = "RANK" in os.environ and "WORLD_SIZE" in os.environ and not distributed.is_initialized()
    if started and device in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    device = pick_device(device)
    if started:
        try:
            distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        except ValueError as error:
            raise UsageError(str(error), "Start several processes with torchrun.") from error
    try:
        yield device
    finally:
        if started:
            distributed.destroy_process_group()


def learning_rate(config: OptimiserConfig, step: int) -> float:
    """Return the learning rate of a step, counted from 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    falling = (1 + math.cos(math.pi * done)) / 2
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * falling


def usable_neighbours(batch: Item) -> Tensor:
    """Return the mask [b, l, k, r] of a batch's neighbours, without those before another document."""
    documents = batch["documents"]
    ends = torch.zeros_like(documents, dtype=torch.bool)
    ends[:, :-1] = documents[:, 1:] != documents[:, :-1]
    return batch["neighbour_mask"] & ~ends[..., None, None]


def endless(dataset: RetroDataset) -> Iterator[Item]:
    """Yield the batches that are left of a dataset's epoch, then those of further epochs."""
    yield from dataset
    while dataset.sequences:
        dataset.set_epoch(dataset.epoch + 1)
        yield from dataset
    raise UsageError(f"{dataset.path} has no live chunks to train on")


class Trainer:
    """A model, its optimiser, and a position in the data."""

    def __init__(self, model: RetroModel, dataset: RetroDataset, config: OptimiserConfig, device: str) -> None:
        self.model, self.dataset, self.config, self.device = model.to(device), dataset, config, device
        matrices = [weight for weight in model.parameters() if weight.dim() > 1]
        others = [weight for weight in model.parameters() if weight.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2))
        self.step, self.tokens = 0, 0
        self._batches, self._last = endless(dataset), Item()
        self._shared = DistributedDataParallel(self.model) if dataset.world_size > 1 else None
        self._forward: Callable[..., Tensor] = self._shared or self.model
        if config.compile:
            self._forward = torch.compile(self._forward)

    def sums(self, *values: float | Tensor) -> list[float]:
        """Return the sums of numbers over all processes."""
        found = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=self.device) for value in values])
        if self.dataset.world_size > 1:
            distributed.all_reduce(found)
        return [float(value) for value in found.tolist()]

    def advance(self, stop: Callable[[], bool]) -> tuple[dict[str, Any], bool]:
        """Take a step; return its line of losses.jsonl, and whether ``stop()`` in any process.

        Raises ``RetrotoolError`` if the loss or the gradient is not finite.
        """
        begun, waited = time.perf_counter(), 0.0
        nats, tokens = torch.zeros(2, dtype=torch.float64)
        for left in reversed(range(self.config.accumulation)):
            asked = time.perf_counter()
            self._last = next(self._batches)
            waited += time.perf_counter() - asked
            with self._shared.no_sync() if self._shared is not None and left else nullcontext():
                of_batch, targets = self._losses(self._last)
                torch.autograd.backward(of_batch)
            nats, tokens = nats + of_batch.detach(), tokens + targets
        total, count, stops = self.sums(nats, tokens, stop())
        loss = total / max(count, 1)
        if not (math.isfinite(loss) and self._update(count)):
            advice = "Lower learning_rate, or raise warmup_steps; the last checkpoint is kept."
            raise RetrotoolError(f"loss or gradient of step {self.step + 1:,} is not a finite number", advice)
        self.step, self.tokens, lasted = self.step + 1, self.tokens + int(count), time.perf_counter() - begun
        line = {"step": self.step, "tokens": self.tokens, "loss": loss, "bits_per_token": loss / math.log(2)}
        return {**line, "tokens_per_second": count / lasted, "waited": waited / lasted}, stops > 0

    def _losses(self, batch: Item) -> tuple[Tensor, Tensor]:
        """Return the sum of a batch's losses in nats, and the number of tokens that it predicts."""
        inputs = [batch["tokens"], batch["loss_mask"], batch["neighbours"], usable_neighbours(batch)]
        tokens, mask, *near = (one.to(self.device) for one in inputs[: 4 if self.model.config.retrieval else 2])
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.config.bfloat16):
            logits = self._forward(tokens, mask, *near)
        return nats_of(logits, tokens, mask).sum(), targets_of(mask).sum()

    def _update(self, count: float) -> bool:
        """Change the weights, if the gradients of ``count`` tokens are finite; return whether they are."""
        for weight in self.model.parameters():
            if weight.grad is not None:  # the mean over processes of sums over tokens
                weight.grad.mul_(self.dataset.world_size / max(count, 1))
        if not torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip).isfinite():
            return False
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return True

    def state(self) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
        """Return facts and tensors for a checkpoint."""
        state = self.optimiser.state
        moments = {f"{name}.{key}": state[one][key] for name, one in self.model.named_parameters() for key in _MOMENTS}
        facts = {"step": self.step, "tokens": self.tokens, "dataset": self.dataset.state_dict(self._last)}
        return facts, {"model": self.model.state_dict(), "optimiser": moments}

    def load(self, facts: Mapping[str, Any], weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Continue from a checkpoint; ``UsageError`` if it has read another store, or in another order."""
        self.dataset.load_state_dict(facts["dataset"])
        self.model.load_state_dict(weights)
        for name, weight in self.model.named_parameters():
            of_weight = {key: moments[f"{name}.{key}"] for key in _MOMENTS}
            devices = {key: "cpu" if key == "step" else self.device for key in _MOMENTS}
            self.optimiser.state[weight] = {key: value.to(devices[key]) for key, value in of_weight.items()}
        self.step, self.tokens = facts["step"], facts["tokens"]


def train(root: str | Path, *, config: str | Path, out: str | Path, device: str = "auto") -> TrainResult:
    """Train on the store ``root`` by the TOML file ``config``, or resume the run in the folder ``out``.

    Raises ``UsageError`` for wrong settings, or if the run in ``out`` has another model or store;
    ``HeldError`` while another run is training there; ``KeyboardInterrupt`` after SIGTERM or Ctrl-C, with a
    checkpoint.
    """
    settings = read_training_config(config)
    check_outside("--out", out, "folder")
    folder, store, data = TrainingFolder(out), Store.open(root).identity, settings.data
    fixed = {"vocabulary": store.tokenizer.vocabulary, "chunk_length": store.chunk_length}
    model = parse_section(RetroConfig, settings.model, f"{settings.file}: model", **fixed)
    with joined_ranks(device) as device_here:
        dataset = RetroDataset(
            root, data.table or None, data.sequence_length, model.neighbours, batch_size=data.batch_size,
            packed=data.packed, seed=data.seed, shuffle_blocks=data.shuffle_blocks,
        )  # fmt: skip
        with folder.held() if dataset.rank == 0 else nullcontext("") as run:
            trainer = Trainer(RetroModel(model, settings.optimiser.seed), dataset, settings.optimiser, device_here)
            facts = {"model": asdict(model), "tokenizer": store.tokenizer.sha256, "table": dataset.name}
            lines = _resume(trainer, folder, facts)
            resumed = trainer.step
            _train_to_end(trainer, folder, run, facts, lines)
    last, parameters = orjson.loads(lines[-1]), sum(weight.numel() for weight in trainer.model.parameters())
    return TrainResult(
        str(out), parameters, resumed, trainer.step, trainer.tokens, last["loss"], last["bits_per_token"]
    )


def _resume(trainer: Trainer, folder: TrainingFolder, facts: Mapping[str, Any]) -> list[bytes]:
    """Load the newest checkpoint, if there is one; return the lines of the losses until then."""
    checkpoint, place = folder.newest(), folder.storage.place
    if checkpoint is not None:
        before, now = ({**one["model"], **{key: one[key] for key in _KEPT}} for one in (checkpoint, facts))
        if other := [f"{key}={before.get(key)}" for key in now if before.get(key) != now[key]]:
            advice = "Use the same settings to resume it, or name another folder."
            raise UsageError(f"the run in {place} has {', '.join(other)}", advice)
        trainer.load(checkpoint, *(folder.tensors(checkpoint, name) for name in ("model", "optimiser")))
    lines = folder.losses(trainer.step)
    if trainer.sums(trainer.step) != [trainer.step * trainer.dataset.world_size]:
        raise UsageError(f"the processes see different checkpoints in {place}", "Name a folder that they share.")
    return lines


def _train_to_end(
    trainer: Trainer, folder: TrainingFolder, run: str, facts: Mapping[str, Any], lines: list[bytes]
) -> None:
    """Take the steps that are left, and append their losses to ``lines``; the first rank writes files."""
    config, writes = trainer.config, trainer.dataset.rank == 0
    written, stopped = time.monotonic(), False
    progress = counting("train", "step", max(0, config.steps - trainer.step)) if writes else nullcontext(lambda _: None)
    with interrupts.deferred() as ended, progress as report:
        while trainer.step < config.steps and not stopped:
            line, stopped = trainer.advance(ended)
            lines.append(orjson.dumps(line))
            report(1)
            is_due = trainer.step % config.checkpoint_steps == 0 or trainer.step == config.steps or stopped
            if writes and (is_due or time.monotonic() - written > LOSSES_SECONDS):
                folder.write_losses(run, lines)  # before the checkpoint, so that none of its steps is missing
                written = time.monotonic()
            if writes and is_due:
                state, tensors = trainer.state()
                folder.save(run, {**facts, **state}, tensors)
    if stopped and trainer.step < config.steps:
        raise KeyboardInterrupt
