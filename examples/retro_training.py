"""RETRO or no retrieval: train a small model of each kind on a store, and evaluate both.

    python examples/retro_training.py FOLDER [--corpus TEXTS.jsonl] [--steps 200] [--sequences 8]

A RETRO model (Borgeaud et al. 2021, arXiv 2112.04426) reads the neighbours of each chunk by cross-attention.
Whether a database is worth it shows in a comparison with a decoder of the same layers that reads none:

1. ``chunk``, ``embed``, ``index`` and ``neighbours`` make a store, which is training text and database.
   Evaluation text is a store too, with its neighbours in the first one.
2. ``train`` trains a RETRO model, and with ``retrieval = false`` a decoder, on the same batches.
3. ``evaluate`` scores the evaluation text by both, in bits per byte, by RETRO with neighbours and without.

TEXTS.jsonl has objects with ``id`` and ``text``; by default it is the language reference inside Python. Of
every ten documents the first is for evaluation. FOLDER must be new; it keeps the stores, the settings of
both models and their checkpoints. ENCODER is as for ``retrotool embed``.

Cost: of training. A step reads 8 sequences of 256 tokens; on two cores, 200 of them take about ten minutes.
So little training shows that everything fits together, not what retrieval gives: for that, take gigabytes
of text, thousands of steps and a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from retrotool import api
from retrotool.errors import RetrotoolError

SETTINGS = """
[model]
dimension = {dimension}
layers = 4
heads = 4
first_cross_layer = 2
cross_every = 2
encoder_dimension = {dimension}
retrieval = {retrieval}

[data]
sequence_length = 256
batch_size = {sequences}

[optimiser]
steps = {steps}
learning_rate = 0.002
warmup_steps = 10
"""


def read_corpus(path: Path | None) -> list[dict[str, str]]:
    """Return documents with ``id`` and ``text``."""
    if path is not None:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    from pydoc_data.topics import topics

    return [{"id": name, "text": text} for name, text in sorted(topics.items())]


def build(store: Path, documents: list[dict[str, str]], encoder: str) -> None:
    """Make a store of documents with embeddings."""
    corpus = store.with_suffix(".jsonl")
    corpus.write_text("".join(json.dumps(document) + "\n" for document in documents), "utf-8")
    api.chunk(store, [str(corpus)])
    api.embed(store, encoder=encoder)


def main(folder: Path, options: argparse.Namespace) -> None:
    folder.mkdir(parents=True)
    documents = read_corpus(options.corpus)
    training, evaluation = folder / "training", folder / "evaluation"
    build(training, [document for n, document in enumerate(documents) if n % 10], options.encoder)
    build(evaluation, documents[::10], options.encoder)
    api.index(training)
    api.neighbours(training, materialise=True)
    api.neighbours(training, queries=evaluation)

    rows = []
    for name, retrieval in (("RETRO", True), ("decoder", False)):
        config, out = folder / f"{name.lower()}.toml", folder / name.lower()
        settings = {"dimension": options.dimension, "sequences": options.sequences, "steps": options.steps}
        config.write_text(SETTINGS.format(retrieval=str(retrieval).lower(), **settings))
        trained = api.train(training, config=config, out=out)
        result = api.evaluate(training, queries=evaluation, model=out).tables[0].all
        assert result.on is not None and result.off is not None and result.difference is not None
        shown = (result.off.value, result.on.value, result.difference.value) if retrieval else (result.off.value,)
        rows.append((name, trained, shown))

    print(f"bits per byte of {result.chunks} chunks of {result.documents} documents, after {options.steps} steps")
    print(f"{'model':<9}{'parameters':>12}{'tokens read':>13}{'off':>9}{'on':>9}{'on - off':>10}")
    for name, trained, figures in rows:
        print(
            f"{name:<9}{trained.parameters:>12,}{trained.tokens:>13,}"
            + "".join(f"{figure:>9.3f}" for figure in figures)
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--dimension", type=int, default=128)
    parser.add_argument("--encoder", default="minilm")
    arguments = parser.parse_args()
    if arguments.folder.exists():
        sys.exit(f"{arguments.folder} is there already. Name a folder that is not.")
    try:
        main(arguments.folder, arguments)
    except RetrotoolError as error:
        sys.exit(f"error: {error}\n{error.advice}")
