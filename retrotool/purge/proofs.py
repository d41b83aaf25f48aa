"""The proofs of purges: what their victims are looked for by when they are gone, as keyed hashes in the store.

A purge has a file of them for each part, with needles of its chunks there (``stages.needles``). The log says of which
chunks, and by which encoders their vectors: so it tells without reading whether something came to the purge later, a
copy that is erased with it or vectors of another encoder, which has to be drawn from before it is erased, too. Files
are made by ``stages.prove``, and go when the purge is taken back. Size: 20 bytes a needle, about 300 a victim; in
memory ten times that when they are looked for.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from retrotool.errors import CorruptError
from retrotool.index.staleness import ranges
from retrotool.purge.matching import KINDS, Needles, proof_key, whole_key
from retrotool.purge.purged_chunks import tombstones_of
from retrotool.store import blocked, parts, schemas
from retrotool.store.atomic import FileEntry
from retrotool.store.paths import FileName, part_slot
from retrotool.store.state import State
from retrotool.store.store import Store

KIND = "proofs"
_METADATA = b"retrotool.proofs"
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Proofs:
    """What is in a file: ``needles`` as keyed hashes, of ``rows`` of a part."""

    needles: Needles
    rows: Ids


@dataclass(frozen=True, slots=True)
class Hashes:
    """n needles as they are kept: ``kinds`` uint8, ``tags`` uint32, and ``hashes`` of 16 bytes, each [n]."""

    kinds: list[npt.NDArray[np.uint8]] = field(default_factory=lambda: [np.zeros(0, np.uint8)])
    tags: list[npt.NDArray[np.uint32]] = field(default_factory=lambda: [np.zeros(0, np.uint32)])
    hashes: list[npt.NDArray[Any]] = field(default_factory=lambda: [np.zeros(0, blocked.HASH)])
    lengths: dict[str, int] = field(default_factory=dict)
    lacking: Counter[str] = field(default_factory=Counter)

    def add(self, needles: Needles) -> None:
        """Take in needles that are hashed. As arrays at once: a purge may have a hundred million chunks."""
        assert needles.tags is not None, "they are hashed"
        self.kinds.append(needles.kinds)
        self.tags.append(needles.tags.astype(np.uint32))
        self.hashes.append(np.frombuffer(b"".join(needles.proofs), blocked.HASH))
        self.lengths.update(needles.lengths)
        self.lacking.update(needles.lacking)


def slot_of(purge: str, part: int) -> str:
    """The slot of a purge's proofs of its chunks in a part."""
    return f"{purge}.{part_slot(part)}"


def covering(rows: Ids, encoders: Sequence[str]) -> dict[str, Any]:
    """What the log says of proofs: a hash of the rows of their part that they are of, and whose vectors were seen."""
    return {"rows": hashlib.blake2b(rows.tobytes(), digest_size=8).hexdigest(), "encoders": sorted(encoders)}


def proof_files(state: State, purge: str) -> list[FileEntry]:
    """The files of a purge's proofs, by part."""
    group = state.group(KIND)
    mine = sorted(slot for slot in group if slot.partition(".")[0] == purge)
    return [entry for slot in mine if (entry := group.get(slot)) is not None]


def hashed(store: Store, purge: str, needles: Needles) -> Needles:
    """Needles of a purge as keyed hashes."""
    return needles.hashed(store.identity.secret, purge.encode())


def write_proofs(
    store: Store, run: str, slot: str, kept: Hashes, rows: Ids, *, about: dict[str, Any] | None = None
) -> FileEntry:
    """Write the proofs of a purge's ``rows`` of a part, ascending: what stands in the log of them is ``about``."""
    # In the order of their hashes, none tells its chunk; and some victims may say the same.
    hashes, order = np.unique(np.concatenate(kept.hashes), return_index=True)
    metadata = {"lengths": kept.lengths, "lacking": dict(kept.lacking), "rows": ranges(rows.tolist())}
    schema = schemas.PROOFS_SCHEMA.with_metadata({_METADATA: orjson.dumps(metadata)})
    arrays = [
        pa.array(np.concatenate(kept.kinds)[order]),
        pa.array(np.concatenate(kept.tags)[order]),
        parts.fixed_binary(hashes.view(np.uint8).reshape(-1, schemas.HASH_BYTES)),
    ]
    return parts.write_parquet(
        store.root, FileName.new(run, KIND, slot, "parquet"), pa.table(arrays, schema=schema), about=about
    )


def read_proofs(store: Store, entry: FileEntry) -> Proofs:
    """The needles of a file; ``CorruptError`` if it has none that can be understood."""
    table = parts.read_parquet(store, entry)
    purge = FileName.parse(entry.path).slot.partition(".")[0]
    try:
        about = orjson.loads(table.schema.metadata[_METADATA])
        kinds = table["kind"].to_numpy()
        lengths = {str(kind): int(n) for kind, n in about["lengths"].items()}
        lacking = {str(kind): int(n) for kind, n in about["lacking"].items()}
        first, last = np.array(about["rows"], np.int64).reshape(-1, 2).T
        if (kinds >= len(KINDS)).any():
            raise ValueError("a kind that is not known")
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"{entry.path}: no proofs: {error}") from error
    tags = table["tag"].to_numpy().astype(np.uint64)
    key = proof_key(store.identity.secret, purge.encode())
    needles = Needles(kinds, table["hash"].to_pylist(), lengths, lacking=lacking, key=key, tags=tags)
    return Proofs(needles, parts.rows_of_documents(first, last + 1 - first))


def proofs_of(store: Store, purge: str) -> Needles | None:
    """The needles of a purge as keyed hashes; None if it has no proofs."""
    files = proof_files(store.state, purge)
    if not files:
        return None
    several = [read_proofs(store, entry).needles for entry in files]
    needles = Needles.joined(several, tombstones_of(store, purge))
    hashes = np.frombuffer(b"".join(needles.proofs), blocked.HASH)
    return needles.of(np.sort(np.unique(hashes, return_index=True)[1]))  # what several files have counts once


def salted_chunks(store: Store, purge: str) -> tuple[str, list[str]]:
    """The salt of a purge's receipt, and the hashes of what its chunks were, all hexadecimal; none: no proofs.

    A hash is BLAKE2b-128, keyed with the salt, of a chunk's tokens: little-endian, of the store's token width.
    """
    hashes: set[bytes] = set()
    for entry in proof_files(store.state, purge):
        table = parts.read_parquet(store, entry, ["kind", "hash"])
        of = table["kind"].to_numpy() == KINDS.index("whole")
        hashes.update(table["hash"].filter(pa.array(of)).to_pylist())
    if not hashes:
        return "", []
    return whole_key(store.identity.secret, purge.encode()).hex(), [value.hex() for value in sorted(hashes)]


def joined_hashes(several: Iterable[Needles]) -> Hashes:
    """Needles that are hashed alike, as they are kept."""
    kept = Hashes()
    for needles in several:
        kept.add(needles)
    return kept
