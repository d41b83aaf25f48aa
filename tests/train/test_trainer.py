"""``retrotool train``: a run that is stopped goes on as if it had not been, alone and in several processes."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import INTERRUPTED, Cli, make_rows, write_jsonl
from forked import Forked
from typer.testing import CliRunner

from retrotool import RetroDataset, api, interrupts
from retrotool.app import app
from retrotool.errors import RetrotoolError, UsageError
from retrotool.store.leases import Run
from retrotool.store.storage import storage_at
from retrotool.store.store import Store
from retrotool.train.retro_model import RetroConfig, RetroModel, load_model
from retrotool.train.trainer import Trainer, learning_rate, usable_neighbours
from retrotool.train.training_config import OptimiserConfig

CONFIG: dict[str, dict[str, Any]] = {
    "model": {
        "dimension": 16, "layers": 3, "heads": 2, "first_cross_layer": 2, "encoder_dimension": 16, "encoder_heads": 2,
    },
    "data": {"sequence_length": 64, "batch_size": 3},
    "optimiser": {
        "steps": 12, "accumulation": 2, "learning_rate": 0.01, "warmup_steps": 2, "checkpoint_steps": 4,
    },
}  # fmt: skip


def write_config(path: Path, **sections: dict[str, Any]) -> Path:
    """The settings of these tests, with others in some sections."""
    lines = []
    for name, values in CONFIG.items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in {**values, **sections.get(name, {})}.items()]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path / "small.toml")


def losses(out: Path) -> list[dict[str, Any]]:
    """The lines of losses.jsonl, without what depends on the time."""
    lines = [json.loads(line) for line in storage_at(out).get("losses.jsonl").splitlines()]
    return [{key: line[key] for key in ("step", "tokens", "loss", "bits_per_token")} for line in lines]


def newest(out: Path) -> dict[str, Any]:
    heads = [one.path for one in storage_at(out).list("checkpoints/") if one.path.endswith(".json")]
    found: dict[str, Any] = json.loads(storage_at(out).get(heads[-1]))
    return found


def tensors(out: Path) -> dict[str, torch.Tensor]:
    """Weights, and the state of the optimiser, of the last checkpoint."""
    files = [newest(out)["files"][name]["path"] for name in ("model", "optimiser")]
    return {key: value for file in files for key, value in safetensors.torch.load(storage_at(out).get(file)).items()}


def same(one: Path, other: Path) -> bool:
    """Whether two runs are equal to the bit: all losses, and what the last checkpoint has."""
    a, b = tensors(one), tensors(other)
    return losses(one) == losses(other) and a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def at_write(part: str, number: int, *counts: int) -> Callable[[], None]:
    """Send a signal to the process itself, when it is about to name a file for the first time, or the ``counts``-th."""

    def before() -> None:
        seen = 0

        def hear(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if (
                event == "retrotool.disk"
                and arguments[0] in ("rename", "finish", "overwrite")
                and part in str(arguments[1])
            ):
                seen += 1
                if seen in (counts or (1,)):
                    os.kill(os.getpid(), number)

        sys.addaudithook(hear)

    return before


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """A store of short chunks with their neighbours. Not to be changed."""
    folder = tmp_path_factory.mktemp("short")
    rows = write_jsonl(folder / "rows.jsonl", make_rows(39, words=40))
    api.chunk(folder / "store", [str(rows)], tokenizer=str(tiny_encoder), chunk_length=16)
    api.embed(folder / "store", encoder=str(tiny_encoder))
    api.neighbours(folder / "store")
    return folder / "store"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, store: Path, cli: Cli) -> Path:
    """A run that nothing interrupted. Not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    done = cli("train", store, "--config", write_config(folder / "small.toml"), "--out", folder / "run", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["step"], found["resumed"]) == (12, 0)
    return folder / "run"


def test_losses_and_checkpoints(whole: Path, store: Path) -> None:
    lines = losses(whole)
    assert [line["step"] for line in lines] == list(range(1, 13))
    # Each step has other texts, but the first ones of a model that knows nothing are all alike.
    assert abs(lines[0]["loss"] - math.log(api_vocabulary(store))) < 0.2
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert all(math.isclose(line["bits_per_token"], line["loss"] / math.log(2)) for line in lines)
    batches = list(RetroDataset(store, sequence_length=64, batch_size=3))
    targets = [int(batch["loss_mask"][:, 1:].sum()) for batch in batches[:4]]
    assert [line["tokens"] for line in lines[:2]] == [sum(targets[:2]), sum(targets)]
    names = [one.path.removeprefix("checkpoints/") for one in storage_at(whole).list("checkpoints/")]
    assert [name for name in names if name.endswith(".json")] == ["0000000008.json", "0000000012.json"]
    assert len(names) == 6
    consumed, epoch = (newest(whole)["dataset"][key] for key in ("consumed", "epoch"))
    assert epoch > 0 and 0 < consumed < newest(whole)["dataset"]["sequences"], "it ended within an epoch"


def api_vocabulary(store: Path) -> int:
    return int(api.info(store).tokenizer["vocabulary"])


@pytest.mark.parametrize("part", ["losses.jsonl", "-optimiser-", "0000000008.json"])
def test_a_run_that_is_killed_is_resumed_to_the_bit(
    whole: Path, store: Path, config: Path, tmp_path: Path, cli: Cli, part: str
) -> None:
    train = ("train", store, "--config", config, "--out", tmp_path / "run")
    killed = cli(*train, preexec_fn=at_write(part, signal.SIGKILL, 1 if part.endswith(".json") else 2))
    assert killed.returncode == -signal.SIGKILL
    assert newest(tmp_path / "run")["step"] == 4
    done = cli(*train, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["resumed"] == 4
    assert same(tmp_path / "run", whole)
    assert not list(storage_at(tmp_path / "run").unfinished())
    assert len(list(storage_at(tmp_path / "run").list("checkpoints/"))) == 6


@pytest.mark.parametrize(("number", "counts"), [(signal.SIGTERM, (1, 2)), (signal.SIGINT, (1,))])
def test_a_signal_ends_a_run_with_a_checkpoint(
    whole: Path, store: Path, config: Path, tmp_path: Path, cli: Cli, number: int, counts: tuple[int, ...]
) -> None:
    train = ("train", store, "--config", config, "--out", tmp_path / "run")
    stopped = cli(*train, preexec_fn=at_write("-model-", number, *counts))
    assert (stopped.returncode, stopped.stdout, stopped.stderr) == (130, "", INTERRUPTED)
    assert newest(tmp_path / "run")["step"] == 5 == len(losses(tmp_path / "run"))
    done = cli(*train)
    assert (done.returncode, done.stderr) == (0, "")
    assert "in 12 steps, resumed after step 5" in done.stdout
    assert same(tmp_path / "run", whole)
    again = cli(*train, "--json")
    assert json.loads(again.stdout)["resumed"] == 12, "nothing is left to do"
    assert same(tmp_path / "run", whole)


def run_ranks(size: int, *arguments: object) -> list[tuple[str, str]]:
    """Run a command in several processes, as torchrun does; return what each prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip

    def become(rank: int) -> Callable[[], None]:
        return lambda: os.environ.update({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})

    running = [Forked([str(one) for one in arguments], before=become(rank)) for rank in range(size)]
    printed = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0] * size, printed
    return printed


def test_two_processes_train_as_one_with_twice_the_batches(store: Path, tmp_path: Path) -> None:
    """A step has a whole epoch, as processes read it in another order."""
    n = RetroDataset(store, sequence_length=64).sequences
    assert n % 2 == 1, "one process has a sequence less"
    data = {"batch_size": (n + 1) // 2}
    for name, accumulation, size in (("one", 2, 1), ("two", 1, 2)):
        optimiser = {"steps": 4, "accumulation": accumulation, "checkpoint_steps": 3, "clip": 1000}
        path = write_config(tmp_path / f"{name}.toml", data=data, optimiser=optimiser)
        arguments = ("train", store, "--config", path, "--out", tmp_path / name, "--json")
        printed = run_ranks(size, *arguments)
        assert json.loads(printed[0][0])["step"] == 4
        assert [out for out, _ in printed[1:]] == [""] * (size - 1), "one of them prints the result"
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [line["tokens"] for line in one] == [line["tokens"] for line in two]
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two], rel=1e-5)
    a, b = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    for key in a:
        if "exp_avg_sq" not in key:  # the mean gradients, too
            torch.testing.assert_close(a[key], b[key], rtol=1e-2, atol=1e-4)


def test_a_step_does_not_depend_on_how_it_is_divided(store: Path, tmp_path: Path) -> None:
    found = []
    for size, accumulation in ((6, 1), (2, 3)):
        optimiser = {"steps": 4, "accumulation": accumulation}
        config = write_config(tmp_path / "some.toml", data={"batch_size": size}, optimiser=optimiser)
        api.train(store, config=config, out=tmp_path / str(size), device="cpu")
        found.append([line["loss"] for line in losses(tmp_path / str(size))])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_the_loss_is_the_mean_over_tokens_of_a_model_without_foreign_neighbours(whole: Path, store: Path) -> None:
    batches = itertools.islice(RetroDataset(store, sequence_length=64, batch_size=3), 2)
    model, nats, count, foreign = RetroModel(load_model(whole).config), 0.0, 0, 0
    for batch in batches:
        usable = batch["neighbour_mask"].clone()
        for b, slots in enumerate(batch["documents"].tolist()):
            for u, (document, following) in enumerate(itertools.pairwise(slots)):
                if document != following:
                    foreign += int(usable[b, u].any())
                    usable[b, u] = False
        assert torch.equal(usable_neighbours(batch), usable)
        with torch.no_grad():
            nats += float(model.loss_of(batch["tokens"], batch["loss_mask"], batch["neighbours"], usable).sum())
        count += int(batch["loss_mask"][:, 1:].sum())
    assert foreign, "some chunks are followed by another document, and have neighbours"
    assert losses(whole)[0]["loss"] == pytest.approx(nats / count, rel=1e-6)


def test_the_learning_rate_rises_and_falls() -> None:
    config = OptimiserConfig(steps=10, learning_rate=1.0, final_learning_rate=0.2, warmup_steps=4)
    rates = [learning_rate(config, step) for step in range(11)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[7] == pytest.approx(0.6) and rates[10] == pytest.approx(0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_a_model_is_loaded_for_others(whole: Path, store: Path, tmp_path: Path) -> None:
    model = load_model(whole)
    assert not model.training
    batch = next(iter(RetroDataset(store, sequence_length=64, batch_size=3)))
    with torch.no_grad():
        loss = model.loss_of(batch["tokens"], batch["loss_mask"], batch["neighbours"], batch["neighbour_mask"])
    assert loss.shape == batch["tokens"].shape
    assert 0 < float(loss.sum() / batch["loss_mask"].sum()) < losses(whole)[0]["loss"] - 0.5
    with pytest.raises(UsageError, match="has no checkpoint"):
        load_model(tmp_path / "nothing")


def test_without_retrieval_there_is_no_encoder(store: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "plain.toml", model={"retrieval": False}, optimiser={"steps": 1})
    result = api.train(store, config=config, out=tmp_path / "run", device="cpu")
    assert result.parameters == sum(weight.numel() for weight in load_model(tmp_path / "run").parameters())
    assert not any("cross" in name or "encoder" in name for name in tensors(tmp_path / "run"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model", "is not TOML"),
        ("[train]", "train is not a section"),
        ("model = 1", "model is not a section"),
        ("[optimiser]", "optimiser.steps is missing"),
        ("[optimiser]\nsteps = 1\nlr = 0.1", "optimiser.lr is unknown"),
        ("[optimiser]\nsteps = 0", "optimiser.steps is 0, which is too small"),
        ("[optimiser]\nsteps = 1.5", "optimiser.steps is 1.5, not an integer"),
        ("[optimiser]\nsteps = 1\nclip = nan", "optimiser.clip is nan, which is too small"),
        ("[optimiser]\nsteps = 1\nbeta1 = 1", "beta1=1 and beta2=0.95 are not less than 1"),
        ("[optimiser]\nsteps = 1\n[data]\npacked = 1", "data.packed is 1, not true or false"),
        ("[optimiser]\nsteps = 1\n[data]\ntable = 'x'", "has no neighbours 'x'"),
        ("[optimiser]\nsteps = 1\n[data]\nsequence_length = 100", "sequence_length=100 is not a multiple"),
        ("[optimiser]\nsteps = 1\n[model]\nvocabulary = 9", "model.vocabulary is unknown"),
        ("[optimiser]\nsteps = 1\n[model]\nheads = 3", "model: dimension=512 is not a multiple of twice its 3 heads"),
        ("[optimiser]\nsteps = 1\n[model]\nneighbours = 500", "500"),
    ],
)
def test_wrong_settings_are_named(store: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "wrong.toml").write_text(text)
    command = ["train", store, "--config", tmp_path / "wrong.toml", "--out", tmp_path / "run"]
    done = CliRunner().invoke(app, [str(word) for word in command])
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr


def test_processes_without_torchrun_are_refused(store: Path, config: Path, tmp_path: Path, cli: Cli) -> None:
    train = ("train", store, "--config", config, "--out", tmp_path / "run")
    done = cli(*train, preexec_fn=lambda: os.environ.update({"RANK": "0", "WORLD_SIZE": "2"}))
    assert (done.returncode, done.stdout) == (2, "")
    assert "MASTER_ADDR expected, but not set" in done.stderr and "with torchrun.\n" in done.stderr


def test_a_run_is_resumed_with_its_model_and_store_alone(whole: Path, store: Path, tmp_path: Path, cli: Cli) -> None:
    other = write_config(tmp_path / "other.toml", model={"layers": 2})
    done = cli("train", store, "--config", other, "--out", whole)
    assert (done.returncode, f"error: the run in {whole} has layers=3" in done.stderr) == (2, True)
    with Run(storage_at(whole)):
        done = cli("train", store, "--config", write_config(tmp_path / "same.toml"), "--out", whole)
    assert (done.returncode, f"is training in {whole}" in done.stderr) == (14, True)
    done = cli("train", store, "--config", tmp_path / "same.toml", "--out", store)
    assert (done.returncode, done.stderr.splitlines()[0]) == (2, f"error: {store} is a store")


def test_a_run_is_not_resumed_with_another_table(store: Path, tmp_path: Path, tiny_encoder: Path) -> None:
    """Also if the table is not named: the only one of a store is not its main one for ever."""
    rows = write_jsonl(tmp_path / "rows.jsonl", make_rows(9, words=40))
    own = tmp_path / "store"
    api.chunk(own, [str(rows)], tokenizer=str(tiny_encoder), chunk_length=16)
    api.embed(own, encoder=str(tiny_encoder))
    api.neighbours(own, name="first")
    config = write_config(tmp_path / "small.toml", optimiser={"steps": 2})
    api.train(own, config=config, out=tmp_path / "run", device="cpu")
    api.neighbours(own)
    with pytest.raises(UsageError, match=r"the run in .* has table=first"):
        api.train(own, config=config, out=tmp_path / "run", device="cpu")


def test_a_gradient_that_is_not_finite_changes_nothing(store: Path) -> None:
    vocabulary = Store.open(store).identity.tokenizer.vocabulary
    config = RetroConfig(vocabulary, 16, 16, 2, 2, first_cross_layer=2, encoder_dimension=16, encoder_heads=2)
    trainer = Trainer(
        RetroModel(config), RetroDataset(store, sequence_length=64, batch_size=2), OptimiserConfig(steps=2), "cpu"
    )
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(RetrotoolError, match="loss or gradient of step 1 is not a finite number"):
        trainer.advance(lambda: False)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.on_disk
def test_a_folder_in_a_store_is_refused(store: Path, config: Path, cli: Cli) -> None:
    done = cli("train", store, "--config", config, "--out", store / "run")
    assert (done.returncode, f"is in the store {store}" in done.stderr) == (2, True)


@pytest.mark.on_disk
def test_a_damaged_checkpoint_is_refused(store: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "short.toml", optimiser={"steps": 2, "checkpoint_steps": 1})
    api.train(store, config=config, out=tmp_path / "run", device="cpu")
    file = tmp_path / "run" / newest(tmp_path / "run")["files"]["model"]["path"]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    command = ["train", str(store), "--config", str(config), "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 12
    assert "is missing, or not what" in done.stderr
    head = tmp_path / "run" / "checkpoints" / "0000000002.json"
    assert f"remove {head}" in done.stderr
    head.unlink()
    done = CliRunner().invoke(app, [*command, "--json"])
    assert json.loads(done.stdout)["resumed"] == 1


@pytest.fixture
def plain_ctrl_c() -> Iterator[None]:
    """Python's own handler: a command that ran in this process may have installed another."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("plain_ctrl_c")
def test_a_second_ctrl_c_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "_REPEATED_SECONDS", 0.0)
    with interrupts.deferred() as came, pytest.raises(KeyboardInterrupt):
        assert not came()
        signal.raise_signal(signal.SIGINT)
        assert came()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
