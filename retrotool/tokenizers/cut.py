"""Cut a long text into pieces whose tokens, in order, are exactly those of the whole text.

Cuts are made before a space after a letter, a digit or common punctuation, and after a single newline between
a character that is not white space and a letter or digit. With these rules, no token crosses such a place:

* GPT-2's pattern and its descendants: only white space, or one space and what follows it, goes with a space;
  a newline before a letter ends a piece.
* BERT's pattern: white space is dropped, and words never contain any.
* Normalisers: BERT's and NFC keep such spaces and newlines, and compose nothing across them.

GPT-2's pattern and its descendants also end a piece between a letter and a digit, and between a digit and
punctuation (``places_beside_digits``).
In the patterns of ``_TAB_PATTERNS`` a tab before punctuation is a piece of its own, at which ``isolate_tabs``
cuts: of white space in front of something else, the last character is left for that, and only spaces and
letters take it.

Text without such a place, and text of tokenizers with other rules, is not cut.
"""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

_BEFORE_SPACE = r"[\w!-=?@\[^{}]"  # not what added tokens end with that may take the space, such as <mask>
_CUT = re.compile(_BEFORE_SPACE + r"(?= )|\S\n(?=[^\W_])")
_BESIDE_DIGITS = (r"[A-Za-z](?=[0-9])", r"[0-9](?=[!-/:-@\[-`{-~])")
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K_PATTERN = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+\z|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # in Oniguruma's syntax: white space at the very end is one piece
O200K_PATTERN = "|".join(
    [*(c + _CONTRACTIONS + "?" for c in _CASED), r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", _TAIL]
)
_AROUND_DIGITS = (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|", r"| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _TAIL)
LLAMA_3_PATTERN, QWEN_2_PATTERN = (digits.join(_AROUND_DIGITS) for digits in (r"\p{N}{1,3}", r"\p{N}"))
_TAB_PATTERNS = frozenset([O200K_PATTERN, LLAMA_3_PATTERN, QWEN_2_PATTERN])
KNOWN_PATTERNS = _TAB_PATTERNS | frozenset([GPT2_PATTERN, CL100K_PATTERN])


def why_not_cut(fields: Mapping[str, Any]) -> str:
    """Return why texts must not be cut for the tokenizer of this ``tokenizer.json``, or ""."""
    normalizer, splitter = fields.get("normalizer") or {}, fields.get("pre_tokenizer") or {}
    kinds = (str((fields.get("model") or {}).get("type")), normalizer.get("type"), splitter.get("type"))
    for token in fields.get("added_tokens") or []:
        content = str(token.get("content", ""))
        to_right = token.get("rstrip") and re.match(_BEFORE_SPACE, content[-1:])
        reaches = to_right or (token.get("lstrip") and content[:1].isalnum())
        if reaches or re.search(_BEFORE_SPACE + r" |\n\w", content) or (token.get("normalized") and normalizer):
            return f"the added token {content!a} may reach across white space, or is found in normalised text"
    if kinds == ("WordPiece", "BertNormalizer", "BertPreTokenizer"):
        return ""
    if kinds[0] != "BPE":
        return f"{kinds[0]} models are not among those it is exact for"
    if kinds[1] not in (None, "NFC"):
        return f"the normaliser {kinds[1]} is not among those it is exact for"
    return _why_not_split(splitter)


def places_beside_digits(fields: Mapping[str, Any]) -> re.Pattern[str] | None:
    """Return where else texts may be cut for the tokenizer of this ``tokenizer.json``, if anywhere."""
    added = [token.get("content", "") for token in fields.get("added_tokens") or []]
    places = [place for place in _BESIDE_DIGITS if not any(re.search(place, content) for content in added)]
    return re.compile("|".join(places)) if places and fields["model"]["type"] == "BPE" else None


def tabs_to_isolate(fields: Mapping[str, Any]) -> re.Pattern[str] | None:
    """Return which tabs ``isolate_tabs`` may cut at for the tokenizer of this ``tokenizer.json``."""
    splitter = fields.get("pre_tokenizer") or {}
    steps = splitter.get("pretokenizers", []) if splitter.get("type") == "Sequence" else [splitter]
    added = fields.get("added_tokens") or []
    reach = any(token.get("lstrip") or token.get("rstrip") or "\t" in token.get("content", "") for token in added)
    if reach or (steps[0].get("pattern") or {}).get("Regex") not in _TAB_PATTERNS:
        return None
    # An added token ends the text before it, and all white space at the end is one piece.
    before = set(string.punctuation) - {token.get("content", "")[:1] for token in added}
    return re.compile(rf"(\t)(?=[{re.escape(''.join(sorted(before)))}])") if before else None


def isolate_tabs(texts: Sequence[str], chosen: Sequence[bool], tab: re.Pattern[str]) -> tuple[list[str], list[int]]:
    """Cut ``chosen`` texts before and after each ``tab``; return all pieces and the number per text."""
    parts = [
        list(filter(None, tab.split(text))) if may and "\t" in text else [text]
        for text, may in zip(texts, chosen, strict=True)
    ]
    return list(itertools.chain.from_iterable(parts)), list(map(len, parts))


def _why_not_split(splitter: Mapping[str, Any]) -> str:
    steps = splitter.get("pretokenizers", []) if splitter.get("type") == "Sequence" else [splitter]
    kinds = [str(step.get("type")) for step in steps]
    if kinds == ["Split", "ByteLevel"]:
        pattern = (steps[0].get("pattern") or {}).get("Regex")
        form = (steps[0].get("behavior"), bool(steps[0].get("invert")))
        known = pattern in KNOWN_PATTERNS and form in (("Isolated", False), ("Removed", True))
        if not known or steps[1].get("use_regex", True):
            return "its splitting pattern is not among those it is exact for"
    elif kinds != ["ByteLevel"] or not steps[0].get("use_regex", True):
        return f"the pre-tokenizer {' + '.join(kinds)} is not among those it is exact for"
    return "it puts a space before every text" if steps[-1].get("add_prefix_space", True) else ""


def cut_texts(
    texts: Sequence[str],
    least: int,
    most: int,
    chosen: Sequence[bool] | None = None,
    *,
    widest: int = 1,
    inside: re.Pattern[str] | None = None,
) -> tuple[list[str], list[int]]:
    """Cut ``chosen`` texts to ``least`` to ``most`` characters; return all pieces and the number per text.

    Both are divided by ``widest`` for texts beyond ASCII. Where there is no other place, texts are cut at one
    of ``inside``; without that a piece may be longer.
    """
    assert least >= widest, "pieces must not be empty"
    pieces: list[str] = []
    counts: list[int] = []
    for text, may_cut in zip(texts, chosen or itertools.repeat(True, len(texts)), strict=True):
        before, start, size = len(pieces), 0, len(text)
        shrink = 1 if text.isascii() else widest
        few, many = least // shrink, most // shrink
        while may_cut and size - start > many:
            place = _CUT.search(text, start + few - 1, start + many)
            if place is None and inside is not None:
                place = inside.search(text, start + few - 1, start + many)
            place = place or _CUT.search(text, start + many - 2)
            if place is None:
                break
            pieces.append(text[start : place.end()])
            start = place.end()
        pieces.append(text[start:] if start else text)
        counts.append(len(pieces) - before)
    return pieces, counts
