"""Classifiers: what transformers says, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classifiers import make_classifier, scores_of_transformers
from conftest import make_text
from mock_cuda import mock_cuda

from retrotool.encoder import classifier as module
from retrotool.encoder.classifier import Classifier, find_classifier
from retrotool.errors import AbortError, RetrotoolError, UsageError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    return make_classifier(tmp_path_factory.mktemp("classifier") / "tiny", tiny_encoder, ("fine", "rude", "toxic"))


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def edit(path: Path, **fields: Any) -> None:
    """Change a model's config.json; None takes a field out."""
    config = json.loads((path / "config.json").read_text()) | fields
    (path / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


TEXTS = [make_text(i, 1 + i % 60) for i in range(150)] + ["", "naïve 日本語 [SEP] and", "?!"]


@pytest.mark.parametrize(
    ("labels", "settings"),
    [
        (("fine", "rude", "toxic"), {}),
        (("fine", "rude", "toxic"), {"problem_type": "single_label_classification"}),
        (("insult", "toxic"), {"problem_type": "multi_label_classification"}),
        (("toxic",), {}),
    ],
)
def test_scores_are_those_of_transformers(
    tmp_path: Path, tiny_encoder: Path, labels: tuple[str, ...], settings: dict[str, Any]
) -> None:
    path = make_classifier(tmp_path / "model", tiny_encoder, labels, **settings)
    identity = find_classifier(path)
    assert identity.labels == labels
    classifier = Classifier(identity, "cpu")
    classifier.batch_tokens = 300
    found = classifier.scores(TEXTS, identity.label("toxic"))
    true = scores_of_transformers(path, TEXTS, "toxic")
    assert true.min() < 0.2 < 0.8 < true.max()
    assert np.allclose(found, true, atol=1e-4)


def test_a_text_that_is_too_long_has_the_highest_score_of_its_windows(tmp_path: Path, tiny_encoder: Path) -> None:
    path = make_classifier(tmp_path / "model", tiny_encoder, max_position_embeddings=12)
    words = [make_text(i, 1 + i % 47).replace(".", "").split() for i in range(40)]
    words = [[word for word in some if len(word) > 1] for some in words]  # a token each
    classifier = Classifier(find_classifier(path), "cpu")
    found = classifier.scores([" ".join(some) for some in words], 1)
    for score, some in zip(found, words, strict=True):
        windows = [" ".join(some[start : start + 10]) for start in range(0, max(len(some), 1), 10)]
        assert abs(score - scores_of_transformers(path, windows, "toxic").max()) < 1e-4
    assert max(map(len, words)) > 30, "some have four windows"


def test_it_is_known_by_its_content_wherever_it_lies(model: Path, copy: Path, tiny_encoder: Path) -> None:
    own = find_classifier(model).sha256
    assert find_classifier(copy).sha256 == own
    edit(copy, id2label={"0": "fine", "1": "toxic", "2": "rude"})
    assert find_classifier(copy).sha256 != own
    shutil.copy(model / "config.json", copy)
    assert find_classifier(copy).sha256 == own
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer, indent=3))
    assert find_classifier(copy).sha256 != own
    other = make_classifier(copy.parent / "other", tiny_encoder, ("fine", "rude", "toxic"), seed=1)
    assert find_classifier(other).sha256 != own


def test_labels_that_the_model_has_not_are_refused_with_those_that_it_has(model: Path, copy: Path) -> None:
    with pytest.raises(UsageError, match="no label 'Toxic'") as error:
        find_classifier(model).label("Toxic")
    assert "fine, rude, toxic" in error.value.advice
    edit(copy, id2label={"0": "a", "1": "toxic", "2": "toxic"})
    with pytest.raises(UsageError, match="several labels 'toxic'"):
        find_classifier(copy).label("toxic")
    edit(copy, id2label=None, label2id=None, num_labels=3)
    assert find_classifier(copy).labels == ("LABEL_0", "LABEL_1", "LABEL_2")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"auto_map": {"AutoModel": "modeling.Model"}}, "requires its own code"),
        ({"problem_type": "regression"}, "trained for regression"),
        ({"architectures": ["BertForTokenClassification"]}, "is a BertForTokenClassification"),
        ({"id2label": {"0": "a", "2": "b"}}, "does not number the labels"),
    ],
)
def test_what_its_configuration_says_is_refused(copy: Path, fields: dict[str, Any], reason: str) -> None:
    edit(copy, **fields)
    with pytest.raises(UsageError, match=reason) as error:
        find_classifier(copy)
    assert str(copy) in str(error.value)


def test_pickled_weights_are_not_loaded(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(UsageError, match="pickled weights can run code"):
        find_classifier(copy)
    with pytest.raises(UsageError, match="no such directory"):
        find_classifier(copy / "model")


def test_an_encoder_without_a_head_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_encoder, tmp_path / "headless"))
    edit(path, architectures=["BertForSequenceClassification"])
    with pytest.raises(UsageError, match=r"2 of the weights .* missing, such as classifier\.") as error:
        Classifier(find_classifier(path), "cpu")
    assert "incomplete" in error.value.advice


def test_a_model_that_is_changed_while_it_is_loaded_is_refused(copy: Path) -> None:
    identity = find_classifier(copy)
    edit(copy, id2label={"0": "fine", "1": "toxic", "2": "rude"})
    with pytest.raises(UsageError, match="was changed while it was loaded"):
        Classifier(identity, "cpu")


def test_a_score_that_is_no_number_is_nan_and_that_of_no_other_text(copy: Path, model: Path) -> None:
    classifier = Classifier(find_classifier(copy), "cpu")
    vocabulary = json.loads((copy / "tokenizer.json").read_text())["model"]["vocab"]
    with torch.no_grad():
        classifier._model.bert.embeddings.word_embeddings.weight[vocabulary["harbour"]] = torch.nan
    texts = ["store chunk", "the harbour of a village", "forest river", "store " * 130 + "harbour" + " store" * 200]
    found = classifier.scores(texts, 2)
    assert np.isnan(found).tolist() == [False, True, False, True], "of several windows, too"
    assert np.allclose(found[[0, 2]], scores_of_transformers(model, texts[:3], "toxic")[[0, 2]], atol=1e-4)


def test_out_of_memory_halves_a_batch_and_a_lost_device_ends_the_run(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = Classifier(find_classifier(model), "cpu")
    true = classifier.scores(TEXTS, 2)
    forward = classifier._forward
    sizes: list[int] = []

    def small_memory(model: Any, rows: Any, label: int) -> Any:
        sizes.append(len(rows))
        if len(rows) > 5:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 byte")
        return forward(model, rows, label)

    monkeypatch.setattr(classifier, "_forward", small_memory)
    assert np.allclose(classifier.scores(TEXTS, 2), true, atol=1e-5)
    assert max(sizes) > 5, "it did run out of memory"

    def no_memory(model: Any, rows: Any, label: int) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(classifier, "_forward", no_memory)
    with pytest.raises(RetrotoolError, match="too little memory for a row of"):
        classifier.scores(TEXTS, 2)

    def lost(model: Any, rows: Any, label: int) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(classifier, "_forward", lost)
    with pytest.raises(AbortError, match="is lost"):
        classifier.scores(TEXTS, 2)


def test_threads_compute_what_one_does(model: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        classifier = Classifier(find_classifier(model), "cpu")
        true = classifier.scores(TEXTS, 2)
        with ThreadPoolExecutor(4) as pool:
            for found in pool.map(lambda _: classifier.scores(TEXTS, 2), range(8)):
                assert np.array_equal(found, true)
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 3, "nor has any other that begins later fewer"
    finally:
        torch.set_num_threads(before)


def watched(classifier: Classifier, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count the rows that each of its models gets."""
    rows, forward = {"half": 0, "float32": 0}, classifier._forward

    def counting(model: Any, some: Any, label: int) -> Any:
        rows["float32" if model is classifier._model else "half"] += len(some)
        return forward(model, some, label)

    monkeypatch.setattr(classifier, "_forward", counting)
    return rows


@pytest.mark.parametrize("labels", [("fine", "rude", "toxic"), ("toxic",)])
def test_a_gpu_screens_in_half_precision_and_selects_what_float32_does(
    tmp_path: Path, tiny_encoder: Path, labels: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SAMPLE", 32)
    monkeypatch.setattr(module, "_BAND", 1.5)  # half precision changes such large random weights by 0.1
    identity = find_classifier(make_classifier(tmp_path / "model", tiny_encoder, labels, max_position_embeddings=40))
    texts = [make_text(i, 1 + i % 60) for i in range(400)]
    true = Classifier(identity, "cpu").scores(texts, identity.label("toxic"))
    middle = np.sort(true)[[200, 300, 390]].astype(np.float64)
    with mock_cuda():
        classifier = Classifier(identity, "cuda")
        assert next(classifier._half.parameters()).dtype == torch.float16
        rows = watched(classifier, monkeypatch)
        # Limits next to a score, which half precision changes a thousand times as much; and one only rounding reaches.
        for above in (*(middle + 1e-5), *(middle - 1e-5), 0.5, 0.9, 1.0):
            found = classifier.scores(texts, identity.label("toxic"), above)
            assert np.array_equal(found >= np.float32(above), true >= np.float32(above))
            assert np.allclose(found[true >= above], true[true >= above], atol=1e-5), "what is selected is float32's"
            assert np.allclose(found, true, atol=0.05)
        assert 0 < rows["float32"] < rows["half"] * 0.7
        rows["half"] = 0
        assert np.allclose(classifier.scores(texts, identity.label("toxic")), true, atol=1e-5)
        assert rows["half"] == 0, "without a limit all are exact"


@pytest.mark.parametrize("late", [False, True])
def test_half_precision_that_is_not_close_is_given_up(
    model: Path, late: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_SAMPLE", 32)
    monkeypatch.setattr(module, "_BAND", 1.5)  # half precision changes such large random weights by 0.1
    true = Classifier(find_classifier(model), "cpu").scores(TEXTS, 2)
    with mock_cuda():
        classifier = Classifier(find_classifier(model), "cuda")
        if late:
            assert np.array_equal(classifier.scores(TEXTS, 2, 0.9) >= 0.9, true >= 0.9)
            assert capsys.readouterr().err == ""
        with torch.no_grad():
            classifier._half.classifier.bias[2] += 2
        rows = watched(classifier, monkeypatch)
        assert np.allclose(classifier.scores(TEXTS, 2, 0.9), true, atol=1e-5)
        assert rows["half"] == len(TEXTS)
        assert np.allclose(classifier.scores(TEXTS, 2, 0.9), true, atol=1e-5)
        assert rows["half"] == len(TEXTS), "it is not tried again"
    said = capsys.readouterr().err
    assert said.count("half precision changes log-odds by 2.") == 1


@pytest.mark.parametrize("every", [False, True])
def test_a_text_that_is_too_much_for_half_precision_is_scored_in_float32(
    model: Path, every: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_BAND", 1.5)
    texts = ["the harbour of a village", *(make_text(i, 9) for i in range(600))]
    true = Classifier(find_classifier(model), "cpu").scores(texts, 2)
    with mock_cuda():
        classifier = Classifier(find_classifier(model), "cuda")
        vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
        with torch.no_grad():
            classifier._half.bert.embeddings.word_embeddings.weight[slice(None) if every else vocabulary["village"]] = (
                torch.inf
            )
        found = classifier.scores(texts, 2, 0.99)
    assert np.array_equal(found >= np.float32(0.99), true >= np.float32(0.99))
    assert np.isfinite(found).all() and abs(found[0] - true[0]) < 1e-5
    assert (classifier._compared == 0) == every and capsys.readouterr().err == ""


def test_a_gpu_without_memory_for_half_precision_does_without(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from retrotool.encoder import forwards

    load = forwards.load_pretrained

    def small_memory(*arguments: Any) -> Any:
        try:
            if "float16" in arguments:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return load(*arguments)
        except torch.OutOfMemoryError as error:
            raise UsageError("can't be loaded") from error

    monkeypatch.setattr(forwards, "load_pretrained", small_memory)
    with mock_cuda():
        found = Classifier(find_classifier(model), "cuda").scores(TEXTS, 2, 0.9)
    assert np.allclose(found, Classifier(find_classifier(model), "cpu").scores(TEXTS, 2), atol=1e-5)
    assert "no memory for half precision" in capsys.readouterr().err


def test_a_classifier_selects_what_a_cpu_does_on_a_gpu(model: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: make gpu-test")
    true = Classifier(find_classifier(model), "cpu").scores(TEXTS, 2)
    classifier = Classifier(find_classifier(model), "cuda")
    for above in (0.1, 0.5, 0.9):
        assert np.array_equal(classifier.scores(TEXTS, 2, above) >= above, true >= above)
