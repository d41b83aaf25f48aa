"""The page of ``inspect``: hostile text stays text, and nothing is fetched."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import resource
from pathlib import Path

import pytest
from conftest import Cli, make_text, write_jsonl
from page_reader import read, shown

from retrotool import api
from retrotool.errors import StorageError
from retrotool.inspect.run import Choice, InspectResult

HOSTILE = [
    "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">",
    "&amp; &lt;b&gt; ]]> <!-- --> \" ' <mark>no mark</mark> </article></li></ol></div>",
    "\u202e kcab \u2066 in \u2069 \u200f שלום \x00\x07\x1b[31m\x7f\r\n tab\t\x85\x9b2J \ufeff\ufffe\uffff\ufffd end",
    "漢字🙂e\u0301 <style>body { display: none }</style> <base href='//evil.example/'>",
]


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
        [(about.get("data-of"), text) for tag, about, text in found.parts if tag == "mark"][:-1]
    )  # the last is an example
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


def test_a_page_stands_alone(hostile: Path, built_store: Path, tmp_path: Path) -> None:
    for store in (hostile, built_store):
        page, result = make(store, tmp_path / "page.html", n=40)
        found = read(page)
        (script,) = found.of_tag("script")
        policy = next(about["content"] for tag, about in found.tags if about.get("http-equiv"))
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
        assert not {name for _, about in found.tags for name in about} & {"src", "srcset", "action", "background"}
        assert all(about["href"].startswith("#") for _, about in found.tags if "href" in about)
        assert not re.search(r"url\(|@import|fetch\(|XMLHttp|//[a-z]", script + "".join(found.of_tag("style")))
        head = " ".join(found.of_tag("dd"))
        assert all(fact in head for fact in (str(store), f"commit {result.commit}", "table main", result.chosen))
        assert "the 3 nearest" in head and f"{result.neighbours} neighbours" in found.of_class("overview")[0]
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
    reported = json.loads(ended.stdout)
    assert (ended.returncode, reported["error"]) == (1, f"{page} can't be written: File too large")
    assert "Traceback" not in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"] and page.read_text() == "old"


def test_an_error_meanwhile_leaves_nothing(built_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise StorageError("broken")

    monkeypatch.setattr("retrotool.inspect.run.InspectedChunk.segments", fail)
    with pytest.raises(StorageError, match="broken"):
        api.inspect(built_store, Choice(chunk=0), page=tmp_path / "page.html")
    assert not list(tmp_path.iterdir())
