"""``info --sources``: what is live of each source and domain, and what was before purges, counted by the API alone."""

from __future__ import annotations

import csv
import ipaddress
import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from conftest import make_rows, write_jsonl
from typer.testing import CliRunner

import retrotool
from retrotool import api
from retrotool.app import app
from retrotool.sources import Fields

URLS = [
    "https://www.example.org/a?b=http://x.de/", "http://user:p@ss@Example.CO.UK:8080/", "HTTPS://example.org./",
    "http://192.168.0.1/x", "http://[2001:db8::1]:80/", "//cdn.example.fr/x.js", "ftp://файл.рф/y", "example.com/a",
    "not a url", "", "file:///etc/hosts", "http://localhost:3000", "https://a.example.org#x.de", "mailto:a@b.de", None,
    "http://./", " https://c.example.org..", "http://user@x.de:8080@example.fr/",
]  # fmt: skip
COLUMNS = [
    "by", "name", "share", "documents", "chunks", "tokens", "documents_before", "chunks_before", "tokens_before",
]  # fmt: skip
Counts = dict[tuple[str, str], list[int]]


def domain_of(url: str | None) -> str:
    host = (urlsplit(url or "").hostname or "").rstrip(".")
    if not host:
        return "(none)"
    try:
        return "(IP address)" if ipaddress.ip_address(host) else ""
    except ValueError:
        return host.rpartition(".")[2]


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Documents of several chunks in three sources, the last ten without URL, some with a text that another has."""
    made = [{**row, "url": URLS[i % len(URLS)], "source": f"s{i % 3}"} for i, row in enumerate(make_rows(50))]
    for row in made[40:]:
        del row["url"]
    return [*made[:40], {**made[7], "id": "copy", "source": "s9"}, *made[40:]]


@pytest.fixture
def store(tmp_path: Path, byte_level_tokenizer: Path, rows: list[dict[str, Any]]) -> Path:
    """Parts with and without a column ``url``."""
    first, second = (write_jsonl(tmp_path / f"{n}.jsonl", some) for n, some in enumerate((rows[:41], rows[41:])))
    api.chunk(
        tmp_path / "store",
        [str(first)],
        tokenizer=str(byte_level_tokenizer),
        part_size=20,
        fields=Fields(keep=("url",)),
    )
    api.chunk(tmp_path / "store", [str(second)], part_size=20)
    return tmp_path / "store"


def live(store: Path, rows: list[dict[str, Any]]) -> Counts:
    """Documents, chunks and tokens that a reader returns, by source and domain."""
    about, reader = {row["id"]: row for row in rows}, retrotool.open(store)
    found: dict[str, list[int]] = defaultdict(list)
    for part in reader.parts():
        for chunk in map(reader.chunk, reader.chunk_ids(part).tolist()):
            found[chunk.document].append(chunk.n_tokens)
    counts: Counts = defaultdict(lambda: [0, 0, 0])
    for name, tokens in found.items():
        for key in (("source", about[name]["source"]), ("domain", domain_of(about[name].get("url")))):
            counts[key] = [n + more for n, more in zip(counts[key], (1, len(tokens), sum(tokens)), strict=True)]
    return dict(counts)


def check(store: Path, now: Counts, before: Counts) -> None:
    found = api.count_sources(store)
    got = {(one.by, one.name): one for one in found.counts}
    assert {key: [one.documents, one.chunks, one.tokens] for key, one in got.items() if one.chunks} == now
    assert {key: [one.documents_before, one.chunks_before, one.tokens_before] for key, one in got.items()} == before
    total = api.info(store)
    for by in ("source", "domain"):
        some = [one for one in found.counts if one.by == by]
        assert [one.tokens for one in some] == sorted((one.tokens for one in some), reverse=True)
        assert sum(one.documents for one in some) == total.documents
        assert sum(one.tokens for one in some) == total.tokens
        assert sum(one.share for one in some) == pytest.approx(1, abs=1e-4)
        assert all(one.share == pytest.approx(one.tokens / total.tokens, abs=1e-6) for one in some)


def test_live_text_and_what_was_before_purges_are_counted(
    store: Path, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    before = live(store, rows)
    assert {name for by, name in before if by == "domain"} == {
        "org", "uk", "fr", "рф", "localhost", "(IP address)", "(none)",
    }  # fmt: skip
    assert ("source", "s9") not in before, "a repeat is not counted"
    check(store, before, before)
    reader = retrotool.open(store)
    some = [reader.document("doc-3")[0], reader.document("doc-45")[-1], *reader.document("doc-8")]
    (tmp_path / "ids").write_text("".join(f"{i}\n" for i in some))
    api.purge(store, api.Selectors(chunk=tmp_path / "ids"), reason="test")
    api.purge(store, api.Selectors(where="source = 's2'"), reason="test")
    purged = live(store, rows)
    assert ("source", "s2") in before and ("source", "s2") not in purged
    check(store, purged, before)
    api.erase(store, ["last"])
    erased = live(store, rows)
    found = {(one.by, one.name): one for one in api.count_sources(store).counts}
    assert ("source", "s2") not in found, "nothing is left of what was erased"
    assert {key: [one.documents, one.chunks, one.tokens] for key, one in found.items() if one.chunks} == erased
    assert all(found[key].tokens_before == before[key][2] for key in (("source", "s0"), ("source", "s1")))


def test_a_store_without_urls_has_no_domains(built_store: Path) -> None:
    assert {one.by for one in api.count_sources(built_store).counts} == {"source"}


def test_text_csv_and_json_are_the_same_list(store: Path) -> None:
    printed = {}
    for form in ([], ["--csv"], ["--json"]):
        done = CliRunner().invoke(app, ["info", str(store), "--sources", *form])
        assert (done.exit_code, done.stderr) == (0, "")
        printed["".join(form)] = done.stdout
    reported = json.loads(printed["--json"])
    assert reported["counts"] == [asdict(one) for one in api.count_sources(store).counts]
    assert (reported["path"], reported["commit"]) == (str(store), retrotool.open(store).commit)
    rows = list(csv.DictReader(printed["--csv"].splitlines()))
    assert rows == [{name: str(one[name]) for name in COLUMNS} for one in reported["counts"]]
    header, *lines = printed[""].splitlines()
    assert header.split() == COLUMNS
    for line, one in zip(lines, reported["counts"], strict=True):
        cells = line.split()
        assert (cells[0], cells[-6:]) == (one["by"], [f"{one[name]:,}" for name in COLUMNS[3:]])
