"""Personal data and keys in text: what can be told by its form alone.

Kinds, and what is found:

* ``email``: addresses whose domain ends in a country or a common top-level domain. Not: ``name at example dot org``.
* ``phone``: international numbers (``+44 20 7946 0958``, ``0044 …``), those behind ``tel``, ``phone``, ``fax`` and the
  like, of North America (``(202) 555-0143``, ``202-555-0143``), and national ones with a leading zero and groups
  (``020 7946 0958``, ``01 42 68 53 00``, ``030/123456``). Not: national numbers in one run of digits without a label.
* ``ip-address``: public ones. Not: private, local and reserved ones, and those of version 4 without two numbers from
  32 up or behind the word version, release, section and the like, which are rarely addresses.
* ``iban``: of countries that have them, with good check digits, in one or in groups of four.
* ``payment-card``: 13 to 19 digits of a known issuer with a good check digit, in one or grouped as on a card.
* ``key``: of AWS (access key ids), GitHub, GitLab, Slack, Google, Stripe, npm, PyPI, Hugging Face, OpenAI, Anthropic;
  JSON Web Tokens; blocks of private keys, up to 8 KiB. Not: passwords, and keys without a form of their own, such as
  the secret of an AWS key.

In folded text the same is found without case, keys of the form ``sk-…`` from 40 characters on. Not told any more: keys
that differ by case, and what a tokenizer has no tokens for, as WordPiece has not for more than 100 letters in a row.

How: an RE2 pattern for each kind, a check in Python for each match. Cost: 90 MB/s a core for all kinds, 500 MB/s for
one, and some 5 µs for each candidate. Memory: hardly any beside the text. What it does not do: names and postal
addresses, which a form does not tell, and numbers of North America that only spaces divide.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from retrotool.errors import UsageError
from retrotool.purge.selectors.document_text import Block
from retrotool.purge.selectors.pii_keys import BLOCK, block_end, check_key, key_pattern
from retrotool.purge.selectors.pii_numbers import AROUND, Candidate, Check, numbers
from retrotool.purge.selectors.selector import Hits, Matcher
from retrotool.purge.selectors.spans import Pattern, compiled, find_all, hits
from retrotool.store.store import Store
from retrotool.tokenizers import Tokenizer, TokenizerFile

KINDS = (*(name for name, _, _ in numbers()), "key")


@dataclass(frozen=True)
class PersonalData:
    """Finds personal data and keys of some kinds."""

    kind: ClassVar[str] = "pii"
    reads_text: ClassVar[bool] = True
    kinds: tuple[str, ...] = KINDS

    def literal(self) -> dict[str, Any]:
        """The kinds."""
        return {"kinds": list(self.kinds)}

    def open(self, store: Store) -> Matcher:
        """Compile the patterns; ``UsageError`` for a kind that is none."""
        own = store.identity.tokenizer
        tokenizer = Tokenizer(TokenizerFile(own.name, store.tokenizer_json()))
        return PersonalDataMatcher(self.kinds, folded=not tokenizer.lossless)


class PersonalDataMatcher:
    """Finds personal data in blocks."""

    def __init__(self, kinds: tuple[str, ...], *, folded: bool = False) -> None:
        for kind in kinds:
            if kind not in KINDS:
                raise UsageError(f"there is no kind of personal data {kind!r}", f"Kinds are {', '.join(KINDS)}.")
        known: dict[str, tuple[str, Check]] = {name: (pattern, check) for name, pattern, check in numbers()}
        known["key"] = key_pattern(folded=folded), check_key
        self._folded = folded
        self._searches: list[tuple[Pattern, Check]] = [
            (compiled(known[kind][0], ignore_case=folded), known[kind][1]) for kind in kinds
        ]
        self._names = tuple(kinds)

    @property
    def names(self) -> tuple[str, ...]:
        """The kinds."""
        return self._names

    def __call__(self, block: Block) -> Hits:
        """The rows with personal data, by its kind."""
        found = []
        for label, (pattern, check) in enumerate(self._searches):
            spans = np.array(list(self._checked(block, pattern, check)), np.int64).reshape(-1, 2)
            found.append(hits(block, spans[:, 0], spans[:, 1], label))
        return Hits.joined(found)

    def _checked(self, block: Block, pattern: Pattern, check: Check) -> Iterator[tuple[int, int]]:
        """Where matches of a pattern lie that are what they look like."""
        begins, ends = find_all(pattern, block)
        borders = block.starts[block.documents]
        document = np.searchsorted(borders, begins, side="right")
        places = (begins, ends, borders[document - 1], borders[document])
        over = 0
        for begin, end, first, last in zip(*(place.tolist() for place in places), strict=True):
            if begin < over:
                continue  # within a block that was found
            before, text, behind = (
                bytes(block.text[low:high]).decode("ascii", "replace")
                for low, high in ((max(first, begin - AROUND), begin), (begin, end), (end, min(last, end + AROUND)))
            )
            place = check(Candidate(text, before, behind, self._folded))
            if place is None:
                continue
            if check is check_key and text.startswith("-"):
                tail = block_end(bytes(block.text[end : min(last, end + BLOCK)]))
                if tail is None:
                    continue
                over = end + tail
                yield begin, over
            else:
                yield begin + place[0], begin + place[1]
