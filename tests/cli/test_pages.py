"""Pages: any text is shown as itself, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from page_reader import read, shown

from retrotool.cli import pages
from retrotool.errors import StorageError

EXAMPLE = """\
{% extends "base.html" %}{% block title %}About {{ text }}{% endblock %}
{% block body %}<p title="{{ text }}">{{ text }}</p>
{% for one in many %}<b>{{ one | thousands }}</b>{% endfor %}{% endblock %}
"""


@pytest.fixture(autouse=True)
def example(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = pages._TEMPLATES.loader
    assert ours is not None
    loader = jinja2.ChoiceLoader([jinja2.DictLoader({"example.html": EXAMPLE}), ours])
    monkeypatch.setattr(pages._TEMPLATES, "loader", loader)


def render(**context: object) -> str:
    return pages._TEMPLATES.get_template("example.html").render(context)


@given(
    st.text(st.one_of(st.sampled_from("<>&\"'\r\n\t\0\x1b\x9b\u202e\u2069\ufffe{%}#x"), st.characters(codec="utf-8")))
)
def test_any_text_is_shown_as_itself(text: str) -> None:
    page = read(render(text=text, many=[]))
    (tag, about, inside), *_ = [part for part in page.parts if part[0] == "p"]
    assert (tag, about["title"], inside) == ("p", shown(text), shown(text))
    assert page.of_tag("title") == page.of_tag("h1") == [f"About {shown(text)}"]
    assert not page.of_tag("script")
    assert "script-src 'none'" in next(about["content"] for _, about in page.tags if "http-equiv" in about)


def test_a_name_that_is_missing_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError, match="many"):
        render(text="")


def test_a_page_is_written_piece_by_piece_and_whole_or_not_at_all(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    pages.write_page(page, "example.html", text="\udcff", many=iter(range(998, 1002)))
    text = page.read_bytes().decode()
    assert read(text).of_tag("b") == ["998", "999", "1,000", "1,001"] and "\\udcff" in text

    def many() -> Iterator[int]:
        yield from range(50_000)
        (scratch,) = tmp_path.glob(".page.html.*")
        assert scratch.stat().st_size > 500_000, "what was read first is not held in memory"

    pages.write_page(page, "example.html", text="", many=many())
    pages.write_page(page, "example.html", text="\udcff", many=iter(range(998, 1002)))

    def breaks() -> object:
        yield 1
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"page\.html can't be written: No space left on device"):
        pages.write_page(page, "example.html", text="", many=breaks())
    assert page.read_bytes().decode() == text and [one.name for one in tmp_path.iterdir()] == ["page.html"]
