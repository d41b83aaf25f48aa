"""``receipt``: check that purged chunks are not returned and erased ones are removed, and write a receipt.

1. Read and check the log from the beginning: who purged, when and why, and which files ever left the store.
2. Decode every file that can hold data of the purged chunks; files that left the store must be absent
   (``verify_erasure``). What is left is a problem, also of a purge that is not erased.
3. Exercise every read path (``read_paths``).
4. List what a bucket still has of deleted files (``bucket_copies``). Copies in it, and what could not be
   checked, are problems; what is unknown, or elsewhere, is only listed.

A commit then records the SHA-256 of the receipt's JSON, so a receipt can't be changed unnoticed. A read-only
store gets no commit.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import orjson

from retrotool.cli import output, pages, result_files
from retrotool.engine.progress import counting
from retrotool.errors import CorruptError, StorageError
from retrotool.neighbours.dependents import Dependent, dependents
from retrotool.purge.purged_chunks import find_purge, unerased
from retrotool.receipt.read_paths import ReadPath, read_paths
from retrotool.receipt.verify_erasure import CommitDigest, Erasure, PurgeHistory, check_files
from retrotool.store.bucket_copies import BucketCopies, bucket_copies
from retrotool.store.folding import fold, writing
from retrotool.store.leases import Run
from retrotool.store.log import Draft
from retrotool.store.store import Store, retry_overtaken
from retrotool.store.tombstones import read_rejected
from retrotool.store.verify_log import check_log

_LISTED = 200  # rows of a table on the page; the JSON has all
LIMITS = (
    "Copies of the store, backups, snapshots, and versions that a file system or a bucket keeps. Erase in them, too.",
    "Blocks of deleted files, until the disk writes over them; solid-state disks keep them longest.",
    "Files under the store that no commit names. They are listed above, and were not decoded.",
    "Chunk ids in the tombstones: they say that something was purged, not what. Hashes of ids and texts on the block "
    "list, keyed with the store's secret: they keep what was purged from coming back.",
    "Centroids and codebooks of indexes, which were trained with its vectors among others and hold none of them. "
    "To train without them: retrotool index STORE --retrain.",
    "Neighbour tables of other stores: they may hold ids of its chunks, distances to them, and their text.",
    "The input files, and exports, pages and search results made before.",
    "Models that were trained on the text: they may still know it.",
)

STATES = {
    "erased": "purged and erased",
    "partly erased": "purged and partly erased: an erase is not finished, or another purge erased some chunks",
    "purged": "purged, not erased",
}


@dataclass(frozen=True, slots=True)
class Receipt:
    """What was purged and erased, and what the check found; no purged text.

    * ``state``: a key of ``STATES``. ``ok``: there are no ``problems``.
    * ``chunks``: all that the purge names. ``copies``: those of rejected repeats. ``newly_purged``: those
      that no earlier purge had.
    * ``commits``: those that purged and erased. ``log_head``: SHA-256 of the newest commit, ``log_commit``.
    * ``dependents``: stores with neighbours in this one, which were not checked.
    * ``bucket``: what the store's bucket has, or may have, of deleted files.
    """

    store: str
    tool: str
    purge: str
    state: str
    ok: bool
    problems: tuple[str, ...]
    reason: str
    who: str
    selector: str
    purged: str
    erased: str
    verified: str
    chunks: int
    newly_purged: int
    copies: int
    documents: int
    tokens: int
    commits: tuple[CommitDigest, ...]
    log_commit: int
    log_head: str
    log_whole: bool
    files: Erasure
    read_paths: tuple[ReadPath, ...]
    dependents: tuple[Dependent, ...]
    bucket: tuple[BucketCopies, ...]
    limits: tuple[str, ...]

    @property
    def unread(self) -> list[str]:
        """Names of the read paths that could not be exercised, for example because a database has moved."""
        return [path.name for path in self.read_paths if path.note and not path.broken]


@dataclass(frozen=True, slots=True)
class VerifiedPurge:
    """A receipt, its files, and the commit with the ``sha256`` of the JSON (None: the store is read-only)."""

    receipt: Receipt
    json: str
    page: str
    sha256: str
    commit: int | None


def verdict(receipt: Receipt) -> str:
    """Return what a check found, in sentences."""
    if not receipt.ok:
        return f"FAILED: {output.count(len(receipt.problems), 'problem')}"
    unread = f" {output.count(len(receipt.unread), 'read path')} could not be checked." if receipt.unread else ""
    bucket = " Copies that its bucket may have were not checked." if receipt.bucket else ""
    return f"Nothing of it is left in the store.{unread}{bucket}"


def verify_purge(root: str | Path, purge: str, *, out: str | Path = ".") -> VerifiedPurge:
    """Check a purge; write ``receipt-PURGE.json`` and ``.html`` into the folder ``out``, made if needed.

    ``purge`` "last" is the newest. ``UsageError`` if it does not exist or was undone.
    """
    store = Store.open(root)
    purge, _ = find_purge(store, purge)
    with contextlib.suppress(StorageError, PermissionError), Run(store.storage) as run:
        fold(store, run)  # drops staged tasks that read what was erased
    result_files.check_outside("--out", out, "folder")
    Path(out).mkdir(parents=True, exist_ok=True)
    json, page = (Path(out) / f"receipt-{purge}.{kind}" for kind in ("json", "html"))
    for path in (json, page):
        result_files.check_file("--out", path)
    receipt = retry_overtaken(lambda: _check(store, purge), store.renew)
    data = orjson.dumps(asdict(receipt), option=orjson.OPT_INDENT_2) + b"\n"
    sha256 = hashlib.sha256(data).hexdigest()
    with result_files.written(json) as scratch:
        scratch.write_bytes(data)
    commit, draft = None, Draft("verify", {"purge": receipt.purge, "ok": receipt.ok, "receipt": sha256})
    with contextlib.suppress(StorageError, PermissionError), writing(store) as run:  # the store may be read-only
        commit = store.commit(run, lambda _: draft).number
    pages.write_page(
        page, "receipt.html", receipt=receipt, place=store.place, state=STATES[receipt.state],
        verdict=verdict(receipt), digest=sha256, commit=commit, listed=_LISTED,
    )  # fmt: skip
    return VerifiedPurge(receipt, str(json), str(page), sha256, commit)


def _check(store: Store, purge: str) -> Receipt:
    _, record = find_purge(store, purge)
    history = PurgeHistory(store, purge)
    chunks = history.chunks.ids
    with counting("log", "log", 1) as report:
        log = check_log(store.storage, store.genesis, store.state.number, history.note)
        report(1)
    with counting("files", "B", store.state.bytes()) as report:
        erasure = check_files(history, report)
    checks = read_paths(store, history.chunks)
    checked = []
    with counting("read paths", "path", len(checks)) as report:
        for check in checks:
            checked.append(check())
            report(1)
    bucket = bucket_copies(store.storage.uri, clean=history.new)
    state = "erased"
    left = [f"{path}: data is left in {output.count(n, 'row')}; erase it again" for path, n in erasure.left.items()]
    if not record["erased"]:
        state = "purged" if len(unerased(store, chunks)) == len(chunks) else "partly erased"
        left = [f"the purge is not erased: its data is left in {output.count(len(left), 'file')}"]
    problems = [f"the log: {problem}" for problem in log.problems]
    if (named := store.state.file("tombstones", purge)) is not None:
        try:
            store.check_sum(named)
        except CorruptError as error:
            problems.append(f"{error}, so the wrong chunks may have been checked".removeprefix(f"{store.place}/"))
    problems += [
        *erasure.damaged,
        *(f"{path}: left the store but still exists; any write to the store removes it" for path in erasure.present),
        *left,
        *(f"{path.name}: returned {output.count(path.found, 'purged chunk')}" for path in checked if path.found),
        *(f"{path.name}: {path.note}" for path in checked if path.broken),
        *(f"the bucket: {one.line}" for one in bucket if one.status != "unknown"),
    ]
    return Receipt(
        store=store.identity.uuid,
        tool=f"retrotool {version('retrotool')}",
        purge=purge,
        state=state,
        ok=not problems,
        problems=tuple(problems),
        **{name: record[name] for name in ("reason", "who", "selector", "documents", "tokens")},
        purged=history.commits[0].time if history.commits else "",
        erased=history.erased.time if history.erased else "",
        verified=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        chunks=len(chunks),
        newly_purged=record["chunks"],
        copies=len(np.intersect1d(chunks, read_rejected(store).ids)),
        commits=tuple(history.commits),
        log_commit=len(log.hashes) - 1,
        log_head=log.head,
        log_whole=not log.problems,
        files=erasure,
        read_paths=tuple(checked),
        dependents=tuple(dependents(store)),
        bucket=bucket,
        limits=LIMITS,
    )
