"""A Hugging Face sequence classifier: texts to the score of one of its labels.

A classifier is a directory saved by ``AutoModelForSequenceClassification``, checked like an encoder. Scores
are the softmax of the logits, or the sigmoid for a single label and ``multi_label_classification``;
``regression`` is refused. A text over the model's length is cut into windows and gets their highest score.

Scores are float32, so that which chunks reach a limit does not depend on the device. A GPU is several times
as fast in half precision, so it screens: only what may reach the limit is scored again in float32. A sample
of every block is, too, which shows whether half precision is close enough; if not, float32 is used alone.

Threads compute concurrently on a CPU, with one torch thread each; on a GPU one computes, others tokenise.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from retrotool import interrupts
from retrotool.encoder import devices
from retrotool.encoder.encoder import Rows, batches, check_vocabulary, say
from retrotool.encoder.encoder_identity import check_model, hash_model, longest_row
from retrotool.errors import UsageError
from retrotool.lazy import torch
from retrotool.machine import give_memory_back
from retrotool.ranges import positions_within
from retrotool.tokenizers import Tokenizer, find_tokenizer

Scores = npt.NDArray[np.float32]

_SAVED_BY = "AutoModelForSequenceClassification"
_FILES = ("config.json", "tokenizer.json")
_HEAD = "ForSequenceClassification"
_BAND = 0.5  # log-odds: what is further below the limit in half precision is below it in float32
_MARGIN = 4  # the band is at least so many times as wide as the largest difference seen
_SAMPLE = 256  # rows to compare at first; of each later block a sixteenth of it
_SATURATED = 16.0  # log-odds from which a score may be 1 in float32


@dataclass(frozen=True, slots=True)
class ClassifierIdentity:
    """A classifier; ``sha256`` covers weights, configuration and tokenizer. Labels may be ``exclusive``."""

    path: Path
    sha256: str
    labels: tuple[str, ...]
    exclusive: bool
    max_tokens: int

    def label(self, name: str) -> int:
        """Return the number of a label; raise ``UsageError`` listing the labels otherwise."""
        if self.labels.count(name) != 1:
            several = "has several labels" if name in self.labels else "has no label"
            raise UsageError(f"classifier {str(self.path)!r} {several} {name!r}", f"It has: {', '.join(self.labels)}.")
        return self.labels.index(name)


def find_classifier(path: Path) -> ClassifierIdentity:
    """Describe the classifier in a directory without loading it; raise ``UsageError`` if it is invalid."""
    what = f"classifier {str(path)!r}"
    if not path.is_dir():
        raise UsageError(f"{what}: no such directory", f"Name a directory saved by {_SAVED_BY}.save_pretrained(...).")
    config = check_model(path, what, _SAVED_BY)
    heads = config.get("architectures") or [_HEAD]
    if not any(str(head).endswith(_HEAD) for head in heads):
        raise UsageError(f"{what} is a {heads[0]}: it does not classify texts", f"Use a model saved by {_SAVED_BY}.")
    kind = config.get("problem_type")
    if kind == "regression":
        raise UsageError(f"{what} was trained for regression: its outputs are not scores of labels")
    labels = _labels(what, config)
    exclusive = kind != "multi_label_classification" and len(labels) > 1
    return ClassifierIdentity(path, hash_model(path, _FILES).hexdigest(), labels, exclusive, longest_row(path, config))


def _labels(what: str, config: dict[str, Any]) -> tuple[str, ...]:
    """Return the label names in the order of the logits, by default named as ``transformers`` does."""
    named = config.get("id2label")
    if named is None:
        return tuple(f"LABEL_{i}" for i in range(int(config.get("num_labels") or 2)))
    try:
        labels = {int(number): str(name) for number, name in named.items()}
        return tuple(labels[i] for i in range(len(named)))
    except (AttributeError, KeyError, ValueError):
        raise UsageError(f"{what}: id2label in its config.json does not number the labels from 0") from None


class Classifier:
    """A loaded classifier on a device (``auto``: a GPU if available). Thread-safe."""

    def __init__(self, identity: ClassifierIdentity, device: str = "auto") -> None:
        from retrotool.encoder.forwards import load_pretrained

        self._what = f"classifier {str(identity.path)!r}"
        devices.check_device(device)
        self.identity, self.device = identity, devices.pick_device(device)
        self.batch_tokens = devices.BATCH_TOKENS[self.device.split(":")[0]]
        self._tokenizer = Tokenizer(find_tokenizer(str(identity.path)))
        self._before, self._after = self._tokenizer.special_tokens()
        self._model = load_pretrained(_SAVED_BY, self._what, identity.path, self.device, "float32")
        self._half: Any = None
        self._compared = 0  # rows that have shown that half precision is close enough
        if self.device != "cpu":
            try:
                self._half = load_pretrained(_SAVED_BY, self._what, identity.path, self.device, "float16")
            except UsageError as error:
                if not devices.is_out_of_memory(error):
                    raise
                say(f"{self._what}: {self.device} has no memory for half precision, so scoring is slower")
        config = self._model.config
        # The files were hashed before they were read; make sure they did not change in between.
        if find_classifier(identity.path) != identity:
            raise UsageError(f"{self._what} was changed while it was loaded", "Run the same command again.")
        if tuple(config.id2label[i] for i in range(config.num_labels)) != identity.labels:
            raise UsageError(f"{self._what}: transformers reads different labels from its config.json")
        self._vocabulary = getattr(config, "vocab_size", None)
        # Some models find a text's last token by the padding after it.
        self._padding = config.pad_token_id
        self._threads = torch.get_num_threads()
        self._device_lock = threading.Lock()

    def scores(self, texts: Sequence[str], label: int, above: float = 0.0) -> Scores:
        """Return the score of a label for each text, float32 [n]; NaN if the model's output is not finite.

        Scores below ``above`` may be less exact on a GPU.
        """
        room = self.identity.max_tokens - len(self._before) - len(self._after)
        if room < 1:
            raise UsageError(f"{self._what} takes {self.identity.max_tokens} tokens, which leaves none for text")
        ids, lengths = self._tokenizer.encode_flat(texts)
        check_vocabulary(self._what, ids, self._vocabulary)
        windows, first = _windows(lengths, room)
        rows = Rows(ids.astype(np.int32), windows).framed(self._before, self._after, self.identity.max_tokens)
        half = self._half if above > 0 else None
        with devices.checking_device(self.device), self._one_thread():
            screened = None if half is None else self._screened(half, rows, label, above)
            found = self._computed(self._model, rows, label)[:, 0] if screened is None else screened
        # A NaN in any window makes the text's score NaN.
        return np.maximum.reduceat(found, first) if len(first) else found

    def _screened(self, half: Any, rows: Rows, label: int, above: float) -> Scores | None:
        """Return scores, by ``half`` where they are surely below ``above``; None if it differs too much."""
        rough = self._computed(half, rows, label)
        limit = min(math.log(above / (1 - above)), _SATURATED) if above < 1 else _SATURATED
        exactly = ~(rough[:, 1] < limit - _BAND)  # NaN, too: some texts may be too much for float16
        sample = min(len(rows), max(_SAMPLE - self._compared, _SAMPLE // 16))
        exactly[np.linspace(0, len(rows) - 1, sample).astype(np.int64)] = True
        exact = self._computed(self._model, rows.take(np.flatnonzero(exactly)), label)
        differences = np.abs(exact[:, 1] - rough[exactly, 1])
        apart = float(np.fmax.reduce(differences, initial=0))
        if apart * _MARGIN > _BAND:
            if self._half is not None:
                say(f"{self._what}: half precision changes log-odds by {apart:.2f}: float32 is used, which is slower")
            self._half = None
            return None
        self._compared += int(np.isfinite(differences).sum())
        rough[exactly] = exact
        return rough[:, 0]

    def _computed(self, model: Any, rows: Rows, label: int) -> Scores:
        """Return scores and log-odds of a label by a model, float32 [n, 2]."""
        found = np.zeros((len(rows), 2), np.float32)  # rows without tokens score 0
        most = len(rows) if self._padding is not None else 1
        for which in batches(rows.lengths, self.batch_tokens, most_rows=max(most, 1), padded=True):
            interrupts.check()
            found[which] = self._score(model, rows.take(which), label)
        return found

    @contextlib.contextmanager
    def _one_thread(self) -> Iterator[None]:
        if self.device != "cpu":
            yield
            return
        torch.set_num_threads(1)  # on a CPU, callers run in parallel instead
        try:
            yield
        finally:
            torch.set_num_threads(self._threads)  # the default of threads started later

    def _score(self, model: Any, rows: Rows, label: int) -> Scores:
        try:
            return self._forward(model, rows, label)
        except Exception as error:
            devices.check_divisible(error, self._what, self.device, len(rows), len(rows.ids))
        give_memory_back()
        self.batch_tokens = max(self.batch_tokens // 2, 1)
        halves = np.array_split(np.arange(len(rows)), 2)
        return np.concatenate([self._score(model, rows.take(half), label) for half in halves])

    def _forward(self, model: Any, rows: Rows, label: int) -> Scores:
        used = np.arange(rows.lengths.max()) < rows.lengths[:, None]
        ids = np.full(used.shape, self._padding or 0, np.int64)
        ids[used] = rows.ids
        with torch.inference_mode(), self._device_lock if self.device != "cpu" else contextlib.nullcontext():
            given, mask = (torch.from_numpy(array).to(self.device) for array in (ids, used.astype(np.int64)))
            logits = model(input_ids=given, attention_mask=mask).logits.float()
            labels = len(self.identity.labels)
            if logits.shape[1:] != (labels,):
                raise UsageError(f"{self._what} returns outputs of shape {tuple(logits.shape[1:])} for {labels} labels")
            own = odds = logits[:, label]
            if self.identity.exclusive:
                odds = own - torch.cat([logits[:, :label], logits[:, label + 1 :]], 1).logsumexp(1)
            score = logits.softmax(1)[:, label] if self.identity.exclusive else own.sigmoid()
            found = torch.stack([score, odds], 1)
            finite = torch.isfinite(logits).all(1, keepdim=True)
            return np.asarray(torch.where(finite, found, torch.nan).cpu().numpy())


def _windows(lengths: npt.NDArray[np.int64], room: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the lengths of all rows' windows, at most ``room``, [w], and each row's first window [n]."""
    count = np.maximum(-(-lengths // room), 1)
    windows = np.minimum(np.repeat(lengths, count) - positions_within(count) * room, room)
    return windows, np.cumsum(count) - count
