"""``--classifier``: chunks that a sequence classifier gives a label, such as toxic, with a score of ``above`` or more.

The classifier is a local directory (``encoder.classifier``, which says what a score is). It reads the text of each
chunk on its own, decoded from its tokens as ``retrotool search`` shows it. Values of key-value records are looked at as
keys are; erased chunks have no text.

A scan is named by the model's content (weights, configuration, tokenizer), the label and the limit, and not by the
model's path: the same model elsewhere resumes it. A score that is no number ends the scan with an error that names the
chunk, and nothing is purged; parts that were scanned before stay scanned.

Cost: the model's forward in float32, on a GPU where there is one. Memory: the model, and a batch a thread.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from retrotool.encoder.classifier import Classifier, find_classifier
from retrotool.errors import RetrotoolError, UsageError
from retrotool.purge.selectors.selector import BlockHits, Selector, TextBlock
from retrotool.store import parts
from retrotool.store.store import Store
from retrotool.tokenizers import stored_tokenizer

_BLOCK_ROWS = {"cpu": 256, "cuda": 4096}


@dataclass(frozen=True, slots=True)
class Classified(Selector):
    """Chunks to which the classifier in ``path`` gives ``label`` with a score of ``above`` or more."""

    kind: ClassVar[str] = "classifier"
    reads_text: ClassVar[bool] = True
    path: str = field(compare=False)
    sha256: str
    label: str
    above: float
    device: str = field(default="auto", compare=False)

    def open(self, store: Store) -> ClassifierMatcher:
        """Load the model; ``UsageError`` if it can't be, or is not what it was."""
        identity = find_classifier(Path(self.path))
        if identity.sha256 != self.sha256:
            raise UsageError(f"classifier {self.path!r} was changed just now", "Run the same command again.")
        classifier = Classifier(identity, self.device)
        return ClassifierMatcher(store, classifier, identity.label(self.label), self.above)


def classified(path: str | Path, label: str | None, above: float | None, device: str = "auto") -> Classified:
    """Return the selector for ``--classifier``.

    ``UsageError`` for a directory without a classifier, a label that it does not have, and an invalid score.
    """
    identity = find_classifier(Path(path))
    if label is None or above is None:
        raise UsageError(
            f"--classifier {path} needs a label and the least score",
            f"Its labels: {', '.join(identity.labels)}. For example: --classifier "
            + shlex.quote(f"{path}={identity.labels[-1]}:0.9"),
        )
    if not (math.isfinite(above) and 0 < above <= 1):
        raise UsageError(f"--classifier: {above} is not a score", "Give a number above 0 and up to 1, such as 0.9.")
    identity.label(label)
    return Classified(str(Path(path).absolute()), identity.sha256, label, float(above), device)


class ClassifierMatcher:
    """Finds chunks whose ``label`` a classifier gives a score of ``above`` or more."""

    def __init__(self, store: Store, classifier: Classifier, label: int, above: float) -> None:
        self.block_rows = _BLOCK_ROWS[classifier.device.split(":")[0]]
        self._tokenizer = stored_tokenizer(store)
        self._store, self._classifier, self._label, self._above = store, classifier, label, above

    def __call__(self, block: TextBlock) -> BlockHits:
        """Those of the block, with their scores; ``RetrotoolError`` names a chunk whose score is no number."""
        chunks = block.chunks
        rows = np.flatnonzero(chunks.n_tokens > 0)
        texts = self._tokenizer.decode_text(chunks.tokens[rows], chunks.n_tokens[rows])
        scores = self._classifier.scores(texts, self._label)
        broken = np.flatnonzero(np.isnan(scores))
        if len(broken):
            row = int(rows[broken[0]])
            names = parts.read_documents(self._store, block.part, ["id"])["id"]
            raise RetrotoolError(
                f"classifier {str(self._classifier.identity.path)!r} gives NaN or infinity for chunk "
                f"{parts.join_id(block.part, block.first + row)} (row {block.first + row} of part {block.part}, "
                f"document {names[int(chunks.doc[row])].as_py()!r})",
                "Nothing was purged. Its weights are broken, or it can't read this text: give another model.",
            )
        chosen = scores >= np.float32(self._above)
        return BlockHits.whole(rows[chosen], scores[chosen])
