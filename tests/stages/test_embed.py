"""Embeddings against transformers and sentence-transformers, and encoders that must be refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import make_rows, make_text, write_jsonl

from retrotool import api
from retrotool.encoder import Encoder, find_encoder
from retrotool.errors import RetrotoolError, UsageError


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def test_minilm_vectors_are_those_of_sentence_transformers() -> None:
    from sentence_transformers import SentenceTransformer

    from retrotool.tokenizers import bundled_model

    # In the last three the tokenizer sees nothing: they are [CLS] and [SEP] alone, for both.
    texts = [*(make_text(i, 1 + i) for i in range(40)), "", " \n\t ", "\u200b\x00"]
    encoder = Encoder("minilm", device="cpu")
    ours = encoder.embed(encoder.tokenizer.encode_batch(texts))
    theirs = SentenceTransformer(str(bundled_model()), device="cpu").encode(texts)
    assert ours.dtype == np.float16
    assert cosine(ours, theirs).min() >= 0.9995
    assert np.allclose(np.linalg.norm(ours.astype(np.float32), axis=1), 1, atol=1e-3)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_pooling_is_what_the_model_says_and_else_the_mean_over_time(
    tiny_encoder: Path, tmp_path: Path, pooling: str
) -> None:
    import torch
    from transformers import AutoModel

    path = Path(shutil.copytree(tiny_encoder, tmp_path / "model"))
    if pooling == "cls":
        (path / "1_Pooling").mkdir()
        (path / "1_Pooling" / "config.json").write_text(
            json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
        )
    encoder = Encoder(str(path), device="cpu")
    rows = encoder.tokenizer.encode_batch([make_text(i, 3 * i + 1) for i in range(20)])
    model = AutoModel.from_pretrained(path).eval()
    with torch.no_grad():
        hidden = [model(torch.tensor([[2, *row[:126], 3]])).last_hidden_state[0] for row in rows]
    expected = torch.stack([h[0] if pooling == "cls" else h.mean(0) for h in hidden]).numpy()
    assert encoder.identity.pooling == pooling
    assert np.allclose(encoder.embed(rows).astype(np.float32), expected, atol=2e-3)


def test_the_order_and_the_lengths_of_other_rows_do_not_matter(tiny_encoder: Path) -> None:
    encoder = Encoder(str(tiny_encoder), device="cpu")
    rows = encoder.tokenizer.encode_batch([make_text(i, 1 + (7 * i) % 60) for i in range(50)])
    together = encoder.embed(rows)
    alone = np.concatenate([encoder.embed([row]) for row in rows])
    assert np.allclose(together.astype(np.float32), alone.astype(np.float32), atol=2e-3)


def test_a_row_that_is_too_long_is_cut_and_one_without_tokens_reported_too(tiny_encoder: Path) -> None:
    encoder = Encoder(str(tiny_encoder), device="cpu")
    row = list(range(10, 200))
    reported: list[int] = []
    empty, long, cut = encoder.embed([[], row, row[:126]], reported.append)
    assert np.isfinite(empty).all() and empty.any()
    assert np.array_equal(long, cut)
    assert sum(reported) == 3


def test_a_chunk_in_which_the_encoder_sees_nothing_has_a_vector(
    tmp_path: Path, tiny_encoder: Path, byte_level_tokenizer: Path
) -> None:
    store = tmp_path / "store"
    rows = [{"id": "layout", "text": "a table" + "\n\t " * 100}, *make_rows(3)]
    api.chunk(store, [str(write_jsonl(tmp_path / "c.jsonl", rows))], tokenizer=str(byte_level_tokenizer))
    api.embed(store, encoder=str(tiny_encoder))
    import retrotool

    reader = retrotool.open(store)
    blank = [i for i in reader.document("layout") if not reader.chunk(i).text.strip()]
    assert len(blank) >= 2
    assert reader.embeddings(0).any(axis=1).all()
    alone = Encoder(str(tiny_encoder), device="cpu").embed([[]])[0]
    assert np.allclose(reader.embeddings(0)[blank].astype(np.float32), alone.astype(np.float32), atol=2e-3)


def test_a_store_of_another_tokenizer_is_embedded_through_its_text(
    tmp_path: Path, tiny_encoder: Path, byte_level_tokenizer: Path
) -> None:
    store = tmp_path / "store"
    rows = make_rows(6)
    api.chunk(store, [str(write_jsonl(tmp_path / "c.jsonl", rows))], tokenizer=str(byte_level_tokenizer))
    api.embed(store, encoder=str(tiny_encoder))
    import retrotool

    reader, encoder = retrotool.open(store), Encoder(str(tiny_encoder), device="cpu")
    chunks = [reader.chunk(int(i)) for i in reader.chunk_ids(0)]
    expected = encoder.embed(encoder.tokenizer.encode_batch([chunk.text for chunk in chunks]))
    assert np.allclose(reader.embeddings(0).astype(np.float32), expected.astype(np.float32), atol=2e-3)
    assert "".join(reader.chunk(i).text for i in reader.document("doc-3")) == rows[3]["text"]


def test_nan_is_an_error_that_says_what_to_do(tiny_encoder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = Path(shutil.copytree(tiny_encoder, tmp_path / "model"))
    weights = load_file(path / "model.safetensors")
    weights["encoder.layer.0.output.dense.bias"][0] = float("nan")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RetrotoolError, match="NaN") as error:
        Encoder(str(path), device="cpu").embed([[10, 11]])
    assert "float32" in error.value.advice


def without(path: Path, name: str) -> None:
    (path / name).unlink()


def pickled(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def remote(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))


def configure(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def maxpool(path: Path) -> None:
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: without(path, "tokenizer.json"), "no tokenizer.json"),
        (lambda path: without(path, "config.json"), "no config.json"),
        (pickled, "pickled"),
        (remote, "requires its own code"),
        (maxpool, "pooling max_tokens is not supported"),
        (lambda path: (path / "config.json").write_text("{"), "not JSON"),
        (lambda path: (path / "config.json").write_text("[]"), "a list, not a JSON object"),
        (lambda path: (path / "modules.json").write_text("{"), "not JSON"),
        (lambda path: (path / "modules.json").write_text('["Pooling"]'), "not a list of JSON objects"),
        (lambda path: (path / "modules.json").write_text('{"type": "Pooling"}'), "not a list of JSON objects"),
        (lambda path: configure(path, max_position_embeddings="many"), "max_position_embeddings is 'many'"),
        (lambda path: configure(path, hidden_size=None), "no hidden_size"),
    ],
)
def test_a_model_that_cannot_be_used_safely_is_refused(
    tiny_encoder: Path, tmp_path: Path, spoil: object, message: str
) -> None:
    path = Path(shutil.copytree(tiny_encoder, tmp_path / "model"))
    spoil(path)  # type: ignore[operator]
    with pytest.raises(UsageError, match=message):
        find_encoder(str(path))


def test_a_length_that_is_null_is_that_of_bert(tiny_encoder: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_encoder, tmp_path / "model"))
    configure(path, max_position_embeddings=None)
    assert find_encoder(str(path))[1].max_tokens == 512


def test_weights_that_break_off_are_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_encoder, tmp_path / "model"))
    weights = path / "model.safetensors"
    for size in (0, 1000, weights.stat().st_size - 1):
        weights.write_bytes((tiny_encoder / "model.safetensors").read_bytes()[:size])
        with pytest.raises(UsageError, match="can't be loaded"):
            Encoder(str(path), device="cpu")


@pytest.mark.parametrize("device", ["xpu", "mps", "vulkan", "meta", "cpu:3", "cuda:", "cuda:x", "toaster", ""])
def test_what_no_encoder_can_be_put_on_is_refused_also_where_nothing_is_left_to_embed(
    built_store: Path, tiny_encoder: Path, device: str
) -> None:
    with pytest.raises(UsageError, match="is unknown"):
        api.embed(built_store, encoder=str(tiny_encoder), devices=device)
    with pytest.raises(UsageError, match="is unknown"):
        Encoder(str(tiny_encoder), device=device)
    with pytest.raises(UsageError, match="float99"):
        api.embed(built_store, encoder=str(tiny_encoder), dtype="float99")


def test_a_device_that_is_not_there_is_named(tiny_encoder: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    for device in ("cuda", "cuda:1"):
        with pytest.raises(UsageError, match="no GPU"):
            Encoder(str(tiny_encoder), device=device)


def test_on_a_gpu_the_vectors_are_those_of_the_cpu(tiny_encoder: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: make gpu-test")
    cpu, gpu = Encoder(str(tiny_encoder), device="cpu"), Encoder(str(tiny_encoder), device="cuda")
    rows = cpu.tokenizer.encode_batch([make_text(i, 1 + i % 60) for i in range(500)])
    assert gpu.dtype == "float16"
    assert cosine(cpu.embed(rows), gpu.embed(rows)).min() >= 0.9995


def test_a_moved_encoder_is_the_same_and_another_of_its_name_is_not(tmp_path: Path, tiny_encoder: Path) -> None:
    store = tmp_path / "store"
    api.chunk(store, [str(write_jsonl(tmp_path / "a.jsonl", make_rows(3)))], tokenizer=str(tiny_encoder))
    api.embed(store, encoder=str(tiny_encoder))
    api.chunk(store, [str(write_jsonl(tmp_path / "b.jsonl", make_rows(3, first=50)))])
    moved = Path(shutil.copytree(tiny_encoder, tmp_path / "elsewhere" / "tiny"))
    assert api.embed(store, encoder=str(moved)).embedded == api.info(store).chunks
    assert api.verify(store).ok
