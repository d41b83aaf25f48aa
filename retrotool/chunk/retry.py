"""Taking up inputs again that were set aside, whole or in part, and have been mended since.

A file that broke off is read up to where it broke; if the documents before are those that were chunked (their
number and a rolling hash of their keys and text hashes were recorded), the rest is new, and nothing has to be looked
up. Else, and for files in which only rows were set aside, each document is looked up among those that the store has of
this input: 32 bytes a document are held in memory.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from retrotool import sources
from retrotool.chunk.chunker import id_hash, text_hash
from retrotool.sources import Document, Fields, InputFile, SetAside
from retrotool.store import parts, schemas
from retrotool.store.state import State
from retrotool.store.store import Store

_BATCH = 1024
OTHER_TEXT = "its id is in the store with another text: purge that first, or give it another id"

Row = Document | SetAside


@dataclass(frozen=True, slots=True)
class Retry:
    """What is known of an input that is taken up again.

    ``documents`` came before it broke off, and ``prefix`` is their hash in hexadecimal; "" if there is no such
    beginning: rows of it were set aside, or it was read in slices. ``plans`` are those that read it before.
    """

    documents: int = 0
    prefix: str = ""
    plans: tuple[str, ...] = ()


class Prefix:
    """The rolling hash of documents: BLAKE2b-128 of their keys and text hashes, in order."""

    def __init__(self) -> None:
        self.documents = 0
        self._digest = hashlib.blake2b(digest_size=schemas.HASH_BYTES)

    def add(self, hashes: list[tuple[bytes, bytes]]) -> None:
        """Add documents by their key and text hash."""
        self.documents += len(hashes)
        self._digest.update(b"".join(itertools.chain.from_iterable(hashes)))

    def digest(self) -> bytes:
        """The hash so far."""
        return self._digest.digest()


class Known:
    """Keys and text hashes of the documents that a store has of an input."""

    def __init__(self, keys: npt.NDArray[np.uint64], texts: npt.NDArray[np.uint64]) -> None:
        order = np.lexsort((keys[:, 1], keys[:, 0]))
        self._keys, self._texts = keys[order], texts[order]

    def find(self, hashes: list[tuple[bytes, bytes]]) -> list[bool | None]:
        """Of each (key, text hash): None if the key is not known, else whether the text is the same."""
        wanted = np.frombuffer(b"".join(itertools.chain.from_iterable(hashes)), ">u8").reshape(-1, 4)
        found: list[bool | None] = []
        starts = np.searchsorted(self._keys[:, 0], wanted[:, 0].astype(np.uint64))
        for row, start in zip(wanted, starts.tolist(), strict=True):
            verdict = None
            while start < len(self._keys) and self._keys[start, 0] == row[0]:
                if self._keys[start, 1] == row[1]:
                    verdict = bool(verdict) or bool((self._texts[start] == row[2:]).all())
                start += 1
            found.append(verdict)
        return found


def known_documents(store: Store, name: str, plans: Sequence[str]) -> Known:
    """The documents of the input ``name`` that the store has of some plans, purged ones included.

    Only of those plans: another input may have the same name. Those that are erased in part have no hash to tell by
    whether a text is theirs: they are left to the block list, and to the search for what repeats.
    """
    keys, texts = [], []
    live = set(store.state.parts())
    for part in (part for plan in plans for part in parts_of(store.state, plan) if part in live):
        entry = parts.part_entry(store, "documents", part)
        table = parts.read_parquet(store, entry, ["key", "text_hash", "input"])
        known = pc.and_(pc.is_valid(table["key"]), pc.is_valid(table["text_hash"]))
        table = table.filter(pc.and_(pc.equal(table["input"], name), known))
        if table.num_rows:
            big = np.dtype(">u8")
            keys.append(parts.from_fixed_binary(table["key"], big).astype(np.uint64))
            texts.append(parts.from_fixed_binary(table["text_hash"], big).astype(np.uint64))
    return Known(_joined(keys), _joined(texts))


def parts_of(state: State, plan_id: str) -> range:
    """Numbers of the parts that a plan gave; as plans are worked in order, they follow those of the plans before."""
    record = state.records[f"plan:{plan_id}"]
    before = [r for r in state.with_prefix("plan:").values() if r["order"] < record["order"]]
    first = sum(r["parts"] + r.get("withdrawn", 0) for r in before) + record.get("withdrawn", 0)
    return range(first, first + record["parts"])


def _joined(arrays: list[npt.NDArray[Any]]) -> npt.NDArray[np.uint64]:
    return np.concatenate(arrays) if arrays else np.zeros((0, 2), np.uint64)


def rows_again(store: Store, file: InputFile, fields: Fields, retry: Retry) -> Iterator[Row]:
    """Rows of a mended input that the store has not."""
    if retry.prefix:
        rows = sources.read(file, fields)
        prefix = Prefix()
        before: list[SetAside] = []
        while prefix.documents < retry.documents and (row := next(rows, None)) is not None:
            if isinstance(row, Document):
                prefix.add([(id_hash(row.id), text_hash(row))])
            else:
                before.append(row)
        if prefix.documents == retry.documents and prefix.digest().hex() == retry.prefix:
            yield from before
            yield from rows
            return
    known = known_documents(store, file.name, retry.plans)
    for batch in _batches(sources.read(file, fields)):
        documents = [row for row in batch if isinstance(row, Document)]
        verdicts = iter(known.find([(id_hash(d.id), text_hash(d)) for d in documents]))
        for row in batch:
            if isinstance(row, SetAside) or (verdict := next(verdicts)) is None:
                yield row
            elif not verdict:
                yield SetAside(row.line, OTHER_TEXT)


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while batch := list(itertools.islice(rows, _BATCH)):
        yield batch
