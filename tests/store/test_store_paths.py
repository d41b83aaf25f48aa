"""Paths: what a name says comes back from it, and none leads out of the store."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrotool.errors import CorruptError, UsageError
from retrotool.store import paths
from retrotool.store.local_storage import LocalStorage
from retrotool.store.paths import DATA_KINDS, NAMED_KINDS, UNNUMBERED_KINDS, FileName

components = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,30}", fullmatch=True)
tokens = st.text("0123456789abcdef", min_size=16, max_size=32)
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


def said(name: FileName) -> FileName:
    """What the path of a name says: the commit, not the path, has the slot of documents and chunks."""
    return replace(name, slot="") if name.kind in UNNUMBERED_KINDS else name


@given(file_names())
def test_a_name_comes_back_from_its_path(name: FileName) -> None:
    assert FileName.parse(name.path) == said(name)


@given(file_names())
def test_a_name_lies_in_the_store(name: FileName) -> None:
    assert LocalStorage("/store").local(name.path) == Path("/store") / name.path


@given(st.text(max_size=40))
def test_what_is_accepted_stays_inside(path: str) -> None:
    root = Path("/some/store")
    try:
        found = LocalStorage("/some/store").local(path)
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
            LocalStorage("/store").local(path)
        with pytest.raises(CorruptError):
            FileName.parse(path)


@pytest.mark.parametrize("path", BAD)
def test_a_bad_path_is_refused(path: str) -> None:
    with pytest.raises(CorruptError, match="leads out"):
        LocalStorage("/store").local(path)


@pytest.mark.parametrize(
    "path",
    [
        "undone/000000.parquet",  # no token
        "undone/000000-0123456789abcde.parquet",  # a short one
        "undone/000000-0123456789ABCDEF.parquet",  # upper case
        "undone/000000-0123456789abcdef",  # no extension
        "undone/000000-0123456789abcdef.parquet\n",
        "undone/name/000000-0123456789abcdef.parquet",  # a kind without names
        "embeddings/000000-0123456789abcdef.npy",  # a kind with names
        "embeddings/a/b/000000-0123456789abcdef.npy",
        "000000-0123456789abcdef.parquet",
        "0123456789abcdef.parquet",
        "chunks/0123456789abcde.parquet",
        "chunks/0123456789abcdef",
        "chunks/name/0123456789abcdef.parquet",
    ],
)
def test_what_has_not_the_form_of_a_path_is_refused(path: str) -> None:
    with pytest.raises(CorruptError, match="not the path"):
        FileName.parse(path)


@pytest.mark.parametrize("kind", DATA_KINDS)
def test_a_name_says_a_slot_if_its_kind_has_one_and_only_then(kind: str) -> None:
    folder = f"{kind}/name" if kind in NAMED_KINDS else kind
    bare, numbered, empty = (f"{folder}/{slot}0123456789abcdef.bin" for slot in ("", "000000-", "-"))
    good, bad = (bare, numbered) if kind in ("documents", "chunks") else (numbered, bare)
    assert FileName.parse(good).path == good
    for path in (bad, empty):
        with pytest.raises(CorruptError, match="not the path"):
            FileName.parse(path)


def test_a_kind_that_no_version_knows_is_refused() -> None:
    # One flipped bit in the log would otherwise hide the tombstones of a purge.
    with pytest.raises(CorruptError):
        FileName.parse("4ombstones/p-0123456789abcdef.parquet")


@given(file_names())
def test_new_names_carry_their_run(name: FileName) -> None:
    new = FileName.new("0123abcd", name.kind, name.slot, name.extension, name.name)
    assert new.run == "0123abcd"
    assert FileName.parse(new.path) == said(new)


@pytest.mark.parametrize(("kind", "bits"), [("chunks", 64), ("documents", 64), ("tombstones", 32)])
def test_new_names_are_new(kind: str, bits: int) -> None:
    """Without a slot, too, of which a run may write a million."""
    names = [FileName.new("0123abcd", kind, "000000", "parquet") for _ in range(20)]
    assert len({name.path for name in names}) == 20
    assert {len(name.token) for name in names} == {(32 + bits) // 4}


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
