"""Encoders of several architectures against sentence-transformers: pooling, prompts, projections, dimension."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Cli, Shared, make_rows, make_text, write_jsonl

import retrotool
from retrotool import api
from retrotool.encoder import Encoder, find_encoder
from retrotool.errors import UsageError

PROMPTS = {"query": "task: search | query: ", "document": "title: none | text: "}
TEXTS = ["a", "the river", *(make_text(i, 1 + 7 * i) for i in range(6)), make_text(9, 90)]
SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 262,
    "max_position_embeddings": 200, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "initializer_range": 0.3,
}  # fmt: skip
DECODER = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", DECODER),
    "gemma3": ("Gemma3Text", {**DECODER, "sliding_window": 8, "use_bidirectional_attention": True}),
    "modernbert": ("ModernBert", {**SMALL, "local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 2}),
}
WIDTHS = {"qwen3": 32, "gemma3": 24, "modernbert": 32}
KEPT = 10


@pytest.fixture(scope="session")
def models(shared: Shared[Path], tiny_encoder: Path) -> Path:
    """A folder with a small model of each kind as its maker publishes it, and its vectors by sentence-transformers."""
    return shared("sentence", lambda folder: make_models(folder, tiny_encoder))


def make_models(folder: Path, tokenizer: Path) -> Path:
    import torch
    import transformers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    transformers.logging.set_verbosity_error()
    torch.manual_seed(3)
    for kind, (name, shape) in KINDS.items():
        plain = folder / f"{kind}-plain"
        config = getattr(transformers, f"{name}Config")(**shape)
        getattr(transformers, f"{name}Model")(config).eval().save_pretrained(plain)
        transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(tokenizer / "tokenizer.json"), pad_token="[PAD]", unk_token="[UNK]"
        ).save_pretrained(plain)
        wide = Dense(32, 64, bias=False, activation_function=torch.nn.Identity())
        modules = {
            "qwen3": [Pooling(32, "lasttoken"), Normalize()],
            "gemma3": [Pooling(32, "mean"), wide, Dense(64, 24), Normalize()],
            "modernbert": [Pooling(32, "cls")],
        }[kind]
        model = SentenceTransformer(modules=[Transformer(str(plain)), *modules], prompts=PROMPTS, device="cpu")
        model.save_pretrained(str(folder / kind))
        model = SentenceTransformer(str(folder / kind), device="cpu", local_files_only=True)
        np.savez(
            folder / f"{kind}.npz",
            documents=model.encode_document(TEXTS, batch_size=4),
            queries=model.encode_query(TEXTS, batch_size=4),
            short=model.encode_document(TEXTS, truncate_dim=KEPT, normalize_embeddings=kind != "modernbert"),
        )
    return folder


def check_same(found: np.ndarray, true: np.ndarray) -> None:
    assert found.shape == true.shape
    assert len(np.unique(true[:, 0])) == len(true), "rows must differ for the comparison to mean anything"
    np.testing.assert_allclose(found.astype(np.float32), true, rtol=2e-3, atol=2e-3)


def embed_queries(encoder: Encoder, texts: list[str]) -> np.ndarray:
    return np.concatenate([encoder.embed(encoder.tokenize_query(text)) for text in texts])


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_of_chunks_and_queries_are_those_of_sentence_transformers(kind: str, models: Path) -> None:
    true = np.load(models / f"{kind}.npz")
    encoder = Encoder(str(models / kind), "cpu", batch_tokens=300)
    assert encoder.forward == "transformers" and encoder.identity.dimension == WIDTHS[kind]
    check_same(encoder.embed(encoder.tokenize(TEXTS)), true["documents"])
    check_same(embed_queries(encoder, TEXTS), true["queries"])
    assert np.abs(true["documents"] - true["queries"]).max() > 0.05, "prompts matter"
    short = Encoder(str(models / kind), "cpu", dimension=KEPT)
    check_same(short.embed(short.tokenize(TEXTS)), true["short"])


def change(path: Path, file: str, **fields: Any) -> None:
    content = json.loads((path / file).read_text()) if (path / file).exists() else {}
    (path / file).write_text(json.dumps({**content, **fields}))


def test_each_setting_makes_another_encoder(models: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(models / "gemma3", tmp_path / "gemma"))
    found = [find_encoder(str(path))[1], find_encoder(str(path), dimension=KEPT)[1]]
    found.append(find_encoder(str(path), pooling="lasttoken", dimension=KEPT)[1])
    assert [one.name for one in found] == ["gemma", "gemma-10", "gemma-lasttoken-10"]
    assert (found[0].prompt, found[0].query_prompt, found[0].normalize) == (*reversed(PROMPTS.values()), True)
    assert find_encoder(str(path), dimension=24)[1] == found[0], "the model's own"
    change(path, "config_sentence_transformers.json", prompts={**PROMPTS, "query": "other: "})
    found.append(find_encoder(str(path))[1])
    change(path, "config_sentence_transformers.json", truncate_dim=KEPT)
    found.append(find_encoder(str(path))[1])
    change(path, "2_Dense/config.json", activation_function="torch.nn.modules.activation.ReLU")
    found.append(find_encoder(str(path))[1])
    weights = path / "3_Dense" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    found.append(find_encoder(str(path))[1])
    assert len({one.sha256 for one in found}) == len(found)
    assert found[-1].dimension == KEPT
    with pytest.raises(UsageError, match="has 10 dimensions, not 11"):
        find_encoder(str(path), dimension=11)


@pytest.mark.parametrize(
    ("prompts", "default", "expected"),
    [
        ({"passage": "p: ", "query": "q: "}, None, ("p: ", "q: ")),
        ({"passage": "p: "}, None, ("p: ", "")),
        ({"query": "q: "}, None, ("", "q: ")),
        ({"any": "a: "}, "any", ("a: ", "a: ")),
        ({"any": "a: ", "query": "", "document": ""}, "any", ("", "")),
    ],
)
def test_a_prompt_of_its_own_comes_before_the_default(
    prompts: dict[str, str], default: str | None, expected: tuple[str, str], tiny_encoder: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(tiny_encoder, tmp_path / "model"))
    change(path, "config_sentence_transformers.json", prompts=prompts, default_prompt_name=default)
    identity = find_encoder(str(path))[1]
    assert (identity.prompt, identity.query_prompt) == expected


def test_search_puts_the_query_prompt_and_embed_that_of_documents(models: Path, tmp_path: Path, cli: Cli) -> None:
    store = tmp_path / "store"
    api.chunk(store, [str(write_jsonl(tmp_path / "a.jsonl", make_rows(8)))], tokenizer=str(models / "qwen3"))
    made = cli("embed", store, "--encoder", models / "qwen3", "--dimension", KEPT)
    assert "(encoder qwen3-10, 10 dimensions, lasttoken pooling," in made.stdout
    api.index(store)
    reader = retrotool.open(store)
    encoder = Encoder(str(models / "qwen3"), "cpu", dimension=KEPT)
    query = embed_queries(encoder, ["a river"])[0].astype(np.float32)
    vectors = {int(i): reader.embeddings(0)[i] for i in reader.chunk_ids(0)}
    texts = [reader.chunk(i).text for i in vectors]
    check_same(np.stack(list(vectors.values())), encoder.embed(encoder.tokenize(texts)))
    distances = {i: float(((vector - query) ** 2).sum()) for i, vector in vectors.items()}
    best = sorted(distances, key=distances.__getitem__)[:3]
    found = json.loads(cli("search", store, "a river", "-k", 3, "--json").stdout)["results"]
    assert [one["id"] for one in found] == best
    assert [one["distance"] for one in found] == pytest.approx([distances[i] for i in best], abs=1e-3)
    assert [one.id for one in reader.search(query, 3)] == best
    with pytest.raises(UsageError, match="not a finite vector of 10 dimensions"):
        reader.search(query[:-1])
    api.chunk(store, [str(write_jsonl(tmp_path / "b.jsonl", make_rows(2, first=50)))])
    again = json.loads(cli("search", store, "a river", "--json").stdout)["next"][0]
    assert again.endswith(f"--encoder {models / 'qwen3'} --dimension 10")
    assert f"{retrotool.open(store).commit + 1})." in cli(*again.split()[1:]).stdout


def modules(path: Path, *kinds: str) -> None:
    (path / "modules.json").write_text(json.dumps([{"type": kind, "path": ""} for kind in kinds]))


LIBRARY = "sentence_transformers.models"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: modules(path, "custom_st.Transformer"), "custom_st.Transformer, here and in .*, is not supp"),
        (lambda path: modules(path, f"{LIBRARY}.Normalize", f"{LIBRARY}.Dense"), "models.Dense, here and in"),
        (lambda path: change(path, "2_Dense/config.json", activation_function="os.system"), "projection is not supp"),
        (lambda path: change(path, "2_Dense/config.json", use_residual=True), "projection is not supported"),
        (lambda path: (path / "3_Dense" / "model.safetensors").rename(path / "3_Dense" / "x.bin"), "pickled weights"),
        (lambda path: change(path, "3_Dense/config.json", out_features=10**12), "return 24 numbers, not 10000000000"),
        (lambda path: shutil.copytree(path / "2_Dense", path / "3_Dense", dirs_exist_ok=True), "can't be used: mat1"),
        (lambda path: change(path, "1_Pooling/config.json", include_prompt=False), "without its prompt"),
        (lambda path: change(path, "config_sentence_transformers.json", default_prompt_name="x"), "'x' is not one of"),
    ],
)
def test_what_is_not_supported_is_refused(
    spoil: Callable[[Path], Any], message: str, models: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(models / "gemma3", tmp_path / "model"))
    spoil(path)
    with pytest.raises(UsageError, match=message):
        Encoder(str(path), "cpu")
