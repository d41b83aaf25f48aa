"""Paths: what a name says comes back from it, and none leads out of the store."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrotool.errors import CorruptError, UsageError
from retrotool.store import paths
from retrotool.store.paths import DATA_KINDS, NAMED_KINDS, FileName

components = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,30}", fullmatch=True)
tokens = st.text("0123456789abcdef", min_size=16, max_size=16)
extensions = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=1, max_size=8)


@st.composite
def file_names(draw: st.DrawFn) -> FileName:
    kind = draw(st.sampled_from(DATA_KINDS))
    name = draw(components) if kind in NAMED_KINDS else ""
    return FileName(kind, name, draw(components), draw(tokens), draw(extensions))


BAD = [
    "", ".", "..", "/", "//", "a/", "/a", "a//b", "./a", "a/.", "../a", "a/../b", "a/..", "/etc/passwd", "a/.hidden",
    "a/-b", "a b", "a\\b", "a\nb", "a\0b", "a\n", "ä", "a/ｂ", "a:b", "~", "~root/a", "$a", "a*", "a?b", "a%2e", "a/ ",
]  # fmt: skip


@given(file_names())
def test_a_name_comes_back_from_its_path(name: FileName) -> None:
    assert FileName.parse(name.path) == name


@given(file_names())
def test_a_name_lies_in_the_store(name: FileName) -> None:
    assert paths.inside(Path("/store"), name.path) == Path("/store") / name.path


@given(st.text(max_size=40))
def test_what_is_accepted_stays_inside(path: str) -> None:
    root = Path("/some/store")
    try:
        found = paths.inside(root, path)
    except CorruptError:
        return
    assert Path(*(part for part in found.parts if part != "..")) == found
    assert found.is_relative_to(root)
    assert found != root
    assert path.isascii()


@given(file_names(), st.sampled_from(BAD))
def test_a_bad_component_is_refused_anywhere(name: FileName, bad: str) -> None:
    pieces = name.path.split("/")
    for place in range(len(pieces) + 1):
        path = "/".join([*pieces[:place], bad, *pieces[place:]])
        with pytest.raises(CorruptError):
            paths.inside(Path("/store"), path)
        with pytest.raises(CorruptError):
            FileName.parse(path)


@pytest.mark.parametrize("path", BAD)
def test_a_bad_path_is_refused(path: str) -> None:
    with pytest.raises(CorruptError, match="leads out"):
        paths.inside(Path("/store"), path)


@pytest.mark.parametrize(
    "path",
    [
        "chunks/000000.parquet",  # no token
        "chunks/000000-0123456789abcde.parquet",  # a short one
        "chunks/000000-0123456789ABCDEF.parquet",  # upper case
        "chunks/000000-0123456789abcdef",  # no extension
        "chunks/-0123456789abcdef.parquet",  # no slot
        "chunks/000000-0123456789abcdef.parquet\n",
        "chunks/name/000000-0123456789abcdef.parquet",  # a kind without names
        "embeddings/000000-0123456789abcdef.npy",  # a kind with names
        "embeddings/a/b/000000-0123456789abcdef.npy",
        "000000-0123456789abcdef.parquet",
    ],
)
def test_what_has_not_the_form_of_a_path_is_refused(path: str) -> None:
    with pytest.raises(CorruptError, match="no path"):
        FileName.parse(path)


def test_a_kind_that_no_version_knows_is_refused() -> None:
    # One flipped bit in the log would otherwise hide the tombstones of a purge.
    with pytest.raises(CorruptError):
        FileName.parse("4ombstones/p-0123456789abcdef.parquet")


@given(file_names())
def test_new_names_carry_their_run(name: FileName) -> None:
    new = FileName.new("0123abcd", name.kind, name.slot, name.extension, name.name)
    assert new.run == "0123abcd"
    assert FileName.parse(new.path) == new


def test_new_names_are_new() -> None:
    # 16 random bits: no slot is written so often in one run, but a constant would show.
    assert len({FileName.new("0123abcd", "chunks", "000000", "parquet").path for _ in range(20)}) > 1


@given(st.integers(0, 10**8), st.integers(0, 10**8))
def test_part_slots_are_six_digits_or_more_and_all_different(one: int, other: int) -> None:
    slot = paths.part_slot(one)
    assert len(slot) >= 6
    assert slot.isdecimal()
    assert int(slot) == one
    assert (slot == paths.part_slot(other)) == (one == other)


@given(components.filter(lambda name: len(name) <= 100))
def test_a_good_name_is_accepted(name: str) -> None:
    assert paths.check_name(name, "--name") == name


@pytest.mark.parametrize("name", ["", "a/b", "..", ".a", "-a", "a b", "ä", "a" * 101, "a\n"])
def test_a_name_that_can_be_no_folder_is_refused_with_advice(name: str) -> None:
    with pytest.raises(UsageError, match="--name") as caught:
        paths.check_name(name, "--name")
    assert "letters" in caught.value.advice
