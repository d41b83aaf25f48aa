"""Retrieval-augmented answers: a language model answers questions with question-answer pairs in its prompt.

    python examples/rag_answers.py FOLDER --model MODEL [--pairs PAIRS.jsonl --questions QUESTIONS.jsonl]

A store of key-value records is searched by its questions and returns their answers, as in Lewis et al. 2020
(arXiv 2005.11401), but with a model that is used as it is:

1. ``chunk --key-field question --value-field answer`` stores the pairs, and ``embed`` embeds the questions.
2. For each question, the nearest three records are put into a prompt, nearest last, before the question.
3. The model continues the prompt; what it writes is printed for the first question. How well it knows the
   true answer is measured for all: the bits that it needs for a byte of it, with and without the records.
4. The first record found is purged, and the first question asked again.

MODEL is a directory of a causal model with ``tokenizer.json``, as transformers saves it. Each line of the two
files has a ``question`` and an ``answer``. By default, the pairs are functions of Python's library and the
first sentence of their docstrings, and every tenth is asked for in other words. FOLDER must be new. ENCODER
is as for ``retrotool embed``.

Cost: embedding the questions, then two readings of a prompt for each question that is asked; on two cores
half a second each with a model of 135M parameters.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import math
import statistics
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

import retrotool
from retrotool import api
from retrotool.errors import RetrotoolError
from retrotool.reader import Reader
from retrotool.sources import Fields

MODULES = (
    "ast", "calendar", "codecs", "contextlib", "difflib", "dis", "email.utils", "fnmatch", "functools", "glob",
    "heapq", "inspect", "locale", "mimetypes", "os", "platform", "random", "re", "shlex", "shutil", "statistics",
    "subprocess", "tempfile", "textwrap", "threading", "tokenize", "traceback", "urllib.parse", "uuid", "warnings",
)  # fmt: skip
K = 3  # records in a prompt
Pairs = list[dict[str, str]]


def pairs_of_the_library() -> tuple[Pairs, Pairs]:
    """Return pairs about the functions of Python's library, and some of them in other words."""
    pairs, asked = Pairs(), Pairs()
    for module in MODULES:
        for name, function in inspect.getmembers(importlib.import_module(module), inspect.isfunction):
            sentence = " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())
            if function.__module__ == module and sentence and not name.startswith("_"):
                answer = sentence.partition(". ")[0].rstrip(".") + "."
                pairs.append({"question": f"What does the function {name} of module {module} do?", "answer": answer})
                asked.append({"question": f"What is {module}.{name}() good for?", "answer": answer})
    return pairs, asked[::10]


class Answerer:
    """A causal model that reads prompts."""

    def __init__(self, path: Path) -> None:
        self._tokenizer: Any = Tokenizer.from_file(str(path / "tokenizer.json"))
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()
        config = self._model.config
        self._begin = config.eos_token_id if config.bos_token_id is None else config.bos_token_id

    def _ids(self, prompt: str) -> list[int]:
        return [self._begin, *self._tokenizer.encode(prompt, add_special_tokens=False).ids]

    def bits_per_byte(self, prompt: str, answer: str) -> float:
        """Return the bits that the model needs for a byte of ``answer`` after ``prompt``."""
        read, due = self._ids(prompt), self._tokenizer.encode(" " + answer, add_special_tokens=False).ids
        with torch.inference_mode():
            logits = self._model(torch.tensor([read + due])).logits[0, len(read) - 1 : -1]
        nats = torch.nn.functional.cross_entropy(logits, torch.tensor(due), reduction="sum")
        return float(nats) / math.log(2) / len(answer.encode())

    def answer(self, prompt: str, longest: int = 40) -> str:
        """Return the first line, of at most ``longest`` tokens, with which the model continues ``prompt``."""
        read = torch.tensor([self._ids(prompt)])
        with torch.inference_mode():
            written = self._model.generate(
                read, attention_mask=torch.ones_like(read), max_new_tokens=longest, do_sample=False, pad_token_id=0
            )
        text: str = self._tokenizer.decode(written[0, read.shape[1] :].tolist())
        return text.strip().partition("\n")[0]


def prompt_for(reader: Reader, question: str, k: int = K) -> str:
    """Return a prompt with the k nearest records, nearest last, and the question."""
    blocks = [f"Question: {question}\nAnswer:"]
    for found in reader.search(question, k=k) if k else []:
        _, *value = reader.document(found.chunk.document)
        answer = "".join(reader.chunk(chunk).text for chunk in value)
        blocks.append(f"Question: {found.chunk.text}\nAnswer: {answer}")
    return "\n\n".join(reversed(blocks))


def main(folder: Path, options: argparse.Namespace) -> None:
    pairs, asked = pairs_of_the_library()
    if options.pairs:
        pairs, asked = (
            [json.loads(line) for line in file.open(encoding="utf-8")] for file in (options.pairs, options.questions)
        )
    folder.mkdir(parents=True)
    store, corpus, model = folder / "store", folder / "pairs.jsonl", Answerer(options.model)
    corpus.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), "utf-8")
    api.chunk(store, [str(corpus)], fields=Fields(key="question", value="answer"))
    api.embed(store, encoder=options.encoder)
    api.index(store)
    reader = retrotool.open(store)

    question, answer = asked[0]["question"], asked[0]["answer"]
    print(prompt := prompt_for(reader, question))
    print("→", textwrap.shorten(model.answer(prompt), 90))
    print("True answer:", answer)
    for name, k in (("without records", 0), (f"with {K} records", K)):
        bits = [model.bits_per_byte(prompt_for(reader, one["question"], k), one["answer"]) for one in asked]
        print(f"bits per byte of {len(asked)} true answers, {name:<16} {statistics.mean(bits):.3f}")

    (found,) = reader.search(question, k=1)
    api.purge(store, api.Selectors(document=found.chunk.document), reason="an example of a takedown")
    reader.refresh()
    (now,) = reader.search(question, k=1)
    bits_now = model.bits_per_byte(prompt_for(reader, question), answer)
    print(f'After the purge of "{found.chunk.text}", the nearest record is "{now.chunk.text}",')
    print(f"and the true answer to the first question takes {bits_now:.3f} bits per byte.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--questions", type=Path)
    parser.add_argument("--encoder", default="minilm")
    arguments = parser.parse_args()
    if arguments.folder.exists():
        sys.exit(f"{arguments.folder} is there already. Name a folder that is not.")
    if (arguments.pairs is None) != (arguments.questions is None):
        sys.exit("Give --pairs and --questions together.")
    try:
        main(arguments.folder, arguments)
    except RetrotoolError as error:
        sys.exit(f"error: {error}\n{error.advice}")
