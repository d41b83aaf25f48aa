"""The proofs of purges: what their victims are looked for by when they are gone, as keyed hashes in the store.

They are made and committed before the first byte is erased (``prove``), for every purge that has one of the chunks
which are to go: nobody can make them later. An erase that is gone on with finds them there. What comes to a purge after
that, a copy that is erased with it or vectors of another encoder, is drawn from before it is erased, and kept in a
file more with the same salt. They go when a purge is taken back. Cost: that of ``needles.draw_needles``; 20 bytes a
needle, about 300 a victim, in the file, and ten times that in memory when they are looked for.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from retrotool.errors import ConflictError, CorruptError
from retrotool.stages.drift import ranges
from retrotool.stages.matching import KINDS, Needles, proof_key, whole_key
from retrotool.stages.needles import draw_needles
from retrotool.stages.purge import has_any, tombstones_of
from retrotool.store import blocked, disk, parts, paths, schemas
from retrotool.store.atomic import FileEntry
from retrotool.store.log import Draft
from retrotool.store.parts import PART_SHIFT
from retrotool.store.paths import FileName
from retrotool.store.restored import standing_purges
from retrotool.store.runs import Run
from retrotool.store.state import State
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones

KIND = "proofs"
Ids = npt.NDArray[np.int64]
Report = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Unproven:
    """What a purge has to be drawn from: its ``chunks``; of these only vectors if ``vectors_of`` is not None.

    Then these are the names of encoders, by part.
    """

    chunks: Ids
    vectors_of: dict[int, list[str]] | None = None


def proof_files(state: State, purge: str) -> list[FileEntry]:
    """The files of a purge's proofs: the first made before anything of it was erased, others for what came later."""
    found = []
    slot = purge
    while (entry := state.file(KIND, slot)) is not None:
        found.append(entry)
        slot = f"{purge}.{len(found)}"
    return found


def unproven(store: Store, victims: Ids) -> dict[str, Unproven]:
    """The purges that have any of ``victims`` and lack proofs of what is not erased yet, with what to draw from."""
    found = {}
    wanted = Tombstones(victims)
    for purge, record in standing_purges(store.state).items():
        files = proof_files(store.state, purge)
        if (record["erased"] and not files) or not has_any(store, purge, wanted):
            continue
        chunks = tombstones_of(store, purge)
        if not files:
            found[purge] = Unproven(chunks)
        elif lacking := _lacking(store, files, np.unique(chunks >> PART_SHIFT).tolist()):
            found[purge] = Unproven(chunks, lacking)
    return found


def _lacking(store: Store, files: list[FileEntry], numbers: list[int]) -> dict[int, list[str]]:
    """Encoders, by part, whose vectors no proof was made of."""
    known: dict[str, set[int]] = {}
    for entry in files:
        for name, some in (entry.about or {}).get("encoders", {}).items():
            known.setdefault(name, set()).update(part for first, last in some for part in range(first, last + 1))
    lacking: dict[int, list[str]] = {}
    for name, there in _encoders(store, numbers).items():
        for part in set(there) - known.get(name, set()):
            lacking.setdefault(part, []).append(name)
    return lacking


def _encoders(store: Store, numbers: list[int]) -> dict[str, list[int]]:
    """Which of some parts each encoder has embedded."""
    state = store.state
    return {
        name: [part for part in numbers if state.part_file("embeddings", part, name) is not None]
        for name in state.names("embeddings")
    }


def prove(store: Store, run: Run, found: dict[str, Unproven], report: Report = lambda _: None) -> None:
    """Make and commit the proofs of ``unproven`` purges; ``ConflictError`` if one was taken back meanwhile.

    ``report`` is called with 1 for each part of each purge.
    """
    for purge, unknown in found.items():
        entry = draw_proofs(store, run, purge, unknown.chunks, report, unknown.vectors_of)
        if entry is None:
            continue

        def build(state: State, purge: str = purge, entry: FileEntry = entry) -> Draft:
            if purge not in standing_purges(state):
                raise ConflictError(f"purge {purge} was taken back meanwhile", "Run the same command again.")
            if state.file(KIND, FileName.parse(entry.path).slot) is not None:
                raise ConflictError(f"purge {purge} is erased by another process, too", "Run the same command again.")
            return Draft("prove", {"purge": purge}, add=(entry,))

        try:
            store.commit(run, build)
        except ConflictError:
            disk.unlink(paths.inside(store.root, entry.path))
            raise


def draw_proofs(
    store: Store,
    run: Run,
    purge: str,
    chunks: Ids,
    report: Report = lambda _: None,
    vectors_of: dict[int, list[str]] | None = None,
) -> FileEntry | None:
    """Make one more file of a purge's proofs, of ``chunks``; commit it before these are erased.

    ``vectors_of``: see ``Unproven``. None if there are proofs, and nothing is left to be drawn from.
    """
    files = proof_files(store.state, purge)
    # Of a part all of the purge was drawn from, or its vectors do not count as proven.
    others = np.setdiff1d(tombstones_of(store, purge), chunks)
    drawn = _encoders(store, np.setdiff1d(chunks >> PART_SHIFT, others >> PART_SHIFT).tolist())
    about = {"encoders": {encoder: ranges(some) for encoder, some in drawn.items()}}
    name = FileName.new(run.id, KIND, f"{purge}.{len(files)}" if files else purge, "parquet")
    several = draw_needles(store, chunks, report, vectors_of)
    return write_proofs(store, name, several, salt=_salt(store, files[0]) if files else None, about=about)


def write_proofs(
    store: Store,
    name: FileName,
    several: Iterable[Needles],
    *,
    salt: bytes | None = None,
    about: dict[str, Any] | None = None,
) -> FileEntry | None:
    """Keep needles as keyed hashes, in a file of the kind ``proofs``.

    ``salt``: of the files before it; then None is returned, and nothing written, if there are no needles.
    """
    key = salt or secrets.token_bytes(32)
    lengths: dict[str, int] = {}
    lacking: Counter[str] = Counter()
    kinds, tags, column = [np.zeros(0, np.uint8)], [np.zeros(0, np.uint32)], [np.zeros(0, blocked.HASH)]
    for needles in several:
        hashed = needles.hashed(store.identity.secret, key)
        assert hashed.tags is not None, "they are of hashed needles"
        lengths = hashed.lengths
        lacking.update(hashed.lacking)
        # As arrays at once: a purge may have a hundred million chunks.
        kinds.append(hashed.kinds)
        tags.append(hashed.tags.astype(np.uint32))
        column.append(np.frombuffer(b"".join(hashed.proofs), blocked.HASH))
    # In the order of their hashes, none tells its chunk; and some victims may say the same.
    hashes, order = np.unique(np.concatenate(column), return_index=True)
    if salt is not None and not len(hashes):
        return None
    metadata = {"salt": key.hex(), "lengths": lengths, "lacking": dict(lacking)}
    schema = schemas.PROOFS_SCHEMA.with_metadata({"retrotool.proofs": orjson.dumps(metadata)})
    arrays = [
        pa.array(np.concatenate(kinds)[order]),
        pa.array(np.concatenate(tags)[order]),
        parts.fixed_binary(hashes.view(np.uint8).reshape(-1, schemas.HASH_BYTES)),
    ]
    return parts.write_parquet(store.root, name, pa.table(arrays, schema=schema), about=about)


def proofs_of(store: Store, purge: str) -> Needles | None:
    """The needles of a purge as keyed hashes; None if it has no proofs."""
    files = proof_files(store.state, purge)
    chunks = tombstones_of(store, purge)
    if not files:
        return None
    needles = Needles.joined([read_proofs(store, entry, chunks) for entry in files])
    hashes = np.frombuffer(b"".join(needles.proofs), blocked.HASH)
    return needles.of(np.sort(np.unique(hashes, return_index=True)[1]))  # what several files have counts once


def salted_chunks(store: Store, purge: str) -> tuple[str, list[str]]:
    """The salt of a purge's receipt, and the hashes of what its chunks were, all hexadecimal; none: no proofs.

    A hash is BLAKE2b-128, keyed with the salt, of a chunk's tokens: little-endian, of the store's token width.
    """
    files = proof_files(store.state, purge)
    if not files:
        return "", []
    hashes: set[bytes] = set()
    for entry in files:
        table = parts.read_parquet(store, entry)
        of = table["kind"].to_numpy() == KINDS.index("whole")
        hashes.update(table["hash"].filter(pa.array(of)).to_pylist())
    salt = whole_key(store.identity.secret, _salt(store, files[0]))
    return salt.hex(), [value.hex() for value in sorted(hashes)]


def _salt(store: Store, entry: FileEntry) -> bytes:
    return bytes.fromhex(_about(entry, parts.read_parquet(store, entry, row_groups=[]))["salt"])


def _about(entry: FileEntry, table: pa.Table) -> dict[str, Any]:
    try:
        about: dict[str, Any] = orjson.loads(table.schema.metadata[b"retrotool.proofs"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"{entry.path}: no proofs: {error}") from error
    return about


def read_proofs(store: Store, entry: FileEntry, chunks: Ids) -> Needles:
    """The needles of a purge as keyed hashes; ``chunks`` are its victims (``purge.tombstones_of``)."""
    table = parts.read_parquet(store, entry)
    try:
        about = _about(entry, table)
        key = proof_key(store.identity.secret, bytes.fromhex(about["salt"]))
        kinds = table["kind"].to_numpy()
        lengths = {str(kind): int(n) for kind, n in about["lengths"].items()}
        lacking = {str(kind): int(n) for kind, n in about["lacking"].items()}
        if (kinds >= len(KINDS)).any():
            raise ValueError("a kind that is not known")
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"{entry.path}: no proofs: {error}") from error
    tags = table["tag"].to_numpy().astype(np.uint64)
    return Needles(kinds, table["hash"].to_pylist(), lengths, np.unique(chunks), None, lacking, key, tags)
