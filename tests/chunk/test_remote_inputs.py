"""Inputs in a bucket, on a web server and on the Hub: the same documents as from a disk, by the command line.

Servers are on 127.0.0.1. This process sends no request through a client of a cloud, as it forks the commands.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import buckets
import pyarrow as pa
import pytest
from chunk_helpers import as_line, documents, write_rows
from conftest import Cli, make_rows
from forked import Forked
from web_server import DATASET, WebServer, web_server

pytestmark = pytest.mark.on_disk

PLACE = f"s3://{buckets.BUCKET}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that is the bucket of a server, whose address is in the environment."""
    root = tmp_path_factory.mktemp("buckets")
    with buckets.local_bucket(root) as address, buckets.settings_of(address):
        yield root / buckets.BUCKET


@pytest.fixture
def bucket(server: Path) -> Iterator[Path]:
    yield server
    for entry in server.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


@pytest.fixture
def web() -> Iterator[WebServer]:
    with web_server() as served:
        yield served


@pytest.fixture
def traffic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with the requests of commands."""
    monkeypatch.setenv("RETROTOOL_TRAFFIC", str(tmp_path / "traffic"))
    (tmp_path / "traffic").touch()
    return tmp_path / "traffic"


def make_corpus(folder: Path) -> None:
    for number, name in enumerate(("a.jsonl", "sub/b.jsonl.gz", "sub/c.jsonl.zst", "sub/deep/d.parquet")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_rows(folder / name, make_rows(60, first=100 * number))
    table = pa.Table.from_pylist(make_rows(60, first=500))
    with pa.OSFile(str(folder / "e.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=20)
    for name in ("skipped.docx", ".hidden.jsonl", "inner/store.json", "inner/chunks/x.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text("{}")


def contents(store: Path) -> list[tuple[str, bytes]]:
    return sorted((row["id"], row["text_hash"]) for row in documents(store))


def content_of(cli: Cli, store: Path) -> str:
    """The digest of all tokens of a store."""
    return str(json.loads(cli("verify", store, "--json").stdout)["content"])


def test_a_bucket_gives_the_documents_of_a_folder_in_the_same_order(cli: Cli, bucket: Path, tmp_path: Path) -> None:
    make_corpus(tmp_path / "corpus")
    shutil.copytree(tmp_path / "corpus", bucket / "corpus")
    assert cli("chunk", tmp_path / "local", tmp_path / "corpus").returncode == 0
    result = cli("chunk", tmp_path / "remote", f"{PLACE}/corpus", "--workers", 2)
    assert result.returncode == 0, result.stderr
    assert f"1 file of unknown format skipped, such as {PLACE}/corpus/skipped.docx" in result.stderr
    assert content_of(cli, tmp_path / "remote") == content_of(cli, tmp_path / "local")
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")
    assert {row["input"] for row in documents(tmp_path / "remote")} == {
        f"{PLACE}/corpus/{name}"
        for name in ("a.jsonl", "e.arrow", "sub/b.jsonl.gz", "sub/c.jsonl.zst", "sub/deep/d.parquet")
    }
    estimate = cli("chunk", tmp_path / "new", f"{PLACE}/corpus", "--dry-run", "--json")
    assert json.loads(estimate.stdout)["documents"] == 300


def test_patterns_and_exclusions_choose_objects_and_build_names_them(cli: Cli, bucket: Path, tmp_path: Path) -> None:
    make_corpus(bucket / "corpus")
    result = cli(
        "chunk", tmp_path / "store", f"{PLACE}/corpus/**/*.jsonl*", "--exclude", "chunks/*", "--exclude", "b.*"
    )
    assert result.returncode == 0, result.stderr
    assert {row["input"].rpartition("/")[2] for row in documents(tmp_path / "store")} == {"a.jsonl", "c.jsonl.zst"}
    planned = cli("build", tmp_path / "new", f"{PLACE}/corpus/a.jsonl", "--dry-run")
    assert f"{PLACE}/corpus/a.jsonl" in planned.stdout
    (bucket / "none.jsonl").write_bytes(b"")
    for given, problem in {
        f"{PLACE}/other": "no such file or folder",
        f"{PLACE}/corpus/*.csv": "matches nothing",
        f"{PLACE}/corpus/skipped.docx": "has an unknown format",
        "s3://other-bucket/a": "s3://other-bucket does not exist",
        f"{PLACE}/a/../b": "not a place of inputs",
    }.items():
        refused = cli("chunk", tmp_path / "new", given)
        assert (refused.returncode, problem in refused.stderr) == (2, True), refused.stderr
    assert not (tmp_path / "new").exists()


def test_a_known_object_is_not_read_again_and_a_changed_one_is_mirrored(
    cli: Cli, bucket: Path, tmp_path: Path, traffic: Path
) -> None:
    rows = make_rows(20)
    write_rows(bucket / "a.jsonl", rows)
    assert cli("chunk", tmp_path / "store", f"{PLACE}/a.jsonl").returncode == 0
    traffic.write_text("")
    again = cli("chunk", tmp_path / "store", f"{PLACE}/a.jsonl")
    assert "1 input skipped: already in the store" in again.stdout
    assert sum(line.startswith("get ") for line in traffic.read_text().splitlines()) <= 2, "its first rows are checked"
    write_rows(bucket / "a.jsonl", [*rows[5:], {"id": "new", "text": "A new document of the object."}])
    changed = cli("chunk", tmp_path / "store", f"{PLACE}/a.jsonl", "--existing", "mirror")
    assert "5 documents removed: no longer in the input" in changed.stdout
    assert "1 document, 1 chunk" in changed.stdout


def test_rejected_rows_are_reported_with_the_uri(cli: Cli, bucket: Path, tmp_path: Path) -> None:
    write_rows(bucket / "a.jsonl", [*make_rows(3), b"{broken", *make_rows(3, first=10)])
    result = cli("chunk", tmp_path / "store", f"{PLACE}/a.jsonl")
    assert result.returncode == 3
    assert f"first: {PLACE}/a.jsonl, line 4" in result.stdout


def test_a_lost_object_is_named_and_when_it_is_back_the_work_is_finished(
    cli: Cli, bucket: Path, tmp_path: Path, traffic: Path
) -> None:
    make_corpus(tmp_path / "corpus")
    shutil.copytree(tmp_path / "corpus", bucket / "corpus")
    assert cli("chunk", tmp_path / "whole", f"{PLACE}/corpus").returncode == 0
    traffic.write_text("")
    lost = bucket / "corpus" / "sub" / "c.jsonl.zst"
    child = Forked(["chunk", str(tmp_path / "store"), f"{PLACE}/corpus"])
    # The plan is made; of the objects in it the first is asked for again.
    while "head corpus/a.jsonl" not in traffic.read_text():
        assert child.poll() is None
        time.sleep(0.005)
    lost.unlink()
    _, stderr = child.communicate()
    assert child.returncode == 1
    assert f"{PLACE}/corpus/sub/c.jsonl.zst" in stderr
    shutil.copy(tmp_path / "corpus" / "sub" / "c.jsonl.zst", lost)
    assert cli("chunk", tmp_path / "store", f"{PLACE}/corpus").returncode == 0
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_a_killed_run_is_resumed(cli: Cli, bucket: Path, tmp_path: Path, traffic: Path) -> None:
    make_corpus(bucket / "corpus")
    assert cli("chunk", tmp_path / "whole", f"{PLACE}/corpus").returncode == 0
    traffic.write_text("")
    child = Forked(["chunk", str(tmp_path / "store"), f"{PLACE}/corpus"])
    while "head corpus/a.jsonl" not in traffic.read_text():
        assert child.poll() is None
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    result = cli("chunk", tmp_path / "store")
    assert f"Resuming interrupted work: {PLACE}/corpus/a.jsonl and 4 more" in result.stderr
    assert content_of(cli, tmp_path / "store") == content_of(cli, tmp_path / "whole")


def test_without_the_extra_the_command_to_install_it_is_printed(tmp_path: Path) -> None:
    program = "import sys; sys.modules['obstore'] = None; from retrotool.app import main; main()"
    command = [sys.executable, "-c", program, "chunk", str(tmp_path / "store"), f"{PLACE}/a.jsonl"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, "pip install obstore boto3" in result.stderr) == (2, True), result.stderr


# Web servers


def lines_of(n: int, size: int = 1) -> bytes:
    rows = make_rows(n)
    return b"".join(as_line({**row, "text": f"{row['id']}: {row['text'] * size}"}) + b"\n" for row in rows)


def test_a_file_of_a_web_server_is_fetched_once_but_for_heads(cli: Cli, web: WebServer, tmp_path: Path) -> None:
    web.files["large file.jsonl"] = lines_of(700, 40)
    size = len(web.files["large file.jsonl"])
    assert size > 16 << 20
    result = cli("chunk", tmp_path / "store", f"{web.address}/large%20file.jsonl", "--workers", 2)
    assert result.returncode == 0, result.stderr
    assert "700 documents" in result.stdout
    slices, heads = 3, 2
    assert size <= web.sent["large file.jsonl"] <= size + (slices + heads) * (256 << 10)


@pytest.mark.parametrize(
    ("lacking", "problem"),
    [
        ({"has_ranges": False}, "Range request not supported"),
        ({"has_length": False}, "Content-Length"),
        ({"is_open": False}, "access denied"),
    ],
)
def test_a_server_without_ranges_or_sizes_or_that_refuses_is_an_error_before_anything_is_written(
    cli: Cli, web: WebServer, tmp_path: Path, lacking: dict[str, Any], problem: str
) -> None:
    web.files["a.jsonl"] = lines_of(10)
    vars(web).update(lacking)
    result = cli("chunk", tmp_path / "store", f"{web.address}/a.jsonl")
    assert (result.returncode, problem in result.stderr) == (2, True), result.stderr
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("request_number", [2, 3])  # the ones before and after its rows are read
def test_a_file_that_is_replaced_after_it_was_planned_is_an_error_that_names_it(
    cli: Cli, web: WebServer, tmp_path: Path, request_number: int
) -> None:
    web.files["a.jsonl"] = lines_of(10)
    web.at_head[request_number] = lambda: web.files.update({"a.jsonl": lines_of(10).replace(b"doc-1", b"dog-1")})
    result = cli("chunk", tmp_path / "store", f"{web.address}/a.jsonl")
    assert result.returncode == 1
    assert f"{web.address}/a.jsonl: it was replaced since it was planned" in result.stderr
    assert f"--exclude {web.address}/a.jsonl" in result.stderr
    again = cli("chunk", tmp_path / "store", f"{web.address}/a.jsonl")
    assert "10 documents" in again.stdout, "the new version is read instead"
    assert "dog-1" in {row["id"] for row in documents(tmp_path / "store")}


# The Hub


COMMANDS = """
import json, sys
from typer.testing import CliRunner
from retrotool.app import app
done = [CliRunner().invoke(app, words) for words in json.load(sys.stdin)]
json.dump([(one.exit_code, one.stdout, one.stderr) for one in done], sys.stdout)
"""


def hub(web: WebServer, *commands: list[object]) -> list[tuple[int, str, str]]:
    """Run commands in a new process, as the Hub's library reads the environment once.

    Return the exit code of each, and what it printed to stdout and stderr.
    """
    env = {**os.environ, "HF_ENDPOINT": web.address, "HF_HUB_OFFLINE": "0"}
    words = json.dumps([[str(word) for word in command] for command in commands])
    done = subprocess.run([sys.executable, "-c", COMMANDS], input=words, env=env, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    return [(code, printed, problem) for code, printed, problem in json.loads(done.stdout)]


def test_a_dataset_of_the_hub_is_read_by_ranges_and_known_by_the_hashes_of_its_files(
    web: WebServer, tmp_path: Path
) -> None:
    for number in range(3):
        web.files[f"data/{number} of 3.jsonl"] = b"".join(
            as_line(row) + b"\n" for row in make_rows(2 + 30 * number, first=100 * number)
        )
    web.files |= {".gitattributes": b"", "README.md": b"# Lakes"}

    def chunk(*places: str) -> list[tuple[int, str, str]]:
        return hub(web, *(["chunk", tmp_path / "store", f"hf://datasets/{place}"] for place in places))

    first, none, other = chunk(f"{DATASET}/data/[!1]*.jsonl", f"{DATASET}/none", f"{DATASET}@v2/data")
    assert first[0] == 0, first
    assert "64 documents" in first[1]
    assert set(web.sent) == {"data/0 of 3.jsonl", "data/2 of 3.jsonl"}
    assert (none[0], "no such file or folder" in none[2]) == (2, True), none
    assert (other[0], "Revision Not Found" in other[2]) == (2, True), other
    (known,) = chunk(f"{DATASET}@v1")
    assert "2 inputs skipped: already in the store" in known[1]
    assert "33 documents" in known[1], "one file, and README.md"
    assert {row["input"].rpartition("@")[2] for row in documents(tmp_path / "store")} >= {"v1/data/1 of 3.jsonl"}
