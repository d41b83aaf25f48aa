"""Bits per byte against literal loops over prompts that are built by hand, and groups, intervals and purges."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from difflib import SequenceMatcher
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli, Shared, make_causal_model, make_rows, make_text, write_jsonl
from stored import copy_store

import retrotool
from retrotool import api
from retrotool.errors import RetrotoolError, UsageError
from retrotool.evaluate.bits_per_byte import estimate_ratio
from retrotool.evaluate.causal_model import load_causal_model
from retrotool.evaluate.evaluation_text import draw
from retrotool.evaluate.language_models import DocumentChunks, LanguageModel, RetroWindows, load_retro_model
from retrotool.neighbours.table_reader import NeighbourTokens
from retrotool.store.store import Store

K, CONTEXT, LENGTH = 3, 2, 64
SHARES = [i / 8 for i in range(1, 9)]


@pytest.fixture(scope="session")
def evaluation(shared: Shared[Path], built_store: Path, tiny_encoder: Path) -> Path:
    """Documents that are new, that quote those of ``built_store`` and that are copies, with neighbours in it."""

    def make(folder: Path) -> Path:
        database, store = retrotool.open(built_store), folder / "evaluation"
        long = [entry.id for entry in database.documents() if entry.n_chunks >= 4][:4]
        texts = {name: " ".join(database.chunk(i).text for i in database.document(name)) for name in long}
        rows = [{"id": f"copy-{name}", "source": "copied", "text": text} for name, text in texts.items()]
        rows += [{"id": f"new-{i}", "source": "new", "text": make_text(900 + i, 30 + 70 * i)} for i in range(4)]
        rows += [
            {"id": f"quote-{i}", "source": "quoting", "text": f"{make_text(800 + i, 50)} {text[200:900]}"}
            for i, text in enumerate(texts.values())
        ]
        api.chunk(store, [str(write_jsonl(folder / "rows.jsonl", rows))], tokenizer=str(tiny_encoder))
        api.embed(store, encoder=str(tiny_encoder))
        api.neighbours(built_store, queries=store)
        return store

    return shared("evaluation", make)


@pytest.fixture(scope="session")
def llama(shared: Shared[Path], tiny_encoder: Path) -> Path:
    tokenizer = (tiny_encoder / "tokenizer.json").read_bytes()
    return shared("llama", lambda folder: make_causal_model(folder / "llama", tokenizer, "float64", bos_token_id=2))


def chunks_of(store: Path) -> Iterator[tuple[str, list[int]]]:
    """Each document's id, and the ids of its live chunks."""
    reader = retrotool.open(store)
    for entry in reader.documents():
        ids = np.arange(entry.n_chunks) + entry.first_chunk
        yield entry.id, [int(i) for i in ids[reader.is_live(ids)]]


def literal(store: Path, network: Any, begin: int, table: str | None, k: int) -> dict[int, float]:
    """The nats of each chunk, one prompt at a time; ``table`` None: without retrieval."""
    reader, found = retrotool.open(store), {}
    for _, ids in chunks_of(store):
        for place, chunk in enumerate(ids):
            prompt = [begin]
            if place and table is not None:
                for near in reversed(reader.neighbours(ids[place - 1], table, k)):
                    prompt += near.chunk.tokens.tolist()
                    prompt += near.continuation.tokens.tolist() if near.continuation else []
            for before in ids[max(0, place - CONTEXT) : place]:
                prompt += reader.chunk(before).tokens.tolist()
            own = reader.chunk(chunk).tokens.tolist()
            with torch.no_grad():
                logs = network(torch.tensor([prompt + own])).logits[0].log_softmax(-1)
            found[chunk] = -sum(float(logs[len(prompt) + i - 1, token]) for i, token in enumerate(own))
    return found


def bits_per_byte(store: Path, nats: dict[int, float]) -> float:
    reader = retrotool.open(store)
    return sum(nats.values()) / math.log(2) / sum(len(reader.chunk(chunk).text.encode()) for chunk in nats)


@pytest.mark.parametrize("after", ["nothing", "purges", "edits"])
def test_bits_per_byte_are_those_of_prompts_built_by_hand(
    evaluation: Path, built_store: Path, llama: Path, tmp_path: Path, after: str
) -> None:
    from transformers import AutoModelForCausalLM

    database, store = built_store, evaluation
    if after != "nothing":
        database, store = (
            copy_store(built_store, tmp_path / "database"),
            copy_store(evaluation, tmp_path / "evaluation"),
        )
        api.neighbours(database, queries=store)
    before = api.evaluate(database, queries=store, model=llama, k=K, context=CONTEXT * LENGTH).tables[0].all.on
    if after == "purges":
        named = {near.chunk.document for _, ids in chunks_of(store) for i in ids for near in near_of(store, i)}
        (tmp_path / "ids").write_text("\n".join(sorted(named)[::2]))
        api.purge(database, api.Selectors(document=tmp_path / "ids"), reason="test")
        api.purge(store, api.Selectors(document="new-3"), reason="test")
    if after == "edits":
        chunk = next(ids for name, ids in chunks_of(store) if name == "new-3")[0]
        (tmp_path / "edits").write_text(json.dumps({"chunk": str(chunk), "neighbours": ["0:5", "1:7"]}))
        api.edit_neighbours(store, tmp_path / "edits")
    found = api.evaluate(database, queries=store, model=llama, k=K, context=CONTEXT * LENGTH, batch_size=3)
    network = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64)
    off, on = (bits_per_byte(store, literal(store, network, 2, table, K)) for table in (None, "main"))
    whole = found.tables[0].all
    assert whole.on is not None and whole.off is not None and whole.difference is not None
    assert (whole.on.value, whole.off.value) == pytest.approx((on, off), rel=1e-9)
    assert whole.difference.value == pytest.approx(on - off, rel=1e-6)
    assert found.chunks == found.live_chunks == whole.chunks == sum(len(ids) for _, ids in chunks_of(store))
    assert abs(on - off) > 1e-4, "the neighbours matter"
    assert before is not None and (abs(before.value - on) < 1e-9) == (after == "nothing")


def test_a_model_runs_in_the_type_that_is_asked_for(evaluation: Path, built_store: Path, llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"queries": evaluation, "model": llama, "k": K, "context": CONTEXT * LENGTH}
    exact, found = (
        api.evaluate(built_store, **options, dtype=dtype).tables[0].all.on for dtype in ("auto", "bfloat16")
    )
    network = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    assert exact is not None and found is not None and found.value != exact.value
    assert found.value == pytest.approx(bits_per_byte(evaluation, literal(evaluation, network, 2, "main", K)), rel=1e-3)
    with pytest.raises(UsageError, match="dtype 'int8' is unknown"):
        api.evaluate(built_store, **options, dtype="int8")


def near_of(store: Path, chunk: int) -> list[Any]:
    return retrotool.open(store).neighbours(chunk, "main", K)


class Copying:
    """A model that copies from the neighbours of the chunk before, and knows nothing; keeps what it was given."""

    method, context, reach = "copying", 0, 1

    def __init__(self) -> None:
        self.given: list[NeighbourTokens] = []

    def nats(self, chunks: DocumentChunks, near: NeighbourTokens | None) -> np.ndarray[Any, Any]:
        found = np.full(chunks.tokens.shape, 5.0)
        for i, (tokens, n) in enumerate(zip(chunks.tokens, chunks.n_tokens, strict=True)):
            if near is not None and i > chunks.first[i]:
                known = [pair[0, : n[0]].tolist() + pair[1, : n[1]].tolist()
                         for pair, n in zip(near.tokens[i - 1], near.n_tokens[i - 1], strict=True)]  # fmt: skip
                for run in known:
                    match = SequenceMatcher(None, tokens[:n].tolist(), run, autojunk=False).find_longest_match()
                    if match.size >= 10:  # shorter runs are common to all texts
                        found[i, match.a : match.a + match.size] = 0.5
            found[i, n:] = 0
        if near is not None:
            self.given.append(near)
        return found


def test_planted_text_helps_where_copies_are_allowed(evaluation: Path, built_store: Path) -> None:
    table = api.evaluate(built_store, queries=evaluation, model=Copying()).tables[0]
    counts = [table.up_to[f"{share:g}"].chunks for share in SHARES]
    assert counts == sorted(counts) and 0 < counts[0] < counts[-1] == table.all.chunks
    gains = {name: one.difference for name, one in (*table.up_to.items(), *table.sources.items())}
    assert all(one is not None for one in gains.values())
    values = {name: one.value for name, one in gains.items() if one is not None}
    assert values["1"] < 10 * values["0.125"] <= 0 and values["copied"] < 3 * values["new"] <= 0
    assert sum(one.chunks for one in table.sources.values()) == table.all.chunks
    assert {name: one.documents for name, one in table.sources.items()} == {"copied": 4, "new": 4, "quoting": 4}


def test_shares_are_those_of_the_longest_common_substring(evaluation: Path, built_store: Path) -> None:
    reader, shares = retrotool.open(evaluation), []
    for _, ids in chunks_of(evaluation):
        for place, chunk in enumerate(ids):
            own, runs = reader.chunk(chunk).tokens.tolist(), [0]
            given = reader.neighbours(ids[place - 1], "main", 2) if place else []
            for near in reader.neighbours(chunk, "main", 10) + given:
                other = near.chunk.tokens.tolist()
                other += near.continuation.tokens.tolist() if near.continuation else []
                runs.append(SequenceMatcher(None, own, other, autojunk=False).find_longest_match().size)
            shares.append(max(runs) / len(own))
    table = api.evaluate(built_store, queries=evaluation, model=Copying()).tables[0]
    assert [table.up_to[f"{a:g}"].chunks for a in SHARES] == [sum(one <= a for one in shares) for a in SHARES]


def test_what_is_purged_is_not_given(evaluation: Path, built_store: Path, tmp_path: Path) -> None:
    database, store = copy_store(built_store, tmp_path / "database"), copy_store(evaluation, tmp_path / "evaluation")
    api.neighbours(database, queries=store)
    before, after = Copying(), Copying()
    all_found = api.evaluate(database, queries=store, model=before, k=5)
    api.purge(database, api.Selectors(where="source = 'a'"), reason="test")
    api.evaluate(database, queries=store, model=after, k=5)
    reader = retrotool.open(database)
    for model, has_purged in ((before, True), (after, False)):
        given = np.concatenate([near.ids[near.n_tokens[:, :, 0] > 0] for near in model.given])
        assert len(given) and (~reader.is_live(given)).any() == has_purged
    api.purge(store, api.Selectors(where="source = 'copied'"), reason="test")
    fewer = api.evaluate(database, queries=store, model=after, k=5)
    assert fewer.chunks < all_found.chunks and set(fewer.tables[0].sources) == {"new", "quoting"}


def test_tables_of_swapped_databases_are_compared(
    evaluation: Path, built_store: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    store, other = copy_store(evaluation, tmp_path / "evaluation"), tmp_path / "other"
    api.chunk(other, [str(write_jsonl(tmp_path / "o.jsonl", make_rows(9, first=300)))], tokenizer=str(tiny_encoder))
    api.embed(other, encoder=str(tiny_encoder))
    api.neighbours(other, queries=store, name="swapped")
    api.neighbours(other, queries=store, name="mixed", databases=[(str(built_store), None)])
    found = api.evaluate(built_store, queries=store, model=Copying(), names=["main", "swapped", "mixed"])
    main, swapped, mixed = found.tables
    assert [len(table.databases) for table in found.tables] == [1, 1, 2]
    assert main.all.off == swapped.all.off == mixed.all.off
    assert swapped.all.difference.value > mixed.all.difference.value
    assert api.evaluate(other, queries=store, model=Copying(), names=["swapped"]).tables == (swapped,)
    with pytest.raises(UsageError, match=r"the neighbours 'swapped' are in .*other, not in .*store"):
        api.evaluate(built_store, queries=store, model=Copying(), names=["swapped"])
    with pytest.raises(UsageError, match="has no neighbours 'nothing'"):
        api.evaluate(built_store, queries=store, model=Copying(), names=["nothing"])


class Recording:
    """Passes all on to a model, and keeps the nats of each chunk by its tokens and those of the chunk before."""

    def __init__(self, model: LanguageModel) -> None:
        self._model, self.method, self.context, self.reach = model, model.method, model.context, model.reach
        self.nats_of: dict[tuple[str, bytes, bytes], float] = {}

    def nats(self, chunks: DocumentChunks, near: NeighbourTokens | None) -> np.ndarray[Any, Any]:
        found = self._model.nats(chunks, near)
        assert not found[~chunks.scored].any()
        for i in np.flatnonzero(chunks.scored):
            before = chunks.tokens[i - 1].tobytes() if i > chunks.first[i] else b""
            self.nats_of["off" if near is None else "on", before, chunks.tokens[i].tobytes()] = found[i].sum()
        return found


@pytest.mark.parametrize("context", [0, 2 * LENGTH, 20 * LENGTH])
@pytest.mark.parametrize("kind", ["in context", "RETRO"])
def test_drawn_chunks_have_the_nats_that_they_have_among_all(
    evaluation: Path, built_store: Path, llama: Path, kind: str, context: int
) -> None:
    def recorded(limit: int | None, seed: int = 0) -> tuple[Any, dict[tuple[str, bytes, bytes], float]]:
        inner: LanguageModel = RetroWindows(Sums(LENGTH), context, "cpu", batch_size=3)
        if kind == "in context":
            inner = load_causal_model(llama, Store.open(evaluation), 2, context, "cpu", "float64", 4)
        model = Recording(inner)
        return api.evaluate(built_store, queries=evaluation, model=model, limit=limit, seed=seed), model.nats_of

    (whole, expected), (drawn, found), (_, others) = recorded(None), recorded(9), recorded(9, seed=1)
    assert recorded(9) == (drawn, found), "the same chunks each time"
    assert drawn.chunks == 9 and drawn.live_chunks == whole.live_chunks == whole.chunks > 20
    assert {key: expected[key] for key in found} == pytest.approx(found, rel=1e-12)
    assert found.keys() != others.keys()
    assert drawn.tables[0].all.documents >= 5, "chunks are drawn, not documents"


def test_new_text_without_neighbours_is_refused_with_the_command(
    evaluation: Path, built_store: Path, tmp_path: Path
) -> None:
    store = copy_store(evaluation, tmp_path / "evaluation")
    api.chunk(store, [str(write_jsonl(tmp_path / "more.jsonl", make_rows(3, first=700)))])
    with pytest.raises(UsageError, match=r"part 1 of .*evaluation has no neighbours 'main' yet") as error:
        api.evaluate(built_store, queries=store, model=Copying())
    assert f"retrotool neighbours {built_store} --queries {store}" in error.value.advice


def test_of_few_saved_neighbours_the_number_is_said(
    evaluation: Path, built_store: Path, llama: Path, tmp_path: Path, cli: Cli
) -> None:
    store = copy_store(evaluation, tmp_path / "evaluation")
    api.neighbours(built_store, queries=store, name="few", saved=2)
    given = ("evaluate", built_store, "--queries", store, "--model", llama, "--limit", 3, "--context", 64)
    printed = cli(*given, "--name", "few", "--name", "main").stdout
    assert printed.splitlines()[-1] == "few has 2 neighbours saved, so copied is what these have, not the nearest 10."
    found = json.loads(cli(*given, "--name", "main", "--name", "few", "--json").stdout)
    assert [table["compared"] for table in found["tables"]] == [10, 2]


@pytest.mark.parametrize(("n", "count"), [(12, 4), (12, 9), (12, 12), (1, 1)])
def test_every_set_is_as_likely(n: int, count: int) -> None:
    draws, rounds = [draw(n, count, seed) for seed in range(2000)], 2000
    assert all((np.diff(one) > 0).all() and len(one) == count for one in draws)
    share = count / n
    counts = np.bincount(np.concatenate(draws), minlength=n)
    assert np.abs(counts - rounds * share).max() <= 4.5 * math.sqrt(rounds * share * (1 - share))
    pairs = sum(int(0 in one and n - 1 in one) for one in draws)
    both = share * (count - 1) / (n - 1) if n > 1 else 1
    assert abs(pairs - rounds * both) <= 4.5 * math.sqrt(rounds * both * (1 - both))


@pytest.mark.parametrize("paired", [False, True])
def test_intervals_are_those_of_a_bootstrap_over_documents(paired: bool) -> None:
    draw = np.random.default_rng(0)
    document = np.repeat(np.arange(150), draw.integers(1, 20, 150))
    sizes = draw.integers(20, 400, len(document))
    off = sizes * (1 + draw.normal(0, 0.2, 150)[document] + draw.normal(0, 0.1, len(document)))
    amounts = off * draw.normal(-0.05, 0.02, 150)[document] if paired else off
    found = estimate_ratio(amounts, sizes, document)
    assert found is not None and found.low is not None and found.high is not None
    assert found.value == pytest.approx(amounts.sum() / sizes.sum())
    of_document = np.stack([np.bincount(document, amounts), np.bincount(document, sizes)])
    totals = of_document[:, draw.integers(0, 150, (4000, 150))].sum(axis=2)
    low, high = np.quantile(totals[0] / totals[1], [0.025, 0.975])
    assert found.high - found.low == pytest.approx(high - low, rel=0.08)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.1 * (high - low))
    assert estimate_ratio(amounts[:1], sizes[:1], document[:1]).low is None
    assert estimate_ratio(amounts[:0], sizes[:0], document[:0]) is None


class Sums:
    """In place of a RETRO model: nats that depend on all that comes before, and on the last chunk's neighbours."""

    def __init__(self, chunk_length: int) -> None:
        self.config = SimpleNamespace(vocabulary=50, chunk_length=chunk_length)

    def loss_of(
        self, tokens: Any, mask: Any, neighbours: Any = None, neighbour_mask: Any = None, *, scored: Any
    ) -> Any:
        values = tokens * mask
        nats = 1 + 0.1 * (values.cumsum(1) - values).double()
        if neighbours is not None:
            of_chunk = (neighbours * neighbour_mask).sum((2, 3)).double()
            m = self.config.chunk_length
            nats[:, m:] += of_chunk[:, :-1].repeat_interleave(m, 1)
        return nats * (mask & scored)


@pytest.mark.parametrize("context", [0, 4, 12, 100])
def test_a_retro_model_reads_the_context_of_each_chunk(context: int) -> None:
    draw = np.random.default_rng(1)
    counts = [1, 7, 3, 2, 9]
    n = sum(counts)
    tokens, n_tokens = draw.integers(1, 50, (n, 4)), np.full(n, 4)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    n_tokens[np.cumsum(counts) - 1] = [1, 2, 3, 4, 1]
    tokens[np.arange(4) >= n_tokens[:, None]] = 0
    n_near = draw.integers(0, 5, (n, 2, 2))
    near = NeighbourTokens(np.zeros((n, 2), int), np.zeros((n, 2), np.uint8), n_near, draw.integers(1, 9, (n, 2, 2, 4)))
    model = RetroWindows(Sums(4), context, "cpu", batch_size=3)
    assert model.context == context
    for given in (None, near):
        found = model.nats(DocumentChunks(tokens, n_tokens, first, np.ones(n, np.bool_)), given)
        for i in range(n):
            begin = max(first[i], i - context // 4)
            before = tokens[begin:i].sum()
            retrieved = 0
            if given is not None and i > begin:
                retrieved = sum(given.tokens[i - 1, j, h, : n_near[i - 1, j, h]].sum() for j in (0, 1) for h in (0, 1))
            for j in range(4):
                expected = 1 + 0.1 * (before + tokens[i, :j].sum()) + retrieved if j < n_tokens[i] else 0
                expected = math.log(50) if i == begin and j == 0 else expected
                assert found[i, j] == pytest.approx(expected), (i, j)


@pytest.mark.on_disk
def test_a_model_that_was_trained_here(evaluation: Path, built_store: Path, tmp_path: Path, cli: Cli) -> None:
    retro_model = pytest.importorskip("retrotool.train.retro_model")
    (tmp_path / "tiny.toml").write_text(
        "[model]\ndimension = 16\nlayers = 2\nheads = 2\nfirst_cross_layer = 1\nencoder_dimension = 8\n"
        "encoder_heads = 2\n[data]\nsequence_length = 192\nbatch_size = 4\n[optimiser]\nsteps = 3\n"
    )
    trained = cli("train", built_store, "--config", tmp_path / "tiny.toml", "--out", tmp_path / "out")
    assert trained.returncode == 0, trained.stderr
    found = api.evaluate(built_store, queries=evaluation, model=tmp_path / "out")
    assert (found.method, found.context, found.k) == ("RETRO", 128, 2)
    model, reader = retro_model.load_model(tmp_path / "out"), retrotool.open(evaluation)
    nats: dict[bool, dict[int, float]] = {True: {}, False: {}}
    for _, ids in chunks_of(evaluation):
        for place, chunk in enumerate(ids):
            window = ids[max(0, place - 2) : place + 1]
            tokens, near = torch.zeros(2, len(window), LENGTH), torch.zeros(2, len(window), 2, 2, LENGTH)  # and masks
            for row, one in enumerate(window):
                own = reader.chunk(one).tokens.tolist()
                tokens[0, row, : len(own)], tokens[1, row, : len(own)] = torch.tensor(own), 1
                for column, neighbour in enumerate(reader.neighbours(one, "main", 2)):
                    for half, piece in enumerate((neighbour.chunk, neighbour.continuation)):
                        other = piece.tokens.tolist() if piece else []
                        near[0, row, column, half, : len(other)] = torch.tensor(other)
                        near[1, row, column, half, : len(other)] = 1
            inputs = [tokens[0].reshape(1, -1).long(), tokens[1].reshape(1, -1).bool()]
            near_inputs = [near[0].reshape(1, len(window), 2, -1).long(), near[1].reshape(1, len(window), 2, -1).bool()]
            for on in (True, False):
                with torch.no_grad():
                    scores = model.loss_of(*inputs, *(near_inputs if on else []))[0, -LENGTH:]
                first = math.log(model.config.vocabulary) if not place else 0
                nats[on][chunk] = float(scores.sum()) + first
    whole = found.tables[0].all
    expected = bits_per_byte(evaluation, nats[True]), bits_per_byte(evaluation, nats[False])
    assert whole.on is not None and whole.off is not None
    assert (whole.on.value, whole.off.value) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UsageError, match="--context 32 leaves out the chunk whose neighbours the model gets"):
        api.evaluate(built_store, queries=evaluation, model=tmp_path / "out", context=32)
    refused = cli("evaluate", tmp_path, "--queries", evaluation, "--model", tmp_path)
    assert refused.returncode == 10
    refused = cli("evaluate", built_store, "--queries", evaluation, "--model", tmp_path)
    assert refused.returncode == 2 and "has no checkpoint" in refused.stderr
    rows = write_jsonl(tmp_path / "rows.jsonl", make_rows(2))
    for name, message, options in (
        ("other", "was trained with another tokenizer than", {}),
        ("short", f"was trained with chunks of {LENGTH} tokens, and .* has 32", {"chunk_length": 32}),
    ):
        api.chunk(tmp_path / name, [str(rows)], **options)
        with pytest.raises(UsageError, match=message):
            load_retro_model(tmp_path / "out", Store.open(tmp_path / name), 2, None, "cpu", "auto", batch_size=1)


def test_the_command_prints_a_line_for_each_group(evaluation: Path, built_store: Path, llama: Path, cli: Cli) -> None:
    given = ("evaluate", built_store, "--queries", evaluation, "--model", llama, "--limit", 12, "--context", 64)
    ended = cli(*given)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert "12 chunks of " in lines[0] and "(seed 0)" in lines[0] and "k = 2, up to 64 tokens" in lines[0]
    assert [line.split()[0] for line in lines[2:11]] == ["all", *["copied"] * 8]
    found = json.loads(cli(*given, "--json", "--seed", 1, "--name", "main").stdout)
    assert (found["chunks"], found["seed"], found["method"], found["context"]) == (12, 1, "in context", 64)
    assert found["tables"][0]["up_to"].keys() == {f"{share:g}" for share in SHARES}


def test_what_cannot_be_evaluated_is_refused(
    evaluation: Path, built_store: Path, llama: Path, byte_level_tokenizer: Path, tmp_path: Path, cli: Cli
) -> None:
    def refused(model: Path, **options: Any) -> RetrotoolError:
        with pytest.raises(UsageError) as error:
            api.evaluate(built_store, queries=evaluation, model=model, **options)
        return error.value

    assert "does not exist" in str(refused(tmp_path / "nothing"))
    foreign = make_causal_model(tmp_path / "foreign", byte_level_tokenizer.read_bytes())
    error = refused(foreign)
    assert "whose ids are not those of" in str(error)
    assert f"--tokenizer {foreign}" in error.advice
    tokenizer = (llama / "tokenizer.json").read_bytes()
    short = make_causal_model(tmp_path / "short", tokenizer, max_position_embeddings=512)
    assert api.evaluate(built_store, queries=evaluation, model=short, k=2, limit=5).context == 128
    assert "reads 512 tokens, of which 3 neighbours and the chunk leave 63" in str(refused(short, k=3))
    assert "leave 191" in str(refused(short, k=2, context=192))
    silent = make_causal_model(tmp_path / "silent", tokenizer, bos_token_id=None, eos_token_id=None)
    assert "has no bos or eos token" in str(refused(silent))
    assert "saved" in str(refused(llama, k=21))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "gguf" in str(refused(tmp_path / "model.gguf"))
    ended = cli("evaluate", built_store, "--queries", evaluation, "--model", tmp_path / "nothing", "--json")
    assert ended.returncode == 2 and json.loads(ended.stdout)["exit_code"] == 2
    ended = cli("evaluate", built_store, "--queries", evaluation, "--model", llama, "-k", 41)
    assert ended.returncode == 2
