"""What a purge can be asked for, as options: files are read here, and selectors made of them."""

from __future__ import annotations

import getpass
import os
from dataclasses import dataclass
from pathlib import Path

from retrotool.encoder.devices import check_device
from retrotool.errors import UsageError
from retrotool.purge.selection import Asked, Given, Repeats, select_ids
from retrotool.purge.selectors.classified import classified
from retrotool.purge.selectors.contaminates import Contaminates
from retrotool.purge.selectors.copies import NearDuplicates
from retrotool.purge.selectors.like import near
from retrotool.purge.selectors.patterns import Patterns, read_patterns
from retrotool.purge.selectors.pii import KINDS, PersonalData
from retrotool.purge.selectors.selector import Selector
from retrotool.purge.selectors.selector_files import read_lines
from retrotool.purge.selectors.spans import compiled
from retrotool.purge.selectors.terms import Terms, read_terms
from retrotool.store.store import Store

_ADVICE = "Nothing was purged. See: retrotool purge --help"


@dataclass(frozen=True, slots=True, kw_only=True)
class Selectors:
    """What to select: what any of these means, or with ``every`` what all of them mean.

    ``ids`` and ``documents`` are files with an id a line, ``chunk`` and ``document`` such ids themselves; ``where`` is
    an expression over document columns, ``pattern`` one of RE2 over text, ``patterns`` a file with such ones.
    ``terms`` is a file of words and names. ``pii`` are kinds of personal data (``selectors.pii.KINDS``).
    ``near_duplicates_of`` is a file of chunk ids whose copies are meant, ``contaminates`` a store of evaluation text,
    ``duplicates``: chunks that repeat one before them. ``like`` is a text, or a file of text: chunks whose stored
    vector is ``within`` of its, as squared L2 (``encoder``: by which embeddings, if the store has several).
    ``classifier`` is a model directory: chunks to which it gives ``label`` with a score of ``above`` or more.
    ``device`` is where these two models run. ``whole_documents`` widens to the documents of what is meant.
    ``allow_lossy``: text may be looked at folded (``selectors.text``), where the tokenizer loses case or spacing.
    """

    ids: str | Path | None = None
    chunk: tuple[int, ...] = ()
    documents: str | Path | None = None
    document: tuple[str, ...] = ()
    where: str | None = None
    pattern: str | None = None
    patterns: str | Path | None = None
    terms: str | Path | None = None
    pii: tuple[str, ...] = ()
    near_duplicates_of: str | Path | None = None
    contaminates: str | Path | None = None
    duplicates: bool = False
    like: str | Path | None = None
    within: float | None = None
    encoder: str | None = None
    classifier: str | Path | None = None
    label: str | None = None
    above: float | None = None
    device: str = "auto"
    every: bool = False
    whole_documents: bool = False
    allow_lossy: bool = False

    def asked(self, store: Store) -> Asked:
        """Read what is in files; ``UsageError`` if nothing is asked for, or what can't be looked for in this store."""
        self._check_texts()
        given: list[Given | Repeats] = []
        if self.ids is not None or self.chunk:
            given.append(Given("ids", (*_lines("--ids", self.ids), *map(str, self.chunk))))
        if self.documents is not None or self.document:
            given.append(Given("documents", (*_lines("--documents", self.documents), *self.document)))
        if self.where is not None:
            given.append(Given("where", (self.where,)))
        if self.duplicates:
            given.append(Repeats())
        scanned = self._scanned(store)
        if not given and not scanned:
            raise UsageError("nothing says what to purge", "Give --ids, --documents, --where, --pattern or another.")
        if not self.allow_lossy and not store.identity.tokenizer.lossless:
            for selector in scanned:
                if selector.reads_text:
                    raise UsageError(
                        f"--{selector.kind}: the tokenizer of {store.root} loses case or spacing, so text can't be "
                        "looked at as it was",
                        "With --allow-lossy it is held against what is left, in lower case if the tokenizer has only "
                        "that, with one space between two words and none beside anything else.",
                    )
        return Asked(tuple(given), tuple(scanned), self.every, self.whole_documents)

    def _check_texts(self) -> None:
        """``UsageError`` for what stands for text, or is written down, and has no UTF-8."""
        for name in ("where", "pattern", "like", "contaminates", "encoder", "label"):
            if (value := getattr(self, name)) is not None:
                check_text(f"--{name}", str(value))
        for document in self.document:
            check_text("--document", document)

    def _scanned(self, store: Store) -> list[Selector]:
        found: list[Selector] = []
        patterns: tuple[str, ...] = ()
        if self.pattern is not None:
            compiled(self.pattern)  # what can't be is told before anything is read
            patterns += (self.pattern,)
        if self.patterns is not None:
            patterns += read_patterns(str(self.patterns))
        if patterns:
            found.append(Patterns(patterns))
        if self.terms is not None:
            found.append(Terms(read_terms(Path(self.terms))))
        if self.pii:
            found.append(PersonalData(self.pii))
        if self.near_duplicates_of is not None:
            ids = select_ids(store, _lines("--near-duplicates-of", self.near_duplicates_of))
            found.append(NearDuplicates(tuple(ids.tolist())))
        if self.contaminates is not None:
            evaluation = Store.open(self.contaminates)
            as_of = f"{evaluation.identity.uuid} {evaluation.state.number}"
            found.append(Contaminates(str(Path(self.contaminates).absolute()), as_of=as_of))
        check_device(self.device)
        if self.like is not None:
            found.append(near(store, self.like, self.within, self.encoder, self.device))
        elif self.within is not None or self.encoder is not None:
            alone = "--within" if self.within is not None else "--encoder"
            raise UsageError(f"{alone} goes with --like", _ADVICE)
        if self.classifier is not None:
            found.append(classified(self.classifier, self.label, self.above, self.device))
        elif self.label is not None or self.above is not None:
            raise UsageError(f"{'--label' if self.label is not None else '--above'} goes with --classifier", _ADVICE)
        return found


def _lines(option: str, path: str | Path | None) -> tuple[str, ...]:
    return () if path is None else read_lines(option, path, "id")


def signed(reason: str, who: str | None) -> str:
    """Who does it, for the log: ``who`` or the user of this process; ``UsageError`` for words that can't stay there."""
    if not reason.strip():
        raise UsageError("--reason is empty", "Say why, in words that name no person: it stays in the log for ever.")
    if who is None:
        try:
            who = getpass.getuser()
        except (KeyError, OSError):  # a container's user may have a number and no name
            who = f"user {os.getuid()}"
    check_text("--reason", reason)
    check_text("--who", who)
    return who


def check_text(option: str, text: str) -> None:
    """``UsageError`` for text that has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{option} {text!a} is not UTF-8", "Nothing was purged.") from None


def kinds_of(text: str | None) -> tuple[str, ...]:
    """Kinds of personal data as ``--pii`` is given them, "all" or some apart by commas; ``UsageError`` for others."""
    if text is None:
        return ()
    kinds = KINDS if text == "all" else tuple(dict.fromkeys(kind.strip() for kind in text.split(",")))
    for kind in kinds:
        if kind not in KINDS:
            raise UsageError(f"--pii: there is no kind {kind!r}", f"Give all, or some of {', '.join(KINDS)}.")
    return kinds
