"""Small models of several families with random weights, and rows to embed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "mpnet")
VOCABULARY = 300
LONGEST = 100


def make_family(kind: str, path: Path, tokenizer: Path, **changes: Any) -> Path:
    """A model of one family, as transformers saves it, with the tokenizer of another model."""
    import torch
    import transformers

    names = {
        "bert": ("BertConfig", "BertModel"),
        "roberta": ("RobertaConfig", "RobertaModel"),
        "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaModel"),
        "camembert": ("CamembertConfig", "CamembertModel"),
        "distilbert": ("DistilBertConfig", "DistilBertModel"),
        "mpnet": ("MPNetConfig", "MPNetModel"),
        "electra": ("ElectraConfig", "ElectraModel"),
    }[kind]
    torch.manual_seed(7)
    if kind == "distilbert":
        shape = {"dim": 48, "n_layers": 3, "n_heads": 4, "hidden_dim": 96}
    else:
        shape = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
    settings = {"vocab_size": VOCABULARY, "max_position_embeddings": LONGEST + 5, "initializer_range": 0.3}
    config = getattr(transformers, names[0])(**{**settings, **shape, **changes})
    model = getattr(transformers, names[1])(config).eval()
    with torch.no_grad():  # norms and biases begin as ones and zeros, which would hide one that is not used
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    shutil.copy(tokenizer / "tokenizer.json", path)
    return path


def rows_of_all_lengths(seed: int = 0, n: int = 60) -> list[list[int]]:
    """Rows of token ids: an empty one, one token, the padding token inside, the longest, and longer than the model."""
    rng = np.random.default_rng(seed)
    lengths = [0, 1, 2, LONGEST - 2, LONGEST - 1, LONGEST, 3 * LONGEST, *rng.integers(1, 64, n - 7).tolist()]
    rows = [rng.integers(5, VOCABULARY, length).tolist() for length in lengths]
    for row in rows[20:30]:
        row[:: max(1, len(row) // 3)] = [0, 1, 4][: len(row[:: max(1, len(row) // 3)])] + [0] * max(
            0, len(row[:: max(1, len(row) // 3)]) - 3
        )
    return rows


def with_pooling(path: Path, pooling: str) -> Path:
    """Let a model's configuration say how it pools."""
    (path / "1_Pooling").mkdir(exist_ok=True)
    flags = {"pooling_mode_cls_token": pooling == "cls", "pooling_mode_mean_tokens": pooling == "mean"}
    (path / "1_Pooling" / "config.json").write_text(json.dumps(flags))
    return path
