"""The command line: help whose examples work, and results alone on stdout, one JSON object if asked for."""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import json
import os
import re
import shlex
import shutil
import struct
import termios
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import memory_storage
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from conftest import make_causal_model, make_rows, write_jsonl
from stored import stored_file, stored_files
from watching import STORE, outside, watching

from retrotool import api
from retrotool.app import app, give_bars_room
from retrotool.build import command as build_command
from retrotool.chunk import command as chunk_command
from retrotool.cli import output
from retrotool.embed import command as embed_command
from retrotool.evaluate import command as evaluate_command
from retrotool.export import command as export_command
from retrotool.index import command as index_command
from retrotool.info import command as info_command
from retrotool.inspect import command as inspect_command
from retrotool.leakage import command as leakage_command
from retrotool.neighbours import command as neighbours_command
from retrotool.plan import command as plan_command
from retrotool.purge import command as purge_command
from retrotool.receipt import command as receipt_command
from retrotool.repair import command as repair_command
from retrotool.search import command as search_command
from retrotool.train import command as train_command
from retrotool.train.dataset import RetroDataset

COMMANDS = {
    "build": build_command,
    "chunk": chunk_command, "embed": embed_command, "index": index_command, "neighbours": neighbours_command,
    "search": search_command, "documents": inspect_command, "show": inspect_command,
    "inspect": inspect_command, "leakage": leakage_command, "train": train_command, "evaluate": evaluate_command,
    "purge": purge_command, "undo": purge_command, "erase": purge_command, "receipt": receipt_command,
    "affected": purge_command, "export": export_command, "info": info_command,
    "log": info_command, "verify": info_command, "repair": repair_command, "plan": plan_command,
    "doctor": info_command,
}  # fmt: skip
SMALL = """[model]
dimension = 16
layers = 1
heads = 2
first_cross_layer = 1
encoder_dimension = 16
[data]
sequence_length = 64
batch_size = 1
[optimiser]
steps = 1
"""
"""The settings of a model to train."""
Run = Callable[..., tuple[int, str, str]]
TROUBLE = re.compile("error|warning|traceback", re.IGNORECASE)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """A command in this process: its exit code, and all that it or a library writes to stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            app([str(argument) for argument in arguments], prog_name="retrotool")
        return int(end.value.code or 0), *capfd.readouterr()

    return call


def examples(command: str) -> list[str]:
    module = COMMANDS[command]
    epilog = getattr(module, f"{command.upper()}_EPILOG", None) or module.EPILOG
    return re.findall(r"^  (retrotool .*)$", epilog, re.MULTILINE)


def test_version(run):
    assert run("--version") == (0, f"retrotool {version('retrotool')}\n", "")


def test_help_lists_every_command_with_what_it_does(run):
    code, out, err = run("--help")
    listed = re.findall(r"^  (\w+) {2,}\w", out.partition("Commands:")[2], re.MULTILINE)
    assert (code, err, listed) == (0, "", list(dict.fromkeys(name.partition(" ")[0] for name in COMMANDS)))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_explains_every_option_and_gives_examples(command, run):
    code, out, err = run(*command.split(), "--help")
    assert (code, err) == (0, "")
    assert run(*command.split(), "-h") == (code, out, err)
    assert len(examples(command)) >= 2
    for example in examples(command):
        assert f"  {example}\n" in out
    for option in re.findall(r"^  ((?:-\w, )?--[\w-]+(?: \S+)?)(.*)$", out, re.MULTILINE):
        assert option[1].strip() or re.search(rf"{re.escape(option[0])}\n {{20,}}\S", out), option


@pytest.fixture
def workplace(tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the files that the examples name."""
    rows = make_rows(12, words=40)
    (tmp_path / "corpus").mkdir()
    for i in (0, 6):
        lines = "".join(json.dumps(row) + "\n" for row in rows[i : i + 6]).encode()
        (tmp_path / "corpus" / f"{i}.jsonl.zst").write_bytes(zstandard.compress(lines))
    papers = [
        {"doi": f"10/{i}", "body": row["text"], "year": 1990 + i, "source": "forum"} for i, row in enumerate(rows)
    ]
    pq.write_table(pa.Table.from_pylist(papers), tmp_path / "papers.parquet")
    (tmp_path / "takedown.txt").write_text("doc-3\n\n10/4\n")
    (tmp_path / "questions.txt").write_text("Which valley has a river?\nWho reads the page?\n")
    write_jsonl(tmp_path / "pairs.jsonl", [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(5)])
    write_jsonl(tmp_path / "edits.jsonl", [{"ban": ["0:1"]}])
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README").write_bytes(b"caf\xe9")
    (tmp_path / "small.toml").write_text(SMALL)
    write_megatron(tmp_path / "wiki", [[2003 + i, 2004, 102] for i in range(4)])
    shutil.copytree(tiny_encoder, tmp_path / "models" / "bert-base-uncased")
    chunks = [f"{part}:{row}" for part in range(4) for row in range(100)]
    pq.write_table(pa.table({"chunk": chunks, "vector": [[1.0, 2.0]] * len(chunks)}), tmp_path / "vectors.parquet")
    for name, first in (("database", 0), ("training", 30)):
        source = write_jsonl(tmp_path / f"{name}.jsonl", make_rows(30, first=first))
        api.chunk(tmp_path / name, [str(source)], tokenizer=str(tiny_encoder))
        api.embed(tmp_path / name, encoder=str(tiny_encoder))
    api.index(tmp_path / "database")
    make_causal_model(tmp_path / "models" / "my-llama", (tiny_encoder / "tokenizer.json").read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_megatron(prefix: Path, documents: list[list[int]]) -> None:
    """Documents as an indexed dataset of Megatron's, uint16."""
    lengths = np.array([len(document) for document in documents], "<i4")
    np.concatenate(documents).astype("<u2").tofile(prefix.with_suffix(".bin"))
    pointers = (2 * (np.cumsum(lengths) - lengths)).astype("<i8")
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(documents), len(documents) + 1)
    boundaries = np.arange(len(documents) + 1, dtype="<i8")
    prefix.with_suffix(".idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + boundaries.tobytes())


def ordered_examples() -> Iterator[str]:
    """All examples, so that each finds what it needs: what an earlier one made, and no second encoder."""
    commands = (
        "chunk", "embed", "index", "neighbours", "export", "inspect", "leakage", "evaluate", "search", "documents",
        "show", "train", "purge", "erase", "receipt", "affected", "undo", "info", "log", "verify", "repair", "plan",
        "doctor",
        "build",
    )  # fmt: skip
    found = [example for command in commands for example in examples(command)]
    yield from sorted(
        found, key=lambda example: any(last in example for last in ("cuda", "--encoder models", "--from"))
    )


def words_of(example: str) -> list[str]:
    """The words of an example after ``retrotool``, with ids of purges that there are; ``undo`` has one to undo."""
    words = shlex.split(example)[1:]
    if words[0] == "undo":
        api.purge("store", api.Selectors(document="doc-5"), reason="r")
    if words[0] in ("undo", "erase", "receipt"):
        there = [one.purge for one in api.list_purges("store").purges if one.state != "undone"]
        stands_for = {"p1a2b3c4d": there[-1], "p5e6f7a8b": there[0]}
        words = [stands_for.get(word, word) for word in words]
    return [str(path) for word in words for path in (sorted(Path().glob(word)) if "*" in word else [word])]


def test_every_example_works(workplace, run):
    import torch

    shown = {}
    stores = [workplace / name for name in ("store", "database", "training", "papers", "evaluation", "pairs")]
    with watching(*stores) as seen:
        for example in ordered_examples():
            code, out, err = run(*words_of(example))
            if "cuda" in example and not torch.cuda.is_available():
                assert (code, out) == (2, ""), example
                assert err.startswith("error: "), example
            else:
                assert code == 0 and not TROUBLE.search(err), f"{example}: {err}"
                assert out, example
            shown[example] = out
        for _ in RetroDataset("store", sequence_length=128, batch_size=2):
            break
    assert memory_storage.is_everywhere() or sum("by " + STORE in what for what in seen) > 1000, "it sees what is done"
    assert outside(seen) == [], "files of stores are opened by their storage alone"
    assert len(shown) == sum(len(examples(command)) for command in COMMANDS)
    found = api.info("store")
    assert (found.documents, len(found.purges)) == (11, 4)  # of the corpus all but doc-7, of the papers none
    assert shown[examples("purge")[0]] == "Nothing was purged from store.\n"
    assert "Would purge" in shown[examples("purge")[1]]
    assert "Erased" in shown[examples("purge")[2]] and "Erased" in shown[examples("erase")[0]]


PAGE = Path(__file__).parents[2] / "docs" / "json.md"
TYPES: dict[str, Any] = {
    "integer": int, "number": float, "string": str, "boolean": bool, "list": list, "object": dict,
    "string or null": (str, type(None)), "integer or null": (int, type(None)),
}  # fmt: skip


def documented_fields() -> dict[str, dict[str, Any]]:
    """Return the fields of each command that docs/json.md lists, nested as in its output.

    A list is [what its items are], and an object with any keys is {"*": what its values are}.
    """
    commands: dict[str, dict[str, Any]] = {}
    for section in PAGE.read_text("utf-8").split("\n## ")[1:]:
        fields = commands.setdefault(section.partition("\n")[0], {})
        rows = re.findall(r"^\| `([^`]+)` \| ([\w ]+) \| \S", section, re.MULTILINE)
        assert len(rows) == section.count("\n| `"), section
        for name, kind in rows:
            keys = ["*" if key.isupper() else key for key in name.replace("[]", ".[]").split(".")]
            parent: Any = fields
            for key, after in itertools.pairwise(keys):
                inner: Any = [] if after == "[]" else {}
                if key != "[]":
                    parent = parent.setdefault(key, inner)
                else:
                    parent = parent[0] if parent else parent.append(inner) or inner
            if keys[-1] == "[]":
                parent.append(TYPES[kind])
            else:
                parent[keys[-1]] = TYPES[kind]
    return commands


FIELDS = documented_fields()
ERROR = FIELDS.pop("Errors")


def check_fields(value: Any, wanted: Any, where: str) -> None:
    """``wanted`` is a type, an object of required fields, or a list of items that are alike, not empty."""
    if isinstance(wanted, dict):
        assert isinstance(value, dict), where
        if "*" in wanted:
            assert value, where
            wanted = dict.fromkeys(value, wanted["*"])
        for name, inner in wanted.items():
            assert name in value, f"{where}.{name}"
            check_fields(value[name], inner, f"{where}.{name}")
    elif isinstance(wanted, list):
        assert isinstance(value, list), where
        assert value, where
        for item in value:
            check_fields(item, wanted[0], f"{where}[]")
    else:
        assert isinstance(value, wanted), where
        assert wanted is not int or not isinstance(value, bool), where


@pytest.fixture
def results(tmp_path: Path, corpus: Path, tiny_encoder: Path, run: Run) -> dict[str, dict[str, Any]]:
    """What each command says with --json, on one store; each says one object and nothing else."""
    store, config = tmp_path / "store", tmp_path / "small.toml"
    config.write_text(SMALL)
    model = make_causal_model(tmp_path / "llama", (tiny_encoder / "tokenizer.json").read_bytes())
    steps: list[tuple[str, list[Any]]] = [
        ("chunk", [store, corpus, "--tokenizer", tiny_encoder, "--part-size", 150, "--workers", 1]),
        ("embed", [store, "--encoder", tiny_encoder, "--devices", "cpu"]),
        ("index", [store]),
        ("neighbours", [store]),
        ("inspect", [store, "--random", 3]),
        ("export", [store, tmp_path / "exported"]),
        ("search", [store, "store index table", "--devices", "cpu"]),
        ("documents", [store]),
        ("show", [store, "0:1"]),
        ("leakage", [store, "--queries", store]),
        ("train", [store, "--config", config, "--out", tmp_path / "trained"]),
        ("evaluate", [store, "--queries", store, "--model", model, "--limit", 20, "--devices", "cpu"]),
        ("build", [store, corpus]),
        ("purge", [store, "--document", "doc-8", "--reason", "test", "--yes"]),
        ("affected", [store]),
        ("undo", [store, "last", "--reason", "test"]),
        ("purge", [store, "--document", "doc-8", "--reason", "test", "--yes"]),
        ("erase", [store, "last", "--yes"]),
        ("receipt", [store, "last", "--out", tmp_path]),
        ("purge", [store, "--where", "id = 'doc-7'", "--reason", "test", "--erase", "--yes"]),
        ("verify", [store]),
        ("log", [store, "--last", 1]),
        ("info", [store]),
        ("plan", ["--tokens", "1.75T", "--gpus", 64]),
        ("doctor", [store]),
        ("repair", [store]),
    ]
    found = {}
    for command, arguments in steps:
        if command == "repair":
            stored_files(store, "index/main/trained-*.faiss")[0].unlink()
        code, out, err = run(command, *arguments, "--json")
        assert code == 0 and not TROUBLE.search(err), f"{command}: {err}"
        assert out.count("\n") == 1
        found[command] = json.loads(out)
    return found


def test_json_has_the_fields_that_scripts_rely_on(results, run, tmp_path):
    assert set(results) == set(FIELDS) == set(COMMANDS)
    for command, wanted in FIELDS.items():
        check_fields(results[command], wanted, command)
    store, found = tmp_path / "store", results["info"]
    _, out, _ = run("info", tmp_path / "nothing", "--json")
    check_fields(json.loads(out), ERROR, "an error")
    assert [part["part"] for part in found["parts"]] == list(range(results["chunk"]["parts"]))
    for part in found["parts"]:
        for file in (part["chunks"], part["documents"], part["embeddings"]["tiny"], part["neighbours"]["main"]):
            assert stored_file(store, file["path"]).exists()
    assert sum(part["chunks"]["rows"] for part in found["parts"]) == results["chunk"]["chunks"]
    assert all(stored_file(store, path).exists() for path in found["indexes"]["main"]["shards"])


def test_json_numbers_agree_with_one_another(results):
    made, found, purged = results["chunk"], results["info"], results["purge"]
    assert results["embed"]["chunks"] == results["neighbours"]["queries"] == made["chunks"]
    assert results["embed"]["dimension"] == 32
    assert results["index"]["vectors"] == made["chunks"]
    assert purged["chunks"] == purged["erased"] > 0
    assert results["undo"]["chunks"] == results["erase"]["erased"] == results["receipt"]["receipt"]["chunks"] > 0
    left = made["chunks"] - purged["chunks"] - results["erase"]["erased"]
    assert (found["documents"], found["chunks"]) == (made["documents"] - 2, left)
    assert results["verify"]["ok"] is True
    assert len(results["search"]["results"]) == 5
    assert [r["distance"] for r in results["search"]["results"]] == sorted(
        r["distance"] for r in results["search"]["results"]
    )
    commits = [results[command]["commit"] for command in ("chunk", "embed", "index", "neighbours", "purge", "info")]
    assert commits == sorted(commits)
    assert commits[-2] == commits[-1]


def test_text_says_the_same_in_words(store_copy, run, tiny_encoder):
    printed = {command: run(command, store_copy)[1] for command in ("info", "verify", "index", "neighbours")}
    facts = api.info(store_copy)
    assert f"{facts.documents} documents, {facts.chunks} chunks of 64 tokens" in printed["info"]
    assert ": OK" in printed["verify"]
    assert "True recall@10: 1.0000" in printed["index"]
    assert "All embedded chunks have their neighbours" in printed["neighbours"]
    code, out, _ = run("embed", store_copy, "--encoder", tiny_encoder)
    assert (code, out.partition(" (")[0]) == (0, "Every chunk has its embedding already")


def test_a_purge_reports_what_it_does_not_reach(store_copy, run):
    select = (store_copy, "--where", "id = 'doc-7'", "--reason", "r")
    assert "Would erase" not in run("purge", *select, "--dry-run")[1]
    assert "Would erase" in run("purge", *select, "--dry-run", "--erase")[1]
    code, out, _ = run("purge", *select, "--erase", "--yes")
    assert (code, out.splitlines()[1].partition(";")[0]) == (0, "Erased 5 chunks")
    assert "Not reached: ids" not in out, "only stores that are known to use this one are named"
    other = ("--where", "id = 'doc-8'", "--reason", "r", "--erase", "--yes", "--json")
    assert "other stores" in json.loads(run("purge", store_copy, *other)[1])["not_reached"][0]


@dataclasses.dataclass
class Named:
    path: str
    paths: tuple[str, ...]


def test_a_name_that_is_not_utf_8_keeps_no_result_from_being_printed(capsys):
    named = Named("caf\udce9", ("x", "caf\udce9"))
    output.show(named, False, lambda found: found.path)
    output.show(named, True, str)
    assert capsys.readouterr().out == 'caf\\udce9\n{"path":"caf\\\\udce9","paths":["x","caf\\\\udce9"]}\n'


def test_search_tells_of_what_is_not_in_the_index_and_how_it_gets_there(store_copy, tmp_path, run):
    command = ("search", store_copy, "store index table", "-k", "1", "--devices", "cpu")
    code, _, err = run(*command)
    assert (code, err) == (0, "")
    source = write_jsonl(tmp_path / "new.jsonl", [{"id": "new", "text": "a document that came later"}])
    api.chunk(store_copy, [str(source)])
    code, out, err = run(*command, "--json")
    printed = json.loads(out)
    assert (code, printed["not_indexed"], len(printed["next"])) == (0, 1, 1)
    lines = ["Not searched: 1 chunk that is not in the index. Next:", *(f"  {line}" for line in printed["next"])]
    assert err == "".join(f"{line}\n" for line in lines)
    assert [shlex.split(line)[1] for line in printed["next"]] == ["build"]
    for line in printed["next"]:
        assert run(*shlex.split(line)[1:])[0] == 0
    code, out, err = run(*command, "--json")
    assert (code, json.loads(out)["not_indexed"], err) == (0, 0, "")


def test_a_terminal_that_says_it_has_no_room_gets_progress_too(monkeypatch):
    names = ("TQDM_NCOLS", "TQDM_NROWS")
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        monkeypatch.delenv(name)
    master, terminal = os.openpty()  # it says 0 rows, 0 columns
    try:
        with os.fdopen(terminal, "w") as stderr:
            monkeypatch.setattr("sys.stderr", stderr)
            give_bars_room()
            assert [os.environ.pop(name) for name in names] == ["80", "24"]
            fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
            give_bars_room()
            assert not os.environ.keys() & set(names)
    finally:
        os.close(master)
