"""GELU in a product's epilogue, on a GPU that is mocked: which form is computed, recorded, and when it is given up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from families import make_family, rows_of_all_lengths
from mock_cuda import mock_cuda

from retrotool import api
from retrotool.embed.command import embed_text
from retrotool.encoder import Encoder, Rows, cosines, devices, forwards
from retrotool.errors import NotFiniteError
from retrotool.store import log
from retrotool.store.storage import storage_at

KINDS = ("bert", "roberta", "distilbert", "mpnet")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """A GPU, without the compiler."""
    monkeypatch.setattr(forwards, "compile_layer", lambda: forwards.Layer.forward)
    monkeypatch.setitem(devices.BATCH_TOKENS, "cuda", 1024)
    with mock_cuda() as counted:
        yield counted


def family(kind: str, path: Path, tokenizer: Path, activation: str) -> Path:
    heads = {"n_heads" if kind == "distilbert" else "num_attention_heads": 6}  # 8 a head: FlashAttention has it
    return make_family(
        kind, path, tokenizer, **{"activation" if kind == "distilbert" else "hidden_act": activation}, **heads
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_gives_the_vectors_of_transformers_with_it(
    kind: str, tiny_encoder: Path, tmp_path: Path, waits: Counter[str]
) -> None:
    rows = rows_of_all_lengths(n=50)
    path = family(kind, tmp_path / "exact", tiny_encoder, "gelu")
    true = Encoder(str(path), "cpu", forward="transformers").embed(rows)
    encoder = Encoder(str(path), "cuda")
    assert (encoder.forward, encoder.dtype, encoder.gelu) == ("packed", "float16", "tanh")
    assert encoder._loaded.constant == (kind != "mpnet")
    assert cosines(found := encoder.embed(rows), true).min() > 0.9995
    encoder._loaded.use_exact_gelu()
    assert encoder.gelu == "" and not np.array_equal(encoder.embed(rows), found)

    path = family(kind, tmp_path / "tanh", tiny_encoder, "gelu_new")
    true = Encoder(str(path), "cpu", forward="transformers").embed(rows)
    plain = Encoder(str(path), "cuda", "float32")
    assert plain._loaded._model.fuse_gelu(True) == "", "nothing is replaced: it is the model's own"
    assert cosines(plain.embed(rows), true).min() > 0.99999


def test_it_is_used_where_it_is_the_activation_and_in_half_precision_on_a_gpu(
    tiny_encoder: Path, tmp_path: Path, waits: Counter[str]
) -> None:
    def fused(activation: str, device: str, dtype: str) -> tuple[str, set[bool]]:
        path = tmp_path / activation
        encoder = Encoder(str(path if path.exists() else family("bert", path, tiny_encoder, activation)), device, dtype)
        return encoder.gelu, {layer.up.fused for layer in encoder._loaded._model.layers if hasattr(layer.up, "fused")}

    assert fused("gelu", "cuda", "float16") == fused("gelu", "cuda", "bfloat16") == ("tanh", {True})
    assert fused("gelu_new", "cuda", "float16") == ("", {True})
    assert fused("relu", "cuda", "float16") == fused("gelu", "cuda", "float32") == ("", {False})
    assert fused("gelu", "cpu", "float32")[0] == fused("gelu", "cpu", "bfloat16")[0] == ""


def test_the_epilogue_has_the_tanh_form_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: make gpu-test")
    bias, x, weight = (torch.randn(*shape, device="cuda") for shape in ((256,), (512, 64), (256, 64)))
    found, plain = torch._addmm_activation(bias, x, weight.T, use_gelu=True), torch.addmm(bias, x, weight.T)
    tanh, exact = (torch.nn.functional.gelu(plain, approximate=form) for form in ("tanh", "none"))
    assert (found - tanh).abs().mean() < (found - exact).abs().mean() / 2


def test_it_is_given_up_if_vectors_differ(
    tiny_encoder: Path, tmp_path: Path, waits: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = family("bert", tmp_path / "bert", tiny_encoder, "gelu")
    rows = rows_of_all_lengths(n=50)
    true = Encoder(str(path), "cpu", forward="transformers").embed(rows)
    monkeypatch.setattr(
        torch, "_addmm_activation", lambda bias, x, weight, use_gelu: torch.addmm(bias, x, weight).relu()
    )
    said: list[str] = []
    encoder = Encoder(str(path), "cuda", say=said.append)
    encoder.verify()
    assert (encoder.forward, encoder.dtype, encoder.gelu, encoder.why) == ("packed", "float16", "", "")
    assert len(said) == 1 and "exact GELU is used instead" in said[0]
    assert encoder.cosine is not None and encoder.cosine > 0.9995
    assert cosines(encoder.embed(rows), true).min() > 0.9995


def test_a_commit_records_it(store_copy: Path, tiny_encoder: Path, waits: Counter[str]) -> None:
    for name, device, gelu in (("there", "cuda:0", "tanh"), ("here", "cpu", "")):
        result = api.embed(store_copy, encoder=str(tiny_encoder), name=name, pooling="cls", devices=device)
        assert result.gelu == gelu
        assert ("float16, tanh GELU, on mock" in embed_text("store", result)) == bool(gelu)
        settings = log.read(storage_at(store_copy), result.commit).settings
        assert settings.get("gelu", "") == gelu and settings["encoder"] == name


def test_batches_are_computed_without_waiting_and_a_number_that_is_none_is_named_by_its_row(
    tiny_encoder: Path, tmp_path: Path, waits: Counter[str]
) -> None:
    encoder = Encoder(str(family("bert", tmp_path / "bert", tiny_encoder, "gelu")), "cuda")
    rows = [[10 + i % 200] * (1 + i % 9) for i in range(200)]
    encoder.embed(rows)
    waits.clear()
    encoder.embed(rows)
    assert set(+waits) == {"synchronize an event"}, "each batch is waited for once, after the next ones have begun"
    rows[137] = [299, 299]
    encoder._loaded._model.word[299] = torch.inf
    with pytest.raises(NotFiniteError, match="row 137 ") as error:
        list(encoder.vectors([Rows.of(rows[:100]), Rows.of(rows[100:])]))
    assert error.value.row == 137
