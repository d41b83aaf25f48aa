r"""Detect texts that a fast tokenizer may get wrong, by comparing it with an exact one.

The fast tokenizer is assumed to decide by a few neighbouring characters at a time, as the splitting rules of
``retrotool.tokenizers.cut`` do. A guard knows three kinds of unsafe text:

* *substrings*: ASCII pairs, characters and added tokens that the two treat differently, found by trying all
  128 × 128 pairs; and tokens of 250 bytes or more.
* *runs*: long runs of one character between two others, each with its least length. Rules such as
  ``\s*[\r\n]+`` join white space of any length with the next newline, so many lengths are tried.
* *code points* above ASCII, tried in several surroundings when they first occur. Code points that Python's
  Unicode tables do not know are unsafe.

Making a guard takes a quarter of a second to a few seconds; checking takes about 1 ns per character. Other
text is only likely to be safe, so random texts are compared too, and the caller compares a sample.
"""

from __future__ import annotations

import itertools
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Flat = tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]
Encode = Callable[[Sequence[str]], Flat]
Hint = tuple[str, Callable[[str], object] | None]
States = npt.NDArray[np.uint8]  # of code points, [CODE_POINTS]
CODE_POINTS = 0x110000
Pair = tuple[Encode, Encode]  # a fast and an exact tokenizer

_MOST_SUBSTRINGS = 24
_MANY, _MOST_SECONDS = 6, 64  # pairs with one character: from when they count as one, and stand for it alone
_MOST_LEARNT = 8  # substrings learnt from trial texts
_LONG_TOKEN = 250  # bytes
_NEAR = 60  # tokens of a kind that a pair of characters is tried with
_UNKNOWN, _SAFE, _UNSAFE, _QUOTABLE = 0, 1, 2, 3
_PAIR_FRAMES = (" {}s ", "\n{}re x", "a{}a ", "1{}1 ", ".{}. ", "  {} x ")
_CHARACTER_FRAMES = (
    "{0} ", "{0}'s ", "a{0}b ", " {0}a ", "x{0} ", ".{0}. ", " {0} ", "  {0}1 ", "{0}{0} ", "1{0}1 ", "\n{0}\n",
    "\n{0}s ", "'{0} ", "a{0}'re ", "a{0}\nb ", "é{0}é ", "一{0}一 ", "—{0}—", " {0}{0}a ", "A{0}B ",
    "{0}12345 ", "12{0}345 ", "-{0}'s ", "-{0}a ", " -{0}x ", "é{0}'t ", "\u0301{0}a ", "{0}\u0301a ", " {0}",
)  # fmt: skip
_WORDS = ("'s", "'LL", "'re", "the", "don't", "Ing", "   ", "\n\n", "\r\n", "\t\t", "2024", "...", "//", "ﬁ", "ǆ")
_STRANGE = "éßÅİſжЖѣאשعلى一龍あア한각ไ์िक्ষ𐍈𝒳🎈👩🏽£—…“’«»\u00a0\u2003\u3000\u2028\u200d\ufe0f\u0301\u0327\u0345٣²½Ⅳ①￼"
_KINDS = {  # characters to try, and the class that each stands for at the ends of a run
    " ": " ",
    "\n": r"\n",
    "\r": r"\r",
    "\t": r"\t",
    "a": r"[^\W\d_]",
    "1": r"\d",
    ".": r"[^\w\s]",
    "-": r"[^\w\s]",
}  # fmt: skip
_SHORT = (*range(1, 10), 12, 15, 16, 17, 20, 24, 31, 32, 33)
_LONG = (40, 48, 63, 64, 65, 80, 96, 127, 128, 129, 200, 256)
_SPACE_BYTES = 3  # most bytes of a white space character in UTF-8


class TokenRun(NamedTuple):
    """``length`` or more of one character after one and before another."""

    before: str
    inside: str
    length: int
    after: str


@dataclass(frozen=True, slots=True)
class Findings:
    """What a guard found, by libraries of ``versions``; ``why``: a reason not to use the fast tokenizer."""

    versions: str
    substrings: tuple[str, ...] = ()
    runs: tuple[TokenRun, ...] = ()
    frames: tuple[str, str] = ("", "")
    why: str = ""

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Findings:
        """Read the record of a store."""
        first, second = fields["frames"]
        runs = tuple(TokenRun(*run) for run in fields.get("runs", ()))
        return cls(fields["versions"], tuple(fields["substrings"]), runs, (first, second), fields["why"])


class Guard:
    """Knows which texts two tokenizers treat alike: by ``findings``, or once it ``explore``s them."""

    def __init__(
        self,
        whole: Pair,
        findings: Findings,
        strict: Callable[[], Pair] | None = None,  # returns a pair whose tokens show everywhere how ``whole`` splits
        *,
        matters: Callable[[int], bool] | None = None,  # whether splitting at a code point can change tokens
        states: States | None = None,  # of code points, from a guard like this one
    ) -> None:
        self._whole = self._split = whole
        self._strict, self._crossed = strict or (lambda: self._split), matters or (lambda _: True)
        self.states: States = np.zeros(CODE_POINTS, np.uint8) if states is None else states.copy()
        self.states[:128] = _SAFE
        self.states[0xD800:0xE000] = _UNSAFE
        self.classified = 0  # code points whose states are new
        self.findings = findings
        self._learn()

    def explore(
        self,
        split: Pair,  # splits like ``whole``; its tokens show where, between ``neighbours``
        *,
        neighbours: Sequence[tuple[str, str]] = (),
        tokens: Sequence[str] = (),
        added: Sequence[str] = (),  # added tokens
        trials: Sequence[str] = (),  # texts to try
        longest: int = 8192,  # most bytes of a text
    ) -> None:
        """Find what the two tokenizers treat differently."""
        self._split = split
        # A tokenizer that stores lengths in a byte may get these wrong.
        long = sorted({token[:_LONG_TOKEN] for token in tokens if len(token.encode()) >= _LONG_TOKEN})
        unsafe = dict.fromkeys([*self._unsafe_ascii(neighbours, tokens), *self._unsafe_added(added), *long])
        self._learn(substrings=tuple(unsafe))
        seconds = Counter(one[0] for one in unsafe if len(one) == 2)
        kinds = len(unsafe) - sum(n - 1 for n in seconds.values() if n > _MANY)
        if kinds > _MOST_SUBSTRINGS:
            self._learn(why=f"it differs on at least {kinds} kinds of pairs of ASCII characters or added tokens")
            return
        frames = [frame for frame in _CHARACTER_FRAMES if not self._is_known(frame.format("e"))]
        frames = list(itertools.compress(frames, ~_unlike(split, [frame.format("e") for frame in frames])))
        plain = "".join(frame for frame in frames if "}'" not in frame)
        self._learn(runs=self._unlike_runs(), frames=("".join(frames), plain))
        odd = [*_odd_texts(longest, added), *trials]
        wrong = _unlike(self._whole, odd)
        for _ in range(_MOST_LEARNT):
            missed = np.flatnonzero(wrong & ~self.unsure(odd))
            pair = self._unsafe_pair_in(odd[missed[0]]) if len(missed) else ""
            if not pair:
                break
            self._learn(substrings=(*self.findings.substrings, pair))
        if len(missed):
            self._learn(why=f"it differs on {len(missed)} of {len(odd)} trial texts, such as {odd[missed[0]][:40]!a}")

    def _learn(self, **found: Any) -> None:
        """Set findings, and what to look for in ASCII texts and others: a substring, and a pattern there."""
        self.findings = replace(self.findings, **found)
        substrings = self.findings.substrings
        whole = [unsafe for unsafe in substrings if len(unsafe) != 2]
        pairs = [unsafe for unsafe in substrings if len(unsafe) == 2 and unsafe[0] not in whole]
        both: list[Hint] = [(unsafe, None) for unsafe in whole]
        for first in dict.fromkeys(pair[0] for pair in pairs):
            seconds = "".join(re.escape(pair[1]) for pair in pairs if pair[0] == first)
            both.append((first, re.compile(f"{re.escape(first)}[{seconds}]").search))
        runs = self.findings.runs
        self._unsafe = {plain: both + _run_hints(runs, ascii_only=plain) for plain in (False, True)}

    def _unsafe_pair_in(self, text: str) -> str:
        """Return an ASCII pair without which ``text`` would have the same tokens in both, or ""."""
        start = 0
        while start < len(text):  # remove what does not matter
            shorter = text[:start] + text[start + 1 :]
            if shorter and _unlike(self._whole, [shorter])[0]:
                text = shorter
            else:
                start += 1
        pairs = [text[i : i + 2] for i in range(len(text) - 1)]
        repaired = [
            pair
            for i, pair in enumerate(pairs)
            if pair.isascii() and not _unlike(self._whole, [f"{text[: i + 1]}a{text[i + 1 :]}"])[0]
        ]
        # Choose the rarest one: letters, digits and spaces are frequent.
        return min(repaired, key=lambda pair: sum(2 * c.isalnum() + (c in " \n") for c in pair), default="")

    def unsure(self, texts: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Return which texts [n] may be tokenised differently."""
        plain = list(map(str.isascii, texts))
        unsure = np.fromiter(map(self._has_unsafe, texts, plain), bool, len(texts))
        places = np.flatnonzero(~np.array(plain, bool))
        if len(places):
            wide = [texts[i] for i in places.tolist()]
            ends = np.cumsum([len(text) + 1 for text in wide])
            found = self._above_ascii("\n".join(["", *wide, ""])) - 1
            unsure[places[np.searchsorted(ends, found, side="right")]] = True
        return unsure

    def _has_unsafe(self, text: str, plain: bool) -> bool:
        """Return whether an unsafe substring or run is in ``text``."""
        for hint, search in self._unsafe[plain]:  # noqa: SIM110 - a generator takes twice the time
            if hint in text and (search is None or search(text)):
                return True
        return False

    def _unlike_runs(self) -> tuple[TokenRun, ...]:
        """Return the runs that the two treat differently, each with its least length."""

        def unlike(texts: Sequence[str]) -> npt.NDArray[np.bool_]:
            return np.asarray(_unlike(self._split, texts) | _unlike(self._whole, texts))

        found = []
        ways = [way for way in itertools.product(_KINDS, repeat=3) if way[1] not in (way[0], way[2])]
        tried = {way: [(n, text) for n, text in _run_texts(*way) if not self._is_known(text)] for way in ways}
        # Try all lengths in one text, then one by one.
        for way in itertools.compress(ways, unlike(["".join(text for _, text in tried[way]) for way in ways])):
            wrong = list(itertools.compress(tried[way], unlike([text for _, text in tried[way]])))
            if wrong:
                found.append(TokenRun(way[0], way[1], min(wrong)[0], way[2]))
        return tuple(found)

    def _is_known(self, text: str) -> bool:
        return any(unsafe in text for unsafe in self.findings.substrings)

    def _above_ascii(self, text: str) -> npt.NDArray[np.int64]:
        """Return where unsafe code points are in ``text``, which begins and ends with a newline."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        places = np.flatnonzero(codes > 127)
        points = codes[places]
        # Many characters are split differently beside a tab, which is rare, so all are unsafe there.
        unsafe: npt.NDArray[np.bool_] = (codes[places + 1] == ord("\t")) | (codes[places - 1] == ord("\t"))
        states = self.states[points]
        if (states != _SAFE).any():
            self._classify(np.unique(points[states == _UNKNOWN]))
            states = self.states[points]
            unsafe |= (states == _UNSAFE) | ((states == _QUOTABLE) & (codes[places + 1] == ord("'")))
        return places[unsafe]

    def _classify(self, points: npt.NDArray[np.uint32]) -> None:
        self.classified += len(points)
        known = np.array([unicodedata.category(chr(point)) != "Cn" for point in points.tolist()], bool)
        self.states[points[~known]] = _UNSAFE
        points = points[known]
        for start in range(0, len(points), 2048):
            some = points[start : start + 2048]
            self.states[some] = np.where(self._wrong_in(self.findings.frames[0], some), _QUOTABLE, _SAFE)
            suspects = some[self.states[some] == _QUOTABLE]
            self.states[suspects[self._wrong_in(self.findings.frames[1], suspects)]] = _UNSAFE
        harmless = [point for point in points[self.states[points] != _SAFE].tolist() if not self._crossed(point)]
        self.states[harmless] = _SAFE

    def _wrong_in(self, frame: str, points: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
        texts = [frame.format(chr(point)) for point in points.tolist()]
        return _unlike(self._strict(), texts) if texts else np.zeros(0, bool)

    def _unsafe_ascii(self, neighbours: Sequence[tuple[str, str]], tokens: Sequence[str]) -> list[str]:
        """Return unsafe characters, and unsafe pairs of the others."""
        letters = [chr(code) for code in range(128)]
        singles = {c for frame in _PAIR_FRAMES for c in self._unsafe_in([frame.format(c) for c in letters], letters)}
        rest = [letter for letter in letters if letter not in singles]
        pairs: set[str] = set()
        for before, after in _surroundings(neighbours):
            # Try many pairs in one text, by first and by second character, then the suspects one by one.
            around = {x + y: f"{before}{x}{y}{after.get(y, '')} " for x in rest for y in rest}
            rows = _unlike(self._split, ["".join(around[x + y] for y in rest) for x in rest])
            if not rows.any():
                continue
            columns = _unlike(self._split, ["".join(around[x + y] for x in rest) for y in rest])
            suspects = itertools.product(itertools.compress(rest, rows), itertools.compress(rest, columns))
            names = [x + y for x, y in suspects]
            pairs |= self._unsafe_in([around[name] for name in names], names)
        if tokens:
            pairs = {pair for pair in pairs if self._matters(pair, tokens)}
        for place, most in ((0, _MOST_SECONDS), (1, _MANY)):  # unsafe with many others means unsafe alone
            often = {letter for letter, n in Counter(pair[place] for pair in pairs).items() if n > most}
            pairs = {pair for pair in pairs if pair[place] not in often}
            singles |= often
        return [*sorted(singles), *sorted(pairs)]

    def _matters(self, pair: str, tokens: Sequence[str]) -> bool:
        """Return whether splitting a pair differently can change tokens, near tokens that could show it."""
        x, y = pair[0], pair[1]
        inside = [token for token in tokens if pair in token]
        after = [x + token for token in tokens if token[0:1] == y and len(token) > 1]
        before = [token + y for token in tokens if token[-1:] == x and len(token) > 1]
        near = [token for some in (inside, after, before) for token in some[:: len(some) // _NEAR + 1]]
        texts = [head + text + tail for text in near for head in ("", " ", "a", "\n ") for tail in ("", "s ", "1", ".")]
        return bool(_unlike(self._whole, texts).any())

    def _unsafe_in(self, texts: Sequence[str], names: Sequence[str]) -> set[str]:
        return set(itertools.compress(names, _unlike(self._split, texts)))

    def _unsafe_added(self, added: Sequence[str]) -> list[str]:
        """Return added tokens that the two find differently, or common beginnings of them."""
        found: set[str] = set()
        names = [name for name in added if name]
        for before, after in (("", ""), ("a", "b"), (" ", " "), ("x ", "\ny"), (".", "'s"), ("_", "_"), ("<", "|>")):
            texts = [before + name + after for name in names]
            found |= set(itertools.compress(names, _unlike(self._whole, texts)))
        length = max(map(len, found), default=0)
        while len({name[:length] for name in found}) > _MOST_SUBSTRINGS and length > 2:
            length -= 1
        return sorted({name[:length] for name in found})


def _surroundings(neighbours: Sequence[tuple[str, str]]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield what to put before a pair, and after it by its second character."""
    letters = [chr(code) for code in range(128)]
    for before, after in ((" ", "s"), ("\n", "re x"), ("a", "a"), ("1", "1"), (".", "."), ("  ", " x")):
        yield before, dict.fromkeys(letters, after)
    # Only characters that share a token with the second one show how the pair was split.
    followers: dict[str, list[str]] = {letter: [] for letter in letters}
    for one, two in neighbours:
        followers[one].append(two)
    for before, kind in ((" ", str.isalpha), ("a", str.isalpha), ("", str.isdigit), ("", str.isprintable)):
        chosen = {one: [two for two in all_of if kind(two)] for one, all_of in followers.items()}
        yield before, {one: some[0 if before else -1] for one, some in chosen.items() if some}


def _run_hints(runs: Sequence[TokenRun], *, ascii_only: bool) -> list[Hint]:
    """Return what to look for; outside ASCII, white space may be of any kinds, in as many bytes."""
    found: list[Hint] = []
    for run in runs:
        inside, length = re.escape(run.inside), run.length
        if run.inside.isspace() and not ascii_only:
            ends = re.escape("".join({run.before, run.after} & {"\n", "\r"}))
            inside, length = rf"[^\S{ends}]", -(-length // _SPACE_BYTES)
        rare = next((end for end in (run.before, run.after) if end in "\r\t"), "")
        found.append((rare, re.compile(f"{_KINDS[run.before]}{inside}{{{length},}}{_KINDS[run.after]}").search))
    return found


def _odd_texts(longest: int, added: Sequence[str]) -> list[str]:
    draw = random.Random(0)  # noqa: S311
    letters = [chr(code) for code in range(128)]
    often = [*" \n\t'.,-_()/", *"sStTrReEvVlLmMdD0123456789abcXYZ", *_WORDS, *added[:8]]
    kinds = (often, [*often, *letters], [*often, *_STRANGE], [*letters, *_STRANGE], [*_STRANGE])
    texts = ["".join(draw.choices(draw.choice(kinds), k=draw.randrange(1, 60))) for _ in range(2000)]
    for run in (" ", "a", "\n", " \n", "é", "一", ".", "1", "'s", "a ", "\t"):
        texts += [run * n for n in (2, 3, 7, 17, 99, 100, 101, 200)]
        texts.append(run * (longest // len(run.encode())))
    return texts


def _unlike(pair: Pair, texts: Sequence[str]) -> npt.NDArray[np.bool_]:
    return differing(pair[0](texts), pair[1](texts))


def differing(one: Flat, other: Flat) -> npt.NDArray[np.bool_]:
    """Return which texts [n] have different ids in two results of (ids, tokens per text)."""
    if np.array_equal(one[0], other[0]) and np.array_equal(one[1], other[1]):
        return np.zeros(len(one[1]), bool)
    split = (np.split(ids, np.cumsum(lengths)[:-1]) for ids, lengths in (one, other))
    return np.array([not np.array_equal(*pair) for pair in zip(*split, strict=True)], bool)


def _run_texts(before: str, inside: str, after: str) -> list[tuple[int, str]]:
    return [
        (length, f"x{before * left}{inside * length}{after * right}y ")
        for length in (*_SHORT, *_LONG)
        for left, right in (((1, 1), (1, 2), (2, 1)) if length in _SHORT else ((1, 1),))
    ]
