"""``--pii``: personal data and keys that can be recognised by their form.

* ``email``: addresses whose domain ends in a country or common top-level domain. Not: ``name at example dot
  org``.
* ``phone``: international numbers (``+44 20 7946 0958``, ``0044 …``); numbers after ``tel``, ``phone``,
  ``fax`` and the like; North American ones (``(202) 555-0143``, ``202-555-0143``); national ones with a
  leading zero and groups (``020 7946 0958``, ``01 42 68 53 00``, ``030/123456``). Not: unlabelled national
  numbers in one run of digits.
* ``ip-address``: public ones. Not: private, local and reserved ones; IPv4 addresses without two numbers from
  32 up, or after a word such as version, release or section, which are rarely addresses.
* ``iban``: of countries that have them, with valid check digits, in one run or in groups of four.
* ``payment-card``: 13 to 19 digits of a known issuer with a valid check digit, in one run or grouped as on a
  card.
* ``key``: of AWS (access key ids), GitHub, GitLab, Slack, Google, Stripe, npm, PyPI, Hugging Face, OpenAI,
  Anthropic; JSON Web Tokens; private key blocks up to 8 KiB. Not: passwords, and keys without a distinct
  form, such as AWS secret keys.

Not found: names and postal addresses, which have no distinct form.

In folded text case is ignored, and ``sk-…`` keys need 40 characters. Text without tokens is not found:
WordPiece has none for more than 100 letters in a row.

Each kind has an RE2 pattern, and a check in Python for each match. Cost: 90 MB/s per core for all kinds, 500
MB/s for one, and about 5 µs per candidate.
"""

from __future__ import annotations

import ipaddress
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from retrotool.errors import UsageError
from retrotool.purge.selectors.patterns import Pattern, compiled, find_in
from retrotool.purge.selectors.selector import BlockHits, Matcher, Selector, TextBlock
from retrotool.store.store import Store
from retrotool.tokenizers import stored_tokenizer

AROUND = 40
"""Bytes of the document before and after a candidate that its check gets; more after a private key."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A match, the text ``before`` and ``after`` it, and whether the text is ``folded``.

    Each byte that is not ASCII is U+FFFD here, so offsets are those of bytes.
    """

    text: str
    before: str
    after: str
    folded: bool


Check = Callable[[Candidate], tuple[int, int] | None]
"""Returns where in a candidate the data begins and ends, or None if it is a false positive."""


EMAIL = r"[\pL\pN._%+'-]+@[\pL\pN-]+(?:\.[\pL\pN-]+)+"
_COUNTRIES_AND_COMMON = (
    "ac ad ae af ag ai al am ao aq ar as at au aw ax az ba bb bd be bf bg bh bi bj bm bn bo br bs bt bw by bz "
    "ca cc cd cf cg ch ci ck cl cm cn co cr cu cv cw cx cy cz de dj dk dm do dz ec ee eg er es et eu fi fj fk "
    "fm fo fr ga gb gd ge gf gg gh gi gl gm gn gp gq gr gs gt gu gw gy hk hm hn hr ht hu id ie il im in io iq "
    "ir is it je jm jo jp ke kg kh ki km kn kp kr kw ky kz la lb lc li lk lr ls lt lu lv ly ma mc md me mg mh "
    "mk ml mm mn mo mp mq mr ms mt mu mv mw mx my mz na nc ne nf ng ni nl no np nr nu nz om pa pe pf pg ph pk "
    "pl pm pn pr ps pt pw py qa re ro rs ru rw sa sb sc sd se sg sh si sk sl sm sn so sr ss st su sv sx sy sz "
    "tc td tf tg th tj tk tl tm tn to tr tt tv tw tz ua ug uk us uy uz va vc ve vg vi vn vu wf ws ye yt za zm "
    "zw aero app art asia bank biz blog cat center city cloud club com company coop design dev digital edu "
    "email fun global gmbh gov group health info int international jobs life live ltd media mil mobi museum "
    "name net network news ngo one online org page photo post press pro services shop site software solutions "
    "space store studio support systems tech tel today top travel university vip website wiki work world xyz "
    "zone "
)
_TOP = frozenset(_COUNTRIES_AND_COMMON.split())


def check_email(seen: Candidate) -> tuple[int, int] | None:
    """Accept local parts of up to 64 bytes, and domains under country or common top-level domains."""
    local, _, domain = seen.text.rpartition("@")
    mine = local.lstrip("'.%-")[-64:]
    labels = domain.split(".")
    while len(labels) > 1 and not (labels[-1].lower() in _TOP or labels[-1].lower().startswith("xn--")):
        labels.pop()  # a sentence that continues: john@example.com.then
    good = all(label and not label.startswith("-") and not label.endswith("-") for label in labels)
    if len(labels) < 2 or not good or not mine or mine.endswith(".") or ".." in mine:
        return None
    if seen.after[:1] == "(" or mine.lower() == "git":  # a function call, or a shared login
        return None
    return len(local) - len(mine), len(local) + 1 + len(".".join(labels))


_CALLING = re.compile(
    r"1|7|2[07]|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]|"
    r"2[1-689][0-9]|3[578][0-9]|42[0-9]|50[0-9]|59[0-9]|67[0-9]|68[0-9]|69[0-2]|85[0-9]|88[0-8]|96[0-9]|97[0-9]|99[2-8]"
)
PHONE = (
    r"\+[1-9][0-9]{0,3}(?:[ .\-/\x{a0}]{0,2}(?:\(0?\d{0,4}\))?[ .\-/]?[0-9]){6,14}"
    r"|\b00[1-9][0-9]{0,2}(?:[ -]\(0\))?(?:[ -]?[0-9]){6,13}"
    r"|\b(?i:tel|phone|fax|mobile|cell|telephone|telefon|tél)\.?(?: ?(?i:no|number|nr)\.?)?:? ?"
    r"(?:[ .\-/()]{0,2}[0-9]){7,15}"
    r"|(?:\b1[ .-])?(?:\([2-9][0-8][0-9]\) ?|\b[2-9][0-8][0-9][.-])[2-9][0-9]{2}[.-][0-9]{4}\b"
    r"|(?:\(0[1-9][0-9]{1,4}\) ?|\b0[1-9][0-9]{1,4}[ /-])[0-9]{2,8}(?:[ -][0-9]{2,6}){0,4}\b"
    r"|\b0[1-9](?: [0-9]{2}){4}\b|\b0[1-9](?:\.[0-9]{2}){4}\b"
)
_NATIONAL = re.compile(r"[2-9][0-8][0-9][2-9][0-9]{6}")


def check_phone(seen: Candidate) -> tuple[int, int] | None:
    """Accept international, labelled, North American and national numbers of valid length and grouping."""
    text = seen.text
    digits = "".join(filter(str.isdigit, text))
    groups = re.findall(r"\d+", text)
    comma = "" if text[0] == "+" else ","  # which parts the fields of a table, or digits of a number
    if re.match(rf"\w|[.{comma}:/-]\d", seen.after) or re.search(rf"\d[-+.{comma}/: ]?\Z|[\w.]-\Z", seen.before):
        return None
    if text[0].isalpha():  # labelled
        start = re.search(r"\d|[(+]", text)
        return (start.start(), len(text)) if start and len(set(digits)) > 2 else None
    if not seen.folded and re.search(r"[\w&=%)\]]\Z", seen.before):
        return None
    if text[0] == "+" or text.startswith("00"):
        digits = digits.removeprefix("00")
        code = _CALLING.match(digits)
        plain = len(groups) == 1
        if code is None or not 9 + plain <= len(digits) <= 15 or len(set(digits)) < 4:
            return None
        if code[0] == "1" and not (len(digits) == 11 and _NATIONAL.match(digits[1:])):
            return None
        number = int(digits)
        power = number & (number - 1) == 0 or number & (number + 1) == 0  # such as the largest value of a type
        table = {len(group) for group in groups} == {4}
        if power or table or sum(len(group) == 1 for group in groups[1:]) > 1:
            return None
        return (0, len(text)) if text[0] == "+" or (not plain and len(groups[0]) <= 5) else None
    if len(set(digits)) < 4 or digits in "0123456789":
        return None
    if digits[0] != "0":
        return (0, len(text)) if digits[-7:-4] not in ("411", "911") else None
    if re.match(r" ?[-/.]? ?\d", seen.after):  # a table
        return None
    if not 9 <= len(digits) <= 11 or groups[:3] == ["01", "02", "03"] or [len(group) for group in groups] == [5, 4]:
        return None  # the last is a ZIP code of the United States
    return 0, len(text)


IP = (
    r"(?:[0-9]{1,3}\.){3}[0-9]{1,3}"
    r"|\b[23][0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{1,4}:){0,6}:?(?:[0-9A-Fa-f]{1,4}:){0,6}[0-9A-Fa-f]{0,4}"
)
_VERSION = re.compile(r"(?i)(?:versions?|release|revision|ver|rev|since|section|chapter|oid|build|v|§)[\s.:=(#]*\Z")


def check_ip(seen: Candidate) -> tuple[int, int] | None:
    """Accept public addresses; IPv4 ones need two numbers from 32 up, which versions rarely have."""
    text = seen.text
    if ":" in text:
        text = text if text.endswith("::") else text.rstrip(":")
        if re.search(r"[\w:]\Z", seen.before) or re.match(r"[\w:]", seen.after):
            return None
        if ("::" not in text and text.count(":") != 7) or text.count(":") < 3:
            return None
    else:
        if re.search(r"[\w.-]\Z", seen.before) and not (seen.folded and seen.before[-1:].isspace()):
            return None
        if re.match(r"[\w]|[.-][\d]|-[a-z]", seen.after) or _VERSION.search(seen.before):
            return None
        if sum(int(number) >= 32 for number in text.split(".")) < 2:
            return None
    try:
        return (0, len(text)) if ipaddress.ip_address(text).is_global else None
    except ValueError:
        return None


_IBANS = (
    "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 DO28 EE20 "
    "EG29 ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 "
    "KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 "
    "PL28 PS29 PT25 QA29 RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 "
    "VA22 VG24 XK20 YE30 "
)
_LENGTHS = {one[:2]: int(one[2:]) for one in _IBANS.split()}
IBAN = r"\b[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?"


def check_iban(seen: Candidate) -> tuple[int, int] | None:
    """Accept the length of the country, in one run or in groups of four, and 1 modulo 97 (ISO 13616)."""
    length = _LENGTHS.get(seen.text[:2].upper())
    if length is None or re.search(r"[\w+/=-]\Z", seen.before):
        return None
    places = [place for place, character in enumerate(seen.text) if character != " "][:length]
    if len(places) < length:
        return None
    end = places[-1] + 1
    groups = seen.text[:end].split(" ")
    following = (seen.text[end:] + seen.after)[:1]
    if re.match(r"[\w+/=]", following) or (len(groups) > 1 and {len(g) for g in groups[:-1]} != {4}):
        return None
    compact = seen.text[:end].replace(" ", "").upper()
    number = int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4]))
    return (0, end) if number % 97 == 1 else None


CARD = r"\b[2-6][0-9]{3}(?:[ -]?[0-9]){8,14}[0-9]\b"
_GROUPS = ([4, 4, 4, 4], [4, 6, 5], [4, 6, 4], [4, 4, 4, 4, 3], [4, 4, 4, 1])
_ISSUERS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}"
    r"|(?:6011|65\d\d|64[4-9]\d|62\d\d)\d{12}|3(?:[689]\d|0[0-59])\d{11}|35(?:2[89]|[3-8]\d)\d{12}"
)


def check_card(seen: Candidate) -> tuple[int, int] | None:
    """Accept numbers of known issuers, ungrouped or grouped as on a card, with a valid Luhn digit."""
    if re.search(r"[\w+/]\Z|[\w ]-\Z|\d[ .:/-]\Z", seen.before) or (seen.before[-1:] == "." and not seen.folded):
        return None
    if re.match(r"[\w+/=]| \d{4}|[-.:]\d", seen.after):  # a comma parts the fields of a table
        return None
    for separator in " -":
        groups, end = seen.text.split(separator), len(seen.text)
        if len(groups) == 5 and len(groups[4]) < 3:  # the month of expiry
            end -= len(groups.pop()) + 1
        digits = "".join(groups)
        if digits.isdigit() and (len(groups) == 1 or [len(g) for g in groups] in _GROUPS):
            luhn = sum(sum(divmod(int(d) << place % 2, 10)) for place, d in enumerate(reversed(digits)))
            return (0, end) if _ISSUERS.fullmatch(digits) and luhn % 10 == 0 else None
    return None


BLOCK = 8 << 10  # bytes of the longest private key block
_LEAST = 64  # the least number of letters and digits in a private key; shorter ones are examples

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


KEY = "|".join((*_SHAPES, _BARE % 20, _JWT, _BEGIN))
FOLDED_KEY = "|".join((*_SHAPES, _BARE % 40, _LOST_JWT, _BEGIN))
"""For folded text, to be matched ignoring case."""


def check_key(seen: Candidate) -> tuple[int, int] | None:
    """Accept keys that look random and are not part of a word, and private key blocks up to their end."""
    text = seen.text
    if text.startswith("-"):
        end = _block_end(seen.after)
        return None if end is None else (0, len(text) + end)
    end = len(text.rstrip("-_"))
    secret = re.split(r"[_-]", text[:end].replace("sk-ant-", "sk-"), maxsplit=1)[-1] if text[:4] != "AIza" else text[4:]
    if re.search(r"[A-Za-z0-9_]\Z", seen.before) or re.match(r"[A-Za-z0-9_]", seen.after):
        return None
    figures = sum(map(str.isdigit, secret))
    runs = max(map(len, re.split(r"[_.-]", secret)))
    telling = len(set(secret)) >= 10 and figures >= 2 and sum(map(str.isalpha, secret)) >= 2
    return (0, end) if telling and (runs >= 16 or text[:3].lower() in ("xox", "eyj")) else None


_BODY = re.compile(r"[A-Za-z0-9+/=\s:,.-]*", re.ASCII)


def _block_end(text: str) -> int | None:
    """Return where a private key ends, given the text after its BEGIN line; None: none is there.

    It ends at its END line, or without one, with the last character that can belong to it.
    """
    end = text.lower().find("-----end")
    if end >= 0:
        body, close = text[:end], text.find("-----", end + 8)
        end = close + 5 if 0 <= close < end + 60 else end + 8
    else:
        body = _BODY.match(text)[0]  # type: ignore[index]
        end = len(body)
    return end if sum(map(str.isalnum, body)) >= _LEAST else None


_FORMS: dict[str, tuple[str, Check]] = {
    "email": (EMAIL, check_email),
    "phone": (PHONE, check_phone),
    "ip-address": (IP, check_ip),
    "iban": (IBAN, check_iban),
    "payment-card": (CARD, check_card),
    "key": (KEY, check_key),
}
KINDS = tuple(_FORMS)


@dataclass(frozen=True, slots=True)
class PersonalData(Selector):
    """Finds personal data and keys of some ``kinds``; ``UsageError`` for an unknown kind."""

    kind: ClassVar[str] = "pii"
    reads_text: ClassVar[bool] = True
    kinds: tuple[str, ...] = KINDS

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise UsageError(f"--pii: unknown kind {kind!r}", f"Give all, or some of {', '.join(KINDS)}.")

    @property
    def names(self) -> tuple[str, ...]:
        """The kinds."""
        return self.kinds

    def open(self, store: Store) -> Matcher:
        """Compile the patterns."""
        return self.matcher(folded=not stored_tokenizer(store).lossless)

    def matcher(self, *, folded: bool = False) -> Matcher:
        """Return the matcher of text that is ``folded`` or not; it labels rows by kind."""
        forms = {**_FORMS, "key": (FOLDED_KEY, check_key)} if folded else _FORMS
        searches = [(compiled(forms[kind][0], ignore_case=folded), forms[kind][1]) for kind in self.kinds]

        def match(block: TextBlock) -> BlockHits:
            found = (list(_checked(block, pattern, check, folded)) for pattern, check in searches)
            return BlockHits.joined([BlockHits.touched(block, some, label) for label, some in enumerate(found)])

        return match


def _checked(block: TextBlock, pattern: Pattern, check: Check, folded: bool) -> Iterator[tuple[int, int]]:
    """Yield where the data in matches of ``pattern`` begins and ends in the text of a block."""
    over = 0
    for first, last in itertools.pairwise(block.borders.tolist()):
        for low, high in find_in(pattern, block.text[first:last]):
            begin, end = first + low, first + high
            if begin < over:
                continue  # within a private key block
            reach = BLOCK if check is check_key and block.text[begin] == ord("-") else AROUND
            edges = itertools.pairwise((max(first, begin - AROUND), begin, end, min(last, end + reach)))
            before, text, after = (bytes(block.text[left:right]).decode("ascii", "replace") for left, right in edges)
            place = check(Candidate(text, before, after, folded))
            if place is not None:
                over = begin + place[1]
                yield begin + place[0], over
