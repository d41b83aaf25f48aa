"""What a bucket still has of files that a store deleted, and uploads in parts that were not finished.

obstore can't list any of it, so each cloud's own package does: boto3, google-auth with requests, or
azure-storage-blob. What needs a package or a permission that is missing is "not checked"; what a server does
not offer is "unknown". Neither is an error here: a receipt says so (``retrotool.receipt``).

* S3: noncurrent versions, until a lifecycle rule or an erase deletes them, locked ones not before their date.
  Destinations of replication are named, not looked at.
* Google Cloud Storage: soft-deleted files, for 7 days by default, and noncurrent versions. Not: unfinished
  uploads.
* Azure: soft-deleted files, versions, snapshots, and blocks that were not committed, which vanish in a week.

Only files that can hold data of chunks are counted (``paths.FileName``), not leases or the log. Cost: a
listing of all versions under the store's prefix, 1,000 per request, and a request to delete each.
"""

from __future__ import annotations

import shlex
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Literal

from retrotool.errors import CorruptError
from retrotool.read_ahead import concurrently
from retrotool.store.cloud_client import azure_service, boto3_client, bucket_of, google_session, timeout_seconds
from retrotool.store.paths import PROBE, FileName
from retrotool.store.storage import Unfinished
from retrotool.store.sums import without_sums

_AT_ONCE = 16  # requests
_UPLOAD = "?uploadId="
_UNCOMMITTED_DAYS = 7
_NOT_OFFERED = (405, 501)  # statuses of answers
_REFUSED = (400, 403, 409, *_NOT_OFFERED)
_PACKAGES = {"s3": "boto3", "gs": "google-auth requests", "az": "azure-storage-blob azure-identity"}

_Status = Literal["kept", "setting", "not checked", "unknown"]


@dataclass(frozen=True, slots=True)
class BucketCopies:
    """Copies of deleted files that a bucket has, or may have; or a setting by which it keeps them.

    * ``status``: "kept"; "setting"; "not checked", because access or a package is missing; "unknown", because
      the server can't say, or the copies are elsewhere.
    * ``until``: the last day that the bucket keeps them, such as "2026-12-07" (UTC). "": until they are
      removed by hand, or not known.
    """

    what: str
    status: _Status
    until: str = ""
    advice: str = ""

    @property
    def line(self) -> str:
        """What is kept, until when, and the advice, in sentences."""
        until = f", until {self.until or 'they are removed by hand'}" if self.status == "kept" else ""
        return f"{self.what}{until}. {self.advice}".rstrip()


def bucket_copies(place: str, *, delete: bool = False, clean: Collection[str] = ()) -> tuple[BucketCopies, ...]:
    """Return what the bucket of the store at ``place`` has of deleted files; () for a folder.

    ``delete``: first delete what can be, the noncurrent versions on S3. ``clean``: paths not to count.
    """

    def counts(path: str) -> bool:
        return _run_of(path) is not None and without_sums(path) not in clean

    return _ask(place, lambda bucket: bucket.copies(counts, delete))


def bucket_settings(place: str) -> tuple[BucketCopies, ...]:
    """Return the settings by which a bucket will keep files that are deleted; () for a folder."""
    return _ask(place, lambda bucket: bucket.settings())


def list_uploads(place: str) -> list[Unfinished]:
    """List the unfinished uploads of a store's files, with size 0; none if they can't be listed."""
    if _cloud(place) != "s3":
        return []
    try:
        uploads = [*_S3Bucket(place).uploads()]
    except Exception as error:  # of boto3; a receipt reports it
        _reason(error)
        return []
    found = ((f"{path}{_UPLOAD}{upload}", _run_of(path)) for path, upload in uploads)
    return [Unfinished(path, run, 0) for path, run in found if run is not None]


def abort_uploads(place: str, paths: Iterable[str]) -> None:
    """Cancel uploads by their paths in ``list_uploads``; those that may not be aborted are left."""
    bucket = _S3Bucket(place)
    for path in paths:
        key, _, upload = path.rpartition(_UPLOAD)
        try:
            bucket.abort(key, upload)
        except Exception as error:  # of boto3; the next clean-up tries again
            _reason(error)


def _cloud(place: str) -> str:
    scheme, is_uri, _ = place.partition("://")
    return "" if not is_uri else "az" if scheme in ("abfs", "abfss") else scheme


def _run_of(path: str) -> str | None:
    """Return the run that wrote a file which can hold data of chunks; None for other files."""
    try:
        name = FileName.parse(without_sums(path))
    except CorruptError:
        return None
    return None if name.slot == PROBE else name.run


_Questions = dict[str, tuple[Callable[[], Iterable[BucketCopies]], str]]
"""By subject: what finds the copies, and the permissions that it needs."""


def _ask(place: str, questions_of: Callable[[Any], _Questions]) -> tuple[BucketCopies, ...]:
    cloud = _cloud(place)
    if cloud in ("http", "https"):
        return (BucketCopies("deleted files: the server can't say whether it keeps them", "unknown"),)
    if cloud not in _BUCKETS:
        return ()
    found: list[BucketCopies] = []
    failed: dict[tuple[_Status, str], list[tuple[str, str]]] = {}
    try:
        for subject, (read, permissions) in questions_of(_BUCKETS[cloud](place)).items():
            try:
                found += read()
            except Exception as error:  # of three packages
                failed.setdefault(_reason(error), []).append((subject, permissions))
    except ModuleNotFoundError as error:
        advice = f"pip install {_PACKAGES[cloud]}"
        return (BucketCopies(f"deleted files: {error.name} is not installed", "not checked", advice=advice),)
    except Exception as error:  # of a package, about credentials
        return (BucketCopies(f"deleted files: {_reason(error)[1]}", "not checked"),)
    for (status, reason), several in failed.items():
        what = ", ".join(subject for subject, _ in several)
        advice = f"Needed: {', '.join(permissions for _, permissions in several)}" if status == "not checked" else ""
        found.append(BucketCopies(f"{what}: {reason}", status, advice=advice))
    return tuple(found)


def _reason(error: Exception) -> tuple[_Status, str]:
    """Return why a question was not answered; raise errors of this program."""
    if isinstance(error, TypeError | AttributeError | LookupError):
        raise error
    status = _code_of(error)
    if status in _NOT_OFFERED:
        return "unknown", f"the server can't say ({status})"
    if status in (401, 403):
        return "not checked", f"access denied ({status})"
    return "not checked", (str(error).splitlines() or [type(error).__name__])[0][:200]


def _code_of(error: Exception) -> int | None:
    """Return the HTTP status in an error of botocore, requests or azure-core."""
    answer: Any = getattr(error, "response", None)
    if isinstance(answer, dict):
        answer = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return answer if isinstance(answer, int) else None
    return getattr(error, "status_code", getattr(answer, "status_code", None))


def _kept(what: str, until: Iterable[str], advice: str) -> Iterator[BucketCopies]:
    """Yield what is kept, if anything; ``until`` has a day for each file, "" without one."""
    if days := list(until):
        yield BucketCopies(f"{what}: {len(days):,}", "kept", "" if "" in days else max(days), advice)


def _day(time: datetime, days: int = 0) -> str:
    return (time.astimezone(UTC) + timedelta(days)).date().isoformat()


class _S3Bucket:
    def __init__(self, place: str) -> None:
        self._place = place
        self._bucket, self._prefix = bucket_of(place)
        self._client = boto3_client()

    def settings(self) -> _Questions:
        return {
            "versioning": (self._versioning, "s3:GetBucketVersioning"),
            "object lock": (self._lock, "s3:GetBucketObjectLockConfiguration"),
            "replicas": (self._replicas, "s3:GetReplicationConfiguration"),
        }

    def copies(self, counts: Callable[[str], bool], delete: bool) -> _Questions:
        versions = partial(self._versions, counts, delete)
        return {
            "noncurrent versions": (versions, "s3:GetBucketVersioning, s3:ListBucketVersions"),
            "replicas": (self._replicas, "s3:GetReplicationConfiguration"),
            "unfinished uploads": (self._unfinished, "s3:ListBucketMultipartUploads"),
        }

    def _send(self, name: str, *refused: int, **about: str) -> dict[str, Any]:
        """Return the answer to a request; {} if its status is 404 or one of ``refused``."""
        from botocore.exceptions import ClientError

        try:
            answer: dict[str, Any] = getattr(self._client, name)(Bucket=self._bucket, **about)
        except ClientError as error:
            if _code_of(error) in (404, *refused):
                return {}
            raise
        return answer

    def _versioning(self) -> Iterator[BucketCopies]:
        if status := self._send("get_bucket_versioning").get("Status"):
            what = f"versioning is {status.lower()}: deleted files become noncurrent versions"
            advice = "An erase deletes these, too, with the permissions s3:ListBucketVersions, s3:DeleteObjectVersion."
            yield BucketCopies(what, "setting", advice=advice)

    def _lock(self) -> Iterator[BucketCopies]:
        found = self._send("get_object_lock_configuration").get("ObjectLockConfiguration", {})
        if rule := found.get("Rule", {}).get("DefaultRetention"):
            period = f"{rule['Days']} days" if "Days" in rule else f"{rule['Years']} years"
            what = f"object lock ({rule['Mode']}): no version can be deleted for {period} after it was written"
            command = ["aws", "s3api", "put-object-lock-configuration", "--bucket", self._bucket]
            command += ["--object-lock-configuration", "ObjectLockEnabled=Enabled"]
            yield BucketCopies(what, "setting", advice=f"For files written from now on: {shlex.join(command)}")

    def _replicas(self) -> Iterator[BucketCopies]:
        found = self._send("get_bucket_replication").get("ReplicationConfiguration", {})
        for rule in found.get("Rules", ()):
            chosen = rule.get("Filter", rule)
            begin = chosen.get("And", chosen).get("Prefix", "")
            if begin.startswith(self._prefix) or self._prefix.startswith(begin):
                bucket = rule["Destination"]["Bucket"].rpartition(":")[2]
                what = f"replicas in the bucket {bucket}: deleting a version is not replicated"
                command = ["aws", "s3api", "list-object-versions", "--bucket", bucket, "--prefix", self._prefix]
                advice = f"Delete them there, too. To list them: {shlex.join(command)}"
                yield BucketCopies(what, "unknown", advice=advice)

    def _versions(self, counts: Callable[[str], bool], delete: bool) -> Iterator[BucketCopies]:
        versioning = self._send("get_bucket_versioning", 403)
        if versioning and "Status" not in versioning:
            return  # it never had versions
        found: list[tuple[dict[str, str], datetime]] = []  # key and id of a version, and since when it is not current
        since: dict[str, datetime] = {}
        pages = self._client.get_paginator("list_object_versions")
        for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix):
            since |= {one["Key"]: one["LastModified"] for one in page.get("DeleteMarkers", ()) if one["IsLatest"]}
            for one in page.get("Versions", ()):
                if not one["IsLatest"] and counts(one["Key"][len(self._prefix) :]):
                    version = {"Key": one["Key"], "VersionId": one["VersionId"]}
                    found.append((version, since.get(one["Key"], datetime.now(UTC))))
        if delete:
            done = concurrently(lambda one: self._send("delete_object", *_REFUSED, **one[0]), found, _AT_ONCE)
            found = [one for one, answer in zip(found, done, strict=True) if not answer]
        if found:
            yield from self._undeleted(found)

    def _undeleted(self, versions: Sequence[tuple[dict[str, str], datetime]]) -> Iterator[BucketCopies]:
        def locked_until(version: dict[str, str]) -> str:
            day = self._send("head_object", *_REFUSED, **version).get("ObjectLockRetainUntilDate")
            return _day(day) if day else ""

        locks = list(concurrently(locked_until, [version for version, _ in versions], _AT_ONCE))
        days = self._expiry()
        until = [
            "" if days is None else max(lock, _day(since, days + 1))  # rules are applied once a day
            for (_, since), lock in zip(versions, locks, strict=True)
        ]
        last = max(locks)
        what = f"noncurrent versions of deleted files{f' (locked until {last})' if last else ''}"
        command = shlex.join(["retrotool", "erase", self._place])
        advice = f"With the permission s3:DeleteObjectVersion{f', after {last}' if last else ''}: {command} PURGE"
        yield from _kept(what, until, advice)

    def _expiry(self) -> int | None:
        """Return the days after which a lifecycle rule deletes all noncurrent versions of the store."""
        found = []
        for rule in self._send("get_bucket_lifecycle_configuration", *_REFUSED).get("Rules", ()):
            chosen, expiry = rule.get("Filter", rule), rule.get("NoncurrentVersionExpiration", {})
            is_plain = rule["Status"] == "Enabled" and "NewerNoncurrentVersions" not in expiry
            only_some = chosen.keys() & {"And", "Tag", "ObjectSizeGreaterThan", "ObjectSizeLessThan"}
            if is_plain and not only_some and self._prefix.startswith(chosen.get("Prefix", "")):
                found.append(expiry.get("NoncurrentDays"))
        return min(filter(None, found), default=None)

    def uploads(self) -> Iterator[tuple[str, str]]:
        """Yield the path and id of each upload."""
        pages = self._client.get_paginator("list_multipart_uploads")
        for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix):
            for one in page.get("Uploads", ()):
                yield one["Key"][len(self._prefix) :], one["UploadId"]

    def _unfinished(self) -> Iterator[BucketCopies]:
        deque(self.uploads(), 0)  # ``list_uploads`` returns them: here an error counts
        yield from ()

    def abort(self, path: str, upload: str) -> None:
        self._client.abort_multipart_upload(Bucket=self._bucket, Key=self._prefix + path, UploadId=upload)


class _GoogleBucket:
    def __init__(self, place: str) -> None:
        self._bucket, self._prefix = bucket_of(place)
        self._session, base = google_session()
        self._url = f"{base}/storage/v1/b/{self._bucket}"

    def settings(self) -> _Questions:
        return {"soft delete, retention, versioning": (self._settings, "storage.buckets.get")}

    def copies(self, counts: Callable[[str], bool], delete: bool) -> _Questions:  # noqa: ARG002
        return {
            "deleted files": (partial(self._deleted, counts), "storage.objects.list"),
            "unfinished uploads": (self._unfinished, ""),
        }

    def _get(self, url: str, **params: str) -> dict[str, Any]:
        answer = self._session.get(url, params=params, timeout=timeout_seconds())
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    def _settings(self) -> Iterator[BucketCopies]:
        found = self._get(self._url, fields="softDeletePolicy,versioning,retentionPolicy")
        soft, retention, versioning = (found.get(n, {}) for n in ("softDeletePolicy", "retentionPolicy", "versioning"))
        kept = "deleted files are kept for"
        locked = "retention: files can't be deleted for {} days"
        for seconds, what, option in (
            (soft.get("retentionDurationSeconds"), f"soft delete: {kept} {{}} days", "--clear-soft-delete"),
            (retention.get("retentionPeriod"), locked, "--clear-retention-period"),
            (versioning.get("enabled"), "versioning: deleted files become noncurrent versions", "--no-versioning"),
        ):
            if int(seconds or 0):
                command = shlex.join(["gcloud", "storage", "buckets", "update", f"gs://{self._bucket}", option])
                days = f"{int(seconds) / 86400:g}"
                yield BucketCopies(what.format(days), "setting", advice=f"Before the erase: {command}")

    def _objects(self, counts: Callable[[str], bool], **params: str) -> Iterator[dict[str, Any]]:
        while True:
            page = self._get(f"{self._url}/o", prefix=self._prefix, **params)
            yield from (one for one in page.get("items", ()) if counts(one["name"][len(self._prefix) :]))
            if "nextPageToken" not in page:
                return
            params["pageToken"] = page["nextPageToken"]

    def _deleted(self, counts: Callable[[str], bool]) -> Iterator[BucketCopies]:
        until = (one["hardDeleteTime"][:10] for one in self._objects(counts, softDeleted="true"))
        yield from _kept("soft-deleted files", until, "Nothing can delete them before.")
        old = ("" for one in self._objects(counts, versions="true") if "timeDeleted" in one)
        command = shlex.join(["gcloud", "storage", "ls", "--all-versions", f"gs://{self._bucket}/{self._prefix}**"])
        advice = f"Delete each: gcloud storage rm URL#GENERATION. To list them: {command}"
        yield from _kept("noncurrent versions of deleted files", old, advice)

    def _unfinished(self) -> Iterator[BucketCopies]:
        advice = "A lifecycle rule with the action AbortIncompleteMultipartUpload removes them."
        yield BucketCopies("uploads that were not finished: they are not listed", "unknown", advice=advice)


class _AzureBucket:
    def __init__(self, place: str) -> None:
        self._bucket, self._prefix = bucket_of(place)
        self._service = azure_service(place)

    def settings(self) -> _Questions:
        return {"soft delete": (self._settings, "a key of the account")}

    def copies(self, counts: Callable[[str], bool], delete: bool) -> _Questions:  # noqa: ARG002
        return {"deleted files": (partial(self._deleted, counts), "the role Storage Blob Data Contributor")}

    def _settings(self) -> Iterator[BucketCopies]:
        policy = self._service.get_service_properties()["delete_retention_policy"]
        if policy is not None and policy.enabled:
            command = ["az", "storage", "account", "blob-service-properties", "update", "--account-name"]
            command += [self._service.account_name, "--enable-delete-retention", "false"]
            what = f"soft delete: deleted files are kept for {policy.days} days"
            yield BucketCopies(what, "setting", advice=f"Before the erase: {shlex.join(command)}")

    def _deleted(self, counts: Callable[[str], bool]) -> Iterator[BucketCopies]:
        container, now = self._service.get_container_client(self._bucket), datetime.now(UTC)
        also = ["deleted", "versions", "snapshots", "uncommittedblobs"]
        soft, old, blocks = [], [], []
        for blob in container.list_blobs(self._prefix, include=also):
            if not counts(blob.name[len(self._prefix) :]):
                continue
            if blob.deleted:
                soft.append(_day(now, 1 + (blob.remaining_retention_days or 0)))
            elif blob.snapshot or (blob.version_id and not blob.is_current_version):
                old.append("")
            elif not blob.size:  # no file of a store is empty
                blocks.append(_day(now, _UNCOMMITTED_DAYS))
        yield from _kept("soft-deleted files", soft, "Nothing can delete them before.")
        yield from _kept("versions or snapshots of files", old, "Delete each: az storage blob delete --version-id ID")
        advice = "They vanish by themselves. Those of running commands are among them."
        yield from _kept("files with blocks that were not committed", blocks, advice)


_BUCKETS: dict[str, Any] = {"s3": _S3Bucket, "gs": _GoogleBucket, "az": _AzureBucket}
