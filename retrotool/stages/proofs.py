"""The proofs of purges: what their victims are looked for by when they are gone, as keyed hashes in the store.

They are made and committed before the first byte is erased (``prove``), for every purge that has one of the chunks
which are to go: nobody can make them later. An erase that is gone on with finds them there. They go when a purge is
taken back. Cost: that of ``needles.draw_needles``; 20 bytes a needle, about 300 a victim, in the file, and ten times
that in memory when they are looked for.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from retrotool.errors import ConflictError, CorruptError
from retrotool.stages.matching import KINDS, Needles, proof_key, whole_key
from retrotool.stages.needles import draw_needles
from retrotool.stages.purge import tombstones_of
from retrotool.store import blocked, disk, parts, paths, schemas
from retrotool.store.atomic import FileEntry
from retrotool.store.log import Draft
from retrotool.store.paths import FileName
from retrotool.store.restored import standing_purges
from retrotool.store.runs import Run
from retrotool.store.state import State
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones

KIND = "proofs"
Ids = npt.NDArray[np.int64]
Report = Callable[[int], object]


def unproven(store: Store, victims: Ids) -> dict[str, Ids]:
    """The purges that have any of ``victims``, are not erased, and have no proofs yet; with all their chunks."""
    found = {}
    wanted = Tombstones(victims)
    for purge, record in standing_purges(store.state).items():
        if record["erased"] or store.state.file(KIND, purge) is not None:
            continue
        chunks = tombstones_of(store, purge)
        if wanted.contains(chunks).any():
            found[purge] = chunks
    return found


def prove(store: Store, run: Run, found: dict[str, Ids], report: Report = lambda _: None) -> None:
    """Make and commit the proofs of ``unproven`` purges; ``ConflictError`` if one was taken back meanwhile.

    ``report`` is called with 1 for each part of each purge.
    """
    for purge, chunks in found.items():
        name = FileName.new(run.id, KIND, purge, "parquet")
        entry = write_proofs(store, name, draw_needles(store, chunks, report))

        def build(state: State, purge: str = purge, entry: FileEntry = entry) -> Draft | None:
            if purge not in standing_purges(state):
                raise ConflictError(f"purge {purge} was taken back meanwhile", "Run the same command again.")
            if state.file(KIND, purge) is not None:
                return None  # another erase was first: what it read was whole
            return Draft("prove", {"purge": purge}, add=(entry,))

        try:
            if not store.commit(run, build).has(entry.path):
                disk.unlink(paths.inside(store.root, entry.path))
        except ConflictError:
            disk.unlink(paths.inside(store.root, entry.path))
            raise


def write_proofs(store: Store, name: FileName, several: Iterable[Needles]) -> FileEntry:
    """Keep needles as keyed hashes, in a file of the kind ``proofs``; commit it before what they are of is erased."""
    salt = secrets.token_bytes(32)
    hashed = Needles.joined([needles.hashed(store.identity.secret, salt) for needles in several])
    tags = np.zeros(0, np.uint32) if hashed.tags is None else hashed.tags.astype(np.uint32)
    column = np.frombuffer(b"".join(hashed.proofs), np.uint8).reshape(-1, schemas.HASH_BYTES)
    # In the order of their hashes, none tells its chunk; and some victims may say the same.
    order = np.unique(column.view(blocked.HASH).reshape(-1), return_index=True)[1]
    about = {"salt": salt.hex(), "lengths": hashed.lengths, "lacking": hashed.lacking}
    schema = schemas.PROOFS_SCHEMA.with_metadata({"retrotool.proofs": orjson.dumps(about)})
    arrays = [pa.array(hashed.kinds[order]), pa.array(tags[order]), parts.fixed_binary(column[order])]
    return parts.write_parquet(store.root, name, pa.table(arrays, schema=schema))


def proofs_of(store: Store, purge: str) -> Needles | None:
    """The needles of a purge as keyed hashes; None if it has no proofs."""
    entry = store.state.file(KIND, purge)
    return None if entry is None else read_proofs(store, entry, tombstones_of(store, purge))


def salted_chunks(store: Store, purge: str) -> tuple[str, list[str]]:
    """The salt of a purge's receipt, and the hashes of what its chunks were, all hexadecimal; none: no proofs.

    A hash is BLAKE2b-128, keyed with the salt, of a chunk's tokens: little-endian, of the store's token width.
    """
    entry = store.state.file(KIND, purge)
    if entry is None:
        return "", []
    table = parts.read_parquet(store, entry)
    of = table["kind"].to_numpy() == KINDS.index("whole")
    salt = whole_key(store.identity.secret, bytes.fromhex(_about(entry, table)["salt"]))
    return salt.hex(), [value.hex() for value in table["hash"].filter(pa.array(of)).to_pylist()]


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
