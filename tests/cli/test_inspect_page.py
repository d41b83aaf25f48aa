"""The page of ``inspect``: hostile text stays text, nothing is fetched, and its search box finds."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import resource
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import Cli, make_text, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from retrotool import api
from retrotool.cli import html
from retrotool.errors import StorageError
from retrotool.inspect.inspect_result import InspectResult
from retrotool.inspect.run import Choice

HOSTILE = [
    "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">",
    "&amp; &lt;b&gt; ]]> <!-- --> \" ' <mark>no mark</mark> </article></li></ol></div>",
    "\u202e kcab \u2066 in \u2069 \u200f שלום \x00\x07\x1b[31m\x7f\r\n tab\t\x85\x9b2J \ufeff\ufffe\uffff\ufffd end",
    "漢字🙂e\u0301 <style>body { display: none }</style> <base href='//evil.example/'>",
]
Parts = list[tuple[str, dict[str, str], str]]


class Reader(HTMLParser):
    """The elements that have a class or are of some kinds, with their text, in order."""

    VOID = ("meta", "br", "input", "img", "base", "link")

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[tuple[str, dict[str, str], list[str]]] = []
        self.parts: Parts = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        about = {name: value or "" for name, value in attrs}
        self.tags.append((tag, about))
        if tag not in self.VOID:
            self.open.append((tag, about, []))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        name, about, text = self.open.pop()
        assert name == tag, f"</{tag}> closes <{name}>"
        whole = "".join(text)
        if self.open:
            self.open[-1][2].append(whole)
        self.parts.append((tag, about, whole))

    def handle_data(self, data: str) -> None:
        self.open[-1][2].append(data) if self.open else None

    def of_class(self, name: str) -> list[str]:
        return [text for _, about, text in self.parts if name in about.get("class", "").split()]

    def of_tag(self, name: str) -> list[str]:
        return [text for tag, _, text in self.parts if tag == name]


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert not reader.open
    return reader


def shown(text: str) -> str:
    """Text as a page can have it: the pictures of C0 controls, and no noncharacters."""
    pictures = {n: chr(0x2400 + n) for n in range(32) if n not in (9, 10, 13)}
    return text.translate({**pictures, 0x7F: "\u2421", 0xFFFE: "\ufffd", 0xFFFF: "\ufffd"})


@given(st.text(st.one_of(st.sampled_from("<>&\"'\r\n\t\0\x1b\x9b\u202e\u2069\ufffe;#x"), st.characters(codec="utf-8"))))
def test_any_text_is_shown_as_itself(text: str) -> None:
    assert "".join(read(f"<p>{html.text(text)}</p>").of_tag("p")) == shown(text)
    assert read(f'<p title="{html.attribute(text)}"></p>').parts[0][1]["title"] == shown(text)
    (element,) = ElementTree.fromstring(f'<a><p title="{html.attribute(text)}">{html.text(text)}</p></a>')
    assert "".join(element.itertext()) == shown(text)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path, byte_level_tokenizer: Path) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    rows = [
        {
            "id": f"{i} {HOSTILE[i % 4]}",
            "source": HOSTILE[i % 3],
            "text": f"{make_text(i, 20)} {HOSTILE[i % 4]} {shared}",
        }
        for i in range(12)
        for shared in ["".join(HOSTILE)]
    ]
    api.chunk(folder / "store", [str(write_jsonl(folder / "h.jsonl", rows))], tokenizer=str(byte_level_tokenizer))
    api.embed(folder / "store", encoder=str(tiny_encoder))
    api.neighbours(folder / "store")
    return folder / "store"


def make(store: Path, page: Path, n: int = 10**6, k: int = 3) -> tuple[str, InspectResult]:
    result = api.inspect(store, Choice(random=n), k=k, page=page)
    return page.read_bytes().decode(), result


def test_hostile_text_stays_text(hostile: Path, tmp_path: Path) -> None:
    page, result = make(hostile, tmp_path / "page.html")
    found = read(page)
    texts = iter(found.of_class("text"))
    names = iter(found.of_class("from"))
    for chunk in result.chunks:
        assert next(texts) == shown(chunk.text)
        assert next(names).startswith(shown(f"{chunk.document} · {chunk.source} · {chunk.index + 1} of {chunk.of} · "))
        for near in chunk.neighbours:
            assert next(texts) == shown(near.text)
            if near.continuation is not None:
                assert next(texts) == shown(near.continuation)
            assert shown(near.document) in next(names)
    assert next(texts, None) is None
    tags = {tag for tag, _ in found.tags}
    assert not tags & {"img", "base", "link", "iframe", "object", "a\u202e"}
    assert not any(name.startswith("on") for _, about in found.tags for name in about)
    assert [
        about for tag, about in found.tags if tag == "article" and about["data-source"] not in map(shown, HOSTILE)
    ] == []


def test_marks_are_the_runs(hostile: Path, tmp_path: Path) -> None:
    page, result = make(hostile, tmp_path / "page.html")
    found = read(page)
    marks = iter(
        [(about.get("data-of"), text) for tag, about, text in found.parts if tag == "mark"][1:]
    )  # one in the head
    assert result.marked
    for chunk in result.chunks:
        runs = {r: n.common.chunk.run for r, n in enumerate(chunk.neighbours, 1) if n.common and n.common.marked}
        left = dict.fromkeys(runs, "")
        while any(left[r] != shown(trim(run)) for r, run in runs.items()):
            ranks, text = next(marks)
            for rank in map(int, str(ranks).split()):
                left[rank] += text
        for rank in runs:
            common = chunk.neighbours[rank - 1].common
            for split in (common.text, common.continuation):
                if split is not None and split.run:
                    assert next(marks) == (None, shown(trim(split.run)))
    assert next(marks, None) is None


def trim(run: str) -> str:
    return run.strip() or run


def test_a_page_stands_alone_and_is_xml(hostile: Path, built_store: Path, tmp_path: Path) -> None:
    for store in (hostile, built_store):
        page, result = make(store, tmp_path / "page.html", n=40)
        found = read(page)
        assert ElementTree.fromstring(page).tag == "html"
        (script,) = found.of_tag("script")
        policy = next(about["content"] for tag, about in found.tags if about.get("http-equiv"))
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
        assert not {name for _, about in found.tags for name in about} & {"src", "srcset", "action", "background"}
        assert all(about["href"].startswith("#") for _, about in found.tags if "href" in about)
        assert not re.search(r"url\(|@import|fetch\(|XMLHttp|//[a-z]", script + "".join(found.of_tag("style")))
        head = " ".join(found.of_tag("dd"))
        assert all(fact in head for fact in (str(store), f"commit {result.commit}", "'main'", result.chosen))
        assert f"the 3 nearest; {result.neighbours}" in head
        # What only the script makes work is hidden without it.
        tools = next(about for tag, about in found.tags if tag == "form")
        assert tools["hidden"] == "" and len(found.of_tag("article")) == result.shown
    assert "recall@10 1.0000" in head and "prefers-color-scheme: dark" in page


def test_continuations_are_folded_unless_the_run_goes_on_in_them(built_store: Path, tmp_path: Path) -> None:
    page, result = make(built_store, tmp_path / "page.html", k=6)
    opened = [("open" in about) for tag, about in read(page).tags if about.get("class") == "next"]
    wanted = [
        near.common.marked and bool(near.common.continuation.run)
        for chunk in result.chunks for near in chunk.neighbours if near.continuation is not None
    ]  # fmt: skip
    assert opened == wanted and {True, False} == set(wanted)


def test_a_page_without_an_end_is_no_page(built_store: Path, tmp_path: Path, cli: Cli) -> None:
    page = tmp_path / "page.html"
    page.write_text("old")

    def small() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, 1 << 14))

    ended = cli("inspect", built_store, "--random", 100, "--html", page, "--json", preexec_fn=small)
    told = json.loads(ended.stdout)
    assert (ended.returncode, told["error"]) == (1, f"{page} can't be written: File too large")
    assert "Traceback" not in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"] and page.read_text() == "old"


def test_an_error_meanwhile_leaves_nothing(built_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise StorageError("broken")

    monkeypatch.setattr("retrotool.inspect.inspect_page.PageWriter.finish", fail)
    with pytest.raises(StorageError, match="broken"):
        api.inspect(built_store, Choice(chunk=0), page=tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def browse(tmp_path: Path) -> Callable[[Path, str], object]:
    """What an expression gives once a page is loaded in a browser."""
    if BROWSER is None:
        pytest.skip("there is no Chromium")

    def call(page: Path, script: str) -> object:
        told = (
            f"<script>window.addEventListener('load', () => {{ document.title = JSON.stringify({script}); }});</script>"
        )
        # Its policy lets no script in but its own.
        changed = re.sub("<meta http-equiv[^>]*>", "", page.read_text("utf-8")).replace("</body>", f"{told}</body>")
        (tmp_path / "run.html").write_text(changed, "utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
        command = [str(BROWSER), *options, "--virtual-time-budget=3000", "--dump-dom", f"file://{tmp_path}/run.html"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        return json.loads(read(done.stdout).of_tag("title")[0])

    return call


def test_the_search_box_leaves_what_has_the_words(
    built_store: Path, tmp_path: Path, browse: Callable[[Path, str], object]
) -> None:
    _, result = make(built_store, tmp_path / "page.html", n=60)
    words = ["harbour", "winter"]
    script = """(() => { words.value = "HARBOUR  winter"; show();
      const ids = list => list.filter(one => !one.element.hidden).map(one => one.element.id);
      return [ids(chunks), chunks.map(one => one.near.filter(near => !near.element.hidden).length), told.value,
        !tools.hidden, chunks.some(c => c.near.some(n => n.next && n.next.dataset.found))]; })()"""
    shown_chunks, shown_near, told, tools, revealed = browse(tmp_path / "page.html", script)  # type: ignore[misc]
    has = lambda *texts: all(word in " ".join(map(str, texts)).lower() for word in words)  # noqa: E731
    left = []
    for chunk in result.chunks:
        own = has(chunk.document, chunk.source, chunk.text)
        near = [own or has(n.document, n.source, n.text, n.continuation or "") for n in chunk.neighbours]
        left.append(sum(near) if own or any(near) else 0)
    assert 0 < sum(left) < 180
    assert shown_chunks == [f"c{chunk.id}" for chunk, n in zip(result.chunks, left, strict=True) if n]
    assert [n for n in shown_near if n] == [n for n in left if n]
    assert told == f"{sum(n > 0 for n in left)} of 60 chunks, {sum(left)} of 180 neighbours"
    assert tools and revealed


def test_choices_are_by_source_and_by_run(
    built_store: Path, tmp_path: Path, browse: Callable[[Path, str], object]
) -> None:
    _, result = make(built_store, tmp_path / "page.html", n=60)
    script = """(() => { source.value = "=a"; from.value = "=b"; run.value = "5"; show();
      const first = chunks.map(one => one.element.hidden ? 0 : one.near.filter(near => !near.element.hidden).length);
      source.value = from.value = ""; run.value = "0"; show();
      return [first, told.value, [...source.options].length]; })()"""
    first, told, options = browse(tmp_path / "page.html", script)  # type: ignore[misc]
    wanted = [
        sum(near.source == "b" and near.common.marked for near in chunk.neighbours) if chunk.source == "a" else 0
        for chunk in result.chunks
    ]
    assert first == wanted and sum(wanted)
    assert (told, options) == ("60 chunks, 180 neighbours", 3)


def test_scripts_of_documents_do_not_run(hostile: Path, tmp_path: Path) -> None:
    if BROWSER is None:
        pytest.skip("there is no Chromium")
    page = tmp_path / "page.html"
    make(hostile, page)
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command = [BROWSER, *options, "--virtual-time-budget=2000", "--dump-dom", f"file://{page}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = read(done.stdout)
    assert found.of_tag("title")[0].startswith("Neighbours")
    # Its own ran.
    assert "hidden" not in next(about for tag, about in found.tags if tag == "form")
