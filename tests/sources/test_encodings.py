"""Text in other encodings, formats that are given by name, Markdown and HTML files."""

from __future__ import annotations

import codecs
import csv
import io
import json
from html.parser import HTMLParser
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st
from source_help import PACK, input_of

from retrotool.errors import UsageError
from retrotool.sources import (
    Document,
    Fields,
    InputFile,
    Rejected,
    base_of,
    cut_input,
    encoding_of,
    read_input,
    streams,
    survey,
)
from retrotool.sources.heads import check_heads

ENCODINGS = ["latin-1", "cp1252", "utf-16", "utf-16-le", "utf-32-be", "shift_jis", "gb18030", "koi8-r", "utf-8-sig"]
TEXTS = {"shift_jis": "日本語のテキスト", "gb18030": "中文 text 😀", "koi8-r": "Привет, мир", "latin-1": "Café £5"}
texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("encodings")


def read_as(path, data: bytes, encoding: str | None = None, name: str | None = None, **fields) -> list:
    path.write_bytes(data)
    return list(read_input(found(path, encoding, name), Fields(**fields)))


def found(path, encoding: str | None = None, name: str | None = None) -> InputFile:
    (file,) = survey([str(path)], None, base_of(name), encoding_of(encoding)).files
    return file


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.jsonl.gz"])
def test_text_is_what_pythons_codec_reads(encoding, name, folder):
    text = TEXTS.get(encoding, "plain, with a comma") * 3000
    rows = {
        "a.txt": text,
        "a.jsonl": json.dumps({"id": "1", "text": text}, ensure_ascii=False) + "\n",
        "a.csv": f'id,text\n1,"{text}"\n',
    }[name.removesuffix(".gz")]
    data = rows.encode(encoding)
    (row,) = read_as(folder / name, PACK["gz"](data) if name.endswith(".gz") else data, encoding)
    assert row.text == text


@given(texts, st.sampled_from([e for e in ENCODINGS if e not in TEXTS]), st.integers(1, 9))
def test_any_text_survives_blocks_that_end_inside_characters(folder, text, encoding, block):
    text = text.encode(encoding, "ignore").decode(encoding)
    if not text:
        return
    with patch.object(streams, "BLOCK_BYTES", block):
        (row,) = read_as(folder / "b.txt", text.encode(encoding), encoding)
    assert row.text == text.removeprefix("\ufeff")


@given(st.binary(min_size=1, max_size=40), st.sampled_from(["cp1252", "utf-16", "shift_jis", "gb18030", "ascii"]))
def test_what_the_codec_refuses_is_rejected_alone_and_named(folder, data, encoding):
    data = codecs.BOM_UTF16 + data if encoding == "utf-16" else data
    try:
        is_valid = bool(data.decode(encoding))
    except UnicodeDecodeError:
        is_valid = False
    (row,) = read_as(folder / "c.txt", data, encoding)
    assert isinstance(row, Document) == is_valid
    if not is_valid:
        assert f"invalid {encoding_of(encoding)}" in row.reason
    if encoding in ("cp1252", "ascii"):
        good = b'{"text": "good"}\n'
        *before, last = read_as(folder / "c.jsonl", good + b'"\x81\n' + good, encoding)
        assert (before[0].text, last.text) == ("good", "good")
        assert isinstance(before[1], Rejected)


def test_input_in_another_encoding_is_not_cut_and_has_its_own_fingerprint(folder):
    path = folder / "d.jsonl"
    path.write_bytes(b'{"text": "x"}\n' * 99)
    plain, other = found(path), found(path, "latin-1")
    assert len(cut_input(plain, Fields(), 100)) > 1 == len(cut_input(other, Fields(), 100))
    assert plain.reading(Fields()) != other.reading(Fields())
    assert found(path, "UTF8").reading(Fields()) == plain.reading(Fields())
    assert found(path, None, "ndjson").reading(Fields()) == plain.reading(Fields())
    assert found(path, None, "csv").reading(Fields()) != found(path, None, "tsv").reading(Fields())


@pytest.mark.parametrize("name", ["rot13", "nothing", "base64", "undefined", "hex"])
def test_what_is_no_encoding_of_text_is_refused(name):
    with pytest.raises(UsageError, match=f"--encoding {name}"):
        encoding_of(name)


@pytest.mark.parametrize("name", ["idna", "punycode", "unicode_escape", "utf-7"])
def test_strange_codecs_end_in_rows_or_rejections(name, folder):
    assert len(read_as(folder / "s.txt", b"caf\xe9 +AGE- \\u00e9", name)) == 1


def test_a_format_is_given_by_name_whatever_the_file_is_called(folder):
    table = io.StringIO()
    csv.writer(table).writerows([["id", "text"], ["1", "a, b"], ["2", 'say "c"']])
    rows = read_as(folder / "README", table.getvalue().encode(), name="csv")
    assert [(row.id, row.text) for row in rows] == [("1", "a, b"), ("2", 'say "c"')]
    (row,) = read_as(folder / "x.gz", PACK["gz"](b"# Title"), name="md")
    assert (row.text, row.id.endswith("/x.gz")) == ("# Title", True)
    assert found(folder / "README", None, "u16").format == "tokens"
    with pytest.raises(UsageError, match="unknown format"):
        found(folder / "x.gz", None, "parquet")
    (folder / "all").mkdir()
    for name in ("a.jsonl", "b", "c.npy"):
        (folder / "all" / name).write_bytes(b"text")
    files = survey([str(folder / "all")], None, "txt").files
    assert [(file.format, file.name) for file in files] == [
        ("txt", f"all/{name}") for name in ("a.jsonl", "b", "c.npy")
    ]
    with pytest.raises(UsageError, match="--format doc"):
        found(folder / "README", None, "doc")


class Words(HTMLParser):
    """The words of a page outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self._hidden = 0
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self._hidden += tag in ("script", "style", "title")

    def handle_endtag(self, tag):
        self._hidden -= tag in ("script", "style", "title")

    def handle_data(self, data):
        self.words += [] if self._hidden else data.split()


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "utf-16"])
@pytest.mark.parametrize("declared", [True, False])
def test_an_html_file_has_the_words_that_a_parser_finds(encoding, declared, folder):
    meta = f'<meta charset="{encoding}">' if declared and encoding != "utf-16" else ""
    body = "".join(f"<p>Lake {i} is caf\u00e9 <b>cold</b> &amp; deep.</p>" for i in range(20))
    head = f"<head>{meta}<title>T</title><style>p {{}}</style></head>"
    page = f"<html>{head}<body><main><h1>Lakes</h1>{body}</main></body></html>"
    (row,) = read_as(folder / "p.html", page.encode(encoding), None if declared or encoding == "utf-8" else encoding)
    assert row.text.split() == Words(page).words
    assert (row.id.endswith("/p.html"), row.source) == (True, str(folder).lstrip("/"))


def test_html_without_text_and_too_long_html_are_rejected(folder):
    (row,) = read_as(folder / "q.htm", b"<html><body><script>x</script></body></html>")
    assert row.reason == "no text in it"
    page = b"<html><body><p>" + b"word " * 500 + b"</p></body></html>"
    (row,) = read_as(folder / "r.html.gz", PACK["gz"](page), max_document=1000)
    assert "more than --max-document 1,000" in row.reason
    with pytest.raises(UsageError, match="no text in it"):
        check_heads([found(folder / "q.htm")], Fields())


def test_markdown_is_text(tmp_path):
    (row,) = read_input(input_of(tmp_path / "a.md", b"# A\n\n*b*"), Fields())
    assert (row.text, row.id) == ("# A\n\n*b*", "a.md")
