"""How commands end: exit codes, one message on stderr, no traceback; and what starting costs."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import INTERRUPTED, make_rows, write_blank, write_jsonl
from stored import path_in_store, stored_file, stored_files
from typer.testing import CliRunner

from retrotool import api
from retrotool.app import app
from retrotool.engine import local as engine_local
from retrotool.errors import EXIT_INTERRUPTED
from retrotool.store.local_storage import LocalStorage
from retrotool.store.store import Store

READING = {
    "embed": [],
    "index": [],
    "neighbours": [],
    "inspect": ["--random", 1],
    "purge": ["--where", "id = 'x'", "--reason", "r"],
    "search": ["text"],
    "info": [],
    "log": [],
    "verify": [],
    "export": ["exported"],
}


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize(
    "place", ["missing", "empty directory", pytest.param("other directory", marks=pytest.mark.on_disk), "file"]
)
@pytest.mark.parametrize("command", READING)
def test_without_a_store_commands_end_with_10_and_make_none(command, place, tmp_path, snapshots):
    store = tmp_path / "store"
    if place == "file":
        store.write_text("x")
    elif place == "empty directory":
        store.mkdir()
    elif place == "other directory":
        store.mkdir()
        (store / "articles.jsonl").write_text("x")
    before = list(tmp_path.rglob("*"))
    code, out, err = run(*command.split(), store, *READING[command])
    assert (code, out) == (10, "")
    snapshots(err, place, STORE=store)
    assert list(tmp_path.rglob("*")) == before


def test_a_search_whose_arguments_are_swapped_says_which_is_the_store(built_store, tmp_path, snapshots):
    code, out, err = run("search", "what is a store?", built_store)
    assert (code, out) == (10, "")
    snapshots(err, STORE=built_store)
    for text in ("x" * 10_000, "what is a store?", str(tmp_path)):
        assert "\nCreate a store: " in run("search", tmp_path / "nothing", text)[2]


def test_what_a_search_lacks_is_named_from_the_beginning(tmp_path, tiny_encoder, snapshots):
    store = tmp_path / "store"
    command = ("search", store, "text")
    chunk = ("chunk", store, "--tokenizer", tiny_encoder)
    assert run(*chunk, write_blank(tmp_path / "none.jsonl"))[0] == 0
    snapshots(run(*command)[2], STORE=store)
    code, out, _ = run("embed", store, "--encoder", tiny_encoder)
    assert code == 0
    snapshots(out, STORE=store)
    run(*chunk, write_jsonl(tmp_path / "some.jsonl", make_rows(3)))
    snapshots(run(*command)[2], STORE=store)
    run("embed", store, "--encoder", tiny_encoder)
    snapshots(run(*command)[2], STORE=store)


def test_a_page_that_can_t_be_written_is_named_itself(built_store, tmp_path, monkeypatch, snapshots):
    page = tmp_path / "page.html"
    inspect = ("inspect", built_store, "--random", "2", "--html", page)
    for error in (PermissionError(errno.EACCES, "Permission denied", str(tmp_path)), OSError(errno.EIO, "No luck")):
        monkeypatch.setattr("pathlib.Path.replace", raising(error))
        code, out, err = run(*inspect)
        assert (code, out, err) == (1, "", f"error: {page} can't be written: {error.strerror}\n")
    monkeypatch.undo()
    monkeypatch.setattr("os.access", lambda path, mode: str(path) != str(tmp_path))
    code, out, err = run(*inspect)
    assert (code, out) == (1, "")
    snapshots(err, FOLDER=tmp_path)
    assert list(tmp_path.iterdir()) == []


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


def test_an_error_is_also_an_object_with_json(tmp_path):
    code, out, err = run("info", tmp_path / "store", "--json")
    printed = json.loads(out)
    assert set(printed) == {"error", "advice", "exit_code"}
    assert (printed["exit_code"], code) == (10, 10)
    assert err == f"error: {printed['error']}\n{printed['advice']}\n"


WORDED_BY_TYPER = {
    "": "Usage: retrotool",
    "nothing": "No such command 'nothing'",
    "chunk": "Missing argument",
    "chunk STORE INPUT --part-size many": "--part-size",
    "chunk STORE INPUT --workers 0": "--workers",
    "info": "Missing argument",
    "info STORE --nothing": "No such option",
    "export": "Missing argument",
    "export STORE": "Missing argument",
    "search STORE": "Missing argument",
    "search STORE text -k 0": "-k",
}
WRONG = [
    "chunk STORE",
    "chunk STORE gone.jsonl",
    "chunk STORE INPUT --max-bad x",
    "chunk STORE INPUT --max-document big",
    "chunk STORE INPUT --key-field question",
    "chunk STORE nothing-*.jsonl",
    "embed STORE --encoder ./gone",
    "embed STORE --devices abacus",
    "embed STORE --dtype int8",
    "index STORE --encoder missing",
    "index STORE --name ../up",
    "index STORE --target-recall 1.5",
    "neighbours STORE --index nothing",
    "neighbours STORE -k 30",
    "neighbours STORE --saved 2000",
    "neighbours STORE --name a/b",
    "info STORE --csv",
    "info STORE --files --sources",
    "export STORE OUT --table x",
    "export STORE OUT -k 21",
    "export STORE OUT -k 0",
    "export STORE INPUT",
    "export STORE gone/out",
    "search STORE _",
    "search STORE text --index nothing",
    "purge STORE --where id='x'",
    "purge STORE --reason r",
    "purge STORE --reason _ --where id='x'",
    "purge STORE --reason r --where id",
    "purge STORE --reason r --allow-lossy --pattern (",
    "erase STORE --older-than 99999999999d",
    "erase STORE --older-than 7",
    "purge STORE --reason r --chunk @gone.txt",
    "purge STORE --reason r --where id!='x'",
]


IN_A_FOLDER = [pytest.param(f"export STORE {out}", marks=pytest.mark.on_disk) for out in ("STORE", "STORE/out")]


@pytest.mark.parametrize("arguments", [*WORDED_BY_TYPER, *WRONG, *IN_A_FOLDER])
def test_wrong_usage_ends_with_2_and_says_what_is_wrong(arguments, built_store, tiny_encoder, tmp_path, snapshots):
    encoder = {"STORE": str(built_store), "_": " ", "INPUT": str(tiny_encoder / "tokenizer.json")}
    encoder |= {"OUT": str(tmp_path / "out"), "STORE/out": str(built_store / "out")}
    before = {file: file.stat().st_mtime for file in stored_files(built_store, "*.json")}
    code, out, err = run(*(encoder.get(word, word) for word in arguments.split()))
    assert (code, out) == (2, ""), err
    if arguments in WORDED_BY_TYPER:
        assert WORDED_BY_TYPER[arguments] in err
    else:
        snapshots(err, arguments, STORE=built_store, INPUT=tiny_encoder, HERE=Path.cwd())
    assert {file: file.stat().st_mtime for file in stored_files(built_store, "*.json")} == before


@pytest.mark.parametrize(
    "arguments",
    [
        "chunk STORE", "embed STORE --encoder ./gone", "index STORE --name ../up", "neighbours STORE -k 30",
        "search STORE _", "search STORE text --index nothing", "purge STORE --reason r",
        "purge STORE --reason r --where id!='x'",
    ],
)  # fmt: skip
def test_wrong_usage_is_also_an_object_with_json(arguments, built_store):
    words = {"STORE": str(built_store), "_": " "}
    code, out, err = run(*(words.get(word, word) for word in arguments.split()), "--json")
    printed = json.loads(out)
    assert (code, printed["exit_code"], set(printed)) == (2, 2, {"error", "advice", "exit_code"})
    assert err.startswith(f"error: {printed['error']}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("purge STORE --reason BYTES --where id='x'", "--reason"),
        ("purge STORE --reason r --where id=BYTES", "--where"),
        ("purge STORE --reason r --pattern BYTES", "--pattern"),
        ("search STORE BYTES", "TEXT"),
    ],
)
def test_what_is_not_utf_8_is_wrong_usage(arguments, message, built_store, cli):
    words = arguments.replace("STORE", str(built_store)).encode().replace(b"BYTES", b"'\xff'").split()
    command = [sys.executable, "-m", "retrotool", *words]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60)
    printed = json.loads(done.stdout)
    assert (done.returncode, printed["exit_code"], "Traceback" in done.stderr) == (2, 2, False)
    assert printed["error"].startswith(message) and printed["error"].endswith("is not UTF-8")


def test_rows_set_aside_end_with_3(tmp_path):
    (tmp_path / "half.jsonl").write_text('{"text": "good"}\nbad\n')
    code, out, err = run("chunk", tmp_path / "store", tmp_path / "half.jsonl", "--json", "--workers", 1)
    assert (code, err.startswith("New store. "), err.count("\n"), out.count("\n")) == (3, True, 1, 1)
    assert (json.loads(out)["documents"], json.loads(out)["rejected"]) == (1, 1)


def test_corruption_ends_with_12_and_names_the_file(store_copy):
    entry = Store.open(store_copy).state.part_file("chunks", 1)
    broken = stored_file(store_copy, entry.path)
    data = bytearray(broken.read_bytes())
    data[len(data) // 2] ^= 1
    broken.write_bytes(data)
    code, out, err = run("verify", store_copy, "--json")
    printed = json.loads(out)
    assert (code, err, printed["ok"]) == (12, "", False)
    assert any(broken.name in problem["path"] for problem in printed["problems"])
    broken.unlink()
    code, out, err = run("purge", store_copy, "--pattern", "x", "--allow-lossy", "--reason", "r", "--yes")
    assert (code, out) == (12, "")
    assert re.match(rf"error: .*{broken.name} is missing\n", err)


def test_help_and_version_load_nothing_heavy():
    heavy = {"torch", "transformers", "faiss", "numpy", "pyarrow", "tokenizers", "orjson.numpy"}
    for arguments in (["--help"], ["--version"], ["search", "--help"]):
        command = [sys.executable, "-X", "importtime", "-m", "retrotool", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
        assert (result.returncode, "retrotool" in loaded, loaded & heavy) == (0, True, set())


def test_a_bug_shows_its_traceback(tmp_path, monkeypatch):
    """What is no error of ours must not be reported as one."""

    def fail(*_, **__):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("retrotool.info.run.info", fail)
    with pytest.raises(ZeroDivisionError):
        run("info", tmp_path)


def test_what_the_system_says_of_a_file_is_reported(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise PermissionError(13, "Permission denied", str(tmp_path / "store" / "chunks"))

    monkeypatch.setattr("retrotool.info.run.info", fail)
    code, out, err = run("info", tmp_path, "--json")
    assert (code, err) == (1, f"error: {tmp_path}/store/chunks: Permission denied\n")
    assert json.loads(out) == {"error": err[7:-1], "advice": "", "exit_code": 1}


def test_what_the_system_says_of_no_file_is_a_bug(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("no file is named")

    monkeypatch.setattr("retrotool.info.run.info", fail)
    with pytest.raises(OSError, match="no file"):
        run("info", tmp_path)


class Terminal:
    """A person at a terminal, who types a line."""

    def __init__(self, line: str) -> None:
        self.line = line

    def isatty(self) -> bool:
        return True

    def readline(self) -> str:
        if self.line == "^C":
            raise KeyboardInterrupt
        return self.line


@pytest.fixture
def asked(monkeypatch, capsys):
    """A command, and what is answered to it: its exit code, stdout and stderr."""

    def ask(line: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", Terminal(line))
        with pytest.raises(SystemExit) as end:
            app([str(argument) for argument in arguments], prog_name="retrotool")
        return int(end.value.code or 0), *capsys.readouterr()

    return ask


PURGE = ("--where", "source = 'a'", "--reason", "r")


@pytest.mark.parametrize(
    ("line", "code", "printed"),
    [
        ("n\n", 1, "Nothing was purged.\n"),
        ("\n", 1, "Nothing was purged.\n"),
        ("", 1, "Nothing was purged.\n"),
        ("^C", EXIT_INTERRUPTED, "interrupted: "),
        ("yes\n", 0, ""),
    ],
)
def test_a_large_purge_asks(line, code, printed, store_copy, asked):
    before = api.info(store_copy)
    found, out, err = asked(line, "purge", store_copy, *PURGE)
    assert found == code
    question, _, rest = err.partition(" Continue? [y/N]: ")
    assert re.fullmatch(r"This purges [\d,]+ chunks, \d\d\.\d\d% of the store\.", question)
    assert rest.startswith(printed) and bool(rest) == bool(printed)
    assert ("Purged" in out) == (code == 0)
    assert (api.info(store_copy).commit > before.commit) == (code == 0)


def test_an_erase_of_much_asks_too(store_copy, asked):
    api.purge(store_copy, api.Selectors(where="source = 'a'"), reason="r")
    before = api.info(store_copy).commit
    assert asked("n\n", "purge", store_copy, *PURGE)[::2] == (0, ""), "it is purged already: there is nothing to ask"
    code, out, err = asked("n\n", "purge", store_copy, *PURGE, "--erase", "--json")
    assert (code, json.loads(out)["error"]) == (1, "Nothing was purged.")
    assert re.match(r"This erases \d+ chunks permanently, \d\d\.\d\d% of all chunks it ever had\. Continue\?", err)
    code, out, err = run("purge", store_copy, *PURGE, "--erase")
    assert (code, out, "needs --yes" in err) == (2, "", True), "there is no terminal"
    assert api.info(store_copy).commit == before
    code, out, _ = asked("y\n", "purge", store_copy, *PURGE, "--erase")
    assert (code, out.partition(" ")[0]) == (0, "Erased")
    assert asked("n\n", "purge", store_copy, *PURGE, "--erase")[::2] == (0, ""), "an erase goes on unasked"


def test_a_purge_of_little_does_not_ask(store_copy, asked):
    code, out, err = asked("n\n", "purge", store_copy, "--where", "id = 'doc-0'", "--reason", "r", "--erase")
    assert (code, err) == (0, "")
    assert out.startswith("Purged 1 chunk (0.27% of the store), 1 whole document")


UNIT_PARTS = 50


def is_at_work(store: Path, tasks: int) -> bool:
    """Whether so many tasks have written a part: more parts are there than fewer tasks have."""
    return len(stored_files(store, "documents/*.parquet")) > UNIT_PARTS * (tasks - 1)


def has_children(process: int) -> bool:
    """Whether a process has started workers; they need a while to be ready."""
    return bool(Path(f"/proc/{process}/task/{process}/children").read_text())


@pytest.mark.parametrize(("workers", "moment"), [(1, "at work"), (2, "at work"), (2, "starting")])
def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(workers, moment, tmp_path, byte_level_tokenizer):
    if moment == "starting" and not Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").exists():
        pytest.skip("this kernel does not tell when a process has started another")
    text = " ".join(row["text"] for row in make_rows(200))[:30_000]
    rows = [{"id": str(i), "text": f"{i} {text}"} for i in range(340 * workers)]  # 10 MB: a unit a worker
    source = write_jsonl(tmp_path / "many.jsonl", rows)
    # A unit is 27,200 chunks, in UNIT_PARTS parts. The slow tokenizer keeps it at work.
    options = ["--tokenizer", byte_level_tokenizer, "--part-size", "500", "--workers", str(workers)]
    store = tmp_path / "store"
    command = [sys.executable, "-m", "retrotool", "chunk", store, source, *options, "--exact-tokenizer"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    while not (has_children(process.pid) if moment == "starting" else is_at_work(store, workers)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    if moment == "starting":
        time.sleep(0.3)  # a worker takes about a second until it is ready
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (EXIT_INTERRUPTED, "")
    assert err.startswith("New store. ") and err.endswith(INTERRUPTED) and err.count("\n") == 2
    assert api.verify(store).problems == []
    if workers == 1:
        assert api.chunk(store, [str(source)]).documents == len(rows)
        assert api.verify(store).documents == len(rows)
        assert stored_files(store, "staging/*") == []
        live = {entry.path for entry in Store.open(store).state.files()}
        files = {
            path_in_store(store, file) for kind in ("documents", "chunks") for file in stored_files(store, f"{kind}/*")
        }
        assert files <= live, "what the interrupted task had written is removed"


@pytest.mark.on_disk
def test_space_is_checked_before_work_that_needs_it(
    tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, source = tmp_path / "store", write_jsonl(tmp_path / "c.jsonl", make_rows(40))
    assert LocalStorage(str(tmp_path)).free_bytes() == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    begun: list[object] = []
    calls = [
        ["chunk", store, source, "--tokenizer", tiny_encoder, "--workers", 1],
        ["embed", store, "--encoder", tiny_encoder],
        ["index", store, "--factory", "IVF4,SQ8"],
        ["neighbours", store],
    ]
    for call in calls:
        with monkeypatch.context() as full:
            full.setattr(LocalStorage, "free_bytes", lambda _: 400)
            full.setattr(engine_local, "open_pool", lambda stage, *_: begun.append(stage.name))
            code, _, errors = run(*call)
        assert code == 1
        assert f"error: {store}: {call[0]} needs about " in errors
        assert "B more, and 1 kB is free\nFree some space " in errors and " 0 " not in errors
        assert run(*call)[0] == 0
    assert begun == []
