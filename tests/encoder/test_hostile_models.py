"""Models that can't be what they say are refused by their sizes, before memory or time is spent on them."""

from __future__ import annotations

import json
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli

from retrotool.encoder import Encoder, find_encoder
from retrotool.encoder.classifier import find_classifier
from retrotool.errors import UsageError


def config(**fields: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**content, **fields}))

    return change


def sparse(name: str, size: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with (path / name).open("wb") as file:
            file.truncate(size)

    return make


def weights(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: (path / "model.safetensors").write_bytes(change((path / "model.safetensors").read_bytes()))


def index(**weight_map: Any) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        (path / "model.safetensors").rename(path / "other.safetensors")
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return make


HOSTILE = {
    "layers": (config(num_hidden_layers=10**7), r"num_hidden_layers 10,000,000, but its weights have 39 tensors"),
    "width": (config(hidden_size=10**9), "hidden_size 1,000,000,000, but its weights have 262 numbers in a row"),
    "middle": (config(intermediate_size=10**12), "intermediate_size 1,000,000,000,000, but"),
    "vocabulary": (config(vocab_size=300), "vocab_size 300, but its weights have 262"),
    "heads": (config(num_attention_heads=10**6), "num_attention_heads 1,000,000, but"),
    "no number": (config(num_hidden_layers=1e300), r"num_hidden_layers is 1e\+300, not a number"),
    "negative": (config(num_hidden_layers=-1), "num_hidden_layers is -1, not a number"),
    "truncated": (weights(lambda data: data[:-100]), "model.safetensors is not a whole safetensors file"),
    "long header": (weights(lambda data: struct.pack("<Q", 1 << 62) + data[8:]), "not a whole safetensors file"),
    "no header": (weights(lambda _: b""), "not a whole safetensors file"),
    "weights": (sparse("model.safetensors", 1 << 42), "its weights take 4,398,046,511,104 bytes, and this machine has"),
    "configuration": (sparse("config.json", 2 << 30), "config.json: 2,147,483,648 bytes, which is no configuration"),
    "tokenizer": (sparse("tokenizer.json", 500 << 20), "tokenizer.json has 524,288,000 bytes, which is no tokenizer"),
    "outside": (index(x="../../../etc/passwd"), "index.json: ../../../etc/passwd is not a file beside it"),
    "missing": (index(x="model-1.safetensors"), "index.json: model-1.safetensors is not a file beside it"),
    "own code": (config(auto_map={"AutoModel": "x.Y"}), "requires its own code, which is never run: .*auto_map"),
    "kernel": (config(_attn_implementation="org/kernel"), "own code, .*_attn_implementation"),
    "file": (config(transformers_weights="adapter_model.bin"), "own code, .*transformers_weights"),
    "adapter": (lambda path: (path / "adapter_config.json").write_text("{}"), "is an adapter of another model"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_it_is_refused_without_being_read(kind: str, tiny_encoder: Path, tmp_path: Path) -> None:
    spoil, message = HOSTILE[kind]
    path = Path(shutil.copytree(tiny_encoder, tmp_path / "model"))
    spoil(path)
    tracemalloc.start()
    try:
        for find in (lambda: find_encoder(str(path)), lambda: find_classifier(path)):
            with pytest.raises(UsageError, match=message):
                find()
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_an_ordinary_implementation_is_not_code(tiny_encoder: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_encoder, tmp_path / "model"))
    config(_attn_implementation="sdpa")(path)
    assert find_encoder(str(path))[1].dimension == 32


@pytest.mark.parametrize("fields", [{"max_position_embeddings": 10**12}, {"vocab_size": 100}])
def test_weights_of_other_shapes_are_refused_when_they_are_loaded(
    fields: dict[str, int], tiny_encoder: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(tiny_encoder, tmp_path / "model"))
    config(**fields, model_type="electra", embedding_size=32)(path)
    with pytest.raises(UsageError, match=r"its weights have other shapes than .*config.json says"):
        Encoder(str(path), "cpu", forward="transformers")


def test_the_command_exits_with_2(built_store: Path, tiny_encoder: Path, tmp_path: Path, cli: Cli) -> None:
    path = Path(shutil.copytree(tiny_encoder, tmp_path / "model"))
    HOSTILE["layers"][0](path)
    refused = cli("embed", built_store, "--encoder", path)
    assert refused.returncode == 2
    assert f"error: encoder '{path}': {path}/config.json has num_hidden_layers" in refused.stderr
