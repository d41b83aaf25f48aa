"""Make a small BERT as a model directory; its vectors are the same on every machine.

Every token has a row of as many +1 as -1, drawn from a hash of the token. Positions add nothing, layer norm
keeps such a row unchanged, and the values and the second product of every layer are zero. So attention and
feed-forward are computed without effect, and a vector is the mean of its tokens' rows: integers divided by
the number of tokens, which every kernel rounds alike. Squared distances of such vectors, stored as float16,
are exact in float64.

``exact=False`` gives random weights instead; their vectors are equal only on equal machines.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
HEADS, INTERMEDIATE, PLACES = 4, 64, 128


def common_words(texts: Iterable[str], most: int) -> list[str]:
    """Return the most frequent words in lower case, ties in alphabetical order."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(re.findall("[a-z]{2,}", text.lower()))
    return sorted(counts, key=lambda word: (-counts[word], word))[:most]


def make_encoder(
    path: Path, words: Iterable[str], *, dimension: int = 32, layers: int = 1, seed: int = 0, exact: bool = True
) -> Path:
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    tokens = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), *words]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    path.mkdir(parents=True)
    _tokenizer(vocabulary).save(str(path / "tokenizer.json"))
    config = {
        "architectures": ["BertModel"], "model_type": "bert", "hidden_act": "gelu", "hidden_size": dimension,
        "intermediate_size": INTERMEDIATE, "layer_norm_eps": 1e-12, "max_position_embeddings": PLACES,
        "num_attention_heads": HEADS, "num_hidden_layers": layers, "pad_token_id": 0, "type_vocab_size": 2,
        "vocab_size": len(vocabulary),
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config, indent=1))
    weights = _weights(list(vocabulary), dimension, layers, seed, exact)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


def _tokenizer(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    )
    return tokenizer


def _signs(token: str, dimension: int) -> npt.NDArray[np.float32]:
    """Return a row of as many +1 as −1, drawn from the hash of a token."""
    drawn = np.frombuffer(hashlib.blake2b(token.encode(), digest_size=dimension).digest(), np.uint8)
    row = np.full(dimension, -1, np.float32)
    row[np.argsort(drawn, kind="stable")[: dimension // 2]] = 1
    return row


def _weights(
    tokens: list[str], dimension: int, layers: int, seed: int, exact: bool
) -> dict[str, npt.NDArray[np.float32]]:
    rng = np.random.default_rng(seed)

    def random(*shape: int) -> npt.NDArray[np.float32]:
        return (rng.standard_normal(shape) * 0.1).astype(np.float32)

    def no_effect(*shape: int) -> npt.NDArray[np.float32]:
        return np.zeros(shape, np.float32) if exact else random(*shape)

    words = np.stack([_signs(token, dimension) for token in tokens])
    weights = {
        "embeddings.word_embeddings.weight": words if exact else random(len(tokens), dimension),
        "embeddings.position_embeddings.weight": no_effect(PLACES, dimension),
        "embeddings.token_type_embeddings.weight": no_effect(2, dimension),
    }
    norms = ["embeddings.LayerNorm"]
    for i in range(layers):
        layer = f"encoder.layer.{i}"
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
        weights |= {
            f"{layer}.attention.self.query.weight": random(dimension, dimension),
            f"{layer}.attention.self.key.weight": random(dimension, dimension),
            f"{layer}.attention.self.value.weight": no_effect(dimension, dimension),
            f"{layer}.attention.output.dense.weight": random(dimension, dimension),
            f"{layer}.intermediate.dense.weight": random(INTERMEDIATE, dimension),
            f"{layer}.output.dense.weight": no_effect(dimension, INTERMEDIATE),
        }
    for name in [name for name in weights if name.startswith("encoder.")]:
        weights[name.replace("weight", "bias")] = np.zeros(len(weights[name]), np.float32)
    for name in norms:
        weights[f"{name}.weight"] = np.ones(dimension, np.float32)
        weights[f"{name}.bias"] = np.zeros(dimension, np.float32)
    return weights
