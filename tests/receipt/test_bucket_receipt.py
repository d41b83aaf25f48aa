"""Erase on a bucket: nothing is left in old versions, or the receipt says what is left, and until when."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import buckets
import pytest
from conftest import Shared, make_rows, write_jsonl
from receipt_help import NAMES, TEXTS
from stored import contents_of
from typer.testing import CliRunner, Result

import retrotool
from retrotool import api
from retrotool.app import app
from retrotool.index.run import Options
from retrotool.receipt.run import Receipt
from retrotool.store.storage import storage_at

pytestmark = pytest.mark.sends_requests


@pytest.fixture(scope="module")
def secret_store(shared: Shared[Path], tiny_encoder: Path) -> Path:
    """Not to be changed: copy it."""

    def make(folder: Path) -> Path:
        rows = [*make_rows(9), *({"id": name, "text": text} for name, text in zip(NAMES, TEXTS, strict=True))]
        api.chunk(folder / "store", [str(write_jsonl(folder / "a.jsonl", rows))], tokenizer=str(tiny_encoder))
        api.embed(folder / "store", encoder=str(tiny_encoder))
        return folder / "store"

    return shared("bucket", make)


@pytest.fixture(scope="module")
def canaries(secret_store: Path) -> list[bytes]:
    """Bytes of vectors that are to be erased."""
    reader = retrotool.open(secret_store)
    rows = [chunk for name in NAMES for chunk in reader.document(name)]
    return [reader.embeddings(chunk >> 32, "tiny")[chunk & 0xFFFFFFFF].tobytes() for chunk in rows]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with buckets.moto() as address, buckets.settings_of(address):
        yield address


class Bucket:
    """A bucket with a copy of the store, and all bytes that are in it."""

    def __init__(self, address: str, name: str, store: Path, *, versioned: bool = True, lock: bool = False) -> None:
        self.client, self.name, self.place = buckets.client_of(address), name, f"s3://{name}/store"
        self.client.create_bucket(Bucket=name, ObjectLockEnabledForBucket=lock)
        if versioned and not lock:
            self.client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
        for path, data in contents_of(store).items():
            self.client.put_object(Bucket=name, Key=f"store/{path}", Body=data)

    def versions(self) -> list[bytes]:
        """The bytes of all versions of all objects."""
        pages = self.client.get_paginator("list_object_versions").paginate(Bucket=self.name)
        found = [one for page in pages for one in page.get("Versions", ())]
        get = self.client.get_object
        return [get(Bucket=self.name, Key=v["Key"], VersionId=v["VersionId"])["Body"].read() for v in found]

    def has(self, canaries: list[bytes]) -> bool:
        versions = self.versions()
        return any(canary in data for canary in canaries for data in versions)


def erase(place: str) -> api.PurgeResult:
    return api.purge(place, api.Selectors(document=NAMES), reason="r", who="w", erase=True)


def receipt(place: str, purge: str, tmp_path: Path) -> Receipt:
    return api.verify_purge(place, purge, out=tmp_path).receipt


def retrotool_command(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_no_old_version_has_any_of_it(
    address: str, secret_store: Path, canaries: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = Bucket(address, "old-versions", secret_store)
    assert bucket.has(canaries)
    with buckets.denying(address, "versionId") as before, monkeypatch.context() as patched:
        patched.setenv("AWS_ENDPOINT_URL", before)
        done = erase(bucket.place)
        (kept,) = done.bucket
        assert kept.status == "kept"
        assert bucket.has(canaries), "the versions can't be deleted"
        found = receipt(bucket.place, done.purge, tmp_path)
        assert (found.state, found.ok) == ("erased", False)
        assert found.problems == (f"the bucket: {kept.line}",)
    again = api.erase(bucket.place, [done.purge])
    assert again.bucket == ()
    assert not bucket.has(canaries)
    found = receipt(bucket.place, done.purge, tmp_path)
    assert (found.ok, found.problems, found.bucket) == (True, (), ())
    for retrain in (False, True):
        api.index(bucket.place, options=Options(retrain=retrain))
    assert receipt(bucket.place, done.purge, tmp_path).problems == (), (
        "what was written after the erase has nothing of it"
    )
    assert api.verify(bucket.place).ok


def test_what_is_locked_is_reported_with_its_date(
    address: str, secret_store: Path, canaries: list[bytes], tmp_path: Path
) -> None:
    bucket = Bucket(address, "locked", secret_store, lock=True)
    until = datetime.now(UTC) + timedelta(30)
    for file in storage_at(bucket.place).list("embeddings/"):
        bucket.client.put_object_retention(
            Bucket=bucket.name, Key=f"store/{file.path}", Retention={"Mode": "COMPLIANCE", "RetainUntilDate": until}
        )
    done = erase(bucket.place)
    assert bucket.has(canaries)
    found = receipt(bucket.place, done.purge, tmp_path)
    day = until.date().isoformat()
    (kept,) = found.bucket
    assert not found.ok
    assert f"(locked until {day}): " in kept.what
    assert f"after {day}: retrotool erase {bucket.place} PURGE" in kept.advice


def test_commands_on_a_bucket(address: str, secret_store: Path, tmp_path: Path) -> None:
    bucket = Bucket(address, "replicated", secret_store)
    rule = {
        "ID": "r", "Priority": 1, "Status": "Enabled", "Filter": {"Prefix": ""},
        "DeleteMarkerReplication": {"Status": "Disabled"}, "Destination": {"Bucket": "arn:aws:s3:::old-versions"},
    }  # fmt: skip
    bucket.client.put_bucket_replication(
        Bucket=bucket.name,
        ReplicationConfiguration={"Role": "arn:aws:iam::123456789012:role/r", "Rules": [rule]},
    )
    checks = {
        one["name"]: one for one in json.loads(retrotool_command("doctor", bucket.place, "--json").stdout)["checks"]
    }
    assert "replicas in the bucket old-versions" in checks["erase in the bucket"]["found"]
    documents = [word for name in NAMES for word in ("--document", name)]
    purged = retrotool_command("purge", bucket.place, *documents, "--reason", "r", "--erase", "--yes")
    assert purged.exit_code == 0, purged.stderr
    assert "The bucket: versioning is enabled: deleted files become noncurrent versions. An erase" in purged.stderr
    assert "Not checked: replicas in the bucket old-versions" in purged.stdout
    checked = retrotool_command("receipt", bucket.place, "last", "--out", str(tmp_path))
    assert checked.exit_code == 0, checked.stdout
    assert "\nnot checked: replicas in the bucket old-versions" in checked.stdout
    assert "\nNothing of it is left in the store. Copies that its bucket may have were not checked." in checked.stdout
    page, written = (next(tmp_path.glob(f"receipt-*.{kind}")).read_text() for kind in ("html", "json"))
    assert "<td>replicas in the bucket old-versions" in page
    assert [one["status"] for one in json.loads(written)["bucket"]] == ["unknown"]
    dry = retrotool_command("erase", bucket.place, "last", "--dry-run")
    assert "The bucket: versioning is enabled" in dry.stderr


def test_a_server_that_can_not_say(secret_store: Path, tmp_path: Path) -> None:
    with buckets.local_bucket(tmp_path / "buckets") as address, buckets.settings_of(address):
        place = f"s3://{buckets.BUCKET}/store"
        for path, data in contents_of(secret_store).items():
            storage_at(place).overwrite(path, "0123abcd", data)
        done = erase(place)
        found = receipt(place, done.purge, tmp_path)
    assert [one.status for one in found.bucket] == ["unknown"]
    assert found.ok and found.bucket[0].what.endswith("the server can't say (501)")


WRITER = """
import sys, time
from retrotool.store.leases import Run
from retrotool.store.storage import storage_at

def write(sink):
    sink.write(b"erased text " * (4 << 20))
    print(run.id, flush=True)
    time.sleep(600)

storage = storage_at(sys.argv[1])
with Run(storage) as run:
    storage.put(f"chunks/{run.id}00000000.parquet", run.id, write)
"""


def test_the_upload_of_a_killed_writer_is_aborted(address: str, secret_store: Path) -> None:
    bucket = Bucket(address, "uploads", secret_store, versioned=False)

    def uploads() -> list[str]:
        found = bucket.client.list_multipart_uploads(Bucket=bucket.name).get("Uploads", [])
        return sorted(one["Key"].rpartition("/")[2][:8] for one in found)

    def start() -> tuple[subprocess.Popen[str], str]:
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITER), bucket.place], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        return process, process.stdout.readline().strip()

    writers: list[Any] = [start(), start()]
    try:
        (live, its_run), (killed, other) = writers
        assert uploads() == sorted([its_run, other])
        killed.kill()
        killed.wait()
        purge = api.purge(bucket.place, api.Selectors(document=NAMES[:1]), reason="r", who="w").purge
        assert uploads() == [its_run], "only that of the writer that runs is left"
        live.kill()
        live.wait()
        api.erase(bucket.place, [purge])
        assert uploads() == []
    finally:
        for process, _ in writers:
            process.kill()
            process.communicate()
