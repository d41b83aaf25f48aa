"""kNN-LM: a language model that looks up what came next in similar places of a text.

    python examples/knn_lm.py FOLDER --model MODEL [--corpus TEXTS.jsonl]

The method of Khandelwal et al. 2020 (arXiv 1911.00172), which extends the continuous cache of Grave et al.
2017 (arXiv 1612.04426) from the text read so far to any text. The datastore is a store of single tokens:

1. The value of an entry is a token, ``chunk --chunk-length 1``. Its key is the last hidden state of a causal
   model that has read the document up to that token, ``embed --from``.
2. ``neighbours`` finds the k nearest keys for each token of an evaluation text, by the same hidden states.
3. A softmax over −distance / temperature gives each of their tokens a probability, which is mixed with that
   of the model: bits per token with and without it are printed.
4. The document that was found most often is purged. The same table of neighbours, without a new search, has
   none of its tokens any more.

MODEL is a directory of a causal model with ``tokenizer.json``, as transformers saves it. TEXTS.jsonl has
objects with ``id`` and ``text``; by default it is the language reference inside Python. Of every ten
documents the first is for evaluation. FOLDER must be new.

Cost: the model reads everything once, in windows that overlap by half. A token takes two bytes per dimension
of the model, and as much in the index. On two cores, a model of 135M parameters takes about a quarter of an
hour for the 115,000 tokens of the language reference.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM

import retrotool
from retrotool import api
from retrotool.errors import RetrotoolError

HALF_WINDOW = 512  # tokens that the model reads at a time, after as many that it has read before
ENCODER = "hidden-states"
Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def read_corpus(path: Path | None) -> list[dict[str, str]]:
    """Return documents with ``id`` and ``text``."""
    if path is not None:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    from pydoc_data.topics import topics

    return [{"id": name, "text": text} for name, text in sorted(topics.items())]


def states_and_bits(model: Any, tokens: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float32], Floats]:
    """Return the hidden state [n, d] before each of n tokens, and the bits [n] of the token by the model."""
    config = model.config
    begin = config.eos_token_id if config.bos_token_id is None else config.bos_token_id
    ids, found = torch.tensor([begin, *tokens.tolist()]), list[tuple[Any, Any]]()
    for start in range(0, len(tokens), HALF_WINDOW):
        first, stop = max(0, start - HALF_WINDOW), min(start + HALF_WINDOW, len(tokens))
        with torch.inference_mode():
            output = model(ids[None, first:stop], output_hidden_states=True, use_cache=False)
            nats = torch.nn.functional.cross_entropy(
                output.logits[0, start - first :], ids[start + 1 : stop + 1], reduction="none"
            )
        found.append((output.hidden_states[-1][0, start - first :].numpy(), nats.numpy() / np.log(2)))
    states, bits = (np.concatenate(column) for column in zip(*found, strict=True))
    return states, bits.astype(np.float64)


def build(store: Path, documents: list[dict[str, str]], model_path: Path, model: Any) -> tuple[list[int], Floats]:
    """Make a store of tokens with hidden states; return its chunk ids, and the model's bits for each."""
    corpus, keys = store.with_suffix(".jsonl"), store.with_suffix(".parquet")
    corpus.write_text("".join(json.dumps(document) + "\n" for document in documents), "utf-8")
    api.chunk(store, [str(corpus)], tokenizer=str(model_path), chunk_length=1)
    reader, ids, bits = retrotool.open(store), list[int](), list[Floats]()
    schema = pa.schema({"chunk": pa.int64(), "vector": pa.list_(pa.float32())})
    with pq.ParquetWriter(keys, schema) as writer:
        for entry in reader.documents():
            chunks = range(entry.first_chunk, entry.first_chunk + entry.n_chunks)
            states, of_model = states_and_bits(model, reader.tokens(chunks)[:, 0])
            writer.write_table(pa.table({"chunk": chunks, "vector": list(states)}, schema))
            ids.extend(chunks)
            bits.append(of_model)
    api.embed(store, encoder=ENCODER, vectors=keys)
    return ids, np.concatenate(bits)


def lookup(evaluation: Path, datastore: Path, ids: list[int], k: int) -> tuple[Ids, Any, Floats]:
    """Return, by the table of neighbours, their ids (−1: none), tokens and squared distances, all [n, k]."""
    near, distances = np.full((len(ids), k), -1), np.full((len(ids), k), np.inf)
    reader = retrotool.open(evaluation)
    for row, chunk in enumerate(ids):
        for column, (neighbour, distance) in enumerate(reader.neighbour_ids(chunk, k=k)):
            near[row, column], distances[row, column] = neighbour, distance
    return near, retrotool.open(datastore).tokens(near.ravel()).reshape(near.shape), distances


def mixed_bits(bits: Floats, hits: Any, distances: Floats, share: float, temperature: float) -> Floats:
    """Return bits [n], with a ``share`` of the probability from neighbours that are ``hits`` [n, k]."""
    nearest = np.minimum(distances[:, :1], np.finfo(np.float64).max)  # finite, also without neighbours
    weights = np.exp((nearest - distances) / temperature)
    total = weights.sum(axis=1)
    looked_up, share_of_each = (weights * hits).sum(axis=1) / np.maximum(total, 1), np.where(total > 0, share, 0)
    mixed: Floats = -np.log2((1 - share_of_each) * 2**-bits + share_of_each * looked_up)
    return mixed


def main(folder: Path, options: argparse.Namespace) -> None:
    documents = read_corpus(options.corpus)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, local_files_only=True).eval()
    folder.mkdir(parents=True)
    datastore, evaluation = folder / "datastore", folder / "evaluation"
    build(datastore, [document for n, document in enumerate(documents) if n % 10], options.model, model)
    ids, bits = build(evaluation, documents[::10], options.model, model)
    api.index(datastore)
    api.neighbours(datastore, queries=evaluation, k=options.k, saved=options.k + options.k // 4)

    entries = list(retrotool.open(datastore).documents())
    tokens = retrotool.open(evaluation).tokens(ids)
    print(f"{len(entries)} documents are stored; {len(ids):,} tokens are evaluated.")
    near, values, distances = lookup(evaluation, datastore, ids, options.k)
    with_lookup = mixed_bits(bits, values == tokens, distances, options.share, options.temperature)
    print(f"bits per token, the model alone     {bits.mean():.3f}")
    print(f"with {options.k} neighbours of each token    {with_lookup.mean():.3f}")

    places = np.searchsorted([entry.first_chunk for entry in entries], near[near >= 0], side="right") - 1
    found = entries[np.bincount(places).argmax()]
    api.purge(datastore, api.Selectors(document=found.id), reason="an example of a takedown")
    near, values, distances = lookup(evaluation, datastore, ids, options.k)
    left = ((near >= found.first_chunk) & (near < found.first_chunk + found.n_chunks)).sum()
    print(f"Document {found.id} was found {np.bincount(places).max():,} times; after its purge, {left} times.")
    after = mixed_bits(bits, values == tokens, distances, options.share, options.temperature)
    print(f"bits per token after the purge      {after.mean():.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("-k", type=int, default=32)
    parser.add_argument("--share", type=float, default=0.25, help="of the probability (λ)")
    parser.add_argument("--temperature", type=float, default=10.0, help="of the softmax over distances")
    arguments = parser.parse_args()
    if arguments.folder.exists():
        sys.exit(f"{arguments.folder} is there already. Name a folder that is not.")
    try:
        main(arguments.folder, arguments)
    except RetrotoolError as error:
        sys.exit(f"error: {error}\n{error.advice}")
