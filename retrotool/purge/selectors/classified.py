"""``--classifier``: chunks to which a sequence classifier gives a label, such as toxic, with a minimum score.

The classifier is a local directory (``encoder.classifier`` defines the score). It gets the text of each chunk
by itself, decoded from its tokens as ``retrotool search`` shows it; keys and values of key-value records
alike. Erased chunks have no text.

A scan is identified by the model's content (weights, configuration, tokenizer), the label and the limit. Its
path does not count: the same model elsewhere resumes it. A NaN score ends the scan with an error that names
the chunk. Nothing is purged then; parts scanned before stay scanned.

Cost: a forward pass in float32; on a GPU one in half precision, and float32 for what it may select. Memory:
the model, on a GPU one and a half times, and a batch per thread.
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
        """Load the model; ``UsageError`` if it can't be loaded or was changed."""
        identity = find_classifier(Path(self.path))
        if identity.sha256 != self.sha256:
            raise UsageError(f"classifier {self.path!r} was changed concurrently", "Run the same command again.")
        classifier = Classifier(identity, self.device)
        return ClassifierMatcher(store, classifier, identity.label(self.label), self.above)


def classified(path: str | Path, label: str | None, above: float | None, device: str = "auto") -> Classified:
    """Return the selector for ``--classifier``.

    ``UsageError`` for a directory without a classifier, an unknown label and an invalid score.
    """
    identity = find_classifier(Path(path))
    if label is None or above is None:
        raise UsageError(
            f"--classifier {path} needs a label and a minimum score",
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
        """Find them in a block, with their scores; ``RetrotoolError`` names a chunk whose score is NaN."""
        chunks = block.chunks
        rows = np.flatnonzero(chunks.n_tokens > 0)
        texts = self._tokenizer.decode_text(chunks.tokens[rows], chunks.n_tokens[rows])
        scores = self._classifier.scores(texts, self._label, self._above)
        broken = np.flatnonzero(np.isnan(scores))
        if len(broken):
            part, row = chunks.part, int(rows[broken[0]])
            names = parts.read_documents(self._store, part, ["id"])["id"]
            raise RetrotoolError(
                f"classifier {str(self._classifier.identity.path)!r} gives NaN or infinity for chunk "
                f"{parts.join_id(part, block.first + row)} (row {block.first + row} of part {part}, "
                f"document {names[int(chunks.doc[row])].as_py()!r})",
                "Nothing was purged. Its weights are damaged, or it can't process this text. Give another model.",
            )
        chosen = scores >= np.float32(self._above)
        return BlockHits.whole(rows[chosen], scores[chosen])
