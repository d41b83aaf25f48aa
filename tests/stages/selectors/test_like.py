"""``--like``: all chunks within a distance of a text, as brute force finds them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Cli, make_encoder, make_rows, make_text, write_jsonl
from stored import contents_of, stored_file, stored_files

import retrotool
from retrotool import api, engine
from retrotool.embed.store_encoder import load_encoder
from retrotool.errors import UsageError
from retrotool.index.run import drop
from retrotool.purge.select import select
from retrotool.purge.selectors import like, scan
from retrotool.purge.selectors.scan import read_scan
from retrotool.sources import Fields
from retrotool.store.folding import writing
from retrotool.store.store import Store

TEXT = "a river in the forest, and a bridge over the valley"


def distances(root: Path, queries: np.ndarray) -> dict[int, float]:
    """The least squared distance of every chunk of a store to some vectors, by numpy in float64."""
    store, found = Store.open(root), {}
    for part in store.state.parts():
        entry = store.state.part_file("chunks", part)
        assert entry is not None
        (name,) = store.state.names("embeddings")
        embeddings = store.state.part_file("embeddings", part, name)
        assert embeddings is not None
        vectors = np.load(stored_file(root, embeddings.path)).astype(np.float64)
        apart = np.square(vectors[:, None] - queries[None].astype(np.float64)).sum(2).min(1)
        found |= {(part << 32) + row: float(distance) for row, distance in enumerate(apart)}
    return found


def query(root: Path, *texts: str) -> np.ndarray:
    """The vectors of texts by the store's encoder, which ``search`` uses."""
    store = Store.open(root)
    (name,) = store.state.names("embeddings")
    encoder = load_encoder(store, name, "cpu")
    return np.concatenate([encoder.embed(encoder.tokenize_query(text)) for text in texts]).astype(np.float32)


def selected(root: Path, **selectors: object) -> set[int]:
    store = Store.open(root)
    asked = api.Selectors(device="cpu", **selectors).read(store)  # type: ignore[arg-type]
    assert asked.scan is not None
    with writing(store) as run:
        engine.execute(asked.scan, store, run)
    return set(select(store, asked).chunks.tolist())


def a_share(apart: dict[int, float], share: float) -> tuple[float, set[int]]:
    """A distance in the gap behind the nearest share of chunks, and these."""
    ordered = sorted(apart, key=lambda chunk: apart[chunk])
    n = int(share * len(ordered))
    while apart[ordered[n]] - apart[ordered[n - 1]] < 1e-4:
        n += 1
    return (apart[ordered[n - 1]] + apart[ordered[n]]) / 2, set(ordered[:n])


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_all_chunks_within_the_distance_are_selected_and_no_other(store_copy: Path, share: float) -> None:
    within, expected = a_share(distances(store_copy, query(store_copy, TEXT)), share)
    assert len(expected) > 0
    assert selected(store_copy, like=TEXT, within=within) == expected
    assert stored_files(store_copy, "scans/*")
    assert api.verify(store_copy).ok, "the results are stored as the format says"


@pytest.mark.parametrize("small", [True, False])
def test_the_text_of_a_file_is_cut_into_chunks_and_each_is_looked_for(
    store_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: bool
) -> None:
    if small:  # so that there are borders of slices
        monkeypatch.setattr(like, "_SLICE_ROWS", 7)
        monkeypatch.setattr(like, "_LEAST_ROWS", 1)
        monkeypatch.setattr(scan, "BLOCK_ROWS", 20)
        monkeypatch.setattr(like, "_PAIRS", 3)
    row = next(row for row in make_rows(120) if row["id"] == "doc-31")
    (tmp_path / "takedown.txt").write_text(row["text"])
    reader = retrotool.open(store_copy)
    own = reader.document("doc-31")
    assert len(own) > 3
    found = selected(store_copy, like=tmp_path / "takedown.txt", within=1e-3)
    assert set(own) <= found, "a text finds itself at a distance of nothing"
    pieces = np.concatenate([reader.embeddings(chunk >> 32)[[chunk & 0xFFFFFFFF]] for chunk in own])
    within, expected = a_share(distances(store_copy, pieces), 0.5)
    assert len(expected - set(own)) > 10
    assert selected(store_copy, like=tmp_path / "takedown.txt", within=within) == expected


def test_a_distance_that_search_prints_takes_what_search_shows(store_copy: Path) -> None:
    reader = retrotool.open(store_copy)
    found = reader.search(TEXT, 12, encoder=reader.load_encoder(device="cpu"))
    assert selected(store_copy, like=TEXT, within=found[-1].distance) == {n.id for n in found}
    nearer = np.nextafter(np.float32(found[-1].distance), np.float32(0))
    assert selected(store_copy, like=TEXT, within=nearer) == {n.id for n in found if n.distance < found[-1].distance}
    store = Store.open(store_copy)
    asked = api.Selectors(like=TEXT, within=found[-1].distance, device="cpu").read(store)
    assert asked.scan is not None
    scanned = read_scan(store, asked.scan)
    figures = dict(zip(scanned["chunks"].to_pylist(), scanned["figures"].to_pylist(), strict=True))
    assert figures == {n.id: n.distance for n in found}, "to the last bit"


def test_keys_are_selected_and_no_values(tmp_path: Path, tiny_encoder: Path) -> None:
    rows = [{"q": make_text(i, 12), "a": make_text(100 + i, 150)} for i in range(30)]
    store = tmp_path / "store"
    api.chunk(
        store, [str(write_jsonl(tmp_path / "rows.jsonl", rows))], tokenizer=str(tiny_encoder), part_size=40,
        fields=Fields(key="q", value="a"),
    )  # fmt: skip
    api.embed(store, encoder=str(tiny_encoder))
    reader = retrotool.open(store)
    chunks = np.concatenate([reader.chunk_ids(part) for part in reader.parts()])
    keys = set(chunks[reader.is_searchable(chunks)].tolist())
    assert selected(store, like=TEXT, within=1e6) == keys
    assert selected(store, like=TEXT, within=1e6, whole_documents=True) == set(chunks.tolist())


def test_what_is_erased_is_near_nothing_and_what_is_purged_can_still_be_erased(store_copy: Path) -> None:
    chunks = set(distances(store_copy, query(store_copy, TEXT)))
    everything = 1e6
    first, second = sorted(chunks)[:2]
    api.purge(store_copy, api.Selectors(chunk=(first,)), reason="test", erase=True)
    api.purge(store_copy, api.Selectors(chunk=(second,)), reason="test")
    assert selected(store_copy, like=TEXT, within=everything) == chunks - {first}
    done = api.purge(store_copy, api.Selectors(like=TEXT, within=everything, device="cpu"), reason="test")
    assert (done.chunks, done.already_purged) == (len(chunks) - 2, 1)


def test_a_part_without_embeddings_is_an_error_and_scanned_when_it_has_some(
    store_copy: Path, tmp_path: Path, tiny_encoder: Path
) -> None:
    within, before = a_share(distances(store_copy, query(store_copy, TEXT)), 0.3)
    assert selected(store_copy, like=TEXT, within=within) == before
    more = write_jsonl(tmp_path / "more.jsonl", make_rows(30, first=500))
    api.chunk(store_copy, [str(more)], part_size=100)
    asked = api.Selectors(like=TEXT, within=within, device="cpu")
    with pytest.raises(UsageError, match="has no embeddings of tiny") as error:
        api.purge(store_copy, asked, reason="test")
    assert f"retrotool embed {store_copy} --encoder {tiny_encoder}" in error.value.advice
    assert api.info(store_copy).purges == {}
    api.embed(store_copy, encoder=str(tiny_encoder))
    apart = distances(store_copy, query(store_copy, TEXT))
    expected = {chunk for chunk, distance in apart.items() if distance <= within}
    assert len(expected) > len(before)
    assert api.purge(store_copy, asked, reason="test").chunks == len(expected)


def test_of_several_embeddings_those_are_used_that_search_uses(store_copy: Path, tmp_path: Path) -> None:
    other = make_encoder(tmp_path / "other", seed=3)
    api.embed(store_copy, encoder=str(other))
    by_default = api.Selectors(like=TEXT, within=1.0).read(Store.open(store_copy)).scan.selectors
    assert (
        by_default == api.Selectors(like=TEXT, within=1.0, encoder="tiny").read(Store.open(store_copy)).scan.selectors
    )
    drop(store_copy, name="main")
    with pytest.raises(UsageError, match="embeddings of other, tiny") as error:
        api.Selectors(like=TEXT, within=1.0).read(Store.open(store_copy))
    assert "--encoder NAME --default" in error.value.advice
    scans = {
        api.Selectors(like=TEXT, within=1.0, encoder=name)
        .read(Store.open(store_copy))
        .scan.scan(Store.open(store_copy))
        for name in ("tiny", "other")
    }
    assert len(scans) == 2
    shutil.rmtree(other)
    with pytest.raises(UsageError, match="other"):
        selected(store_copy, like=TEXT, within=1.0, encoder="other")


@pytest.mark.parametrize(
    ("selectors", "reason"),
    [
        ({"like": TEXT}, "--like needs --within DISTANCE"),
        ({"within": 1.0}, "--within needs --like TEXT"),
        ({"encoder": "tiny"}, "an encoder needs --like TEXT"),
        ({"like": TEXT, "within": -0.5}, "--within -0.5 is not a distance"),
        ({"like": TEXT, "within": float("nan")}, "--within nan is not a distance"),
        ({"like": TEXT, "within": float("inf")}, "--within inf is not a distance"),
        ({"like": " \n", "within": 1.0}, "the text is empty"),
        ({"like": Path("takedown.txt"), "within": 1.0}, "takedown.txt can't be read: No such file"),
        ({"like": "a \udcff", "within": 1.0}, "is not UTF-8"),
        ({"like": TEXT, "within": 1.0, "encoder": "bert"}, "no embeddings of 'bert'"),
        ({"like": TEXT, "within": 1.0, "device": "tpu"}, "'tpu' is unknown"),
    ],
)
def test_what_makes_no_sense_is_reported(built_store: Path, selectors: dict[str, object], reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as error:
        api.Selectors(**selectors).read(Store.open(built_store))  # type: ignore[arg-type]
    assert error.value.advice or "UTF-8" in reason or "empty" in reason


def test_files_that_hold_no_text_are_reported(built_store: Path, tmp_path: Path) -> None:
    store = Store.open(built_store)
    for content, reason in ((b" \n", "has no text"), (b"\xff\xfe", "can't be read")):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(UsageError, match=reason):
            api.Selectors(like=tmp_path / "file", within=1.0).read(store)


def test_a_text_that_the_encoder_can_not_take_whole_is_refused(store_copy: Path, tmp_path: Path) -> None:
    words = " ".join(["harbour"] * 126)
    assert selected(store_copy, like=words, within=0.0) == set()
    with pytest.raises(UsageError, match="the text has 127 tokens, and the encoder tiny takes at most 126") as error:
        selected(store_copy, like=f"{words} x", within=0.0)
    assert "file" in error.value.advice
    (tmp_path / "file").write_text(f"{words} x")
    selected(store_copy, like=tmp_path / "file", within=0.0)


def test_a_store_without_embeddings_is_reported_what_to_do(tmp_path: Path, corpus: Path, tiny_encoder: Path) -> None:
    api.chunk(tmp_path / "store", [str(corpus)], tokenizer=str(tiny_encoder))
    with pytest.raises(UsageError, match="has no embeddings") as error:
        api.Selectors(like=TEXT, within=1.0).read(Store.open(tmp_path / "store"))
    assert f"retrotool embed {tmp_path / 'store'}" in error.value.advice


def test_the_text_stands_in_no_file_but_the_selectors_and_goes_with_the_erase(store_copy: Path) -> None:
    within, expected = a_share(distances(store_copy, query(store_copy, TEXT)), 0.05)
    asked = api.Selectors(like=TEXT, within=within, device="cpu")
    shown = api.purge(store_copy, asked, reason="test", dry_run=True)
    assert shown.review is not None
    figures = [example.figure for example in shown.review.examples]
    assert figures == sorted(figures)
    assert all(figure is not None and 0 < figure <= within for figure in figures)
    api.purge(store_copy, asked, reason="test")

    def holding() -> set[str]:
        return {path.split("/")[0] for path, data in contents_of(store_copy).items() if TEXT.encode() in data}

    assert holding() == {"selectors"}
    done = api.purge(store_copy, asked, reason="test", erase=True)
    assert done.erased == len(expected)
    assert holding() == set()
    assert api.verify(store_copy).ok


def test_examples_tell_their_distances(store_copy: Path, cli: Cli) -> None:
    asked = api.Selectors(like=TEXT, within=60, device="cpu")
    review = api.purge(store_copy, asked, reason="r", dry_run=True).review
    assert review is not None
    assert len(review.examples) == 10
    shown = cli("purge", store_copy, "--like", TEXT, "--within", 60, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    for example in review.examples:
        assert (
            f"{example.chunk >> 32}:{example.chunk & 0xFFFFFFFF} of {example.document}, distance {example.figure:.4f}: "
            in shown.stdout
        )
