"""The tokenizer of new stores: it gives back every byte, in every script, and is the one that tokie is right for."""

from __future__ import annotations

import json
import pydoc_data.topics
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from chunk_helpers import run_chunk, write_rows

from retrotool import api
from retrotool.chunk import chunk_plan
from retrotool.embed.store_encoder import EncoderRows
from retrotool.store import parts
from retrotool.store.store import Store
from retrotool.tokenizers import DEFAULT_TOKENIZER, FastTokenizer, Tokenizer, find_tokenizer, stored_tokenizer

# The first article of the Universal Declaration of Human Rights.
ARTICLES = (
    "All human beings are born free and equal in dignity and rights.",
    "Все люди рождаются свободными и равными в своём достоинстве и правах.",
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق.",
    "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "人人生而自由，在尊严和权利上一律平等。",
    "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
)
ODD = (
    " \r\n\t\t x\n\n\n",
    "\0\x7f\ufeff\u00a0\u200d\u0301é",
    "👩🏽‍🚀🎈𝄞𐍈",
    "�� <|endoftext|> ## [UNK]",
    "def f(x):\n\treturn x\n" * 9,
)
ROWS = [{"id": str(i), "text": text} for i, text in enumerate((*ARTICLES, *ODD, " ".join(ARTICLES)))]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, str]:
    """A store of ROWS, whose short chunks end inside characters, and what was printed on stderr."""
    folder = tmp_path_factory.mktemp("default")
    result = run_chunk(folder / "store", write_rows(folder / "rows.jsonl", ROWS), "--chunk-length", 3)
    assert result.exit_code == 0
    return Store.open(folder / "store"), result.stderr


def test_every_byte_comes_back(made):
    store, _ = made
    assert (store.identity.tokenizer.name, store.identity.tokenizer.vocabulary) == (DEFAULT_TOKENIZER, 1 << 15)
    assert (store.identity.tokenizer.lossless, store.identity.tokenizer.token_bytes) == (True, 2)
    chunks = parts.read_chunks(store, 0)
    pieces = stored_tokenizer(store).decode(chunks.tokens, chunks.n_tokens).to_pylist()
    for number, row in enumerate(ROWS):
        own = [piece for piece, document in zip(pieces, chunks.doc, strict=True) if document == number]
        assert b"".join(own) == row["text"].encode()


def test_an_encoder_sees_no_halves_of_characters(made):
    store, _ = made
    chunks = parts.read_chunks(store, 0)
    pieces = stored_tokenizer(store).decode(chunks.tokens, chunks.n_tokens).to_pylist()
    cut = [piece for piece in pieces if "\ufffd" in piece.decode(errors="replace") and "\ufffd".encode() not in piece]
    assert len(cut) > 10, "no chunk ends inside a character"
    identity = SimpleNamespace(tokenizer="another", prompt="", lower=False)
    encoder = SimpleNamespace(identity=identity, tokenize=list)
    texts = EncoderRows(store, encoder).rows(chunks.tokens, chunks.n_tokens)
    assert sum(text.count("\ufffd") for text in texts) == sum(row["text"].count("\ufffd") for row in ROWS)
    kept = sum(map(len, texts))
    assert sum(len(row["text"]) for row in ROWS) - 2 * len(cut) <= kept < sum(len(row["text"]) for row in ROWS)


def test_tokie_gives_the_tokens_of_the_library():
    tokenizer = Tokenizer(find_tokenizer(DEFAULT_TOKENIZER))
    fast = FastTokenizer(tokenizer)
    assert (fast.engine, fast.why) == ("tokie", "")
    topics = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    texts = [*(row["text"] for row in ROWS), *topics[:40]]
    ids, lengths = fast._encode(texts)[:2]
    expected, due = tokenizer.encode_flat(texts)
    assert np.array_equal(lengths, due) and np.array_equal(ids, expected)
    assert tokenizer.encode_batch(["<|endoftext|>"]) == [[0]], "as the padding of chunks"


def test_large_inputs_are_tokenised_by_tokie_in_a_store_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chunk_plan, "SMALL_PLAN", 0)
    for name in ("first", "second"):  # which reads what the first found out about tokie
        rows = [{**row, "id": f"{name} {row['id']}"} for row in ROWS]
        path = write_rows(tmp_path / f"{name}.jsonl", rows)
        counts = json.loads(run_chunk(tmp_path / "store", path, "--duplicates", "keep", "--json").stdout)
        assert 0 < counts["exact"] < counts["documents"] == counts["compared"]
    found = chunk_plan.known_findings(Store.open(tmp_path / "store").state)
    assert found == FastTokenizer(Tokenizer(find_tokenizer(DEFAULT_TOKENIZER)), findings=found).findings
    assert found is not None and found.runs, "white space between two newlines"


def test_a_new_store_says_which_tokenizer_it_has(made, tmp_path: Path):
    says, following = made[1].splitlines()
    assert says == "New store. Its tokenizer, bytes-32k (lossless), can't be changed later."
    assert following.startswith("Next: retrotool embed ")
    path = write_rows(tmp_path / "rows.jsonl", ROWS[:2])
    result = run_chunk(tmp_path / "store", path, "--tokenizer", "minilm", "--json")
    assert result.stderr == "New store. Its tokenizer, minilm (loses case or spacing), can't be changed later.\n"
    assert json.loads(result.stdout)["documents"] == 2
    assert run_chunk(tmp_path / "store", path).stderr == ""
    assert not api.info(tmp_path / "store").tokenizer["lossless"], "the store's own is used, whatever the default is"
