"""The packed forward against transformers, family by family, and that nothing else is taken for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import FAMILIES, make_family, rows_of_all_lengths, with_pooling

from retrotool.encoder import Encoder, cosines
from retrotool.encoder.packed import NotPackedError, architecture_of
from retrotool.errors import UsageError


def embed(path: Path, forward: str, **options: Any) -> np.ndarray:
    encoder = Encoder(str(path), "cpu", forward=forward, **options)
    assert encoder.forward == forward
    try:
        return encoder.embed(rows_of_all_lengths())
    finally:
        encoder.close()


def assert_same(found: np.ndarray, true: np.ndarray) -> None:
    assert found.shape == true.shape
    assert cosines(found, true).min() > 0.99999
    assert np.allclose(found.astype(np.float32), true.astype(np.float32), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_gives_the_vectors_of_transformers(
    kind: str, pooling: str, tiny_encoder: Path, tmp_path: Path
) -> None:
    path = with_pooling(make_family(kind, tmp_path / kind, tiny_encoder), pooling)
    true = embed(path, "transformers")
    assert len(np.unique(true[:, 0])) > 50, "rows must differ for the comparison to mean anything"
    assert_same(embed(path, "packed"), true)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"])
def test_every_activation(activation: str, tiny_encoder: Path, tmp_path: Path) -> None:
    path = make_family("bert", tmp_path / "model", tiny_encoder, hidden_act=activation)
    assert_same(embed(path, "packed"), embed(path, "transformers"))


def test_roberta_whose_padding_token_is_not_the_usual_one(tiny_encoder: Path, tmp_path: Path) -> None:
    path = make_family("roberta", tmp_path / "model", tiny_encoder, pad_token_id=4)
    assert_same(embed(path, "packed"), embed(path, "transformers"))


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "mpnet"])
def test_a_model_saved_with_a_head_is_the_model(kind: str, tiny_encoder: Path, tmp_path: Path) -> None:
    import transformers
    from safetensors.torch import load_file

    plain = make_family(kind, tmp_path / "plain", tiny_encoder)
    names = {"bert": "Bert", "distilbert": "DistilBert", "roberta": "Roberta", "mpnet": "MPNet"}
    model = getattr(transformers, f"{names[kind]}ForMaskedLM").from_pretrained(plain)
    headed = tmp_path / "headed"
    model.save_pretrained(headed)
    shutil.copy(tiny_encoder / "tokenizer.json", headed)
    assert any(key.startswith(f"{kind}.") for key in load_file(headed / "model.safetensors"))
    assert_same(embed(headed, "packed"), embed(plain, "transformers"))


def test_weights_in_old_spelling_and_in_several_files(tiny_encoder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = make_family("bert", tmp_path / "model", tiny_encoder)
    true = embed(path, "transformers")
    weights = load_file(path / "model.safetensors")
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in weights.items()
    }
    keys = sorted(old)
    assert any("gamma" in key for key in keys)
    (path / "model.safetensors").unlink()
    save_file({key: old[key] for key in keys[::2]}, path / "model-00001-of-00002.safetensors")
    save_file({key: old[key] for key in keys[1::2]}, path / "model-00002-of-00002.safetensors")
    assert_same(embed(path, "packed"), true)


@pytest.mark.parametrize(("kind", "places"), [("bert", 512), ("mpnet", 514), ("roberta", 514)])
def test_rows_of_512_tokens(kind: str, places: int, tiny_encoder: Path, tmp_path: Path) -> None:
    path = make_family(kind, tmp_path / "model", tiny_encoder, max_position_embeddings=places)
    rng = np.random.default_rng(0)
    rows = [rng.integers(5, 300, n).tolist() for n in (510, 509, 511, 512, 700, 1, 64)]
    packed, true = (Encoder(str(path), "cpu", forward=forward) for forward in ("packed", "transformers"))
    assert packed.identity.max_tokens == 512
    assert_same(packed.embed(rows), true.embed(rows))


def test_a_model_in_several_files_is_read_by_its_index_and_variants_are_left_alone(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    from transformers import AutoModel

    plain = make_family("bert", tmp_path / "plain", tiny_encoder)
    other = make_family("bert", tmp_path / "other", tiny_encoder, layer_norm_eps=0.1)
    model = AutoModel.from_pretrained(other)
    model.encoder.layer[0].output.dense.weight.data.mul_(2)
    model.save_pretrained(tmp_path / "variant")
    path = tmp_path / "sharded"
    AutoModel.from_pretrained(plain).save_pretrained(path, max_shard_size="50KB")
    assert len(list(path.glob("model-*.safetensors"))) > 2
    for folder in (plain, path):
        shutil.copy(tmp_path / "variant" / "model.safetensors", folder / "model-0.fp16.safetensors")
    shutil.copy(tiny_encoder / "tokenizer.json", path)
    true = embed(plain, "transformers")
    assert_same(embed(plain, "packed"), true)
    assert_same(embed(path, "packed"), true)


def test_bfloat16_is_near_and_the_batch_a_row_is_in_does_not_matter(tiny_encoder: Path, tmp_path: Path) -> None:
    path = make_family("bert", tmp_path / "model", tiny_encoder)
    true = embed(path, "transformers")
    assert cosines(embed(path, "packed", dtype="bfloat16"), true).min() > 0.995
    for batch_tokens in (1, 100, 100_000):
        assert_same(embed(path, "packed", batch_tokens=batch_tokens), true)


def test_another_model_goes_through_transformers_and_says_so(tiny_encoder: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModel

    path = make_family("electra", tmp_path / "model", tiny_encoder)
    encoder = Encoder(str(path), "cpu")
    assert (encoder.forward, encoder.why) == ("transformers", "models of type electra are not of the BERT family")
    rows = [row[:90] for row in rows_of_all_lengths() if row]
    before, after = encoder.tokenizer.special_tokens()
    model = AutoModel.from_pretrained(path).eval()
    with torch.no_grad():
        true = [model(torch.tensor([[*before, *row, *after]])).last_hidden_state[0].mean(0).numpy() for row in rows]
    assert_same(encoder.embed(rows), np.array(true).astype(np.float16))
    with pytest.raises(UsageError, match="no packed forward: models of type electra"):
        Encoder(str(path), "cpu", forward="packed")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"position_embedding_type": "relative_key"}, "positions are relative_key"),
        ({"is_decoder": True}, "decoder"),
        ({"hidden_act": "silu"}, "silu"),
        ({"num_attention_heads": 5}, "5 heads"),
        ({"num_attention_heads": 0}, "0 heads"),
        ({"hidden_size": None}, "no hidden_size"),
        ({"model_type": "deberta"}, "deberta"),
        ({"model_type": None}, "None"),
    ],
)
def test_what_is_computed_otherwise_is_reported_by_the_configuration(
    changes: dict[str, Any], reason: str, tiny_encoder: Path
) -> None:
    config = json.loads((tiny_encoder / "config.json").read_text())
    assert architecture_of(config).heads == 4
    with pytest.raises(NotPackedError, match=reason):
        architecture_of({**config, **changes})


@pytest.mark.parametrize("kind", ["bert", "electra"])
def test_a_model_that_lacks_a_weight_is_refused(kind: str, tiny_encoder: Path, tmp_path: Path) -> None:
    """transformers would make it up at random, another one each time."""
    from safetensors.torch import load_file, save_file

    path = make_family(kind, tmp_path / "model", tiny_encoder)
    weights = load_file(path / "model.safetensors")
    weights["encoder.layer.1.attention.self.extra.weight"] = weights.pop("encoder.layer.1.attention.self.key.weight")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UsageError, match=r"1 of the weights .* missing, such as .*layer\.1\.attention\.self\.key\.weight"
    ):
        Encoder(str(path), "cpu")


def test_a_packed_forward_that_differs_is_not_used(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retrotool.encoder import packed

    path = make_family("bert", tmp_path / "model", tiny_encoder)
    true = embed(path, "transformers")
    pooled = packed.mean_of_rows
    monkeypatch.setattr(packed, "mean_of_rows", lambda x, spans: pooled(x, spans).roll(1, 1))
    said: list[str] = []
    encoder = Encoder(str(path), "cpu", say=said.append)
    assert encoder.forward == "packed"
    encoder.verify()
    assert encoder.forward == "transformers"
    assert encoder.cosine is not None
    assert encoder.cosine > 0.99999
    assert "transformers is used instead" in said[0]
    assert "packed forward gave a cosine of" in encoder.why
    assert_same(encoder.embed(rows_of_all_lengths()), true)


def test_a_right_one_is_verified_and_its_work_counted_from_there(tiny_encoder: Path, tmp_path: Path) -> None:
    encoder = Encoder(str(make_family("mpnet", tmp_path / "model", tiny_encoder)), "cpu")
    encoder.verify()
    assert encoder.forward == "packed"
    assert encoder.cosine is not None
    assert encoder.cosine > 0.99999
    assert encoder.tokens == 0
    encoder.embed([[10, 11, 12], [10]])
    assert encoder.tokens == 8, "two special tokens a row"
    assert encoder.seconds > 0


@pytest.mark.parametrize("asked", ["bfloat16", "auto"])
def test_a_type_that_ruins_an_encoder_is_said_and_not_used_unless_it_was_asked_for(
    asked: str, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retrotool.encoder import encoder as module

    path = make_family("bert", tmp_path / "model", tiny_encoder)
    true = embed(path, "transformers")
    monkeypatch.setitem(module.LEAST_COSINE, "bfloat16", 1.01)
    pick = module.devices.pick_dtype
    monkeypatch.setattr(
        module.devices, "pick_dtype", lambda device, dtype: "bfloat16" if dtype == "auto" else pick(device, dtype)
    )
    said: list[str] = []
    encoder = Encoder(str(path), "cpu", asked, say=said.append)
    assert encoder.dtype == "bfloat16"
    encoder.verify()
    assert encoder.forward == "packed", "the forward is right, the type is not"
    assert len(said) == 1
    assert encoder.cosine is not None
    if asked == "auto":
        assert "float32 is used instead" in said[0]
        assert encoder.dtype == "float32"
        assert encoder.cosine > 0.99999
        assert "bfloat16 gave a cosine of" in encoder.why
        assert_same(encoder.embed(rows_of_all_lengths()), true)
    else:
        assert "use --dtype float32 for exact vectors" in said[0]
        assert encoder.dtype == "bfloat16"
        assert encoder.why == ""


@pytest.mark.parametrize("forward", ["packed", "transformers"])
def test_weights_that_change_under_a_run_are_noticed_or_do_not_matter(
    forward: str, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retrotool.encoder import forwards

    path = make_family("bert", tmp_path / "model", tiny_encoder)
    other = make_family("bert", tmp_path / "other", tiny_encoder, hidden_act="relu")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-4000:] = bytes(4000)
    encoder = Encoder(str(path), "cpu", forward=forward)
    true = encoder.embed(rows_of_all_lengths())
    (path / "model.safetensors").write_bytes(weights)
    assert np.array_equal(encoder.embed(rows_of_all_lengths()), true), "what is loaded stays"
    if forward == "packed":
        with pytest.raises(UsageError, match="was changed since it was loaded"):
            encoder.verify()
    kind = "PackedForward" if forward == "packed" else "PaddedForward"
    load = getattr(forwards, kind)

    def changed(*arguments: Any) -> Any:
        (path / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
        return load(*arguments)

    monkeypatch.setattr(forwards, kind, changed)
    with pytest.raises(UsageError, match="was changed while it was loaded"):
        Encoder(str(path), "cpu", forward=forward)
