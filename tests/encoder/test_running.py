"""An encoder at work: blocks, batches, memory that runs out, numbers that are none, and leaving before the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import make_family, rows_of_all_lengths

from retrotool.encoder import Encoder, Rows
from retrotool.errors import AbortError, NotFiniteError, RetrotoolError, UsageError
from retrotool.read_ahead import ahead
from retrotool.tokenizers import FastTokenizer


@pytest.fixture(scope="module")
def model(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family("bert", tmp_path_factory.mktemp("family") / "bert", tiny_encoder)


def spoiled(encoder: Encoder, spoil: Callable[[Mapping[str, torch.Tensor], torch.Tensor], torch.Tensor]) -> None:
    """Let something happen to what the forward of an encoder gives."""
    forward = encoder._loaded

    class Spoiled:
        constant, padded = forward.constant, forward.padded

        def arrays(self, rows: Rows, batch_tokens: int) -> Any:
            return forward.arrays(rows, batch_tokens)

        def __call__(self, tensors: Mapping[str, torch.Tensor], more: Mapping[str, Any]) -> torch.Tensor:
            return spoil(tensors, forward(tensors, more))

    encoder._loaded = encoder._runner._forward = Spoiled()  # type: ignore[union-attr, assignment]


@pytest.mark.parametrize("forward", ["packed", "transformers"])
def test_blocks_come_one_by_one_as_if_they_were_embedded_alone(model: Path, forward: str) -> None:
    encoder = Encoder(str(model), "cpu", forward=forward, batch_tokens=500)
    rows = rows_of_all_lengths(n=90)
    blocks = [rows[:1], rows[1:40], [], rows[40:]]
    reported: list[int] = []
    found = list(encoder.vectors(map(Rows.of, blocks), reported.append))
    assert [len(vectors) for vectors in found] == [1, 39, 0, 50]
    assert sum(reported) == 90
    assert np.allclose(np.concatenate(found), encoder.embed(rows), atol=2e-3)


@pytest.mark.parametrize("forward", ["packed", "transformers"])
def test_out_of_memory_halves_the_batches_and_goes_on(model: Path, forward: str) -> None:
    said: list[str] = []
    encoder = Encoder(str(model), "cpu", forward=forward, batch_tokens=4000, say=said.append)
    rows = [[5 + i % 200] * (5 + i % 60) for i in range(600)]
    true = encoder.embed(rows)
    sizes: list[int] = []

    def small_memory(tensors: Mapping[str, torch.Tensor], vectors: torch.Tensor) -> torch.Tensor:
        sizes.append(tensors["ids"].numel())
        if sizes[-1] > 900:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 byte")
        return vectors

    spoiled(encoder, small_memory)
    found = encoder.embed(rows)
    assert np.allclose(found, true, atol=2e-3)
    assert encoder.batch_tokens <= 1000
    assert all("out of memory: continuing with" in message for message in said)
    assert len(said) == 3, "it is said once a halving (4,000 to 500 tokens), not once a batch"
    tried = len(sizes)
    encoder.embed(rows)
    assert max(sizes[tried:]) <= 1000, "it stays so"


def test_a_row_for_which_there_is_no_memory_is_an_error(model: Path) -> None:
    encoder = Encoder(str(model), "cpu", say=lambda _: None)

    def no_memory(tensors: Mapping[str, torch.Tensor], vectors: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    spoiled(encoder, no_memory)
    with pytest.raises(RetrotoolError, match="too little memory for a row of 4 tokens") as error:
        encoder.embed([[10, 11]] * 3)
    assert error.value.advice


def test_a_device_that_is_lost_ends_the_run(model: Path) -> None:
    """Each task would fail on it, three times."""
    encoder = Encoder(str(model), "cpu")

    def lost(tensors: Mapping[str, torch.Tensor], vectors: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be")

    spoiled(encoder, lost)
    with pytest.raises(AbortError, match=r"cpu is lost: CUDA error: an illegal memory access was encountered$"):
        encoder.embed([[10, 11]])


def test_another_error_of_a_batch_is_passed_on(model: Path) -> None:
    encoder = Encoder(str(model), "cpu")

    def broken(tensors: Mapping[str, torch.Tensor], vectors: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("cuBLAS error")

    spoiled(encoder, broken)
    with pytest.raises(RuntimeError, match="cuBLAS error"):
        encoder.embed([[10, 11]])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_a_vector_that_is_no_number_is_named_by_its_row(model: Path, value: float) -> None:
    encoder = Encoder(str(model), "cpu", batch_tokens=300)
    rows = [[10 + i % 200] * (1 + i % 9) for i in range(200)]
    rows[137] = [299, 299]

    def spoil(tensors: Mapping[str, torch.Tensor], vectors: torch.Tensor) -> torch.Tensor:
        ids = tensors["ids"].tolist()
        if 299 in ids:
            lengths = np.diff(np.flatnonzero(np.array([*ids, encoder._before[0]]) == encoder._before[0]))
            row = int(np.searchsorted(np.cumsum(lengths), ids.index(299), "right"))
            vectors = vectors.clone()
            vectors[row, 3] = value
        return vectors

    spoiled(encoder, spoil)
    with pytest.raises(NotFiniteError, match="row 137") as error:
        list(encoder.vectors([Rows.of(rows[:100]), Rows.of(rows[100:])]))
    assert error.value.row == 137


def test_a_token_that_the_model_has_not_is_refused_before_it_reaches_the_device(model: Path) -> None:
    with pytest.raises(UsageError, match="returned token 300, but the vocabulary of its model has 300"):
        Encoder(str(model), "cpu").embed([[10], [300]])


def test_who_leaves_early_waits_for_no_more_than_the_batches_in_flight(model: Path) -> None:
    encoder = Encoder(str(model), "cpu", batch_tokens=50)
    computed = 0

    def slow(tensors: Mapping[str, torch.Tensor], vectors: torch.Tensor) -> torch.Tensor:
        nonlocal computed
        computed += 1
        time.sleep(0.01)
        return vectors

    spoiled(encoder, slow)
    taken = 0

    def blocks() -> Iterator[Rows]:
        nonlocal taken
        for _ in range(1000):
            taken += 1
            yield Rows.of([[10, 11, 12]] * 100)

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), encoder.stream(blocks()) as coming:
        next(coming)
        raise KeyboardInterrupt
    assert taken <= 6
    assert computed <= 60 + encoder._runner.depth
    assert threading.active_count() <= before, "no thread is left"


def test_an_error_in_making_a_block_comes_out_where_vectors_are_taken(model: Path) -> None:
    encoder = Encoder(str(model), "cpu")

    def blocks() -> Iterator[Rows]:
        yield Rows.of([[10]])
        raise OSError("a broken disk")

    with encoder.stream(blocks()) as coming, pytest.raises(OSError, match="a broken disk"):
        list(coming)


def test_ahead_makes_no_more_than_it_may_and_closes_what_it_takes_from() -> None:
    made: list[int] = []
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            for i in range(100):
                made.append(i)
                yield i
        finally:
            closed.set()

    with closing(ahead(items(), 2)) as coming:
        assert next(coming) == 0
        time.sleep(0.05)
        assert len(made) <= 5
    assert closed.is_set()
    with closing(ahead(iter(range(50)), 3)) as coming:
        assert list(coming) == list(range(50))


def test_texts_are_put_as_the_configuration_wants_them(tiny_encoder: Path, tmp_path: Path) -> None:
    import json
    import shutil

    path = Path(shutil.copytree(tiny_encoder, tmp_path / "model"))
    plain = Encoder(str(path), "cpu")
    (path / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": {"passage": "store: "}, "default_prompt_name": "passage"})
    )
    (path / "sentence_bert_config.json").write_text(json.dumps({"do_lower_case": True, "max_seq_length": 40}))
    own = Encoder(str(path), "cpu")
    assert own.identity.sha256 != plain.identity.sha256
    assert (own.identity.prompt, own.identity.lower, own.identity.max_tokens) == ("store: ", True, 40)
    assert own.tokenize(["Chunk TOKEN"]).ids.tolist() == plain.tokenize(["store: chunk token"]).ids.tolist()
    assert own.tokenize_query("Chunk").ids.tolist() == plain.tokenize(["store: chunk"]).ids.tolist()


def test_a_tokenizer_that_can_not_tokenise_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    import shutil

    from tokenizers import Tokenizer, models

    path = Path(shutil.copytree(tiny_encoder, tmp_path / "model"))
    Tokenizer(models.WordLevel({"store": 0}, unk_token="[UNK]")).save(str(path / "tokenizer.json"))
    with pytest.raises(UsageError, match="its tokenizer fails"):
        Encoder(str(path), "cpu")


def test_the_fast_tokenizer_gives_the_same_rows(tiny_encoder: Path) -> None:
    encoder = Encoder(str(tiny_encoder), "cpu")
    texts = ["a store of chunks", "", "Ünïcödé and [MASK] 語", "x" * 300]
    slow = encoder.tokenize(texts)
    encoder.fast = FastTokenizer(encoder.tokenizer)
    fast = encoder.tokenize(texts)
    encoder.fast = None
    assert fast.ids.tolist() == slow.ids.tolist() == encoder.tokenize(texts).ids.tolist()
    assert fast.lengths.tolist() == slow.lengths.tolist()
