"""``--classifier``: the chunks to which transformers gives a label with a score above a limit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classifiers import make_classifier, scores_of_transformers
from mock_cuda import mock_cuda

import retrotool
from retrotool import api, engine
from retrotool.encoder import classifier
from retrotool.encoder.classifier import Classifier
from retrotool.errors import RetrotoolError, UsageError
from retrotool.purge.select import select
from retrotool.purge.selectors import classified
from retrotool.purge.selectors.scan import read_scan
from retrotool.store.folding import writing
from retrotool.store.store import Store

ABOVE = 0.9


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    return make_classifier(tmp_path_factory.mktemp("classifier") / "tiny", tiny_encoder)


@pytest.fixture(scope="module")
def scores(built_store: Path, model: Path) -> dict[int, float]:
    """What transformers says of every chunk's text."""
    reader = retrotool.open(built_store)
    chunks = np.concatenate([reader.chunk_ids(part) for part in reader.parts()]).tolist()
    texts = [reader.chunk(chunk).text for chunk in chunks]
    return dict(zip(chunks, scores_of_transformers(model, texts, "toxic").tolist(), strict=True))


def asked_for(model: Path, **changed: Any) -> api.Selectors:
    given = {"classifier": model, "label": "toxic", "above": ABOVE, "device": "cpu", "allow_lossy": True}
    return api.Selectors(**(given | changed))


def scan(root: Path, selectors: api.Selectors) -> tuple[Store, Any]:
    store = Store.open(root)
    asked = selectors.read(store)
    assert asked.scan is not None
    with writing(store) as run:
        engine.execute(asked.scan, store, run)
    return store, asked


@pytest.mark.parametrize("rows", [32, 256])
def test_the_chunks_of_the_label_are_selected_and_no_other(
    store_copy: Path, model: Path, scores: dict[int, float], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(classified._BLOCK_ROWS, "cpu", rows)
    expected = {chunk for chunk, score in scores.items() if score >= ABOVE}
    assert 5 < len(expected) < len(scores) / 2
    assert min(abs(score - ABOVE) for score in scores.values()) > 1e-4, "none is on the edge"
    store, asked = scan(store_copy, asked_for(model))
    assert set(select(store, asked).chunks.tolist()) == expected
    found = read_scan(store, asked.scan)
    for chunk, figure in zip(found["chunks"].to_pylist(), found["figures"].to_pylist(), strict=True):
        assert abs(figure - scores[chunk]) < 1e-4
    done = api.purge(store_copy, asked_for(model), reason="test")
    assert done.chunks == len(expected)
    assert [(match.selector, match.name) for match in done.matches] == [("classifier", "")]


def test_a_gpu_selects_the_same_with_the_same_scores(
    store_copy: Path, model: Path, scores: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(classified._BLOCK_ROWS, "cuda", 64)
    monkeypatch.setattr(classifier, "_SAMPLE", 32)
    monkeypatch.setattr(classifier, "_BAND", 1.5)  # half precision changes such large random weights by 0.1
    computed, kinds = Classifier._computed, set[bool]()

    def watched(self: Classifier, model: Any, rows: Any, label: int) -> Any:
        kinds.add(model is self._half)
        return computed(self, model, rows, label)

    monkeypatch.setattr(Classifier, "_computed", watched)
    with mock_cuda():
        store, asked = scan(store_copy, asked_for(model, device="cuda"))
    assert kinds == {True, False}
    assert set(select(store, asked).chunks.tolist()) == {chunk for chunk, score in scores.items() if score >= ABOVE}
    found = read_scan(store, asked.scan)
    for chunk, figure in zip(found["chunks"].to_pylist(), found["figures"].to_pylist(), strict=True):
        assert abs(figure - scores[chunk]) < 1e-4


def test_purged_and_erased_chunks(store_copy: Path, model: Path, scores: dict[int, float]) -> None:
    first, second = sorted(chunk for chunk, score in scores.items() if score >= ABOVE)[:2]
    api.purge(store_copy, api.Selectors(chunk=(first,)), reason="test", erase=True)
    api.purge(store_copy, api.Selectors(chunk=(second,)), reason="test")
    done = api.purge(store_copy, asked_for(model), reason="test", dry_run=True)
    assert done.already_purged == 1
    assert done.chunks == sum(score >= ABOVE for score in scores.values()) - 2


def test_a_scan_goes_on_with_the_same_model_elsewhere_and_starts_over_with_another(
    store_copy: Path, model: Path, tmp_path: Path
) -> None:
    store, asked = scan(store_copy, asked_for(model))
    moved = Path(shutil.copytree(model, tmp_path / "moved"))
    again = asked_for(moved).read(store)
    assert again.scan is not None
    assert again.scan.plan(store) == []
    assert select(store, again).chunks.tolist() == select(store, asked).chunks.tolist()
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-3}))
    for other in (asked_for(moved), asked_for(model, above=0.5), asked_for(model, label="fine")):
        different = other.read(store).scan
        assert different is not None
        assert len(different.plan(store)) == len(store.state.parts()) > 2


def test_a_chunk_that_the_classifier_fails_on_is_named_and_nothing_is_purged(
    store_copy: Path, model: Path, scores: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(classified._BLOCK_ROWS, "cpu", 16)
    target = sorted(scores)[len(scores) // 2]
    assert target & 0xFFFFFFFF > 32, "in no first block"
    reader = retrotool.open(store_copy)
    text = reader.chunk(target).text
    plain = Classifier.scores

    def failing(self: Classifier, texts: list[str], label: int, above: float) -> np.ndarray:
        return np.where([one == text for one in texts], np.float32(np.nan), plain(self, texts, label, above))

    monkeypatch.setattr(Classifier, "scores", failing)
    with pytest.raises(RetrotoolError, match=f"NaN or infinity for chunk {target} ") as error:
        api.purge(store_copy, asked_for(model), reason="test")
    assert reader.chunk(target).document in str(error.value)
    assert "Nothing was purged" in error.value.advice
    assert api.info(store_copy).purges == {}
    monkeypatch.setattr(Classifier, "scores", plain)
    store = Store.open(store_copy)
    stage = asked_for(model).read(store).scan
    assert stage is not None
    assert [task.label for task in stage.plan(store)] == [f"part {target >> 32}"], "the other parts stay scanned"
    done = api.purge(store_copy, asked_for(model), reason="test")
    assert done.chunks == sum(score >= ABOVE for score in scores.values())


def test_numbers_that_overflow_in_the_model_are_such_a_failure(store_copy: Path, tmp_path: Path, model: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights["classifier.bias"] = torch.full_like(weights["classifier.bias"], torch.inf)
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(RetrotoolError, match="NaN or infinity for chunk 0 "):
        api.purge(store_copy, asked_for(broken), reason="test")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"label": None}, "needs a label and a minimum score"),
        ({"above": None}, "needs a label and a minimum score"),
        ({"label": "nice"}, "has no label 'nice'"),
        ({"above": 1.01}, "--classifier: 1.01 is not a score"),
        ({"above": 0.0}, "--classifier: 0.0 is not a score"),
        ({"above": float("nan")}, "--classifier: nan is not a score"),
        ({"classifier": None}, "need a classifier"),
        ({"classifier": None, "label": None}, "need a classifier"),
        ({"classifier": "nowhere"}, "no such directory"),
        ({"allow_lossy": False}, "--classifier: the tokenizer of .* loses case or spacing"),
    ],
)
def test_what_makes_no_sense_is_reported(built_store: Path, model: Path, changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as error:
        asked_for(model, **changed).read(Store.open(built_store))
    assert error.value.advice
    if "label" in changed and changed.get("classifier", model):
        assert "fine, toxic" in error.value.advice


def test_examples_tell_their_scores(store_copy: Path, model: Path, cli: Any) -> None:
    line = ["--classifier", f"{model}=toxic:{ABOVE}", "--allow-lossy", "--dry-run"]
    shown = cli("purge", store_copy, *line)
    assert shown.returncode == 0, shown.stderr
    assert ", score 0.9" in shown.stdout
    assert cli("purge", store_copy, "--classifier", f"{model}=toxic", "--reason", "r").returncode == 2
