"""``purge --verify``: looking for what is left of a purge, everywhere, and the receipt that says what was found.

1. The log is read and checked from its beginning: who purged, when and why, and which files an erase has replaced.
2. Every way to read the store is gone (``commands.views``).
3. Once it is erased, every byte under the store is searched for what the purge took (``stages.residue``), by the keyed
   hashes that were kept before the erase (``stages.proofs``); the files that were replaced must be gone, and those in
   their place be what the log says, by SHA-256.

The log then gets an entry with the SHA-256 of the receipt, so that nobody can change that afterwards; a store that
can't be written has none. Hashes of the chunks are on the receipt, and the salt that they were made with in a file of
its own: who has both can test a guess.

Cost: reading the store once, 50 to 60 MB a second and core of what is decompressed, and its chunks once more if a
piece that is found may be other documents'; its tables of neighbours three times. Memory: 3 kB a chunk of the purge.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson
from tqdm import tqdm

from retrotool import interrupts
from retrotool.cli import result_file
from retrotool.errors import StorageError, UsageError
from retrotool.neighbours.dependents import dependents
from retrotool.purge import read_paths, receipt_page, residue
from retrotool.purge.erased_files import ErasedFile, ErasedFiles
from retrotool.purge.matching import KINDS, Needles
from retrotool.purge.needles import passed_over
from retrotool.purge.proofs import proofs_of, salted_chunks
from retrotool.purge.purged_chunks import count_unerased, in_store, tombstones_of
from retrotool.purge.read_paths import View
from retrotool.store import atomic, identity, parts, paths
from retrotool.store.log import Draft
from retrotool.store.session import writing
from retrotool.store.state import State
from retrotool.store.store import Store
from retrotool.store.verify_log import LogFound, check_log

Report = Callable[[int], object]

LIMITS = (
    "Models that were trained on the text before may still know it.",
    "Centroids and codebooks of indexes were trained with its vectors among others; they hold none of them. "
    "Whoever wants them without: retrotool index STORE --retrain.",
    "Bare chunk ids stay in the tombstones; they say that something was purged, not what.",
    "Copies of the store, backups, snapshots and versions that a bucket keeps are not reached: erase in them, too.",
    "A disk may keep the blocks of deleted files until it writes over them; solid-state disks keep them longest.",
    "The input that was chunked, and what was exported before, are other people's files: none was looked at.",
    "Text is looked for in pieces that nobody else has said: what a living document says, too, is there by right. "
    "A chunk of a few words may have no such piece.",
    "Of text a piece of fewer than about 150 characters in a row may pass unnoticed; of 60 every second does. The "
    "whole text of a chunk does not, nor its tokens, a vector as it is stored, or an id that stands by itself, unless "
    "it is counted here among those without a piece to look for.",
    "Who has the file with the salt can test with the hashes whether a text that they guess was among what was erased.",
)


@dataclass(frozen=True, slots=True)
class Trace:
    """So many ``pieces`` of a ``kind`` (tokens, text, vector16, vector32, key, id, chunk) are left in a file."""

    path: str
    kind: str
    pieces: int


@dataclass(frozen=True, slots=True)
class Searched:
    """The search through all bytes: files, bytes, needles by kind, and those that living documents say by right.

    ``without`` counts, by kind, chunks (or documents) of which there was nothing to look for: too short, or said by
    others, too. ``passed_over`` chunks were not drawn from, as there are too many. ``left`` is what was found.
    """

    files: int
    bytes: int
    needles: dict[str, int]
    without: dict[str, int]
    passed_over: int
    said_by_others: int
    left: tuple[Trace, ...]


@dataclass(frozen=True, slots=True)
class Receipt:
    """What was purged, what was done, and what was found when it was looked for; none of the text.

    ``state`` is "erased", "partly erased" (an erase is not at its end, or another purge had some) or "purged".
    ``ok``: nothing was found, and there are no ``problems``. ``unread`` ways could not be gone, as what they are of
    is elsewhere. ``chunks`` are all that it names, ``living`` of them were not purged before. ``files`` are those that
    an erase replaced. ``salted_chunks`` are BLAKE2b-128 of the tokens of each chunk that was erased, keyed with a salt
    that is not here. ``log_head`` is the SHA-256 of commit ``log_commit``.
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
    selector_hash: str
    purged: str
    purged_by: int
    erased: str
    erased_by: int
    verified: str
    chunks: int
    living: int
    copies: int
    documents: int
    tokens: int
    log_commit: int
    log_head: str
    log_whole: bool
    views: tuple[View, ...]
    unread: tuple[str, ...]
    searched: Searched | None
    files: tuple[ErasedFile, ...]
    salted_chunks: tuple[str, ...]
    elsewhere: tuple[str, ...]
    limits: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class VerifiedPurge:
    """A receipt, where it was written as JSON and as a page, and the commit that has its SHA-256 (None: none could).

    ``salt``: the file with the key of the hashes ("": there are none).
    """

    receipt: Receipt
    json: str
    page: str
    salt: str
    sha256: str
    commit: int | None


def verify_purge(root: str | Path, purge: str, *, out: str | Path = ".") -> VerifiedPurge:
    """Look for a purge, and write the receipt ``receipt-PURGE.json`` and ``.html`` into the folder ``out``.

    ``UsageError`` if there is no such purge, or it was taken back.
    """
    store = Store.open(root)
    _check(store, purge)
    targets = {kind: Path(out) / f"receipt-{purge}.{kind}" for kind in ("json", "html", "salt")}
    for path in targets.values():
        result_file.check_file("--out", path)
    salt, hashes = salted_chunks(store, purge)
    receipt = _receipt(store, purge, hashes)
    data = orjson.dumps(asdict(receipt), option=orjson.OPT_INDENT_2) + b"\n"
    sha256 = hashlib.sha256(data).hexdigest()
    if hashes:
        _write(targets["salt"], f"{salt}\n".encode(), mode=0o600)  # for nobody else: with it guesses can be tested
    _write(targets["json"], data)
    commit = _note(store, receipt, sha256)  # now that it is there
    _write(targets["html"], receipt_page.page(receipt, sha256, commit).encode())
    return VerifiedPurge(
        receipt, str(targets["json"]), str(targets["html"]), str(targets["salt"]) if hashes else "", sha256, commit
    )


def _write(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Write a file that has ``mode`` from its first byte on, as far as the user's mask lets it."""
    with result_file.written(path) as scratch:
        scratch.unlink(missing_ok=True)
        with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)


def _check(store: Store, purge: str) -> None:
    records = store.state.with_prefix("purge:")
    if purge not in records:
        known = f"it has: {', '.join(list(records)[-20:])}" if records else "it has none"
        raise UsageError(f"{store.root} has no purge {purge!r}; {known}", f"See: retrotool log {store.root}")
    if "restored" in records[purge]:
        raise UsageError(
            f"the purge {purge!r} was taken back: its chunks are living", f"See: retrotool log {store.root}"
        )


def _receipt(store: Store, purge: str, hashes: list[str]) -> Receipt:
    record = store.state.records[f"purge:{purge}"]
    chunks = tombstones_of(store, purge)
    there = in_store(store, chunks)
    with _progress("log", 1, "log") as report:
        erased, found = _read_log(store, purge, np.unique(chunks >> parts.PART_SHIFT).tolist())
        report(1)
    problems = [f"the log: {problem}" for problem in found.problems] + _check_evidence(store, erased)
    with _progress("views", read_paths.ways(store), "view") as report:
        seen = read_paths.look(store, chunks, report)
    problems += [f"{view.name}: {view.found:,} purged chunks come up" for view in seen if view.found]
    problems += [f"{view.name}: {view.note}" for view in seen if view.broken]
    searched = None
    if record["erased"]:
        problems += _check_files(store, erased.files)
        needles = proofs_of(store, purge)
        if needles is not None:
            searched, what_is_left = _search(store, needles)
            problems += what_is_left
        elif len(there):
            problems.append("it was erased by a version that kept no proofs: nothing is left to look for it by")
    return Receipt(
        store=store.identity.uuid,
        tool=f"retrotool {version('retrotool')}",
        purge=purge,
        state=_state(store, there, erased=bool(record["erased"])),
        ok=not problems,
        problems=tuple(problems),
        reason=str(record["reason"]),
        who=str(record.get("who", "")),
        selector=str(record["selector"]),
        selector_hash=str(record["hash"]),
        purged=erased.purged,
        purged_by=erased.purged_by,
        erased=erased.erased,
        erased_by=erased.erased_by,
        verified=_now(),
        chunks=len(chunks),
        living=int(record["chunks"]),
        copies=len(chunks) - _named(store, purge),
        documents=int(record["documents"]),
        tokens=int(record["tokens"]),
        log_commit=len(found.hashes) - 1,
        log_head=found.head,
        log_whole=not found.problems,
        views=tuple(seen),
        unread=tuple(view.name for view in seen if view.note and not view.broken),
        searched=searched,
        files=tuple(sorted(erased.files, key=lambda file: (file.commit, file.before))),
        salted_chunks=tuple(hashes),
        elsewhere=tuple(sorted({one.path for one in dependents(store)})),
        limits=LIMITS,
    )


def _state(store: Store, chunks: npt.NDArray[np.int64], *, erased: bool) -> str:
    if erased:
        return "erased"
    return "purged" if count_unerased(store, chunks) == len(chunks) else "partly erased"


def _named(store: Store, purge: str) -> int:
    entry = store.state.file("tombstones", purge)
    return 0 if entry is None else entry.rows


def _read_log(store: Store, purge: str, numbers: list[int]) -> tuple[ErasedFiles, LogFound]:
    erased = ErasedFiles(purge, numbers)
    _, genesis = identity.read_identity(store.root)
    return erased, check_log(store.root, genesis, store.state.number, erased.note)


def _check_evidence(store: Store, erased: ErasedFiles) -> list[str]:
    """What is wrong with the files that tell who the victims are and what they are looked for by."""
    return [
        f"{path}: it is not what the log says, by SHA-256: what is looked for is not what was erased"
        for path, entry in erased.evidence.items()
        if not store.state.has(path) or atomic.file_sha256(paths.inside(store.root, path)) != entry.sha256
    ]


def _check_files(store: Store, replaced: list[ErasedFile]) -> list[str]:
    """What is wrong with files that were replaced, and with those that took their place and are still there."""
    problems = [
        f"{file.before}: it was replaced, and is still there"
        for file in replaced
        if (store.root / file.before).exists()
    ]
    after = {file.after: file for file in replaced if file.after and store.state.has(file.after)}
    total = sum(file.after_bytes for file in after.values())
    with _progress("files", total, "B") as report:
        for path, file in after.items():
            if atomic.file_sha256(store.root / path) != file.after_sha256:
                problems.append(f"{path}: it is not what the log says, by SHA-256")
            report(file.after_bytes)
    return problems


def _search(store: Store, needles: Needles) -> tuple[Searched, list[str]]:
    """What the search through all bytes found, and that in words."""
    paths = residue.Residue(store.root, needles).files()
    total = sum(path.stat().st_size for path in paths if path.exists())
    with _progress("search", total, "B") as report, _progress("ask others", len(store.state.parts()), "part") as part:
        left = residue.look(store, needles, report, part)
    traces = Counter((finding.path, finding.kind) for finding in left.findings)
    waiting = {finding.path for finding in left.findings if finding.number in left.waiting and finding.kind != "chunk"}
    named = {entry.path for entry in store.state.files()}
    words = []
    for (path, kind), n in sorted(traces.items()):
        pieces = "1 piece" if n == 1 else f"{n:,} pieces"
        words.append(f"{path}: {pieces} of it ({kind}) left; {_what_to_do(path, path in named, path in waiting)}")
    kinds = [KINDS[kind] for kind in needles.kinds.tolist()]
    counted = {kind: n for kind, n in Counter(kinds).items() if kind != "whole"}
    without = {kind: n for kind, n in needles.lacking.items() if n}
    searched = Searched(
        len(paths), total, counted, without, passed_over(len(needles.chunks)), left.said,
        tuple(Trace(path, kind, n) for (path, kind), n in sorted(traces.items())),
    )  # fmt: skip
    return searched, words


def _what_to_do(path: str, named: bool, waiting: bool) -> str:
    """How to get rid of what is left in a file, which a commit has ``named``, or others that wait for an erase say."""
    if path.split("/")[0] in ("log", "checkpoints"):
        return "it was given as a reason or a name, which stays"
    if waiting:
        return "others that are purged, or set aside, say it, too: erase these"
    if named:
        return "erase the purge once more"
    return "no commit names that file: remove it"


def _note(store: Store, receipt: Receipt, sha256: str) -> int | None:
    """The commit that names the receipt."""

    def build(_: State) -> Draft:
        return Draft("verify", {"purge": receipt.purge, "ok": receipt.ok, "receipt": sha256})

    with contextlib.suppress(StorageError, PermissionError), writing(store) as run:
        return store.commit(run, build).number
    return None


@contextlib.contextmanager
def _progress(title: str, total: int, unit: str) -> Iterator[Report]:
    with tqdm(
        total=total, unit=unit, unit_scale=unit == "B", desc=title, disable=None, delay=2, file=sys.stderr
    ) as bar:

        def told(n: int) -> None:
            interrupts.check()
            bar.update(n)

        yield told


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
