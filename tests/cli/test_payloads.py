"""Escape sequences, bidi marks and HTML in ids, texts, sources, file names and reasons reach no terminal or page.

A store is built whose documents are payloads, and every command that prints or renders is run on it. What a command
prints, as text or JSON, has no control character but line breaks and tabs; its pages have no element that the template
does not have.
"""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import make_causal_model, make_text, write_jsonl
from page_reader import read
from stored import copy_store
from typer.testing import CliRunner

from retrotool import api
from retrotool.app import app
from retrotool.inspect.run import Choice

ESCAPES = [
    "\x1b[31m", "\x1b[2J\x1b[H", "\x1b]0;owned\x07", "\x1b]8;;http://evil.example\x1b\\click\x1b]8;;\x1b\\",
    "\x1b]52;c;ZXZpbA==\x07", "\x1bP+q544e\x1b\\", "\x1b_Gi=1;AAAA\x1b\\", "\x1bc", "\x1b(0", "\x1b[?1049h", "\x1b[6n",
    "\x9b31m", "\x9d0;owned\x9c", "\x90+q\x9c", "\x08\x08\x08", "\x07", "\x0b\x0c", "\x0e\x0f", "\x00", "\x7f", "\x85",
    "over\rwritten", "forged\nerror: line", "\x1b[8mhidden",
]  # fmt: skip
MARKS = [
    "\u202a", "\u202b", "\u202c", "\u202d", "\u202e", "\u2066", "\u2067", "\u2068", "\u2069", "\u200e", "\u200f",
    "\u061c", "\u206a", "\u2028", "\u2029",
]  # fmt: skip
HTML = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", '"><svg onload=alert(1)>', "'><b>", "</title><h1>",
    "</script><script>", "<!--", "]]>", "&lt;script&gt;", "javascript:alert(1)", "{{ 7 * 7 }}", "<style>*{color:red}",
    "<a href=//evil.example>x</a>", "<base href=//evil.example>", '" onmouseover="alert(1)',
]  # fmt: skip
PAYLOADS = [*ESCAPES, *MARKS, *HTML]
SHARED = "a run of words that every one of these documents has in common with its neighbours"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path, byte_level_tokenizer: Path) -> Path:
    """A store of documents whose id, text, source and kept field are payloads, from a file whose name is one."""
    folder = tmp_path_factory.mktemp("payloads")
    rows = [
        {"id": f"{i} {payload}", "source": payload, "kept": payload, "text": f"{make_text(i, 12)} {payload} {SHARED}"}
        for i, payload in enumerate(PAYLOADS)
    ]
    file = Path(write_jsonl(folder / "in\x1b[31m\n\u202e<b>.jsonl", rows))
    with file.open("a", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"id": payload, "body": payload}) + "\n" for payload in PAYLOADS)
    store = folder / "store"
    words = ["chunk", store, file, "--tokenizer", byte_level_tokenizer, "--keep", "kept", "--workers", 1]
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 3, done.stderr
    check(done.stdout + done.stderr)
    api.embed(store, encoder=str(tiny_encoder))
    api.index(store)
    api.neighbours(store)
    return store


def check(printed: str) -> None:
    found = {c for c in printed if unicodedata.category(c) in ("Cc", "Zl", "Zp") or c in MARKS}
    assert found <= {"\n", "\t"}, sorted(map(ascii, found))


def commands() -> Iterator[list[str]]:
    why = ["--reason", "\x1b[31m\u202e<b>", "--yes"]
    yield from (
        ["info", "STORE"], ["info", "STORE", "--sources"], ["info", "STORE", "--files"], ["log", "STORE"],
        ["info", "STORE", "--sources"],
        ["verify", "STORE"], ["verify", "STORE", "--log"], ["search", "STORE", SHARED, "-k", "60"],
        ["documents", "STORE", "--limit", "0"], ["documents", "STORE", "--where", "kept = '\x1b'"],
        ["show", "STORE", f"3 {PAYLOADS[3]}"], ["show", "STORE", "0:1"], ["show", "STORE", "\x1b\u202e"],
        ["inspect", "STORE", "--random", "60"], ["leakage", "STORE", "--queries", "STORE"],
        ["evaluate", "STORE", "--queries", "STORE", "--model", "MODEL"],
        ["index", "STORE", "--tune"], ["chunk", "STORE", "FILE", "--dry-run"], ["chunk", "STORE2", "FILE"],
        ["embed", "STORE"], ["neighbours", "STORE"], ["export", "STORE", "OUT"], ["affected", "STORE"],
        ["purge", "STORE", "--pattern", "words that", "--dry-run"],
        ["purge", "STORE", "--like", SHARED, "--within", "1e6", "--dry-run"],
        ["purge", "STORE", "--where", "kept is not null", "--dry-run"],
        ["purge", "STORE", "--document", PAYLOADS[0], "--reason", "r"],
        ["purge", "STORE", "--chunk", "\x1b[31m", "--reason", "r"],
        ["purge", "STORE", "--where", "\x1b = '\u202e'", "--reason", "r"],
        ["search", "STORE", "x", "--index", "\x1b\u202e"], ["inspect", "STORE", "--document", "\x1b\u202e\n"],
        ["inspect", "STORE", "--table", "\x9b\u200f"], ["export", "STORE", "FOLDER/\x1b\u202e/x"],
        ["info", "FOLDER/\x1b\u202e"], ["\x1b[31m"], ["info", "STORE", "--\x1b"],
        ["purge", "STORE", "--document", f"0 {PAYLOADS[0]}", *why], ["purge", "STORE"],
        ["receipt", "STORE", "last", "--out", "FOLDER"], ["affected", "STORE"], ["log", "STORE"], ["info", "STORE"],
        ["erase", "STORE", "last", "--yes"], ["receipt", "STORE", "last", "--out", "FOLDER"],
    )  # fmt: skip


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_no_payload_reaches_a_terminal(
    hostile: Path, tmp_path: Path, byte_level_tokenizer: Path, as_json: bool
) -> None:
    store = copy_store(hostile, tmp_path / "store")
    file = next(hostile.parent.glob("in*.jsonl"))
    model = make_causal_model(tmp_path / "model", byte_level_tokenizer.read_bytes())
    words = {"STORE": store, "MODEL": model, "STORE2": tmp_path / "second", "FILE": file, "OUT": tmp_path / "out"}
    printed = 0
    for command in commands():
        line = [str(words.get(word, word.replace("FOLDER", str(tmp_path)))) for word in command]
        done = CliRunner().invoke(app, [*line, "--json"] if as_json and len(line) > 1 else line)
        assert done.exception is None or isinstance(done.exception, SystemExit), (command, done.exception)
        check(done.stdout + done.stderr)
        assert "\nerror: line" not in done.stdout + done.stderr, "a line can't be forged"
        printed += "\\x1b" in done.stdout + done.stderr or "\\u001b" in done.stdout
        if as_json and len(line) > 1 and done.stdout:
            json.loads(done.stdout)
    assert printed > 10, "what is hostile is shown, escaped"


def test_csv_is_escaped_too(hostile: Path) -> None:
    done = CliRunner().invoke(app, ["documents", str(hostile), "--csv"])
    check(done.stdout)
    assert "\\x1b" in done.stdout and list(csv.reader(io.StringIO(done.stdout)))[-1][-2:] == ["live", HTML[-1]]


def test_json_has_the_characters_themselves(hostile: Path) -> None:
    done = CliRunner().invoke(app, ["search", str(hostile), SHARED, "-k", "60", "--json"])
    found = {result["document"] for result in json.loads(done.stdout)["results"]}
    assert found == {f"{i} {payload}" for i, payload in enumerate(PAYLOADS)}


def test_no_payload_is_an_element_of_a_page(hostile: Path, tmp_path: Path) -> None:
    store = copy_store(hostile, tmp_path / "store")
    api.inspect(store, Choice(random=60), page=tmp_path / "page.html")
    api.purge(store, api.Selectors(document=f"0 {PAYLOADS[0]}"), reason="".join(HTML), who="<b>")
    api.verify_purge(store, "last", out=tmp_path)
    pages = [tmp_path / "page.html", *tmp_path.glob("receipt-*.html")]
    assert len(pages) == 2
    for page in pages:
        text = page.read_text()
        check(text)
        found = read(text)
        assert not {tag for tag, _ in found.tags} & {"img", "svg", "base", "link", "iframe"}
        assert all(about.get("href", "#").startswith("#") and "src" not in about for _, about in found.tags)
        assert not any(name.startswith("on") for _, about in found.tags for name in about)
        assert len(found.of_tag("script")) <= 1 and "alert(1)" not in "".join(found.of_tag("script"))
        assert "&lt;script&gt;alert(1)" in text, "it is shown as text"
