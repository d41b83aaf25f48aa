"""Personal data in blocks and stores: made-up examples of each kind, what only looks like it, and how much is read."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from block_help import block_of, cut
from conftest import write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from retrotool import api
from retrotool.errors import UsageError
from retrotool.purge.selectors import patterns
from retrotool.purge.selectors.pii import KINDS, PersonalData
from retrotool.purge.selectors.selector import Decoder, text_blocks
from retrotool.store.store import Store


def drawn(seed: int, size: int, letters: str = "abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789") -> str:
    return "a2" + "".join(random.Random(seed).choices(letters, k=size - 4)) + "Z9"


AWS = "AKIA" + "Q3EGWFBT7YKS2LXV"
PRIVATE = "-----BEGIN RSA PRIVATE KEY-----\n{}\n-----END RSA PRIVATE KEY-----"
LINES = "\n".join(drawn(n, 64) for n in range(12))
JWT = f"eyJ{drawn(1, 33)}.eyJ{drawn(2, 60)}.{drawn(3, 43)}"

GOOD = {
    "email": [
        "john.doe+x@example.com", "j@sub.domain.co.uk", "jürgen@beispiel.de", "O'Neil@firm.museum",
        "a_b@xn--bcher-kva.ch",
    ],
    "phone": [
        "+44 20 7946 0958", "+442079460958", "+1 (202) 555-0143", "+1-202-555-0143", "+49 (0)30 1234567",
        "0044 20 7946 0958",
        "(202) 555-0143", "202-555-0143", "202.555.0143", "020 7946 0958", "01 42 68 53 00", "030/1234567",
        "(030) 1234567", "+972-4-8307322",
    ],
    "ip-address": ["81.2.69.142", "2606:2800:220:1:248:1893:25c8:1946", "2a00:1450:4001::200e"],
    "iban": [
        "DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432", "NO93 8601 1117 947",
        "FR14 2004 1010 0505 0001 3M02 606",
    ],
    "payment-card": [
        "4111 1111 1111 1111", "4111-1111-1111-1111", "4111111111111111", "5555 5555 5555 4444", "3782 822463 10005",
        "6011111111111117", "30569309025904", "2223003122003222",
    ],
    "key": [
        AWS, "ghp_" + drawn(4, 36), f"github_pat_{drawn(5, 22)}_{drawn(6, 59)}", f"xoxb-123456789012-{drawn(7, 24)}",
        "AIza" + drawn(8, 35), "sk_live_" + drawn(9, 24), "npm_" + drawn(10, 36),
        "pypi-AgEIcHlwaS5vcmc" + drawn(11, 90),
        "hf_" + drawn(12, 34), "sk-" + drawn(13, 48), "sk-proj-" + drawn(14, 60), "sk-ant-api03-" + drawn(15, 90), JWT,
        PRIVATE.format(LINES),
    ],
}  # fmt: skip
BAD = {
    "email": [
        "@functools.wraps", "user@localhost", "icon@2x.png", "a..b@example.com", "x@-bad.com",
        "self.assertEqual(a@b.c)",
        "matrix@vector.transpose()", "git@github.com:a/b.git", "john at example.com",
    ],
    "phone": [
        "2023-01-15 12:30:45", "12345678901", "+2147483647", "+18446744073709551615", "978-3-16-148410-0",
        "1.2.3.4",
        "02110-1301", "0x1234567890", "3.14159265358979", "0123 4567 89ab cdef", "@@ -1,12 +1234,15 @@",
        "0020.0007.0043", "00400000-00452000",
        "10 20 30 40 50", "+0100", "01 02 03 04 05", "20231231-120000", "1-2-3-4-5-6-7-8",
    ],
    "ip-address": [
        "1.2.3.4", "127.0.0.1", "192.168.1.77", "10.200.100.50", "192.0.2.99", "300.81.69.142", "version 81.2.69.142",
        "5.17.1.50", "1.81.2.69.142", "81.2.69.142.5", "std::abs", "a::b", "12:30:45", "2001:db8::1", "fe80::1", "::1",
        "81.02.69.142", "libfoo-81.2.69.142",
    ],
    "iban": [
        "DE89 3704 0044 0532 0130 01", "DE89 3704 0044 0532 0130", "XX89370400440532013000", "DE8937040044053201300099",
    ],
    "payment-card": [
        "4111 1111 1111 1112", "0.4111111111111111", "9780306406157", "1111222233334444", "41111111-11111111",
        "4111 1111 1111 1111 1111 1111", "3.4111 1111 1111 1111", "1700000000000000", "deadbeef4111111111111111",
    ],
    "key": [
        "AKIAIOSFODNNXAMPLEXX", "ghp_" + "x" * 36, "sk-learn-something-with-a-long-name-2", "sk-" + "0" * 48, "sk-1234",
        "eyJhbGciOi", "hf_hub_download", "npm_config_registry", PRIVATE.format("..."), PRIVATE.format("MIIEow...\nx"),
    ],
}  # fmt: skip


def found_in(text: str, *, folded: bool = False, size: int = 50) -> set[tuple[str, str]]:
    """Kind and text of all that is found."""
    block = block_of([cut(text.encode(), size)])
    found = PersonalData(KINDS).matcher(folded=folded)(block)
    places = zip(found.labels.tolist(), found.begin.tolist(), found.end.tolist(), strict=True)
    return {(KINDS[label], bytes(block.text[begin:end]).decode()) for label, begin, end in places}


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in GOOD.items() for text in texts])
def test_examples_are_found_in_sentences(kind: str, text: str) -> None:
    for around in ("{}", "It is {}, or so.", "({})", "“{}”", "a: {}.\nThen", "Ünï {}\n", "<{}>"):
        assert (kind, text) in found_in(around.format(text)), around


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in BAD.items() for text in texts])
def test_what_only_looks_like_it_is_not_found(kind: str, text: str) -> None:
    for around in ("{}", "It is {}, or so.", "({})"):
        assert [one for one in found_in(around.format(text)) if one[0] == kind] == [], around


def digit_sum(number: str) -> int:
    """Luhn's, from ISO/IEC 7812: every second digit from the right is doubled, and its digits are added."""
    total = 0
    for place, digit in enumerate(reversed(number)):
        total += sum(map(int, str(int(digit) * (1 + place % 2))))
    return total


@given(st.from_regex(r"4[0-9]{15}", fullmatch=True).filter(lambda n: len(set(n)) > 2))
def test_cards_are_those_with_a_good_check_digit(number: str) -> None:
    assert (("payment-card", number) in found_in(f"card {number} .")) == (digit_sum(number) % 10 == 0)


@given(st.integers(0, 10**18 - 1), st.integers(2, 98))
def test_ibans_are_those_that_are_one_modulo_97(account: int, check: int) -> None:
    iban = f"DE{check:02}{account:018}"
    remainder = 0
    for digit in f"{account:018}1314{check:02}":
        remainder = (10 * remainder + int(digit)) % 97
    assert (("iban", iban) in found_in(iban)) == (remainder == 1)


@given(st.data())
def test_all_is_found_wherever_chunks_are_cut(data: st.DataObject) -> None:
    picked = data.draw(st.lists(st.sampled_from([(k, t) for k, ts in GOOD.items() for t in ts]), max_size=6))
    text = " and\n".join(text for _, text in picked)
    assert set(picked) <= found_in(text, size=data.draw(st.integers(5, 200)))


@pytest.mark.parametrize("row", ["Jane Roe,{},12/27", "1001,{},12/27", '"a",{}'])
@pytest.mark.parametrize(("kind", "text"), [("payment-card", "4111111111111111"), ("phone", "+442079460958")])
def test_fields_of_a_table_are_found(row: str, kind: str, text: str) -> None:
    assert (kind, text) in found_in(row.format(text))


def test_documents_are_apart_and_kinds_are_labels() -> None:
    block = block_of([[b"john@exam", b"ple.com 81.2.69.", b"142"], [b"81.2."], [b"69.142"]])
    matcher = PersonalData(("ip-address", "email")).matcher()
    assert PersonalData(("ip-address", "email")).names == ("ip-address", "email")
    found = matcher(block)
    assert sorted(zip(found.rows.tolist(), found.labels.tolist(), strict=True)) == [(0, 1), (1, 0), (1, 1), (2, 0)]
    with pytest.raises(UsageError, match="'phon'"):
        PersonalData(("phon",))


def test_a_private_key_is_found_whole_and_no_longer_than_eight_thousand_bytes() -> None:
    long = "\n".join(drawn(n, 64) for n in range(100))
    key = PRIVATE.format(long)
    assert ("key", key) in found_in(f"# a key\n{key}\nend", size=250)
    cut_off = PRIVATE.format(long).partition("-----END")[0]
    for strange in "§\x1c":
        assert found_in(f"{cut_off}{strange} Then other text") == {("key", cut_off)}
    endless = "-----BEGIN PRIVATE KEY-----\n" + "\n".join(drawn(n, 64) for n in range(1000))
    assert [len(text) for _, text in found_in(endless, size=1000)] == [27 + (8 << 10)]


@pytest.mark.parametrize(
    "piece",
    [
        "-----BEGIN PRIVATE KEY-----",
        "a@",
        "a.",
        "1 ",
        "+1",
        "4111 ",
        "1.1.",
        "2001:",
        "DE89 ",
        "eyJa",
        "eyJaaaaaaaaa.",
        "0",
        "x",
    ],
)
def test_what_is_read_is_linear(piece: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0

    def counted(pattern, text, position, until, end, most, found):
        nonlocal read
        before = position
        after = original(pattern, text, position, until, end, most, found)
        read += end - before
        return after

    original = patterns._find_from
    monkeypatch.setattr(patterns, "_find_from", counted)
    size = 150_000
    text = (piece * (size // len(piece))).encode()
    found = PersonalData(KINDS).matcher()(block_of([cut(text, 250)]))
    assert read < 5 * len(KINDS) * size
    assert len(found) < size


FOLDED = {  # what is left of some by a WordPiece without case
    "email": ["john.doe+x@example.com", "o'neil@firm.museum"],
    "phone": ["+44 20 7946 0958", "+1(202)555-0143", "(202)555-0143", "020 7946 0958", "+49(0)30 1234567"],
    "ip-address": ["81.2.69.142", "2606:2800:220:1:248:1893:25c8:1946"],
    "iban": ["de89 3704 0044 0532 0130 00", "gb82west12345698765432"],
    "payment-card": ["4111 1111 1111 1111", "4111-1111-1111-1111"],
    "key": [AWS.lower(), "ghp_" + drawn(4, 36).lower(), "sk-" + drawn(13, 48).lower(), JWT.lower()],
}


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in FOLDED.items() for text in texts])
def test_examples_are_found_in_folded_text(kind: str, text: str) -> None:
    for around in ("{}", "it is {},or so.", "call({})", "{}.then", "call {} then"):
        assert (kind, text) in found_in(around.format(text), folded=True), around


DOCUMENTS = {
    "none": "Version 1.2.3.4 of 2023-01-15, see section 3.2",
    **{kind: f"You see , {texts[0]} . Then" for kind, texts in GOOD.items()},
    "block": f"Private : {PRIVATE.format(LINES)} .",
}


@pytest.mark.parametrize("name", ["whole", "folded"])
def test_personal_data_in_stores(name: str, tmp_path: Path, tiny_encoder: Path, byte_level_tokenizer: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"id": i, "text": text} for i, text in DOCUMENTS.items()])
    tokenizer = {"whole": byte_level_tokenizer, "folded": tiny_encoder}[name]
    api.chunk(tmp_path / "store", [str(corpus)], tokenizer=str(tokenizer))
    store = Store.open(tmp_path / "store")
    matcher, decoder = PersonalData().open(store), Decoder(store)
    assert store.identity.tokenizer.lossless == (name == "whole")
    found = set()
    for block in text_blocks(store, decoder, 0):
        hits = matcher(block)
        documents = [list(DOCUMENTS)[doc] for doc in block.chunks.doc]
        labelled = zip(hits.rows.tolist(), hits.labels.tolist(), strict=True)
        found |= {(documents[row], KINDS[label]) for row, label in labelled}
        rows = [row for row in range(len(block)) if documents[row] == "block"]
        assert len(rows) > 2
        assert len(set(rows) - set(hits.rows.tolist())) <= 1  # its end may be a chunk of its own
    assert found == {(kind, kind) for kind in KINDS} | {("block", "key")}
    assert PersonalData(("email",)).literal() == {"kinds": ("email",)}
