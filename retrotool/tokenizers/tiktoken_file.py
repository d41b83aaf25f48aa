"""A tiktoken encoding's file (a token in base64 and its rank a line) as a ``tokenizer.json`` with the same ids.

The file has the tokens only. How text is split before, and which special tokens there are, is known for the encodings
below, which go by the file's name (``o200k_base.tiktoken``). tiktoken joins the two neighbours that make the token of
the lowest rank; so every way to make a token of two others is a merge, in the order of the tokens' ranks.

Special tokens are found in text, as in any ``tokenizer.json``; tiktoken refuses or ignores them there, by choice of
the caller. Where one text can be joined to the same token at two overlapping places, the two libraries may choose
differently; that takes runs of one letter that no token holds.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import orjson

from retrotool.errors import UsageError
from retrotool.tokenizers.cut import CL100K_PATTERN, GPT2_PATTERN, O200K_PATTERN
from retrotool.tokenizers.tokenizer import byte_level_alphabet


@dataclass(frozen=True, slots=True)
class Encoding:
    """What a file does not say: how text is split, and the ids of the special tokens."""

    pattern: str
    special: Mapping[str, int]


def _special(**ids: int) -> Mapping[str, int]:
    return MappingProxyType({f"<|{name}|>": number for name, number in ids.items()})


ENCODINGS = {
    "gpt2": Encoding(GPT2_PATTERN, _special(endoftext=50256)),
    "r50k_base": Encoding(GPT2_PATTERN, _special(endoftext=50256)),
    "p50k_base": Encoding(GPT2_PATTERN, _special(endoftext=50256)),
    "p50k_edit": Encoding(
        GPT2_PATTERN, _special(endoftext=50256, fim_prefix=50281, fim_middle=50282, fim_suffix=50283)
    ),
    "cl100k_base": Encoding(
        CL100K_PATTERN,
        _special(endoftext=100257, fim_prefix=100258, fim_middle=100259, fim_suffix=100260, endofprompt=100276),
    ),
    "o200k_base": Encoding(O200K_PATTERN, _special(endoftext=199999, endofprompt=200018)),
}
"""The encodings that tiktoken itself names, by that name."""


def looks_like(content: bytes) -> bool:
    """Whether a file's first line is a token in base64 and a rank."""
    token, _, rank = content[: content.find(b"\n")].partition(b" ")
    return rank.isdigit() and _is_base64(token)


def convert_tiktoken(content: bytes, name: str) -> bytes:
    """The ``tokenizer.json`` of an encoding's file; ``name`` (or its path's last part) says which encoding it is."""
    stem = Path(name).name.partition(".")[0]
    encoding = ENCODINGS.get(stem)
    if encoding is None:
        raise UsageError(
            f"tokenizer {name!r}: a tiktoken file does not say how text is split, and {stem!r} is no encoding known "
            "here",
            f"Name the file as its encoding: {', '.join(f'{known}.tiktoken' for known in ENCODINGS)}; or convert it to "
            "a tokenizer.json.",
        )
    ranks = _read(content, name)
    letters = {byte: letter for letter, byte in byte_level_alphabet().items()}

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [
        f"{spelled(token[:end])} {spelled(token[end:])}"
        for token in sorted(ranks, key=ranks.__getitem__)
        for end in _ends(token, ranks)
    ]
    special = {token: number for token, number in encoding.special.items() if number not in ranks.values()}
    fields = {
        "version": "1.0",
        "added_tokens": [_added(token, number) for token, number in special.items()],
        "pre_tokenizer": _splitter(encoding.pattern),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            # The special tokens too: ids of added tokens that are not there are given anew, in a row.
            "vocab": {**{spelled(token): rank for token, rank in ranks.items()}, **special},
            "merges": merges,
            "ignore_merges": True,  # a word that is a token is that token, as in tiktoken
        },
    }
    return orjson.dumps(fields)


def _splitter(pattern: str) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    if pattern == GPT2_PATTERN:
        return {**byte_level, "use_regex": True}  # it has this pattern of its own
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {**byte_level, "use_regex": False}]}


def _ends(token: bytes, ranks: Mapping[bytes, int]) -> list[int]:
    """Where a token can be cut into two others, those of the lowest ranks first."""
    found = [end for end in range(1, len(token)) if token[:end] in ranks and token[end:] in ranks]
    return sorted(found, key=lambda end: (ranks[token[:end]], ranks[token[end:]]))


def _read(content: bytes, name: str) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line:
            continue
        token, _, rank = line.partition(b" ")
        if not (rank.isdigit() and _is_base64(token)):
            raise UsageError(f"tokenizer {name!r}: line {number:,} is no token in base64 and its rank")
        ranks[base64.b64decode(token)] = int(rank)
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UsageError(
            f"tokenizer {name!r} has no token for {len(missing)} of the 256 bytes: the file is broken off, or is no "
            "encoding of bytes"
        )
    return ranks


def _is_base64(token: bytes) -> bool:
    try:
        return bool(base64.b64decode(token, validate=True))
    except binascii.Error:
        return False


def _added(token: str, number: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": token, **flags, "special": True}
