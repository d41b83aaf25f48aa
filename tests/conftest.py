"""Fixtures: a small encoder and corpora made by code, and ways to run commands."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import memory_storage
import pytest
from forked import run_forked
from hypothesis import HealthCheck, settings
from snapshots import Snapshots
from stored import copy_store

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As in a background job of a script: tests of Ctrl-C would wait for ever, and their children ignore it, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests say what a machine without a GPU does; those that want one are run by: make gpu-test
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ["TQDM_DISABLE"] = "1"  # progress comes after seconds: what a test reads must not depend on its speed
os.environ["COLUMNS"] = "100"  # whatever the terminal that tests are run in

HERE = Path(__file__).parent
MEMORY = Path("/dev/shm")
NEEDED = 4 << 30
"""Bytes that must be free in ``MEMORY`` for tests to keep their files there: many times what they use."""
if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > NEEDED:
    # Stores are on a disk of memory, where fsync costs nothing; PYTEST_DEBUG_TEMPROOT names another place.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

# How many examples a property is tried on; HYPOTHESIS_PROFILE=nightly for many.
slow_machines = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", max_examples=25, **slow_machines)
settings.register_profile("nightly", max_examples=300, **slow_machines)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")
settings.load_profile(PROFILE)


def times(few: int, many: int) -> int:
    """How often something random is tried: ``few`` times by ``make test``, ``many`` by ``make nightly``."""
    return many if PROFILE == "nightly" else few


INTERRUPTED = "interrupted: what is finished is kept. Run the same command again to resume.\n"

WORDS = (
    "store chunk token vector index query neighbour document part shard commit log page file disk kernel driver "
    "memory thread process signal socket packet buffer queue stack heap tree graph node edge path root leaf key value "
    "hash table list array string number letter word sentence paragraph chapter book author reader writer editor river "
    "mountain forest desert ocean island valley bridge tower castle village city market harbour garden winter summer"
).split()


def pytest_configure(config: pytest.Config) -> None:
    """With RETROTOOL_TEST_STORAGE=memory, begin the process that holds all stores; other processes inherit its name.

    What is found about tokenizers is kept for all processes, and not in the user's cache.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        cache = tempfile.TemporaryDirectory(prefix="retrotool-cache-")
        config.add_cleanup(cache.cleanup)
        os.environ["RETROTOOL_CACHE"] = cache.name
    if memory_storage.is_everywhere() and memory_storage.ADDRESS not in os.environ:
        held = contextlib.ExitStack()
        config.add_cleanup(held.close)
        folder = held.enter_context(tempfile.TemporaryDirectory(prefix="retrotool-memory-"))
        held.enter_context(memory_storage.memory_server(Path(folder)))
        places = [HERE / "everywhere", HERE, *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(map(str, places))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: whichever process gets one last makes all others wait for it.

    Last those that send requests: commands on a bucket can't be forked from a process that has sent one.
    """
    if PROFILE != "nightly":
        for item in items:
            if item.get_closest_marker("nightly"):
                item.add_marker(pytest.mark.skip(reason="it is long: make nightly"))
    if memory_storage.is_everywhere():
        for item in items:
            if item.get_closest_marker("on_disk"):
                item.add_marker(pytest.mark.skip(reason="it is about a disk"))
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.get_closest_marker("sends_requests") is not None, item.path not in slow))


_frozen = 0


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what of the code for GPUs was not tested here."""
    reasons = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", []))
    for reason, n in reasons.items():
        if "GPU" in reason:
            terminalreporter.write_line(f"{n} skipped: {reason.removeprefix('Skipped: ')}")


def pytest_runtest_setup() -> None:
    """What is imported by now stays: it need not be looked through for garbage again."""
    global _frozen
    if len(sys.modules) > _frozen + 200:
        gc.collect()
        gc.freeze()
        _frozen = len(sys.modules)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Stores of a test that is over take no memory."""
    if memory_storage.is_everywhere() and "tmp_path" in getattr(item, "funcargs", {}):
        memory_storage.forget(item.funcargs["tmp_path"])


def make_text(seed: int, words: int) -> str:
    """Deterministic text: ``words`` words that say something different for every seed."""
    import numpy as np

    rng = np.random.default_rng(seed)
    drawn = rng.zipf(1.3, words) % len(WORDS)
    return " ".join(f"{WORDS[i]}{'.' if n % 11 == 10 else ''}" for n, i in enumerate(drawn))


def make_rows(n: int, *, first: int = 0, words: int = 150) -> list[dict[str, Any]]:
    """``n`` documents with ids, of lengths around ``words`` words, from two sources."""
    return [
        {
            "id": f"doc-{i}",
            "text": make_text(i, 1 + (i * 37) % (2 * words)),
            "source": ("a", "b")[i % 2],
            "year": 2000 + i % 20,
        }
        for i in range(first, first + n)
    ]


def rewrite_sums(path: Path) -> None:
    """Write the sums of blocks of a store's file that was changed, as if it had been written like this."""
    from retrotool.store.sums import SUMS, BlockSums

    sums = BlockSums()
    sums.update(memoryview(path.read_bytes()))
    path.with_name(path.name + SUMS).write_bytes(sums.content())


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_blank(path: Path) -> Path:
    """Write an input that is a blank line, which makes a store without documents."""
    path.write_text("\n")
    return path


Made = TypeVar("Made")
Shared = Callable[[str, Callable[[Path], Made]], Made]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared[Any]:
    """Make something once for all processes that run tests: ``shared("name", make)``, where ``make`` gets a new folder.

    What it returns, a path perhaps, is what each process gets. Nobody may change what is in the folder: copy it.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def get(name: str, make: Callable[[Path], Made]) -> Made:
        folder, done = root / f"shared-{name}", root / f"shared-{name}.pickle"
        with (root / f"shared-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a process that was stopped at it
                folder.mkdir()
                done.write_bytes(pickle.dumps(make(folder)))
            made: Made = pickle.loads(done.read_bytes())
            return made

    return get


@pytest.fixture(scope="session")
def tiny_encoder(shared: Shared[Path]) -> Path:
    """A BERT of two layers and 32 dimensions with random weights and a WordPiece vocabulary, saved as safetensors."""
    return shared("encoder", lambda folder: make_encoder(folder / "tiny", seed=0))


def make_encoder(path: Path, seed: int, dimension: int = 32) -> Path:
    import torch
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    letters = [chr(c) for c in range(33, 127)]
    tokens = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *letters,
        *(f"##{c}" for c in letters),
        *(w for w in WORDS if len(w) > 1),
    ]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    path.mkdir(parents=True)
    tokenizer.save(str(path / "tokenizer.json"))
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=dimension, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=128,
    )  # fmt: skip
    BertModel(config).eval().save_pretrained(path)
    return path


def make_causal_model(path: Path, tokenizer: bytes, dtype: str = "float32", **config: Any) -> Path:
    """A Llama of two layers with random weights, for ids of a ``tokenizer.json``."""
    import torch
    from tokenizers import Tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    path.mkdir(parents=True)
    (path / "tokenizer.json").write_bytes(tokenizer)
    vocabulary = max(Tokenizer.from_str(tokenizer.decode()).get_vocab().values()) + 1
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, initializer_range=0.2, **(sizes | config)))
    model.to(getattr(torch, dtype)).save_pretrained(path)
    return path


def make_cache_model(path: Path, tokenizer: bytes) -> Path:
    """A Llama that expects the tokens that it has read before, the more often the more: text helps it that is alike.

    Its one layer attends to all tokens alike, so that the output is the mean of their embeddings.
    """
    import torch
    from transformers import LlamaForCausalLM

    width = 256
    make_causal_model(path, tokenizer, hidden_size=width, num_hidden_layers=1, tie_word_embeddings=True)
    model = LlamaForCausalLM.from_pretrained(path)
    embedding, layer = model.get_input_embeddings(), model.model.layers[0]
    with torch.no_grad():
        embedding.weight.copy_(torch.nn.functional.normalize(embedding.weight))
        for weight in (layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight, layer.mlp.down_proj.weight):
            weight.zero_()
        layer.self_attn.v_proj.weight.copy_(torch.eye(width))
        layer.self_attn.o_proj.weight.copy_(8 * torch.eye(width))
        model.model.norm.weight.fill_(0.9)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def byte_level_tokenizer(shared: Shared[Path]) -> Path:
    """A byte-level BPE of 2,000 tokens, trained here: lossless."""
    return shared("tokenizer", lambda folder: train_tokenizer(folder / "tokenizer.json"))


def train_tokenizer(path: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((make_text(i, 200) for i in range(100)), trainer)
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def corpus(shared: Shared[Path]) -> Path:
    """120 documents as jsonl."""
    return shared("corpus", lambda folder: write_jsonl(folder / "corpus.jsonl", make_rows(120)))


@pytest.fixture(scope="session")
def built_store(shared: Shared[Path], corpus: Path, tiny_encoder: Path) -> Path:
    """A finished store of several parts: chunked, embedded, indexed, with neighbours. Not to be changed: copy it."""

    def build(folder: Path) -> Path:
        from retrotool import api

        store = folder / "store"
        api.chunk(store, [str(corpus)], tokenizer=str(tiny_encoder), part_size=100)
        api.embed(store, encoder=str(tiny_encoder))
        api.index(store)
        api.neighbours(store)
        return store

    return shared("built", build)


@pytest.fixture
def store_copy(built_store: Path, tmp_path: Path) -> Path:
    """A copy of ``built_store`` that may be changed."""
    return copy_store(built_store, tmp_path / "store")


@pytest.fixture
def snapshots(request: pytest.FixtureRequest) -> Snapshots:
    """Compare what is printed with what is kept: ``snapshots(text, STORE=store)``."""
    return Snapshots(request.path, request.node.name)


@pytest.fixture(autouse=True)
def own_engine() -> Iterator[None]:
    """What a test chooses to work with is not what the next one works with."""
    yield
    if (choice := sys.modules.get("retrotool.engine.engines")) is not None:
        choice.use_engine()


@pytest.fixture(autouse=True)
def quick_workers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes are forked from one that has imported what they need, unless a test wants them ``spawned``."""
    from retrotool.engine import local

    if not request.node.get_closest_marker("spawned"):
        context = multiprocessing.get_context("forkserver")
        models = ["transformers.models.auto.modeling_auto", "transformers.models.bert.modeling_bert"]
        context.set_forkserver_preload(["torch", "faiss", "pyarrow.parquet", "tokenizers", *models, "retrotool.api"])
        quick = SimpleNamespace(get_context=lambda _: context, parent_process=multiprocessing.parent_process)
        monkeypatch.setattr(local, "multiprocessing", quick)


_loaded: dict[tuple[object, ...], tuple[str, str, Any]] = {}
_verified: dict[tuple[object, ...], float] = {}
_hashed: dict[tuple[object, ...], str] = {}
LARGE = 16 << 20
"""Bytes of a file of a model that is too large to be hashed again and again."""


@pytest.fixture(autouse=True)
def known_encoders(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is loaded once a process, hashed once if it is large, and not verified again once it was right.

    Where this is tested, every time.
    """
    if request.path.parent.name == "encoder" or request.path.name.startswith("test_embed"):
        return
    from retrotool.encoder import Encoder, encoder_identity
    from retrotool.encoder.encoder import LEAST_COSINE

    load, verify, sha256 = Encoder._load, Encoder.verify, encoder_identity._sha256

    def hashed(file: Path) -> str:
        status = file.stat()
        if status.st_size < LARGE:
            return sha256(file)
        key = (file, status.st_size, status.st_mtime_ns)
        if key not in _hashed:
            _hashed[key] = sha256(file)
        return _hashed[key]

    def loaded(encoder: Encoder, way: str) -> None:
        key = (encoder.identity, encoder._path, encoder.device, encoder.dtype, way)
        if encoder.device != "cpu" or key not in _loaded:
            load(encoder, way)
            _loaded[key] = (encoder.forward, encoder.why, encoder._loaded)
            return
        from retrotool.encoder.forwards import CpuRunner

        encoder.forward, encoder.why, encoder._loaded = _loaded[key]
        encoder._runner = CpuRunner(encoder._loaded)

    def verified(encoder: Encoder, sample: Any = None) -> None:
        key = (encoder.identity, encoder.device, encoder.dtype, encoder.forward)
        if key not in _verified:
            verify(encoder, sample)
            if encoder.cosine is not None and encoder.cosine >= LEAST_COSINE[encoder.dtype]:
                _verified[(encoder.identity, encoder.device, encoder.dtype, encoder.forward)] = encoder.cosine
        else:
            encoder.cosine = _verified[key]

    monkeypatch.setattr(encoder_identity, "_sha256", hashed)
    monkeypatch.setattr(Encoder, "_load", loaded)
    monkeypatch.setattr(Encoder, "verify", verified)


_tokenizers: dict[bytes, dict[str, Any]] = {}
_tables: dict[bytes, Any] = {}


@pytest.fixture(autouse=True)
def known_tokenizers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer is loaded, and its bytes are found out, once a process.

    Where this is tested, every time, as is where tokie is like it.
    """
    if request.path.parent.name == "tokenizers":
        monkeypatch.setenv("RETROTOOL_CACHE", os.devnull)
        return
    from retrotool.tokenizers import Tokenizer
    from retrotool.tokenizers.tokenizer import TokenizerFile

    load, spell = Tokenizer.__init__, Tokenizer._byte_table.func

    def loaded(tokenizer: Tokenizer, file: TokenizerFile) -> None:
        if file.content not in _tokenizers:
            load(tokenizer, file)
            _tokenizers[file.content] = dict(vars(tokenizer))
        vars(tokenizer).update(_tokenizers[file.content], file=file)

    def byte_table(tokenizer: Tokenizer) -> Any:
        if tokenizer.file.content not in _tables:
            _tables[tokenizer.file.content] = spell(tokenizer)
        return _tables[tokenizer.file.content]

    monkeypatch.setattr(Tokenizer, "__init__", loaded)
    monkeypatch.setattr(Tokenizer, "_byte_table", property(byte_table))


Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def cli() -> Cli:
    """Run ``retrotool`` in a process of its own, which is forked: ``cli("info", store, "--json")``."""

    from retrotool.tokenizers import DEFAULT_TOKENIZER, Tokenizer, find_tokenizer

    default = find_tokenizer(DEFAULT_TOKENIZER)

    def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        _ = Tokenizer(default)._byte_table  # known to this process from now on, and so to those that it forks
        return run_forked([str(argument) for argument in arguments], **options)

    return run
