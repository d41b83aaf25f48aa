"""``inspect`` in a terminal: what is printed, in which colours, and how it ends."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from conftest import Cli, make_text, write_jsonl
from stored import copy_store, stored_file
from typer.testing import CliRunner

import retrotool
from retrotool import api
from retrotool.app import app
from retrotool.store.folding import writing
from retrotool.store.log import Draft
from retrotool.store.parts import format_id
from retrotool.store.store import Store

LONG = "The harbour master hangs out a black ball to say that the port is closed until the storm is over."
HOSTILE = f"\x1b[31m {LONG} \x9b2J \u202e kcab \u2066 漢字かな交じり文がここにある。" * 2 + "x" * 130


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path, byte_level_tokenizer: Path) -> Path:
    """A store of byte-level tokens whose documents share a sentence, and try to get at the terminal."""
    folder = tmp_path_factory.mktemp("hostile")
    rows = [
        {"id": f"{i}\x1b]0;owned\x07\u202e", "source": "a\x9b", "text": make_text(i, 20) + HOSTILE} for i in range(6)
    ]
    api.chunk(folder / "store", [str(write_jsonl(folder / "h.jsonl", rows))], tokenizer=str(byte_level_tokenizer))
    api.embed(folder / "store", encoder=str(tiny_encoder))
    api.neighbours(folder / "store")
    return folder / "store"


def columns(line: str) -> int:
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in line)
    return wide + sum(unicodedata.category(c) not in ("Mn", "Me", "Cf") for c in line)


def unwrapped(text: str) -> str:
    return "".join(text.split())


def test_text_shows_chunks_neighbours_and_what_they_have_in_common(built_store: Path) -> None:
    code, out, err = run(built_store, "--document", "doc-7", "-k", 3)
    assert (code, err) == (0, "")
    reader = retrotool.open(built_store)
    head, *blocks = out.split("\n\n")
    assert unwrapped(head).startswith(unwrapped(f"{built_store}, neighbours 'main': document doc-7."))
    assert "index 'main', recall@10 1.0000" in head
    chunks = reader.document("doc-7")
    assert len(blocks) == len(chunks)
    result = {
        chunk["id"]: chunk
        for chunk in json.loads(run(built_store, "--document", "doc-7", "-k", 3, "--json")[1])["chunks"]
    }
    marked = 0
    for place, (chunk, block) in enumerate(zip(chunks, blocks, strict=True), 1):
        lines = block.splitlines()
        assert lines[0].startswith(f"chunk {format_id(chunk)}  document doc-7  source b  {place} of {len(chunks)}  ")
        ranks = [line for line in lines if re.match(r"\d+\. distance", line)]
        for rank, (near, line) in enumerate(zip(reader.neighbours(chunk, k=3), ranks, strict=True), 1):
            assert line.startswith(
                f"{rank}. distance {near.distance:.4f}  chunk {format_id(near.id)}  document {near.chunk.document}"
            )
            assert unwrapped(near.chunk.text) in unwrapped(block.replace("[[", "").replace("]]", ""))
            common = result[chunk]["neighbours"][rank - 1]["common"]
            reported = f"{common['tokens']} tokens in common, r {common['r']:.3f}: tokens {common['start']} to "
            assert (reported in block) == common["marked"]
            if common["marked"]:
                marked += 1
                assert unwrapped(f"[[{common['chunk']['run']}]]")[:12] in unwrapped(block)
    assert marked
    assert max(map(len, out.splitlines())) <= 100 or str(built_store) in max(out.splitlines(), key=len)


def test_json_is_one_object_with_everything(built_store: Path) -> None:
    code, out, err = run(built_store, "--random", 5, "--seed", 3, "--json")
    reported = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert (reported["store"], reported["name"], reported["shown"], reported["k"]) == (str(built_store), "main", 5, 2)
    assert reported["chosen"].endswith("seed 3")
    assert ": 1 random chunk of " in run(built_store, "--random", 1)[1]
    for chunk in reported["chunks"]:
        for near in chunk["neighbours"]:
            common = near["common"]
            for field, text in (
                ("chunk", chunk["text"]),
                ("text", near["text"]),
                ("continuation", near["continuation"]),
            ):
                pieces = common[field]
                assert (pieces is None) == (text is None)
                if pieces is not None:
                    assert list(pieces) == ["before", "run", "after"] and "".join(pieces.values()) == text
            assert common["r"] == common["tokens"] / 64
    assert run(built_store, "--random", 5, "--seed", 3, "--json")[1] == out
    assert run(built_store, "--random", 5, "--seed", 4, "--json")[1] != out


def test_documents_can_not_get_at_the_terminal(hostile: Path) -> None:
    code, out, _ = run(hostile, "--random", 100, "-k", 3)
    assert code == 0
    assert {c for c in out if unicodedata.category(c) == "Cc"} == {"\n"}
    assert not set(out) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    assert "\\x1b[31m" in out and "\\u202e" in out and "\\x9b2J" in out and "\\x1b]0;owned\\x07" in out
    long = [line for line in out.splitlines() if columns(line) > 100]
    assert not [line for line in long if str(hostile) not in line]
    assert out.count("[[") == out.count("]]") > 0


@pytest.mark.parametrize(
    "words",
    [
        ["info", "STORE", "--sources"],
        ["search", "STORE", "Then a sentence", "-k", "3"],
        ["neighbours", "STORE", "--only-source", "nobody's"],
    ],
)
def test_no_other_command_lets_them_either(hostile: Path, tmp_path: Path, words: list[str]) -> None:
    store = copy_store(hostile, tmp_path / "store")
    api.index(store)
    result = CliRunner().invoke(app, [word.replace("STORE", str(store)) for word in words])
    out = result.stdout + result.stderr
    assert {c for c in out if unicodedata.category(c) == "Cc"} == {"\n"}
    assert "\u202e" not in out and "\\x9b" in out


def in_terminal(*arguments: object, **environment: str) -> str:
    """What a command writes to a terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "retrotool", *map(str, arguments)]
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    with subprocess.Popen(command, stdout=theirs, env={**kept, "TERM": "xterm", **environment}) as process:
        os.close(theirs)
        found = b""
        while True:
            try:
                data = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not data:
                break
            found += data
    os.close(ours)
    assert process.returncode == 0
    return found.decode().replace("\r\n", "\n")


def test_a_terminal_gets_colours_unless_it_says_no(hostile: Path) -> None:
    plain = run(hostile, "--chunk", 0, "-k", 2)[1]
    assert "[[" in plain
    coloured = in_terminal("inspect", hostile, "--chunk", 0, "-k", 2)
    assert coloured != plain and re.sub("\x1b\\[[0-9;]*m", "", coloured) == plain
    assert re.search("\x1b\\[1;33m\\[\\[", coloured)
    assert in_terminal("inspect", hostile, "--chunk", 0, "-k", 2, NO_COLOR="1") == plain
    assert in_terminal("inspect", hostile, "--chunk", 0, "-k", 2, TERM="dumb") == plain


def test_a_value_and_a_chunk_alone_are_reported(tmp_path: Path, tiny_encoder: Path) -> None:
    from key_values import Written, make_store

    rows = [Written("r", make_text(0, 12), make_text(1, 40)), Written("s", make_text(2, 12), make_text(3, 40))]
    store = make_store(tmp_path / "store", tiny_encoder, rows)
    api.embed(store, encoder=str(tiny_encoder))
    api.neighbours(store)
    code, out, _ = run(store, "--chunk", 2)
    assert code == 0 and "(Not a key: values of key-value records are never searched for. Its key is chunk 0:0.)" in out
    (tmp_path / "ids").write_text("s\n")
    api.purge(store, api.Selectors(document=tmp_path / "ids"), reason="test")
    assert "(No neighbours: none was found, or all that were saved are purged.)" in run(store, "--chunk", 0)[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chunk", "1", "--random", "2"], "error: give one of --chunk, --document and --random"),
        (["--chunk", "1", "--seed", "2"], "error: --seed needs --random"),
        (["--chunk", "x"], "--chunk"),
        (["--random", "0"], "--random"),
        (["--chunk", "12345678901234567890"], "'12345678901234567890' is not a chunk id"),
        (["--chunk", "7:4294967296"], "'7:4294967296' is not a chunk id"),
        (["--chunk", "7:12"], "the store has no chunk 7:12"),
        (["--chunk", str((7 << 32) + 12)], "has no chunk 7:12"),
        (["--document", "nobody"], "the store has no document 'nobody'"),
        (["--chunk", "0", "--table", "other"], "has no neighbours 'other'; it has: main"),
        (["--chunk", "0", "-k", "21"], "-k 21"),
        (["--chunk", "0", "--html", "FOLDER/none/page.html"], "none does not exist"),
        (["--chunk", "0", "--html", "FOLDER"], "is a folder"),
        (["--chunk", "0", "--html", "/dev/null"], "is a device"),
        pytest.param(["--chunk", "0", "--html", "STORE/store.json"], "is in the store", marks=pytest.mark.on_disk),
        pytest.param(["--chunk", "0", "--html", "STORE/log/page.html"], "is in the store", marks=pytest.mark.on_disk),
    ],
)
def test_wrong_usage_ends_with_2_and_says_so(
    built_store: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    places = {"FOLDER": str(tmp_path), "STORE": str(built_store)}
    before = stored_file(built_store, "store.json").read_bytes()
    for place, path in places.items():
        arguments = [word.replace(place, path) for word in arguments]
    code, out, err = run(built_store, *arguments)
    assert stored_file(built_store, "store.json").read_bytes() == before
    assert (code, out, message in err) == (2, "", True), err
    assert Path("/dev/null").is_char_device() and not list(tmp_path.iterdir())


def test_the_table_that_is_missing_is_named_with_its_command(built_store: Path) -> None:
    code, out, err = run(built_store, "--chunk", 0, "--table", "other", "--json")
    reported = json.loads(out)
    assert (code, reported["exit_code"]) == (2, 2)
    assert f"retrotool neighbours {built_store} --name other" in reported["advice"] and reported["advice"] in err
    assert run("nowhere", "--chunk", 0)[0] == 10


def test_with_a_page_text_has_the_figures_alone_and_json_has_all(built_store: Path, tmp_path: Path, cli: Cli) -> None:
    page = tmp_path / "page.html"
    code, out, err = run(built_store, "--random", 30, "--html", page)
    assert (code, err) == (0, "") and page.is_file()
    assert "30 chunks with 60 neighbours; " in out and f"Page: {page}" in out and "distance" not in out
    reported = json.loads(run(built_store, "--random", 30, "--html", page, "--json")[1])
    assert (reported["page"], len(reported["chunks"])) == (str(page), 30)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_a_store_alone_shows_three_random_chunks(built_store: Path) -> None:
    assert run(built_store) == run(built_store, "--random", 3)
    assert json.loads(run(built_store, "--json")[1])["shown"] == 3


def test_without_neighbours_chunks_are_shown_with_the_command_that_makes_them(tmp_path: Path, corpus: Path) -> None:
    store = tmp_path / "store"
    api.chunk(store, [str(corpus)])
    code, out, err = run(store, "--document", "doc-7")
    reader = retrotool.open(store)
    assert (code, err) == (0, "")
    assert f"No neighbours yet. Compute them: retrotool neighbours {store}" in " ".join(out.split())
    for chunk in reader.document("doc-7"):
        assert unwrapped(reader.chunk(chunk).text) in unwrapped(out)
    assert "distance" not in out and "No neighbours: none was found" not in out
    page = tmp_path / "page.html"
    assert run(store, "--random", 5, "--html", page)[0] == 0 and page.read_text().count("<article") == 5
    assert run(store, "--table", "other")[0] == 2


def test_the_only_table_is_taken(store_copy: Path, tmp_path: Path) -> None:
    only = copy_store(store_copy, tmp_path / "only")
    for name in ("main", "other"):
        api.neighbours(store_copy, name=name)
    assert json.loads(run(store_copy, "--chunk", 0, "--json")[1])["name"] == "main", "of several, main"
    with writing(store := Store.open(only)) as started:
        record = store.state.records["neighbours:main"]
        tables = [entry.path for entry in store.state.group("neighbours", "main").entries()]
        store.commit(
            started, lambda _: Draft("neighbours", {}, remove=tuple(tables), records={"neighbours:main": None})
        )
    assert record["saved"] and "neighbours:main" not in Store.open(only).state.records
    api.neighbours(only, name="other")
    assert json.loads(run(only, "--chunk", 0, "--json")[1])["name"] == "other"
    assert api.export(only, tmp_path / "exported").table == "other"


def test_chunks_are_named_by_part_and_row_or_by_number(built_store: Path) -> None:
    last = retrotool.open(built_store).document("doc-7")[-1]
    found = [json.loads(run(built_store, "--chunk", name, "--json")[1]) for name in (format_id(last), last)]
    assert found[0]["chunks"] == found[1]["chunks"] and found[0]["chunks"][0]["id"] == last
    assert f"chunk {last >> 32}:{last & 0xFFFFFFFF}  document doc-7" in run(built_store, "--chunk", last)[1]


@pytest.mark.parametrize("width", [40, 80, 130])
def test_text_is_as_wide_as_the_terminal(built_store: Path, width: int) -> None:
    out = in_terminal("inspect", built_store, "--random", 20, COLUMNS=str(width), TERM="dumb")
    widths = [columns(line) for line in out.splitlines()]
    assert max(widths) <= width and max(widths) > 0.8 * width
    code = CliRunner().invoke(app, ["search", str(built_store), "store index table"], env={"COLUMNS": str(width)})
    assert code.exit_code == 0
    assert (
        min(0.8 * width, 40)
        < max(columns(line) for line in code.stdout.splitlines() if line.startswith("   "))
        <= width
    )
