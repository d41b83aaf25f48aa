"""Keys and tokens that open something, by the shapes that their issuers gave them.

Where case is lost, shapes are looked for without it, longer where only case made them telling, and what a tokenizer
has no word for, as WordPiece has not of more than 100 letters and digits, may stand in a JSON Web Token.
"""

from __future__ import annotations

import re

from retrotool.purge.selectors.pii_numbers import Candidate

BLOCK = 8 << 10
"""The longest block of a private key, in bytes."""
_LEAST = 64
"""Letters and digits that the body of a private key has at least: what has fewer is an example."""

_SHAPES = (
    r"(?:AKIA|ASIA)[A-Z2-7]{16}",
    r"gh[pousr]_[A-Za-z0-9]{36,255}",
    r"github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}",
    r"glpat-[A-Za-z0-9_-]{20,64}",
    r"xox[abeoprs]-[A-Za-z0-9-]{20,255}",
    r"AIza[A-Za-z0-9_-]{35}",
    r"[sr]k_(?:live|test)_[A-Za-z0-9]{20,255}",
    r"npm_[A-Za-z0-9]{36}",
    r"pypi-[A-Za-z0-9_-]{80,255}",
    r"hf_[A-Za-z0-9]{34,40}",
)
_BARE = r"sk-(?:ant-|proj-|svcacct-|admin-|or-)?[A-Za-z0-9_-]{%d,255}"
_JWT = r"eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{16,}"
_LOST_JWT = r"eyJ[A-Za-z0-9_-]{8,}\.(?:eyJ[A-Za-z0-9_-]{8,}|\[UNK\])\.(?:[A-Za-z0-9_-]{16,}|\[UNK\])"
_BEGIN = r"-----BEGIN (?:[A-Z0-9]+ ){0,2}PRIVATE KEY(?: BLOCK)?-----"


def key_pattern(*, folded: bool) -> str:
    """All shapes; folded, to be matched whatever the case."""
    bare, jwt = (_BARE % 40, _LOST_JWT) if folded else (_BARE % 20, _JWT)
    return "|".join((*_SHAPES, bare, jwt, _BEGIN))


def check_key(seen: Candidate) -> tuple[int, int] | None:
    """Apart from other words, and as mixed as what is drawn by chance; a block with its body is ``block_end``."""
    text = seen.text
    if text.startswith("-"):
        return 0, len(text)
    end = len(text.rstrip("-_"))
    secret = re.split(r"[_-]", text[:end].replace("sk-ant-", "sk-"), maxsplit=1)[-1] if text[:4] != "AIza" else text[4:]
    if re.search(r"[A-Za-z0-9_]\Z", seen.before) or re.match(r"[A-Za-z0-9_]", seen.behind):
        return None
    figures = sum(map(str.isdigit, secret))
    runs = max(map(len, re.split(r"[_.-]", secret)))
    telling = len(set(secret)) >= 10 and figures >= 2 and sum(map(str.isalpha, secret)) >= 2
    return (0, end) if telling and (runs >= 16 or text[:3].lower() in ("xox", "eyj")) else None


_BODY = re.compile(rb"[A-Za-z0-9+/=\s:,.-]*")


def block_end(text: bytes) -> int | None:
    """Where a private key ends whose text follows its BEGIN line; None: there is none in it.

    At its END line, or without one where what can belong to it ends.
    """
    end = text.lower().find(b"-----end")
    if end >= 0:
        body, close = text[:end], text.find(b"-----", end + 8)
        end = close + 5 if 0 <= close < end + 60 else end + 8
    else:
        body = _BODY.match(text)[0]  # type: ignore[index]
        end = len(body)
    return end if sum(map(bytes([c for c in range(128) if chr(c).isalnum()]).__contains__, body)) >= _LEAST else None
