"""Finding inputs: which files there are, what each is called, and that none is missing in silence."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from retrotool.errors import UsageError
from retrotool.sources import Fields, find_inputs, read_input, survey


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(f"text of {name}")


def names_of(*given: str) -> list[str]:
    return [file.name for file in find_inputs(given)]


def refusal_of(*given: str) -> str:
    with pytest.raises(UsageError) as refused:
        find_inputs(given)
    return f"{refused.value}; {refused.value.advice}"


def test_folders_give_files_of_known_formats_once_in_order(here):
    make("c/b.jsonl", "c/a.txt", "c/sub/c.parquet", "c/.hidden.txt", "c/.git/d.txt", "c/readme")
    found = find_inputs(["c/b.jsonl", "c", "c/a.txt"])
    assert [Path(file.path).name for file in found] == ["b.jsonl", "a.txt", "c.parquet"]


@pytest.mark.parametrize("name", ["missing.jsonl", "image.png", "empty-folder", "*.gz", "[x]/**/?.txt", "-", "a\0b"])
def test_what_can_be_no_input_is_named(here, name):
    make("image.png")
    Path("empty-folder").mkdir()
    assert name in refusal_of(name)


PATTERNS = {
    "*.jsonl": ["a1.jsonl", "a2.jsonl", "b[1].jsonl"],
    "a?.jsonl": ["a1.jsonl", "a2.jsonl"],
    "a[2-9].jsonl": ["a2.jsonl"],
    "b[1].jsonl": ["b[1].jsonl"],  # what exists by that name is meant
    "t[1]": ["t[1].bin"],  # or stands for one
    "**/*.txt": ["sub/u.txt", "t.txt"],
    "s?b": ["sub/u.txt"],  # a folder among the matches is a folder given
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_stand_for_what_they_match_by_the_same_names(here, pattern):
    make("a2.jsonl", "a1.jsonl", "b[1].jsonl", "b1.ndjson", "t.txt", "sub/u.txt", ".h.jsonl", "t[1].idx", "t[1].bin")
    assert names_of(pattern) == PATTERNS[pattern]


# Names


NAMES = {
    "n.txt": "n.txt",
    "a/n.txt": "a/n.txt",
    "./a//b/../n.txt": "a/n.txt",
    "../here/a/n.txt": "here/a/n.txt",
    "../../n.txt": "n.txt",
}


@pytest.mark.parametrize("given", NAMES)
def test_a_file_is_named_by_the_path_as_given(tmp_path, monkeypatch, given):
    Path(tmp_path / "up" / "here" / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "up" / "here")
    make(given)
    assert names_of(given) == [NAMES[given]]
    absolute = os.path.normpath(Path.cwd() / given)
    assert names_of(absolute) == [absolute.removeprefix("/")]


def test_a_file_in_a_folder_is_named_by_the_folder_and_the_way_from_there(here):
    make("deep/corpus/a/n.txt", "deep/corpus/n.txt")
    expected = ["corpus/a/n.txt", "corpus/n.txt"]
    assert names_of("deep/corpus") == names_of("deep/../deep/corpus/") == names_of(f"{here}/deep/corpus") == expected
    os.chdir("deep/corpus")
    assert names_of(".") == expected


def test_names_do_not_depend_on_what_else_is_given(here):
    make("a/n.txt", "b/n.txt", "n.txt", "c/a/n.txt")
    alone = [*names_of("a/n.txt"), *names_of("b"), *names_of("n.txt"), *names_of("c/a/n.txt")]
    assert names_of("a/n.txt", "b", "n.txt", "c/a/n.txt") == alone == ["a/n.txt", "b/n.txt", "n.txt", "c/a/n.txt"]
    assert [row.id for file in find_inputs(["a/n.txt"]) for row in read_input(file, Fields())] == ["a/n.txt"]


def test_inputs_of_one_name_are_reported_apart_by_the_folders_around_them(here):
    make("one/x/n.txt", "two/x/n.txt", "other.txt")
    assert names_of("one/x", "two/x", "other.txt") == ["one/x/n.txt", "two/x/n.txt", "other.txt"]


# Links, and what is no file


def test_links_to_folders_are_followed_and_every_folder_once(here):
    make("c/real/a.jsonl", "c/real/sub/b.jsonl", "elsewhere/far.jsonl", "elsewhere/more/f.jsonl")
    for link, target in {
        "c/before": "real",  # stands before the real folder, which gives its name all the same
        "c/loop": ".",
        "c/real/up": "..",
        "c/far": "../elsewhere",
        "c/far-again": "../elsewhere",
        "elsewhere/back": "../c",
    }.items():
        Path(link).symlink_to(target)
    assert names_of("c") == ["c/far/far.jsonl", "c/far/more/f.jsonl", "c/real/a.jsonl", "c/real/sub/b.jsonl"]


def test_a_linked_file_is_read_once(here):
    make("c/b.jsonl")
    Path("c/a.jsonl").symlink_to("b.jsonl")
    assert names_of("c") == ["c/a.jsonl"]


@pytest.mark.parametrize(("link", "target"), [("b.jsonl", "gone.jsonl"), ("folder", "gone"), ("c.jsonl", "c.jsonl")])
def test_a_link_to_nothing_is_refused_by_name(here, link, target):
    make("c/a.jsonl")
    Path(f"c/{link}").symlink_to(target)
    for given in ("c", f"c/{link}", "c/*"):
        assert f"c/{link}: broken link; Remove it, or restore its target" in refusal_of(given)


def test_the_first_link_to_nothing_is_named_and_hidden_ones_are_no_matter(here):
    make("c/a.jsonl")
    Path("c/.#lock").symlink_to("gone")
    assert names_of("c") == ["c/a.jsonl"]
    for name in ("z.txt", "m.txt", "sub"):
        Path(f"c/{name}").symlink_to("gone")
    assert "c/m.txt: broken link" in refusal_of("c")


@pytest.mark.parametrize("kind", ["pipe", "socket"])
@pytest.mark.parametrize("name", ["p.jsonl", "p[1].jsonl"])
def test_what_is_no_regular_file_is_refused_with_advice(here, kind, name):
    make("c/a.jsonl")
    if kind == "pipe":
        os.mkfifo(f"c/{name}")
    else:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(f"c/{name}")
    for given in ("c", f"c/{name}"):
        assert f"c/{name} is not a regular file; Pipe it into - instead" in refusal_of(given)


def test_pipes_that_look_like_no_input_do_not_hinder_a_folder(here):
    make("c/a.jsonl")
    os.mkfifo("c/control")
    assert names_of("c") == ["c/a.jsonl"]
    assert "c/control is not a regular file" in refusal_of("c/control")


def test_an_empty_name_is_not_the_current_folder(here):
    make("a.jsonl")
    assert "an input has an empty name" in refusal_of("")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list any folder")
def test_a_folder_that_may_not_be_listed_is_refused(here):
    make("c/a.jsonl", "c/closed/b.jsonl")
    Path("c/closed").chmod(0)
    assert "Permission denied" in refusal_of("c")
    assert "Permission denied" in refusal_of("c/closed/b.jsonl")


# What is left out


def test_what_is_left_out_in_folders_is_reported(here):
    make("c/a.jsonl", "c/b.jsonl.lz4", "c/sub/c.docx", "c/w.bin", "c/v.npy", "c/.hidden.docx", "c/.git/config")
    make("c/t.bin", "c/t.idx", "c/p.u16")
    found = survey(["c", "c/a.jsonl"])
    assert found.files == find_inputs(["c"])
    assert [file.name for file in found.files] == ["c/a.jsonl", "c/p.u16", "c/t.bin"]
    assert [str(file) for file in found.left_out] == ["c/b.jsonl.lz4", "c/sub/c.docx", "c/v.npy", "c/w.bin"]


def test_what_is_also_given_by_name_is_not_left_out(here):
    make("c/a.jsonl", "c/w.bin")
    assert survey(["c", "c/w.bin"]).left_out == []
    assert names_of("c", "c/w.bin") == ["c/a.jsonl", "c/w.bin"]


def test_files_and_folders_are_excluded_by_the_end_of_their_path(here):
    make("c/a.jsonl", "c/b.html", "c/drafts/d.jsonl", "c/x/drafts.jsonl", "c/x/y/b.jsonl", "c/x/.html", "e.jsonl")

    def left(*patterns: str) -> list[str]:
        return [file.name for file in survey(["c", "e.jsonl"], exclude=patterns).files]

    rest = ["c/a.jsonl", "c/x/drafts.jsonl", "c/x/y/b.jsonl"]
    assert left("*.html", "drafts") == [*rest, "e.jsonl"]
    assert left("b.*", "c/drafts/*", "y/b.jsonl") == ["c/a.jsonl", "c/x/drafts.jsonl", "e.jsonl"]
    assert left(str(here / "c/x"), "*.html", "e.*") == ["c/a.jsonl", "c/drafts/d.jsonl"]
    assert left("c") == ["e.jsonl"]
    assert left("x/b.jsonl", "A.jsonl", "*.html") == [rest[0], "c/drafts/d.jsonl", *rest[1:], "e.jsonl"]
    excluded = survey(["c"], exclude=("*.html", "drafts", "b.jsonl")).excluded
    assert [str(path) for path in excluded] == ["c/b.html", "c/drafts", "c/x/y/b.jsonl"]


def test_a_store_among_the_inputs_is_none_of_them(here):
    make("c/a.jsonl", "c/store/store.json", "c/store/chunks/x.parquet", "c/store/tokens.xyz")
    assert survey(["c"])._replace(files=[]) == ([], [], [])
    assert names_of("c") == ["c/a.jsonl"]


def test_a_file_that_is_called_like_a_stores_hides_no_other(here):
    make("shop/top.jsonl", "shop/a/store.json", "shop/a/items.jsonl", "shop/a/more/b.jsonl")
    assert names_of("shop") == ["shop/a/items.jsonl", "shop/a/more/b.jsonl", "shop/a/store.json", "shop/top.jsonl"]
