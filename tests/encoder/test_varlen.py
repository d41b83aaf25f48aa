"""The path that GPUs take, on a CPU: variable-length attention in constant shapes, compiled once.

FlashAttention itself needs a GPU. Here a plain implementation stands in for it, so that all that is around it is what
runs there: the filling up of batches, the places where rows begin, the compiling of layers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from families import make_family, rows_of_all_lengths, with_pooling

from retrotool.encoder import Encoder, cosines
from retrotool.encoder.forwards import PackedForward

pytestmark = pytest.mark.slow


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, d] each; rows begin at ``starts``, the last of which is the end."""
    place = torch.arange(len(query))
    row = torch.searchsorted(starts.contiguous(), place, right=True)
    mask = torch.where(row[:, None] == row[None, :], 0.0, float("-inf"))
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5 + mask
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)


class Seen:
    """The shapes that attention saw."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int, int]] = []


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    import torch.nn.attention.varlen as module

    from retrotool.encoder import forwards

    found = Seen()

    def varlen_attn(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_q: torch.Tensor,
        cu_k: torch.Tensor,
        max_q: int,
        max_k: int,
    ) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            lengths = torch.diff(cu_q)
            assert int(lengths.max()) <= max_q == max_k
            assert int(lengths.min()) >= 0
            assert int(cu_q[0]) == 0
            assert int(cu_q[-1]) == len(query)
            found.shapes.append((len(query), len(cu_q), max_q))
        return attend(query, key, value, cu_q)

    monkeypatch.setattr(module, "varlen_attn", varlen_attn)
    monkeypatch.setattr(forwards, "_has_varlen", lambda _: True)
    built = PackedForward.__init__

    def constant(self: PackedForward, *arguments: object, **options: object) -> None:
        built(self, *arguments, **options)  # type: ignore[arg-type]
        self.constant = True

    monkeypatch.setattr(PackedForward, "__init__", constant)
    return found


@pytest.mark.parametrize(
    ("kind", "pooling"),
    [
        ("bert", "mean"),
        pytest.param("bert", "cls", marks=pytest.mark.nightly),
        pytest.param("roberta", "mean", marks=pytest.mark.nightly),
        ("distilbert", "cls"),
    ],
)
def test_the_vectors_are_those_of_transformers(
    kind: str, pooling: str, seen: Seen, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retrotool.encoder import forwards

    monkeypatch.setattr(forwards, "compile_layer", lambda: forwards.Layer.forward)
    path = with_pooling(make_family(kind, tmp_path / kind, tiny_encoder), pooling)
    rows = rows_of_all_lengths(n=100)
    true = Encoder(str(path), "cpu", forward="transformers").embed(rows)
    for batch_tokens in (16, 300, 1024, 100_000):
        found = Encoder(str(path), "cpu", batch_tokens=batch_tokens).embed(rows)
        assert cosines(found, true).min() > 0.99999


def test_whole_batches_have_one_shape_and_all_layers_one_program(
    seen: Seen, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retrotool.encoder import forwards

    monkeypatch.setattr(forwards, "cores", lambda: 1)  # two lanes would both compile at first
    programs: list[object] = []

    def counting(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> object:
        programs.append(graph)
        return graph.forward

    compiled = forwards.compile_layer
    monkeypatch.setattr(forwards, "compile_layer", lambda: compiled(backend=counting))
    torch._dynamo.reset()
    path = make_family("bert", tmp_path / "bert", tiny_encoder)
    rng = np.random.default_rng(1)
    rows = [rng.integers(5, 160, n).tolist() for n in rng.integers(10, 60, 400)]
    true = Encoder(str(path), "cpu", forward="transformers").embed(rows)
    encoder = Encoder(str(path), "cpu", batch_tokens=1024)
    found = np.concatenate([encoder.embed(rows[start : start + 200]) for start in (0, 200)])
    assert cosines(found, true).min() > 0.99999
    assert encoder._loaded.why_eager == ""
    assert len(programs) == 1, "three layers, a dozen batches"
    eager = {shape[0] for shape in seen.shapes}
    assert len(seen.shapes) <= 2 * 3, "what is left at the end of a block runs as it is"
    assert all(tokens <= 512 for tokens in eager)
    torch._dynamo.reset()


def test_exact_gelu_is_compiled_anew(
    seen: Seen, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retrotool.encoder import forwards, packed

    monkeypatch.setattr(forwards, "cores", lambda: 1)
    monkeypatch.setattr(packed, "has_onednn", lambda _: False)
    programs: list[str] = []

    def counting(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> object:
        programs.append(graph.code)
        return graph.forward

    compiled = forwards.compile_layer
    monkeypatch.setattr(forwards, "compile_layer", lambda: compiled(backend=counting))
    torch._dynamo.reset()
    path = make_family("bert", tmp_path / "bert", tiny_encoder)
    rows = [[5 + i % 150] * 30 for i in range(60)]
    true = Encoder(str(path), "cpu", forward="transformers").embed(rows)
    encoder = Encoder(str(path), "cpu", batch_tokens=1024)
    encoder._loaded._model.fuse_gelu(True)
    for fused in (True, False):  # on a CPU both are exact
        assert cosines(encoder.embed(rows), true).min() > 0.99999
        assert ["_addmm_activation" in code for code in programs] == [True, False][: 2 - fused]
        encoder._loaded.use_exact_gelu()
    assert encoder._loaded.why_eager == ""
    torch._dynamo.reset()


def test_a_compiler_that_fails_is_done_without(
    seen: Seen, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retrotool.encoder import forwards

    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("no C compiler\nsee the log")

    monkeypatch.setattr(forwards, "compile_layer", lambda: broken)
    path = make_family("bert", tmp_path / "bert", tiny_encoder)
    rows = rows_of_all_lengths(n=200)
    true = Encoder(str(path), "cpu", forward="transformers").embed(rows)
    said: list[str] = []
    encoder = Encoder(str(path), "cpu", batch_tokens=1024, say=said.append)
    assert cosines(encoder.embed(rows), true).min() > 0.99999
    assert encoder._loaded.why_eager == "RuntimeError: no C compiler"
    assert "can't be compiled (RuntimeError: no C compiler)" in said[0]


def test_memory_that_runs_out_adds_one_shape_a_halving(
    seen: Seen, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retrotool.encoder import forwards

    monkeypatch.setattr(forwards, "cores", lambda: 1)
    whole: list[int] = []

    def layer(*arguments: object) -> torch.Tensor:
        x = arguments[1]
        assert isinstance(x, torch.Tensor)
        whole.append(len(x))
        if len(x) > 1024:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forwards.Layer.forward(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(forwards, "compile_layer", lambda: layer)
    path = make_family("bert", tmp_path / "bert", tiny_encoder)
    rng = np.random.default_rng(1)
    rows = [rng.integers(5, 160, n).tolist() for n in rng.integers(1, 98, 300)]
    true = Encoder(str(path), "cpu", forward="transformers").embed(rows)
    said: list[str] = []
    encoder = Encoder(str(path), "cpu", batch_tokens=4096, say=said.append)
    assert cosines(encoder.embed(rows), true).min() > 0.99999
    assert set(whole) == {4096, 2048, 1024}
    assert encoder.batch_tokens == 1024
    assert len(said) == 2
    assert encoder._loaded.why_eager == ""


def test_an_encoder_is_verified_as_it_will_compute(
    seen: Seen, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retrotool.encoder import forwards

    monkeypatch.setattr(forwards, "compile_layer", lambda: lambda layer, x, *rest: x * 1.5)  # miscompiled
    path = make_family("bert", tmp_path / "bert", tiny_encoder)
    said: list[str] = []
    encoder = Encoder(str(path), "cpu", batch_tokens=65536, say=said.append)
    encoder.verify()
    assert encoder.forward == "transformers"
    assert "transformers is used instead" in said[0]


@pytest.mark.parametrize(("heads", "fits"), [(4, False), (6, True), (1, True)])
def test_heads_that_flash_attention_has_not_take_the_other_way(
    heads: int, fits: bool, tiny_encoder: Path, tmp_path: Path
) -> None:
    from retrotool.encoder.encoder_identity import json_object
    from retrotool.encoder.forwards import _fits_flash
    from retrotool.encoder.packed import architecture_of

    path = make_family("bert", tmp_path / "bert", tiny_encoder, num_attention_heads=heads)
    assert _fits_flash(architecture_of(json_object(path / "config.json"))) == fits


def test_rows_shorter_than_a_batch_has_room_for(seen: Seen, tiny_encoder: Path, tmp_path: Path) -> None:
    path = make_family("bert", tmp_path / "bert", tiny_encoder)
    rows = [[5 + i % 150] for i in range(700)]
    true = Encoder(str(path), "cpu", forward="transformers").embed(rows)
    found = Encoder(str(path), "cpu", batch_tokens=1024).embed(rows)
    assert cosines(found, true).min() > 0.99999


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["bert", "mpnet"])
def test_the_packed_forward_on_a_gpu(kind: str, dtype: str, tiny_encoder: Path, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: make gpu-test")
    path = make_family(kind, tmp_path / kind, tiny_encoder, num_attention_heads=6)  # 8 a head: FlashAttention has it
    rows = rows_of_all_lengths(n=3000)
    true = Encoder(str(path), "cpu", forward="transformers").embed(rows)
    encoder = Encoder(str(path), "cuda", dtype, batch_tokens=8192)
    encoder.verify()
    assert encoder.forward == "packed"
    assert encoder._loaded.constant == (kind == "bert" and dtype != "float32")
    assert encoder.gelu == ("" if dtype == "float32" else "tanh")
    assert cosines(encoder.embed(rows), true).min() > {"float16": 0.9995, "bfloat16": 0.99, "float32": 0.9999}[dtype]
    assert encoder._loaded.why_eager == ""
    assert encoder.seconds > 0
