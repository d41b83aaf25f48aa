"""The folder of a training run: checkpoints and losses, through the storage layer, so it may be in a bucket.

    checkpoints/0000001000-model-1a2b3c4d.safetensors       weights
    checkpoints/0000001000-optimiser-1a2b3c4d.safetensors   state of the optimiser
    checkpoints/0000001000.json                             step, model, position in the data, files
    losses.jsonl                                            a line per step

A checkpoint exists once its JSON does, which names its files and their hashes, and is written last. Names of
files have the id of a run, so what a killed run left is in no one's way. The last two checkpoints are kept.
Cost: tensors are copied to memory as a whole, and all losses are written again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import orjson
import safetensors.torch
from torch import Tensor

from retrotool.errors import CorruptError, HeldError, UsageError
from retrotool.store import leases, schema
from retrotool.store.identity import FILE as IDENTITY
from retrotool.store.leases import CLAIM_SILENCE_SECONDS, Run
from retrotool.store.storage import Place, get_if_there, storage_at, where

LOSSES = "losses.jsonl"
_FOLDER, _KEPT = "checkpoints/", 2
_HEAD = re.compile(rf"{_FOLDER}\d{{10,}}\.json")
_FILE = {"path": re.compile(rf"{_FOLDER}[\w.-]+\.safetensors"), "sha256": str}
_CHECKPOINT = {
    "step": range(1 << 53), "tokens": range(1 << 53), "tokenizer": str, "table": str, "model": {}, "dataset": {},
    "files": {"model": _FILE, "optimiser": _FILE},
}  # fmt: skip


class TrainingFolder:
    """The folder or bucket at ``place``; ``UsageError`` if it is a store."""

    def __init__(self, place: Place) -> None:
        self.storage = storage_at(place)
        if self.storage.stat(IDENTITY) is not None:
            raise UsageError(f"{self.storage.place} is a store", "Name a folder for the training run.")

    @contextmanager
    def held(self) -> Iterator[str]:
        """Yield the id of a new run; no other may write here until it ends.

        ``HeldError`` if another run is alive, or was silent for less than five minutes on another machine.
        """
        with Run(self.storage) as run:
            now, own = leases.renew(self.storage, run.id), leases.run_path(run.id)
            for lease in [one.path for one in self.storage.list(leases.run_path("")) if one.path != own]:
                other = lease.removeprefix(leases.run_path(""))
                if leases.is_alive(self.storage, other, now=now, silence=CLAIM_SILENCE_SECONDS):
                    message = f"{leases.describe_run(self.storage, other)} is training in {self.storage.place}"
                    raise HeldError(message, "Wait until it ends; if its machine has failed, for five minutes.")
                self.storage.delete([lease])
            self.storage.drop(self.storage.unfinished())
            yield run.id

    def newest(self) -> dict[str, Any] | None:
        """Read the JSON of the newest checkpoint; None if there is none yet."""
        heads = self._heads()
        return self._read(heads[-1]) if heads else None

    def tensors(self, checkpoint: Mapping[str, Any], name: str) -> dict[str, Tensor]:
        """Read the file ``model`` or ``optimiser`` of a checkpoint; ``CorruptError`` if it was changed."""
        file = checkpoint["files"][name]
        data = get_if_there(self.storage, file["path"]) or b""
        if hashlib.sha256(data).hexdigest() != file["sha256"]:
            head = where(self.storage, _head(checkpoint["step"]))
            advice = f"To use the checkpoint before it, remove {head}."
            raise CorruptError(f"{where(self.storage, file['path'])} is missing, or not what {head} says", advice)
        return safetensors.torch.load(data)

    def save(self, run: str, facts: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write a checkpoint: ``facts``, with its step, as JSON, and named tensors.

        Then remove old ones, and what killed runs left of theirs.
        """
        files = {}
        for name, values in tensors.items():
            path = f"{_FOLDER}{facts['step']:010d}-{name}-{run}.safetensors"
            data = safetensors.torch.save({key: value.detach().cpu().contiguous() for key, value in values.items()})
            sink, _ = self.storage.put(path, run, lambda sink, data=data: sink.write(data))  # type: ignore[misc]
            files[name] = {"path": path, "sha256": sink.sha256}
        content = orjson.dumps({**facts, "files": files}, option=orjson.OPT_INDENT_2)
        self.storage.overwrite(_head(facts["step"]), run, content)
        self._remove_old()

    def losses(self, steps: int) -> list[bytes]:
        """Return the lines of the first ``steps`` steps; ``CorruptError`` if some are missing."""
        lines = (get_if_there(self.storage, LOSSES) or b"").splitlines()[:steps]
        if len(lines) < steps:
            raise CorruptError(f"{where(self.storage, LOSSES)} has {len(lines):,} lines, but {steps:,} steps were made")
        return lines

    def write_losses(self, run: str, lines: Sequence[bytes]) -> None:
        """Replace the lines of all steps."""
        self.storage.overwrite(LOSSES, run, b"".join(line + b"\n" for line in lines))

    def _heads(self) -> list[str]:
        return [one.path for one in self.storage.list(_FOLDER) if _HEAD.fullmatch(one.path)]

    def _read(self, head: str) -> dict[str, Any]:
        found: dict[str, Any] = schema.load(self.storage.get(head), _CHECKPOINT, where(self.storage, head))
        return found

    def _remove_old(self) -> None:
        """Remove all but the last checkpoints: first their JSON, so that none is half there."""
        heads = self._heads()
        self.storage.delete(heads[:-_KEPT])
        kept = {*heads[-_KEPT:]}
        kept |= {file["path"] for head in heads[-_KEPT:] for file in self._read(head)["files"].values()}
        self.storage.delete([one.path for one in self.storage.list(_FOLDER) if one.path not in kept])


def _head(step: int) -> str:
    return f"{_FOLDER}{step:010d}.json"
