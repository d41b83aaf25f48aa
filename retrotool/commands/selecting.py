"""What a purge can be asked for, as options: files are read here, and selectors made of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from retrotool.errors import UsageError
from retrotool.stages.selection import Asked, Given
from retrotool.stages.selectors.base import Selector
from retrotool.stages.selectors.patterns import Patterns, read_patterns
from retrotool.store.store import Store

_ADVICE = "Nothing was purged. See: retrotool purge --help"


@dataclass(frozen=True, slots=True, kw_only=True)
class Selectors:
    """What to select: what any of these means, or with ``every`` what all of them mean.

    ``ids`` and ``documents`` are files with an id a line, ``chunk`` and ``document`` such ids themselves; ``where`` is
    an expression over document columns, ``pattern`` one of RE2 over text, ``patterns`` a file with such ones.
    ``whole_documents`` widens to the documents of what is meant. ``allow_lossy``: patterns may be held against folded
    text (``retrotool.stages.selectors.text``), where the tokenizer loses case or spacing.
    """

    ids: str | Path | None = None
    chunk: tuple[int, ...] = ()
    documents: str | Path | None = None
    document: tuple[str, ...] = ()
    where: str | None = None
    pattern: str | None = None
    patterns: str | Path | None = None
    every: bool = False
    whole_documents: bool = False
    allow_lossy: bool = False

    def asked(self, store: Store) -> Asked:
        """Read what is in files; ``UsageError`` if nothing is asked for, or what can't be looked for in this store."""
        given: list[Given] = []
        if self.ids is not None or self.chunk:
            given.append(Given("ids", (*_lines("--ids", self.ids), *map(str, self.chunk))))
        if self.documents is not None or self.document:
            given.append(Given("documents", (*_lines("--documents", self.documents), *self.document)))
        if self.where is not None:
            check_text("--where", self.where)
            given.append(Given("where", (self.where,)))
        scanned = self._scanned()
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
        for selector in scanned:
            selector.open(store)  # what can't be looked for is told before anything is read
        return Asked(tuple(given), tuple(scanned), self.every, self.whole_documents)

    def _scanned(self) -> list[Selector]:
        found: list[Selector] = []
        patterns: tuple[str, ...] = ()
        if self.pattern is not None:
            check_text("--pattern", self.pattern)
            patterns += (self.pattern,)
        if self.patterns is not None:
            patterns += read_patterns(str(self.patterns))
        if patterns:
            found.append(Patterns(patterns))
        return found


def _lines(option: str, path: str | Path | None) -> tuple[str, ...]:
    if path is None:
        return ()
    try:
        return tuple(Path(path).read_text("utf-8", "surrogateescape").split("\n"))
    except OSError as error:
        raise UsageError(
            f"{option} {path} can't be read: {error.strerror}", "Give a file with one id a line."
        ) from error


def check_text(option: str, text: str) -> None:
    """``UsageError`` for text that has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{option} {text!a} is not UTF-8", "Nothing was purged.") from None
