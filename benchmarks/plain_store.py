"""Read a store with pyarrow, numpy and faiss alone, and compute digests of its content.

``retrotool`` is not imported: this reads what ``docs/format.md`` promises to other tools. Digests are over
values in the order of chunk ids, so they are independent of file names, row groups and the layout of the
store. Only ``live_files`` knows how a file's kind, name and slot follow from the log.

A chunk is live if it is not erased (it has tokens) and not a tombstone. Cost: one pass over all files.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

PART_SHIFT = 32
"""A chunk id is the part number shifted by this, plus the row."""


@dataclass(frozen=True, slots=True)
class LiveFile:
    """A current file; ``documents`` of part 3 has kind "documents", name "" and slot "000003"."""

    kind: str
    name: str
    slot: str
    path: Path


def live_files(store: Path) -> list[LiveFile]:
    """Fold the log of a store to its current files, without those of pending parts."""
    live: dict[str, LiveFile] = {}
    records: dict[str, Any] = {}
    for number in count():
        commit = store / "log" / f"{number:08d}.json"
        if not commit.exists():
            break
        fields = json.loads(commit.read_bytes())
        records.update(fields["records"])
        for path in fields["remove"]:
            del live[path]
        for entry in fields["add"]:
            kind, *name, file = entry["path"].split("/")
            slot = str(entry.get("slot", file.rpartition("-")[0]))
            live[entry["path"]] = LiveFile(kind, "/".join(name), slot, store / entry["path"])
    end = (records.get("parts") or 0) - (records.get("pending") or 0)
    return [file for file in live.values() if file.kind not in ("documents", "chunks") or int(file.slot) < end]


class Digest:
    """A SHA-256 over arrays and texts."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def array(self, values: npt.NDArray[Any]) -> None:
        self._hash.update(np.ascontiguousarray(values).tobytes())

    def values(self, values: Iterable[object]) -> None:
        self._hash.update("".join(f"{value!r}\x1f" for value in values).encode())

    def __str__(self) -> str:
        return self._hash.hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Part:
    """The live chunks of one part: ``ids`` int64 [n], ``rows`` int64 [n], ``tokens`` uint8 [n, bytes].

    ``index`` and ``n_tokens`` int32 [n]; ``documents`` are the ids of their documents. ``keys`` bool [n]: not
    a value.
    """

    ids: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    documents: list[str]
    index: npt.NDArray[np.int32]
    n_tokens: npt.NDArray[np.int32]
    tokens: npt.NDArray[np.uint8]
    keys: npt.NDArray[np.bool_]


@dataclass(slots=True)
class PlainStore:
    """A store at ``path``, read through its current log."""

    path: Path
    files: list[LiveFile] = field(init=False)
    tombstones: npt.NDArray[np.int64] = field(init=False)
    """Ids of purged and rejected chunks, ascending."""

    def __post_init__(self) -> None:
        self.files = live_files(self.path)
        ids = [np.zeros(0, np.int64)]
        ids += [pq.read_table(file.path)["chunk"].to_numpy() for file in self.files if file.kind == "tombstones"]
        self.tombstones = np.unique(np.concatenate(ids))

    def by_part(self, kind: str, name: str = "") -> dict[int, Path]:
        found = {int(file.slot): file.path for file in self.files if (file.kind, file.name) == (kind, name)}
        return dict(sorted(found.items()))

    def names(self, kind: str) -> list[str]:
        return sorted({file.name for file in self.files if file.kind == kind})

    def parts(self) -> Iterator[Part]:
        documents = self.by_part("documents")
        for number, path in self.by_part("chunks").items():
            table = pq.read_table(path, page_checksum_verification=True)
            n_tokens = table["n_tokens"].to_numpy()
            ids = (number << PART_SHIFT) + np.arange(table.num_rows)
            rows = np.flatnonzero((n_tokens > 0) & ~np.isin(ids, self.tombstones, assume_unique=True))
            names = pq.read_table(documents[number], columns=["id"])["id"].to_pylist()
            width = table.schema.field("tokens").type.byte_width
            tokens = np.concatenate(
                [
                    np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * width, chunk.offset * width)
                    for chunk in table["tokens"].chunks
                ]
            ).reshape(-1, width)
            keys = np.ones(table.num_rows, np.bool_)
            if "key" in table.column_names:
                keys = table["key"].to_numpy()
            yield Part(
                ids[rows],
                rows,
                [names[doc] for doc in table["doc"].to_numpy()[rows]],
                table["index"].to_numpy()[rows],
                n_tokens[rows],
                tokens[rows],
                keys[rows],
            )

    def content(self) -> dict[str, Any]:
        """Return digests and counts of all live data, by what they cover."""
        ids, documents, tokens, keys = Digest(), Digest(), Digest(), Digest()
        chunks = n_tokens = 0
        of_documents: set[str] = set()
        for part in self.parts():
            ids.array(part.ids)
            documents.values(part.documents)
            documents.array(part.index)
            tokens.array(part.n_tokens)
            tokens.array(part.tokens)
            keys.array(part.keys)
            chunks, n_tokens = chunks + len(part.ids), n_tokens + int(part.n_tokens.sum())
            of_documents.update(part.documents)
        return {
            "counts": {"chunks": chunks, "tokens": n_tokens, "documents": len(of_documents)},
            "ids": str(ids),
            "documents of chunks": str(documents),
            "tokens": str(tokens),
            "keys": str(keys),
            "tombstones": self._tombstones(),
            "columns of documents": self._columns(),
            "rejected rows": self._rejected(),
            "vectors": {name: self._vectors(name) for name in self.names("embeddings")},
            "indexes": {name: self._index(name) for name in self.names("index")},
            "neighbours": {name: self._neighbours(name) for name in self.names("neighbours")},
        }

    def _tombstones(self) -> dict[str, Any]:
        digest = Digest()
        digest.array(self.tombstones)
        return {"count": len(self.tombstones), "ids": str(digest)}

    def _columns(self) -> dict[str, str]:
        """Return a digest per column of ``documents``; of inputs only the file's name counts."""
        digests: dict[str, Digest] = {}
        for path in self.by_part("documents").values():
            table = pq.read_table(path)
            for name in table.column_names:
                values = table[name].to_pylist()
                if name == "input":
                    values = [value and Path(value).name for value in values]
                digests.setdefault(name, Digest()).values(values)
        return {name: str(digest) for name, digest in digests.items()}

    def _rejected(self) -> dict[str, Any]:
        places: list[tuple[str, int, int | None]] = []
        for file in self.files:
            if file.kind == "quarantine":
                rows = pq.read_table(file.path, columns=["input", "line", "offset"]).to_pylist()
                places += [(Path(row["input"]).name, row["line"], row["offset"]) for row in rows]
        digest = Digest()
        digest.values(sorted(places, key=repr))
        return {"places": str(digest), "by input": dict(sorted(Counter(place[0] for place in places).items()))}

    def reasons(self) -> dict[str, int]:
        files = [file.path for file in self.files if file.kind == "quarantine"]
        found = Counter(reason for path in files for reason in pq.read_table(path)["reason"].to_pylist())
        return dict(sorted(found.items()))

    def vectors(self, encoder: str) -> Iterator[tuple[Part, npt.NDArray[np.float16]]]:
        """Yield parts with the vectors of their live chunks, float16 [n, d]; values have zero vectors."""
        files = self.by_part("embeddings", encoder)
        for part in self.parts():
            number = int(part.ids[0] >> PART_SHIFT) if len(part.ids) else -1
            if number in files:
                yield part, np.load(files[number], mmap_mode="r")[part.rows]

    def _vectors(self, encoder: str) -> dict[str, Any]:
        ids, values = Digest(), Digest()
        chunks = 0
        for part, vectors in self.vectors(encoder):
            ids.array(part.ids)
            values.array(vectors)
            chunks += len(part.ids)
        return {"chunks": chunks, "ids": str(ids), "values": str(values)}

    def _index(self, name: str) -> dict[str, Any]:
        shards = [file for file in self.files if file.kind == "index" and file.name == name]
        read = [read_shard(file.path) for file in shards if file.slot.startswith("shard-")]
        if not read:
            return {"vectors": 0}
        ids, lists, codes = (np.concatenate(arrays) for arrays in zip(*read, strict=True))
        order = np.argsort(ids, kind="stable")
        digests = {"ids": Digest(), "lists": Digest(), "codes": Digest()}
        for digest, values in zip(digests.values(), (ids, lists, codes), strict=True):
            digest.array(values[order])
        return {"vectors": len(ids), **{what: str(digest) for what, digest in digests.items()}}

    def neighbours(self, table: str) -> Iterator[tuple[Part, npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
        """Yield parts with ids int64 [n, saved] and distances float32 [n, saved] of live neighbours.

        Tombstones are removed and later neighbours move up; −1 and +inf fill the end.
        """
        files = self.by_part("neighbours", table)
        for part in self.parts():
            number = int(part.ids[0] >> PART_SHIFT) if len(part.ids) else -1
            if number not in files:
                continue
            found = pq.read_table(files[number], page_checksum_verification=True)
            saved = found.schema.field("ids").type.list_size
            ids, distances = (
                np.concatenate([chunk.flatten().to_numpy() for chunk in found[column].chunks]).reshape(-1, saved)
                for column in ("ids", "distances")
            )
            ids, distances = ids[part.rows], distances[part.rows]
            dead = np.isin(ids, self._tombstones_of(found.schema.metadata))
            order = np.argsort(dead, axis=1, kind="stable")
            ids = np.take_along_axis(np.where(dead, -1, ids), order, 1)
            distances = np.take_along_axis(np.where(dead, np.float32(np.inf), distances), order, 1)
            yield part, ids, distances

    def _tombstones_of(self, metadata: dict[bytes, bytes]) -> npt.NDArray[np.int64]:
        """Return the tombstones of a table's database: this store, or the one at the path in the table."""
        own = json.loads((self.path / "store.json").read_bytes())["uuid"]
        if metadata[b"retrotool.database"].decode() == own:
            return self.tombstones
        return PlainStore(Path(metadata[b"retrotool.path"].decode())).tombstones

    def _neighbours(self, table: str) -> dict[str, Any]:
        ids, distances = Digest(), Digest()
        found = rows = 0
        for _, row_ids, row_distances in self.neighbours(table):
            ids.array(row_ids)
            distances.array(row_distances)
            found, rows = found + int((row_ids >= 0).sum()), rows + len(row_ids)
        return {"rows": rows, "found": found, "ids": str(ids), "distances": str(distances)}


def read_shard(path: Path) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Read ids int64 [n], lists int64 [n] (0 without lists) and codes uint8 [n, bytes] of a faiss file."""
    whole = faiss.read_index(str(path))  # owns the data of the views below
    index: Any = faiss.downcast_index(whole)
    if isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    if isinstance(index, faiss.IndexIDMap | faiss.IndexIDMap2):
        ids = faiss.vector_to_array(index.id_map)
        inner: Any = faiss.downcast_index(index.index)
        codes = faiss.vector_to_array(inner.codes).reshape(len(ids), -1)
        return ids, np.zeros(len(ids), np.int64), codes
    lists = index.invlists
    found_ids, found_lists, found_codes = [], [], []
    for number in range(lists.nlist):
        size = lists.list_size(number)
        if size:
            found_ids.append(faiss.rev_swig_ptr(lists.get_ids(number), size).copy())
            codes = faiss.rev_swig_ptr(lists.get_codes(number), size * lists.code_size).reshape(size, -1).copy()
            found_codes.append(codes)
            found_lists.append(np.full(size, number, np.int64))
    if not found_ids:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, lists.code_size), np.uint8)
    return np.concatenate(found_ids), np.concatenate(found_lists), np.concatenate(found_codes)
