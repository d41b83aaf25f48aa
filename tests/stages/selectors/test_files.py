"""Files that selectors are given: as other programs write them, with nothing in them, and in other encodings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from retrotool import api
from retrotool.errors import UsageError
from retrotool.store.store import Store

FILES = {
    "pattern": b"tide\nfirst\n",
    "terms": b"# names\nM\xc3\xbcller\nBerlin\n",
    "document": b"doc-1\ndoc-2\n",
    "chunk": b"1\n2\n",
    "near_duplicates_of": b"1\n2\n",
    "like": b"A text\nof two lines.\n",
}


def asked(store: Path, name: str, file: Path) -> Any:
    more = {"within": 0.5} if name == "like" else {}
    return api.Selectors(**{name: file}, **more, allow_lossy=True).read(Store.open(store))


@pytest.mark.parametrize("name", FILES)
def test_a_byte_order_mark_says_nothing(name: str, built_store: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(FILES[name])
    (tmp_path / "marked").write_bytes(
        b"\xef\xbb\xbf" + FILES[name].replace(b"\n", b"\n" if name == "like" else b"\r\n")
    )
    assert asked(built_store, name, tmp_path / "marked") == asked(built_store, name, tmp_path / "plain")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf \r\n\n"])
def test_a_file_with_nothing_in_it_is_reported(name: str, content: bytes, built_store: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(content)
    with pytest.raises(UsageError, match="empty has no "):
        asked(built_store, name, tmp_path / "empty")


@pytest.mark.parametrize("name", FILES)
def test_a_file_in_another_encoding_is_reported_with_the_line(name: str, built_store: Path, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"5\nM\xfcller\n")
    with pytest.raises(UsageError, match=r"latin can't be read: line 2 is not UTF-8"):
        asked(built_store, name, tmp_path / "latin")


@pytest.mark.parametrize("name", ["where", "pattern", "like", "contaminates", "label", "encoder", "document"])
def test_arguments_that_are_no_text_are_refused(name: str, built_store: Path) -> None:
    given: Any = ("M\udcfcller",) if name == "document" else "M\udcfcller"
    with pytest.raises(UsageError, match=f"--{name} .*is not UTF-8"):
        api.Selectors(**{name: given}, allow_lossy=True).read(Store.open(built_store))
