"""What a bucket keeps of deleted files is listed with its date, on S3 deleted, and what can't be seen is reported."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import buckets
import pytest

from retrotool.store.bucket_copies import bucket_copies, bucket_settings, list_uploads
from retrotool.store.cloud_client import azure_service
from retrotool.store.storage import storage_at

pytestmark = pytest.mark.sends_requests

PATH, OTHER, LEASE = "chunks/0123abcd00000000.parquet", "documents/0123abcd00000001.parquet", "leases/run-0123abcd"
RUN = "0123abcd"
_number = itertools.count()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with buckets.moto() as address, buckets.settings_of(address):
        yield address


class Bucket:
    """A new bucket on moto, and a store's place in it."""

    def __init__(self, address: str, *, versioned: bool = True, lock: bool = False) -> None:
        self.client = buckets.client_of(address)
        self.name = f"bucket-{next(_number)}"
        self.place = f"s3://{self.name}/a store"
        self.client.create_bucket(Bucket=self.name, ObjectLockEnabledForBucket=lock)
        if versioned and not lock:
            self.client.put_bucket_versioning(Bucket=self.name, VersioningConfiguration={"Status": "Enabled"})

    def write_and_delete(self, *paths: str) -> None:
        for path in paths:
            self.client.put_object(Bucket=self.name, Key=f"a store/{path}", Body=b"erased text")
            self.client.delete_object(Bucket=self.name, Key=f"a store/{path}")

    def versions(self) -> list[str]:
        found = self.client.list_object_versions(Bucket=self.name).get("Versions", [])
        return sorted(one["Key"].removeprefix("a store/") for one in found)

    def expire(self, days: int, **rule: Any) -> None:
        rules = [
            {"ID": "old", "Status": "Enabled", "NoncurrentVersionExpiration": {"NoncurrentDays": days}}
            | ({"Filter": {"Prefix": ""}} | rule)
        ]
        self.client.put_bucket_lifecycle_configuration(Bucket=self.name, LifecycleConfiguration={"Rules": rules})


def in_days(days: int) -> str:
    return (datetime.now(UTC) + timedelta(days)).date().isoformat()


@pytest.mark.parametrize("place", ["/tmp/store", "memory://store"])
def test_a_store_that_is_not_in_a_bucket_keeps_nothing(place: str) -> None:
    assert bucket_copies(place) == bucket_settings(place) == ()


def test_a_bucket_without_versions_keeps_nothing(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = Bucket(address, versioned=False)
    bucket.write_and_delete(PATH)
    assert bucket_copies(bucket.place) == bucket_settings(bucket.place) == ()
    for query in ("versions", "versioning"):
        with buckets.denying(address, query) as before, monkeypatch.context() as patched:
            patched.setenv("AWS_ENDPOINT_URL", before)
            assert bucket_copies(bucket.place) == (), "one of the two permissions is enough"


def test_noncurrent_versions_are_listed_and_deleted(address: str) -> None:
    bucket = Bucket(address)
    bucket.write_and_delete(PATH, OTHER, LEASE)
    bucket.client.put_object(Bucket=bucket.name, Key=f"a store/{PATH}.live", Body=b"live")
    (setting,) = bucket_settings(bucket.place)
    assert setting.what == "versioning is enabled: deleted files become noncurrent versions"
    (kept,) = bucket_copies(bucket.place)
    assert (kept.status, kept.until) == ("kept", "")
    assert kept.line == (
        "noncurrent versions of deleted files: 2, until they are removed by hand. "
        f"With the permission s3:DeleteObjectVersion: retrotool erase '{bucket.place}' PURGE"
    )
    (less,) = bucket_copies(bucket.place, clean={PATH})
    assert less.what.endswith(": 1")
    assert bucket_copies(bucket.place, delete=True) == ()
    assert bucket.versions() == [f"{PATH}.live", LEASE], "what can't hold text is left, and what others keep there"


def test_versions_stay_when_versioning_is_suspended(address: str) -> None:
    bucket = Bucket(address)
    bucket.write_and_delete(PATH)
    bucket.client.put_bucket_versioning(Bucket=bucket.name, VersioningConfiguration={"Status": "Suspended"})
    assert [one.what.partition(":")[0] for one in bucket_settings(bucket.place)] == ["versioning is suspended"]
    assert [one.status for one in bucket_copies(bucket.place)] == ["kept"]


def test_a_lifecycle_rule_gives_the_day(address: str) -> None:
    bucket = Bucket(address)
    bucket.write_and_delete(PATH)
    bucket.expire(9)
    assert bucket_copies(bucket.place)[0].until == in_days(10), "rules are applied once a day"
    for others in (
        {"Status": "Disabled"},
        {"Filter": {"Prefix": "elsewhere/"}},
        {"Filter": {"Tag": {"Key": "k", "Value": "v"}}},
    ):
        bucket.expire(9, **others)
        assert bucket_copies(bucket.place)[0].until == "", "the rule is not about these files"


@pytest.mark.parametrize("expire", [None, 2, 90])
def test_a_locked_version_stays_until_its_date(address: str, expire: int | None) -> None:
    bucket = Bucket(address, lock=True)
    rule = {"DefaultRetention": {"Mode": "COMPLIANCE", "Days": 30}}
    bucket.client.put_object_lock_configuration(
        Bucket=bucket.name, ObjectLockConfiguration={"ObjectLockEnabled": "Enabled", "Rule": rule}
    )
    bucket.write_and_delete(PATH)
    if expire is not None:
        bucket.expire(expire)
    found = [one.what for one in bucket_settings(bucket.place)]
    assert found[1] == "object lock (COMPLIANCE): no version can be deleted for 30 days after it was written"
    (kept,) = bucket_copies(bucket.place, delete=True)
    assert bucket.versions() == [PATH]
    assert kept.what == f"noncurrent versions of deleted files (locked until {in_days(30)}): 1"
    assert kept.until == {None: "", 2: in_days(30), 90: in_days(91)}[expire]
    assert f", after {in_days(30)}: retrotool erase" in kept.advice


def test_destinations_of_replication_are_named(address: str) -> None:
    bucket, copy = Bucket(address), Bucket(address)

    rule = {
        "ID": "r", "Priority": 1, "Status": "Enabled", "Filter": {"Prefix": ""},
        "DeleteMarkerReplication": {"Status": "Disabled"}, "Destination": {"Bucket": f"arn:aws:s3:::{copy.name}"},
    }  # fmt: skip
    bucket.client.put_bucket_replication(
        Bucket=bucket.name,
        ReplicationConfiguration={"Role": "arn:aws:iam::123456789012:role/r", "Rules": [rule]},
    )
    (one,) = bucket_copies(bucket.place)
    assert one in bucket_settings(bucket.place)
    assert (one.status, one.until) == ("unknown", ""), "nobody looks there"
    assert f"bucket {copy.name}:" in one.what
    assert one.advice.endswith(f"aws s3api list-object-versions --bucket {copy.name} --prefix 'a store/'")


def test_what_may_not_be_read_is_not_checked(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = Bucket(address)
    bucket.write_and_delete(PATH)
    bucket.client.create_multipart_upload(Bucket=bucket.name, Key=f"a store/{OTHER}")
    with buckets.denying(address, "versions", "versioning", "uploads") as before:
        monkeypatch.setenv("AWS_ENDPOINT_URL", before)
        (one,) = bucket_copies(bucket.place, delete=True)
        (setting,) = bucket_settings(bucket.place)
        assert list_uploads(bucket.place) == []
    assert one.status == setting.status == "not checked"
    assert one.what == "noncurrent versions, unfinished uploads: access denied (403)"
    assert one.advice == "Needed: s3:GetBucketVersioning, s3:ListBucketVersions, s3:ListBucketMultipartUploads"
    assert (setting.what, setting.advice) == ("versioning: access denied (403)", "Needed: s3:GetBucketVersioning")
    assert bucket.versions() == [PATH]


def test_a_version_that_may_not_be_deleted_is_kept(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = Bucket(address)
    bucket.write_and_delete(PATH)
    with buckets.denying(address, "versionId") as before:
        monkeypatch.setenv("AWS_ENDPOINT_URL", before)
        (kept,) = bucket_copies(bucket.place, delete=True)
    assert (kept.status, kept.what) == ("kept", "noncurrent versions of deleted files: 1")


def test_a_server_that_offers_nothing_of_it(tmp_path: Path) -> None:
    with buckets.local_bucket(tmp_path) as address, buckets.settings_of(address):
        place = f"s3://{buckets.BUCKET}/store"
        storage_at(place).put_if_absent(PATH, RUN, b"data")
        (one,) = bucket_copies(place, delete=True)
        (setting,) = bucket_settings(place)
        assert list(storage_at(place).unfinished()) == []
    assert one.line == "noncurrent versions, replicas, unfinished uploads: the server can't say (501)."
    assert setting.what == "versioning, object lock, replicas: the server can't say (501)"
    assert one.status == setting.status == "unknown"


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("boto3", "requests", "azure", "azure.storage", "azure.storage.blob"):
        monkeypatch.setitem(sys.modules, module, None)
    for scheme, packages in (
        ("s3", "boto3"),
        ("gs", "google-auth requests"),
        ("az", "azure-storage-blob azure-identity"),
    ):
        for ask in (bucket_copies, bucket_settings):
            (one,) = ask(f"{scheme}://bucket/store")
            assert (one.status, one.advice) == ("not checked", f"pip install {packages}")
        assert list_uploads(f"{scheme}://bucket/store") == []


def test_a_server_of_web_pages_is_unknown() -> None:
    (one,) = bucket_copies("https://example.invalid/store")
    assert one.status == "unknown"
    assert list_uploads("https://example.invalid/store") == []


DAY = 86400
NAME = "a store/" + PATH
GOOGLE: dict[str, dict[str, Any]] = {
    "": {
        "softDeletePolicy": {"retentionDurationSeconds": str(7 * DAY)},
        "retentionPolicy": {"retentionPeriod": str(DAY)},
        "versioning": {"enabled": True},
    },
    "/o softDeleted": {"items": [{"name": NAME, "hardDeleteTime": "2026-12-07T10:00:00Z"}, {"name": "a store/README"}],
                       "nextPageToken": "more"},
    "/o softDeleted more": {"items": [{"name": NAME, "hardDeleteTime": "2026-12-08T10:00:00Z"}]},
    "/o versions": {"items": [{"name": NAME, "timeDeleted": "2026-11-30T10:00:00Z"}, {"name": NAME}]},
}  # fmt: skip
"""Answers of a stub, by path and query, in the form of Google's documentation: this is not their server."""


class GoogleStub(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        key = [url.path.removeprefix("/storage/v1/b/bucket"), *(k for k in ("softDeleted", "versions") if k in query)]
        assert query.get("prefix", ["a store/"]) == ["a store/"]
        data = json.dumps(GOOGLE[" ".join([*key, *query.get("pageToken", [])])]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def test_soft_deleted_files_and_old_versions_on_a_stub_of_google(monkeypatch: pytest.MonkeyPatch) -> None:
    with buckets.serving(GoogleStub) as address:
        monkeypatch.setenv("GOOGLE_BASE_URL", address)
        monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
        soft, old, uploads = bucket_copies("gs://bucket/a store")
        settings = bucket_settings("gs://bucket/a store")
    assert (soft.status, soft.what, soft.until) == ("kept", "soft-deleted files: 2", "2026-12-08")
    assert (old.status, old.what, old.until) == ("kept", "noncurrent versions of deleted files: 1", "")
    assert (uploads.status, uploads.what) == ("unknown", "uploads that were not finished: they are not listed")
    assert [one.what for one in settings] == [
        "soft delete: deleted files are kept for 7 days", "retention: files can't be deleted for 1 days",
        "versioning: deleted files become noncurrent versions",
    ]  # fmt: skip
    assert settings[0].advice == "Before the erase: gcloud storage buckets update gs://bucket --clear-soft-delete"


def test_blocks_that_were_not_committed_on_azurite() -> None:
    """RETROTOOL_AZURITE names ``azurite-blob``."""
    program = os.environ.get("RETROTOOL_AZURITE")
    if not program or not importlib.util.find_spec("azure") or not importlib.util.find_spec("azure.storage.blob"):
        pytest.skip("RETROTOOL_AZURITE does not name a program, or azure-storage-blob is not installed")
    with buckets.azurite(program):
        storage = storage_at(f"az://{buckets.BUCKET}/a store")
        storage.put_if_absent(OTHER, RUN, b"data")
        storage.delete([OTHER])
        assert bucket_copies(storage.uri) == bucket_settings(storage.uri) == ()
        container = azure_service(storage.uri).get_container_client(buckets.BUCKET)
        container.get_blob_client(f"a store/{PATH}").stage_block("AAAA", b"half")
        (one,) = bucket_copies(storage.uri)
        assert (one.status, one.what, one.until) == ("kept", "files with blocks that were not committed: 1", in_days(7))
        assert list(storage.unfinished()) == [], "nothing can abort them"
