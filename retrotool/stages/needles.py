"""What a purge's victims are looked for by: made before they are erased, kept as keyed hashes, read again for a check.

Of each victim some *needles* of a kind are drawn, spread over it: 4 times 8 tokens in a row as the store has them, 8
times 24 bytes of its text, twice 8 numbers of its vector as float16 and as float32; of a document that goes as a whole
its id and key. Text is *folded*:
ASCII letters in lower case, and no other ASCII but digits, so that text is found with other spaces, line ends and
punctuation, and as it was before a tokenizer lost these.

What others say, too, is no needle: in one pass over all chunks that are no victims, their text and vectors, and over
the columns of their documents, needles that they have are taken out again. So a common phrase is no finding, and a
victim all of whose text stands elsewhere has none left; ``Needles.lacking`` counts these. Others are also the chunks
of purges that wait to be erased.

Cost: 0.2 ms a victim, and reading and decoding the store's chunks once; memory of a part, and 0.2 kB a needle.
Of more than a million victims some are passed over, evenly. Proofs of a purge take 20 bytes a needle.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from retrotool.errors import CorruptError
from retrotool.stages.matching import KINDS, WINDOW, Matcher, Needles, proof_key, sampled, sampled_heads
from retrotool.stages.purge import tombstones_of
from retrotool.stages.views import cells_of, folded
from retrotool.store import parts, schemas, vectors
from retrotool.store.atomic import FileEntry
from retrotool.store.parts import PART_SHIFT
from retrotool.store.paths import FileName
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones
from retrotool.tokenizers import Tokenizer, TokenizerFile

TOKENS, TEXT_BYTES, NUMBERS = 8, 24, 8
RUNS = ("tokens", "vector16", "vector32", "key")
"""Kinds that stand in the bytes as they are; those of text in what is folded."""
_EACH = {"tokens": 4, "text": 8, "vector16": 2, "vector32": 2, "key": 1, "id": 1}
_DRAWN = 16
_VARIED = 6
"""Different bytes that a run must have: zeros and the like are everywhere."""
_MOST_VICTIMS = 1 << 20
_BLOCK = 1 << 14

Ids = npt.NDArray[np.int64]
Report = Callable[[int], object]


def make_needles(store: Store, chunks: Ids, report: Report = lambda _: None) -> Needles:
    """Draw needles of victims, given by ids that are not erased yet, and take out those that others have, too.

    ``report`` is called with 1 for each part that was read. What is erased already has no needles.
    """
    victims = Tombstones(np.unique(chunks))
    drawn = _Drawn(store, victims)
    for part in victims.parts():
        drawn.draw(part)
    needles = drawn.needles()
    left = np.ones(len(needles), np.bool_)
    runs, text, cells = (Matcher(needles, kinds) for kinds in (RUNS, ("text",), ("id",)))
    for part in store.state.parts():
        for data in _others(store, part, victims, drawn.tokenizer):
            for matcher, some in ((runs, data.raw), (text, data.text)):
                for number in _numbers(matcher, some):
                    left[number] = False
        for column in _columns(store, part, victims):
            for piece, starts, ends in cells_of(column):
                left[[number for _, number in cells.cells(piece, starts, ends)]] = False
                left[list(_numbers(runs, piece))] = False
        report(1)
    return drawn.some_of_each(needles, left)


def _numbers(matcher: Matcher, data: bytes) -> Iterator[int]:
    step, overlap = 1 << 20, 256
    for start in range(0, len(data), step):
        yield from (number for _, number in matcher.runs(data[start : start + step + overlap]))


class _Drawn:
    """Needles as they are drawn, part by part."""

    def __init__(self, store: Store, victims: Tombstones) -> None:
        identity = store.identity
        self.tokenizer = Tokenizer(TokenizerFile(identity.tokenizer.name, store.tokenizer_json()))
        self._store, self._victims = store, victims
        self._lengths = {
            "tokens": TOKENS * identity.tokenizer.token_bytes, "text": TEXT_BYTES, "vector16": 2 * NUMBERS,
            "vector32": 4 * NUMBERS, "key": schemas.HASH_BYTES,
        }  # fmt: skip
        self._found: list[tuple[int, int, bytes]] = []
        self._had: dict[str, set[int]] = {kind: set() for kind in KINDS}
        self._step = -(-len(victims) // _MOST_VICTIMS) or 1

    def draw(self, part: int) -> None:
        """Draw of the victims of a part."""
        store = self._store
        if store.state.part_file("chunks", part) is None:
            return
        rows = self._victims.rows(part)
        first = int(np.searchsorted(self._victims.ids, part << PART_SHIFT))
        chunks = parts.read_chunks(store, part)
        self._draw_ids(part, chunks.doc, chunks.n_tokens, rows, first)
        whole = rows[chunks.n_tokens[rows] > 0]
        places = (first + np.searchsorted(rows, whole))[:: self._step]
        rows = whole[:: self._step]
        texts = self.tokenizer.decode(chunks.tokens[rows], chunks.n_tokens[rows])
        for place, row, text in zip(places.tolist(), rows.tolist(), texts, strict=True):
            self._draw("tokens", place, chunks.tokens[row, : chunks.n_tokens[row]].tobytes())
            self._draw("text", place, folded(text.as_py()))
        for name in store.state.names("embeddings"):
            entry = store.state.part_file("embeddings", part, name)
            if entry is None:
                continue
            matrix = vectors.read_vectors(store, entry)
            for place, row in zip(places.tolist(), rows.tolist(), strict=True):
                if matrix[row].any():
                    self._draw("vector16", place, matrix[row].tobytes())
                    self._draw("vector32", place, matrix[row].astype("<f4").tobytes())

    def _draw(self, kind: str, place: int, data: bytes) -> None:
        self._had[kind].add(place)
        length = self._lengths[kind]
        starts = len(data) - length + 1
        if starts < 1:
            return
        every = np.frombuffer(data, np.uint8)
        words = np.lib.stride_tricks.sliding_window_view(every, WINDOW)[:starts].copy().view("<u8").reshape(-1)
        chosen = np.flatnonzero(sampled(words.astype(np.uint64), kind))
        if not len(chosen):
            chosen = np.arange(starts)
        places = np.unique(np.linspace(0, len(chosen) - 1, _DRAWN).astype(np.int64))
        # In an order of which every beginning is spread over the whole.
        spread = chosen[places[sorted(range(len(places)), key=lambda i: f"{i:04b}"[::-1])]]
        runs = (data[at : at + length] for at in spread.tolist())
        number = KINDS.index(kind)
        self._found += [(number, place, run) for run in runs if len(set(run)) >= _VARIED]

    def _draw_ids(self, part: int, doc: Any, n_tokens: Any, rows: Ids, first: int) -> None:
        """Ids and keys of the documents of which nothing will be left."""
        left = n_tokens > 0
        left[rows] = False
        gone = np.setdiff1d(doc[rows], doc[left])
        table = parts.read_documents(self._store, part, ["id", "key"]).take(pa.array(gone))
        for at, name, key in zip(gone.tolist(), *(table[c].to_pylist() for c in ("id", "key")), strict=True):
            place = first + int(np.argmax(doc[rows] == at))
            if name is not None:
                self._found += [(KINDS.index("id"), place, name.encode()), (KINDS.index("key"), place, key)]
                self._had["id"].add(place)
                self._had["key"].add(place)

    def needles(self) -> Needles:
        """All that was drawn."""
        kinds = np.array([kind for kind, _, _ in self._found], np.uint8)
        places = np.array([place for _, place, _ in self._found], np.int32)
        return Needles(kinds, [data for _, _, data in self._found], self._lengths, self._victims.ids, places)

    def some_of_each(self, needles: Needles, left: npt.NDArray[np.bool_]) -> Needles:
        """The first of each kind and victim that are ``left``, and how many victims have none."""
        assert needles.victims is not None
        rows = np.flatnonzero(left)
        # Those that hashes can be kept of come first.
        late = ~sampled_heads(needles)[rows]
        order = np.lexsort((rows, late, needles.victims[rows], needles.kinds[rows]))
        pairs = np.stack([needles.kinds[rows].astype(np.int64), needles.victims[rows]])[:, order]
        begins = np.flatnonzero(np.concatenate([[True], (pairs[:, 1:] != pairs[:, :-1]).any(axis=0)])[: len(rows)])
        rank = np.arange(len(rows)) - np.repeat(begins, np.diff([*begins.tolist(), len(rows)]))
        most = np.array([_EACH[kind] for kind in KINDS])[needles.kinds[rows[order]]]
        kept = needles.of(np.sort(rows[order[rank < most]]))
        assert kept.victims is not None
        has = {kind: len(np.unique(kept.victims[kept.kinds == number])) for number, kind in enumerate(KINDS)}
        lacking = {kind: len(had) - has[kind] for kind, had in self._had.items()}
        return Needles(kept.kinds, kept.proofs, kept.lengths, kept.chunks, kept.victims, lacking)


class _Data:
    """Bytes of chunks that are no victims: as they are (tokens, vectors), and their folded text."""

    def __init__(self, raw: bytes, text: bytes = b"") -> None:
        self.raw, self.text = raw, text


def _others(store: Store, part: int, victims: Tombstones, tokenizer: Tokenizer) -> Iterator[_Data]:
    """What the chunks of a part say that are no victims, in their order, as a scan would meet it."""
    chunks = parts.read_chunks(store, part)
    other = chunks.n_tokens > 0
    other[victims.rows(part)] = False
    matrices = [
        vectors.read_vectors(store, entry)
        for name in store.state.names("embeddings")
        if (entry := store.state.part_file("embeddings", part, name)) is not None
    ]
    rows = np.flatnonzero(other)
    for start in range(0, len(rows), _BLOCK):
        some = rows[max(0, start - 1) : start + _BLOCK]  # with the last row of the block before: runs over a border
        tokens, n_tokens = chunks.tokens[some], chunks.n_tokens[some]
        _, offsets, data = tokenizer.decode(tokens, n_tokens).buffers()
        ends = np.frombuffer(offsets, np.int64, count=len(some) + 1)
        yield _Data(tokens.tobytes(), folded(data.to_pybytes()[int(ends[0]) : int(ends[-1])]))
        for matrix in matrices:
            yield _Data(matrix[some].tobytes())
            yield _Data(matrix[some].astype("<f4").tobytes())


def _columns(store: Store, part: int, victims: Tombstones) -> Iterator[pa.Array]:
    """The columns of the documents that keep theirs: those of which some chunk is no victim."""
    table = parts.read_documents(store, part)
    count = table["n_chunks"].to_numpy()
    first = table["first_row"].to_numpy()
    rows = victims.rows(part)
    mine = np.searchsorted(rows, first + count) - np.searchsorted(rows, first)
    table = table.filter(pa.array(mine < count))
    for column in table.columns:
        yield from column.chunks


def write_proofs(store: Store, name: FileName, needles: Needles) -> FileEntry:
    """Keep needles as keyed hashes, in a file of the kind ``proofs``; commit it with the purge or the erase."""
    salt = secrets.token_bytes(32)
    hashed = needles.hashed(store.identity.secret, salt)
    assert hashed.tags is not None
    column = np.frombuffer(b"".join(hashed.proofs), np.uint8).reshape(-1, schemas.HASH_BYTES)
    about = {"salt": salt.hex(), "lengths": hashed.lengths, "lacking": hashed.lacking}
    schema = schemas.PROOFS_SCHEMA.with_metadata({"retrotool.proofs": orjson.dumps(about)})
    arrays = [pa.array(hashed.kinds), pa.array(hashed.tags.astype(np.uint32)), parts.fixed_binary(column)]
    return parts.write_parquet(store.root, name, pa.table(arrays, schema=schema))


def proofs_of(store: Store, purge: str) -> Needles | None:
    """The needles of a purge as keyed hashes; None if it has no proofs."""
    entry = store.state.file("proofs", purge)
    return None if entry is None else read_proofs(store, entry, tombstones_of(store, purge))


def read_proofs(store: Store, entry: FileEntry, chunks: Ids) -> Needles:
    """The needles of a purge as keyed hashes; ``chunks`` are its victims (``purge.tombstones_of``)."""
    table = parts.read_parquet(store, entry)
    try:
        about = orjson.loads(table.schema.metadata[b"retrotool.proofs"])
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
