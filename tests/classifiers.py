"""Small sequence classifiers made by code, and what transformers itself says of texts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from conftest import make_text


def make_classifier(
    path: Path, tokenizer: Path, labels: Sequence[str] = ("fine", "toxic"), *, seed: int = 0, **config: Any
) -> Path:
    """A BERT of two layers with random weights and so many labels, with the tokenizer of a directory.

    Its weights are large, and its head is such that scores are all over from 0 to 1.
    """
    import torch
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    vocabulary = json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"]
    settings = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "max_position_embeddings": 128, **config,
    }  # fmt: skip
    named = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    model = BertForSequenceClassification(BertConfig(vocab_size=len(vocabulary), **named, **settings)).eval()
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            for parameter in layer.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(6)
        backend = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        texts = [torch.tensor([backend.encode(make_text(i, 9)).ids]) for i in range(40)]
        model.classifier.weight.mul_(3 / torch.cat([model(text).logits for text in texts]).std(0)[:, None])
        model.classifier.bias.sub_(torch.cat([model(text).logits for text in texts]).mean(0))
    model.save_pretrained(path)
    shutil.copy(tokenizer / "tokenizer.json", path)
    return path


def scores_of_transformers(path: Path, texts: Sequence[str], label: str) -> np.ndarray:
    """Scores by transformers alone, a text at a time, as its own pipeline computes them."""
    import torch
    from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))
    number = model.config.label2id[label]
    found = []
    for text in texts:
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits[0]
        beside = model.config.problem_type == "multi_label_classification" or len(logits) == 1
        found.append(float((logits.sigmoid() if beside else logits.softmax(0))[number]))
    return np.array(found, np.float32)
