"""What a purge's victims are looked for by: made before they are erased, kept as keyed hashes, read again for a check.

Of each victim some *needles* of a kind are drawn, spread over it: 4 times 8 tokens in a row as the store has them, 8
times 24 bytes of its text, twice 8 numbers of its vector as float16 and as float32; of a document that goes as a whole
its id and key, also of one that goes in part and has the hash of all its text for an id. Text is *folded*:
ASCII letters in lower case, and no other ASCII but digits, so that text is found with other spaces, line ends and
punctuation, and as it was before a tokenizer lost these. All tokens of a victim are a needle, too, by which nothing is
looked for: a receipt has its hash.

What others say by right is no needle. Those that the rest of the victim's own part says, which is read anyway, are
never drawn, nor is a vector that another chunk has, too; and whoever finds needles asks what the store's living chunks
and documents say now (``said_by_others``), and takes these out. So a common phrase is no finding, however late it came,
and of a victim all of whose text stands elsewhere nothing is looked for. ``Needles.lacking`` counts those of which
nothing was drawn. What is purged, and waits to be erased, says nothing by right.

Cost: 0.2 ms a victim, and reading and decoding their parts once for 16,384 of them, of however many purges; memory of a
part, and 8 kB a victim of these. ``said_by_others`` reads and decodes all parts that it is given. Of more than 262,144
victims some are passed over, evenly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrotool.purge.decode import cells_of, folded
from retrotool.purge.matching import KINDS, WINDOW, Matcher, Needles, sampled, sampled_heads
from retrotool.store import parts, schemas, vectors
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones, read_tombstones
from retrotool.tokenizers import Tokenizer, TokenizerFile

TOKENS, TEXT_BYTES, NUMBERS = 8, 24, 8
RUNS = ("tokens", "vector16", "vector32", "key")
"""Kinds that stand in the bytes as they are; those of text in what is folded."""
_EACH = {"tokens": 4, "text": 8, "vector16": 2, "vector32": 2, "key": 1, "id": 1, "whole": 1}
_DRAWN = 16
_ORDER = [int(f"{i:04b}"[::-1], 2) for i in range(_DRAWN)]
_DRAWN_BYTES = 1 << 20
"""What is looked at together when runs are drawn: it takes 20 times as much."""
_VARIED = 6
"""Different bytes that a run must have: zeros and the like are everywhere."""
_MOST_VICTIMS = 1 << 18
_AT_ONCE = 1 << 14
"""Victims that are drawn of before what others say is taken out."""
_BLOCK = 1 << 14

Ids = npt.NDArray[np.int64]
Report = Callable[[int], object]


def make_needles(store: Store, chunks: Ids, report: Report = lambda _: None) -> Needles:
    """Needles of victims, given by ids that are not erased yet; ``report`` is called with 1 for each part."""
    victims = Tombstones(np.unique(chunks))
    draw = Draw(store, hidden_by(store, victims.ids))
    several: list[Needles] = []
    for part in victims.parts():
        if store.state.part_file("chunks", part) is not None:
            several += [needles for (needles,) in draw.of_part(part, [victims.rows(part)])]
        report(1)
    return Needles.joined(several, victims.ids)


class Draw:
    """Draws needles of victims, part by part. ``hidden``: what says nothing by right."""

    def __init__(self, store: Store, hidden: Tombstones, tokenizer: Tokenizer | None = None) -> None:
        self._store, self._hidden = store, hidden
        self._tokenizer = tokenizer or tokenizer_of(store)

    def of_part(
        self,
        part: int,
        groups: Sequence[Ids],
        among: Ids | None = None,
        encoders: Sequence[str] | None = None,
    ) -> Iterator[list[Needles]]:
        """Needles of the victims of a part, some thousand victims at a time: those of each of ``groups`` of rows.

        Groups may overlap. What is erased already has no needles. ``among``: rows to draw from, of the others there is
        only what tells a chunk as a whole. ``encoders``: draw of nothing but these vectors.
        """
        drawn = _Drawn(self._store, part, groups, self._tokenizer, self._hidden)
        for needles in drawn.draw(among, encoders):
            left = np.ones(len(needles), np.bool_)
            said = said_by_others(
                self._store, needles, [part], hidden=self._hidden, tokenizer=self._tokenizer, embedded=False
            )
            left[sorted(said)] = False
            some = drawn.some_of_each(needles, left)
            yield [some.of_victims(mask) for mask in drawn.masks]


def sampled_victims(chunks: Ids) -> Ids:
    """The victims that are drawn from, of as many as there are: all, or some, evenly."""
    return chunks[:: -(-len(chunks) // _MOST_VICTIMS) or 1]


def passed_over(victims: int) -> int:
    """Of so many victims, how many nothing is drawn from."""
    return victims - len(sampled_victims(np.arange(victims)))


def hidden_by(store: Store, victims: Ids) -> Tombstones:
    """What says nothing by right: victims, and all that is purged or set aside."""
    return Tombstones(np.union1d(read_tombstones(store).ids, victims))


def said_by_others(
    store: Store,
    needles: Needles,
    numbers: Sequence[int],
    report: Report = lambda _: None,
    *,
    hidden: Tombstones,
    tokenizer: Tokenizer | None = None,
    embedded: bool = True,
) -> set[int]:
    """Numbers of the needles that chunks or documents of the parts ``numbers`` say which are not ``hidden``.

    ``report`` is called with 1 for each part. ``tokenizer``: the store's, if it is loaded already. ``embedded``: also
    look into the vectors of others, which are most of what there is.
    """
    tokenizer = tokenizer or tokenizer_of(store)
    is_cell = [kind for kind in KINDS if needles.is_cell(kind)]
    runs = Matcher(needles, [kind for kind in RUNS if kind not in is_cell])
    text, cells = Matcher(needles, ("text",)), Matcher(needles, is_cell)
    said: set[int] = set()
    for part in numbers:
        for data in _others(store, part, hidden, tokenizer, embedded=embedded):
            for matcher, some in ((runs, data.raw), (text, data.text)):
                said.update(_numbers(matcher, some))
        for column in _columns(store, part, hidden):
            for piece, starts, ends in cells_of(column):
                said.update(number for _, number in cells.cells(piece, starts, ends))
                said.update(_numbers(runs, piece))
                said.update(_numbers(text, folded(piece)))
        report(1)
    return said


def _numbers(matcher: Matcher, data: bytes) -> Iterator[int]:
    step, overlap = 1 << 20, 256
    for start in range(0, len(data), step):
        yield from (number for _, number in matcher.runs(data[start : start + step + overlap]))


def tokenizer_of(store: Store) -> Tokenizer:
    """The tokenizer that a store's text is decoded by."""
    return Tokenizer(TokenizerFile(store.identity.tokenizer.name, store.tokenizer_json()))


class _Drawn:
    """Needles as they are drawn of the victims of a part.

    A victim's number is its place among the rows of all groups; behind these come the documents of each group, for
    whether one goes as a whole depends on the group.
    """

    def __init__(
        self, store: Store, part: int, groups: Sequence[Ids], tokenizer: Tokenizer, hidden: Tombstones
    ) -> None:
        identity = store.identity
        self._store, self._part, self._tokenizer, self._hidden = store, part, tokenizer, hidden
        self._rows = np.unique(np.concatenate([np.zeros(0, np.int64), *groups]))
        self._groups = groups
        self._lengths = {
            "tokens": TOKENS * identity.tokenizer.token_bytes, "text": TEXT_BYTES, "vector16": 2 * NUMBERS,
            "vector32": 4 * NUMBERS, "key": schemas.HASH_BYTES,
        }  # fmt: skip
        self.masks = [np.isin(self._rows, group) for group in groups]
        """Which victims are of each group."""
        self._begin()

    def _begin(self) -> None:
        self._kinds: list[npt.NDArray[np.uint8]] = []
        self._places: list[Ids] = []
        self._pieces: list[bytes] = []
        self._tried: dict[str, list[Ids]] = {kind: [] for kind in KINDS if kind != "whole"}

    def _add(self, kind: str, places: Ids, pieces: Sequence[bytes]) -> None:
        self._kinds.append(np.full(len(pieces), KINDS.index(kind), np.uint8))
        self._places.append(places)
        self._pieces += pieces

    def draw(self, among: Ids | None, encoders: Sequence[str] | None) -> Iterator[Needles]:
        """Draw, some thousand victims at a time; the arguments are those of ``Draw.of_part``."""
        store, part = self._store, self._part
        chunks = parts.read_chunks(store, part)
        embeddings = [
            vectors.read_vectors(store, entry)
            for name in (store.state.names("embeddings") if encoders is None else encoders)
            if (entry := store.state.part_file("embeddings", part, name)) is not None
        ]
        living = chunks.n_tokens > 0
        living[self._hidden.rows(part)] = False
        # Two vectors have a run in common if they are the same, and hardly else.
        repeated = [_digests(matrix, np.flatnonzero(living)) for matrix in embeddings]
        places = np.flatnonzero(chunks.n_tokens[self._rows] > 0)
        if encoders is None:
            whole = self._rows[places]
            self._add("whole", places, [chunks.tokens[r, : chunks.n_tokens[r]].tobytes() for r in whole.tolist()])
            self._draw_ids(chunks.doc, chunks.n_tokens)
        if among is not None:
            places = places[np.isin(self._rows[places], among)]
        for start in range(0, max(len(places), 1), _AT_ONCE):
            some = places[start : start + _AT_ONCE]
            rows = self._rows[some]
            if encoders is None:
                texts = self._tokenizer.decode(chunks.tokens[rows], chunks.n_tokens[rows])
                tokens = [chunks.tokens[row, : chunks.n_tokens[row]].tobytes() for row in rows.tolist()]
                self._draw("tokens", some, tokens)
                self._draw("text", some, [folded(text) for text in texts.to_pylist()])
            for matrix, others in zip(embeddings, repeated, strict=True):
                mine = matrix[rows]
                full = np.flatnonzero(mine.any(axis=1))
                alone = np.array([i for i in full.tolist() if _digest(mine[i]) not in others], np.int64)
                for kind, kind_of in (("vector16", mine.dtype), ("vector32", np.dtype("<f4"))):
                    self._tried[kind].append(some[full])
                    self._draw(kind, some[alone], [row.tobytes() for row in mine[alone].astype(kind_of)])
            yield self._needles()
            self._begin()

    def _draw(self, kind: str, places: Ids, several: Sequence[bytes]) -> None:
        """Draw runs of what victims say, each a piece of ``several``."""
        self._tried[kind].append(places)
        step = max(1, _DRAWN_BYTES // max(map(len, several), default=1))
        for start in range(0, len(several), step):
            some = slice(start, start + step)
            data = b"".join(several[some])
            of, at = _spread(data, np.array([len(one) for one in several[some]]), self._lengths[kind], kind)
            runs = [data[i : i + self._lengths[kind]] for i in at.tolist()]
            self._add(kind, places[some][of], runs)

    def _draw_ids(self, doc: Any, n_tokens: Any) -> None:
        """Ids and keys of the documents of which a group leaves nothing, or that will be named anew."""
        table = parts.read_documents(self._store, self._part, ["id", "key", "text_hash"])
        several = []
        for group in self._groups:
            left = n_tokens > 0
            left[group] = False
            mine = np.unique(doc[group])
            several.append(mine[~np.isin(mine, doc[left]) | parts.named_by_text(table.take(pa.array(mine)))])
        gone = np.concatenate([np.zeros(0, np.int64), *several])
        table = table.take(pa.array(gone))
        known = table["id"].is_valid().to_numpy()
        places = len(self._rows) + np.flatnonzero(known)
        names, keys = (table[column].filter(pa.array(known)).to_pylist() for column in ("id", "key"))
        for kind, pieces in (("id", [name.encode() for name in names]), ("key", keys)):
            self._add(kind, places, pieces)
            self._tried[kind].append(places)
        owner = np.repeat(np.arange(len(several)), [len(one) for one in several])
        self.masks = [
            np.concatenate([mask[: len(self._rows)], owner == number]) for number, mask in enumerate(self.masks)
        ]

    def _needles(self) -> Needles:
        kinds = np.concatenate([np.zeros(0, np.uint8), *self._kinds])
        places = np.concatenate([np.zeros(0, np.int64), *self._places]).astype(np.int32)
        none = np.zeros(0, np.int64)
        tried = {kind: np.unique(np.concatenate([none, *some])) for kind, some in self._tried.items()}
        chunks = parts.chunk_ids(self._part, self._rows)
        return Needles(kinds, self._pieces, self._lengths, chunks, places, tried=tried)

    def some_of_each(self, needles: Needles, left: npt.NDArray[np.bool_]) -> Needles:
        """The first of each kind and victim that are ``left``."""
        assert needles.victims is not None
        rows = np.flatnonzero(left)
        # Those that hashes can be kept of come first.
        late = ~sampled_heads(needles)[rows]
        order = np.lexsort((rows, late, needles.victims[rows], needles.kinds[rows]))
        pairs = np.stack([needles.kinds[rows].astype(np.int64), needles.victims[rows]])[:, order]
        begins = np.flatnonzero(np.concatenate([[True], (pairs[:, 1:] != pairs[:, :-1]).any(axis=0)])[: len(rows)])
        rank = np.arange(len(rows)) - np.repeat(begins, np.diff([*begins.tolist(), len(rows)]))
        most = np.array([_EACH[kind] for kind in KINDS])[needles.kinds[rows[order]]]
        return needles.of(np.sort(rows[order[rank < most]]))


def _digest(vector: npt.NDArray[Any]) -> bytes:
    return hashlib.blake2b(vector.tobytes(), digest_size=16).digest()


def _digests(matrix: npt.NDArray[Any], rows: Ids) -> set[bytes]:
    """Hashes of some vectors of a part: 1 µs and some 80 bytes each."""
    return {_digest(matrix[row]) for row in rows.tolist()}


def _spread(data: bytes, sizes: Ids, length: int, kind: str) -> tuple[Ids, Ids]:
    """Up to 16 runs of each of the pieces that ``data`` is made of: which piece each is of, and where it begins.

    Of those that a hash may be kept of, if a piece has any; in an order of which every beginning is spread over it;
    none that is hardly more than zeros.
    """
    none = np.zeros(0, np.int64)
    if len(data) < max(length, WINDOW):
        return none, none
    every = np.frombuffer(data, np.uint8)
    words = np.lib.stride_tricks.sliding_window_view(every, WINDOW).copy().view("<u8").reshape(-1).astype(np.uint64)
    ends = np.cumsum(sizes)
    begins = ends - sizes
    good = np.flatnonzero(sampled(words, kind))
    owner = np.searchsorted(ends, good, side="right")
    fit = good + length <= ends[owner]
    good, owner = good[fit], owner[fit]
    sampled_in = np.bincount(owner, minlength=len(sizes))
    firsts = np.cumsum(sampled_in) - sampled_in
    count = np.where(sampled_in > 0, sampled_in, np.maximum(sizes - length + 1, 0))
    picked = np.arange(_DRAWN)[None] * np.maximum(count - 1, 0)[:, None] // (_DRAWN - 1)
    kept = np.concatenate([count[:, None] > 0, np.diff(picked) > 0], axis=1)
    of_sampled = good[np.minimum(firsts[:, None] + picked, len(good) - 1)] if len(good) else picked
    at = np.where(sampled_in[:, None] > 0, of_sampled, begins[:, None] + picked)
    of = np.repeat(np.arange(len(sizes))[:, None], _DRAWN, axis=1)
    of, at = of[:, _ORDER][kept[:, _ORDER]], at[:, _ORDER][kept[:, _ORDER]]
    runs = np.sort(np.lib.stride_tricks.sliding_window_view(every, length)[at], axis=1)
    varied = (np.diff(runs, axis=1) != 0).sum(1) + 1 >= _VARIED
    return of[varied], at[varied]


class _Data:
    """Bytes of chunks that are not hidden: as they are (tokens, vectors), and their folded text."""

    def __init__(self, raw: bytes, text: bytes = b"") -> None:
        self.raw, self.text = raw, text


def _others(store: Store, part: int, hidden: Tombstones, tokenizer: Tokenizer, *, embedded: bool) -> Iterator[_Data]:
    """What the chunks of a part say that are not hidden, in their order, as a scan would meet it."""
    chunks = parts.read_chunks(store, part)
    other = chunks.n_tokens > 0
    other[hidden.rows(part)] = False
    matrices = [
        vectors.read_vectors(store, entry)
        for name in store.state.names("embeddings")
        if embedded and (entry := store.state.part_file("embeddings", part, name)) is not None
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


def _columns(store: Store, part: int, hidden: Tombstones) -> Iterator[pa.Array]:
    """The columns of the documents of which some chunk is not hidden.

    Without ids and keys that an erase of what is hidden of them replaces: these are not said by right.
    """
    table = parts.read_documents(store, part)
    count = table["n_chunks"].to_numpy()
    first = table["first_row"].to_numpy()
    rows = hidden.rows(part)
    mine = np.searchsorted(rows, first + count) - np.searchsorted(rows, first)
    mine, table = mine[mine < count], table.filter(pa.array(mine < count))
    kept = mine == 0
    kept[~kept] = ~parts.named_by_text(table.filter(pa.array(~kept)))
    for name in table.schema.names:
        column = table[name].filter(pa.array(kept)) if name in ("id", "key") else table[name]
        yield from column.chunks
