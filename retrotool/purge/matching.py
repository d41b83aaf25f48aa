"""Finding many short byte strings at once: in any bytes at every place, or only knowing keyed hashes of them.

A *needle* is a **run** (a kind has one length, at least 8 bytes) that may stand anywhere, or a **cell**, which must be
all of a value: of a table, or between quotes and line ends of a text.

* *Plain* needles: every 8 bytes of the data, at each of the 8 alignments, index a bitmap of 64 bits a needle; what is
  left is looked up by these 8 bytes and compared whole. With 10,000 needles 300 to 400 MB/s and core.
* *Hashed* needles tell nothing of what they are made from. Runs are kept only where the 8 bytes they begin with satisfy
  a public condition, which one window in 16 (of text in 32) does (``sampled``); so only these windows of the data need
  a look, and it can be a pseudo-random function: SipHash-2-4, whose 32 lowest bits are kept, and then BLAKE2b-128 of
  the whole run. Both have keys made of the store's secret and the purge's id. 100 to 200 MB/s and core.

Why nothing unkeyed is kept, not even 16 bits a needle: these would be too many to search by (10,000 needles are 14 % of
65,536 values, a candidate every seven bytes), and too many to give away. Whoever guesses a text, from a list of names
perhaps, would see with a few needles of it whether the guess is right. 8 tokens or 24 bytes of text have perhaps 40
bits of entropy, and of a form letter none, so no hash that can be computed without a secret keeps them. A linear
rolling hash with a secret multiplier is no better, as a few known texts give the multiplier away. Without
``store.json`` the hashes are those of a random function; with it a guess can be tested, as it can by the block list.
That a run satisfies the condition says nothing but that it was kept.

Positions are found, not text: nothing here returns or logs what it has found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

KINDS = ("tokens", "text", "vector16", "vector32", "key", "id", "whole")
"""Kinds of needles by number. Text is folded; ids and, if they are hashed, keys are cells, the others runs.

Nothing is looked for by all tokens of a chunk, ``whole``.
"""
CELLS = frozenset(("id", "key", "whole"))
WINDOW = 8
_SAMPLE = np.uint64(5)
_SAMPLE_BITS = {"text": 5}
"""Of a window's mixed bits as many must be ``_SAMPLE``; 4 of other kinds, of which a chunk has fewer windows."""
_BATCH = 1 << 13
_MIX, _SPREAD = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
_TAG = np.uint64(0xFFFFFFFF)
_HASH_BYTES = 16

Words = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Needles:
    """n needles: ``kinds`` uint8 [n] (places in ``KINDS``), and ``proofs``, what each must be.

    Plain, ``proofs`` are the bytes; with ``key`` (48 bytes) they are 16 bytes of hash, and ``tags`` uint64 [n] go with
    them. ``lengths`` are those of runs, by kind. ``chunks`` are the ids of the victims, sorted; ``victims`` int32 [n]
    the place of each needle's own among them (of ids and keys that of the document's first), if that is known.
    ``lacking`` counts, by kind, victims that have no needle; for ids and keys documents. ``tried`` has, by kind, the
    victims that needles were sought of.
    """

    kinds: npt.NDArray[np.uint8]
    proofs: Sequence[bytes]
    lengths: dict[str, int]
    chunks: Places = field(default_factory=lambda: np.zeros(0, np.int64))
    victims: npt.NDArray[np.int32] | None = None
    lacking: dict[str, int] = field(default_factory=dict)
    key: bytes | None = None
    tags: Words | None = None
    tried: dict[str, Places] = field(default_factory=dict)

    def __len__(self) -> int:
        """Needles of all kinds."""
        return len(self.kinds)

    @classmethod
    def plain(cls, needles: Sequence[tuple[str, bytes]], chunks: Sequence[int] = ()) -> Needles:
        """Needles from (kind, bytes), such as a test's canaries; all runs of a kind must have one length, from 8 on."""
        lengths: dict[str, int] = {}
        for kind, data in needles:
            if kind != "id" and (lengths.setdefault(kind, len(data)) != len(data) or len(data) < WINDOW):
                raise ValueError(f"a needle of {kind} has {len(data)} bytes")
        kinds = np.array([KINDS.index(kind) for kind, _ in needles], np.uint8)
        return cls(kinds, [data for _, data in needles], lengths, np.array(sorted(chunks), np.int64))

    @classmethod
    def joined(cls, several: Sequence[Needles], chunks: Places | None = None) -> Needles:
        """The needles of several that are hashed alike, or not at all; ``chunks``: those of all (default: the first's).

        Which victim each is of is not kept.
        """
        if not several:
            return cls(np.zeros(0, np.uint8), [], {}, np.zeros(0, np.int64) if chunks is None else chunks)
        lacking: dict[str, int] = {}
        for needles in several:
            for kind, n in needles.lacking.items():
                lacking[kind] = lacking.get(kind, 0) + n
        tags = [needles.tags for needles in several if needles.tags is not None]
        return cls(
            np.concatenate([needles.kinds for needles in several]),
            [proof for needles in several for proof in needles.proofs],
            several[0].lengths, several[0].chunks if chunks is None else chunks, None, lacking, several[0].key,
            np.concatenate(tags) if tags else None,
        )  # fmt: skip

    def of(self, some: npt.NDArray[Any]) -> Needles:
        """Some of them, given by a mask or by their numbers."""
        places = np.flatnonzero(some) if some.dtype == np.bool_ else some
        return Needles(
            self.kinds[places], [self.proofs[i] for i in places.tolist()], self.lengths, self.chunks,
            None if self.victims is None else self.victims[places], self.lacking, self.key,
            None if self.tags is None else self.tags[places], self.tried,
        )  # fmt: skip

    def of_victims(self, mine: npt.NDArray[np.bool_]) -> Needles:
        """Those of some victims, given by a mask of all, and of how many of these there are none."""
        assert self.victims is not None, "they tell their victims"
        kept = self.of(mine[self.victims])
        assert kept.victims is not None
        lacking = {}
        for kind, victims in self.tried.items():
            has = np.unique(kept.victims[kept.kinds == KINDS.index(kind)])
            lacking[kind] = int(mine[victims].sum()) - len(has)
        return replace(kept, lacking=lacking)

    def hashed(self, secret: str, salt: bytes) -> Needles:
        """The same as keyed hashes, without the runs that can't be found by them; no needle tells its victim."""
        key = proof_key(secret, salt)
        cell = np.isin(self.kinds, [KINDS.index(kind) for kind in CELLS])
        heads = head_words(self.proofs)
        kept = np.flatnonzero(cell | sampled_heads(self))
        tags = tag_words(heads[kept], key)
        whole, of_whole = whole_key(secret, salt), KINDS.index("whole")
        proofs = [
            hashlib.blake2b(self.proofs[i], digest_size=_HASH_BYTES, key=whole).digest()
            if kind == of_whole
            else _digest(key, kind, self.proofs[i])
            for i, kind in zip(kept.tolist(), self.kinds[kept].tolist(), strict=True)
        ]
        lengths = {kind: n for kind, n in self.lengths.items() if kind not in CELLS}
        return Needles(self.kinds[kept], proofs, lengths, self.chunks, None, self._lacking(kept), key, tags)

    def _lacking(self, kept: Places) -> dict[str, int]:
        """By kind, victims without a needle when only ``kept`` are left."""
        if self.victims is None:
            return self.lacking
        more = {}
        for number, kind in enumerate(KINDS):
            had, has = (np.unique(self.victims[of][self.kinds[of] == number]) for of in (slice(None), kept))
            more[kind] = len(had) - len(has)
        return {kind: n + more.get(kind, 0) for kind, n in self.lacking.items()}

    def is_cell(self, kind: str) -> bool:
        """Whether needles of a kind must be whole values."""
        return kind == "id" or (kind == "key" and self.key is not None)

    def digests(self, kind: int, pieces: Sequence[bytes]) -> list[bytes]:
        """What hashed needles of ``kind``, made from each of the pieces, have as their proof: 16 bytes each."""
        assert self.key is not None
        return [_digest(self.key, kind, piece) for piece in pieces]


def proof_key(secret: str, salt: bytes) -> bytes:
    """32 bytes of key for BLAKE2b and 16 for SipHash, of the store's secret and a purge's salt."""
    return hashlib.blake2b(b"proof:" + salt, digest_size=48, key=bytes.fromhex(secret)).digest()


def whole_key(secret: str, salt: bytes) -> bytes:
    """32 bytes of key for the hashes of whole chunks, which a receipt tells: nothing else is hashed with it."""
    return hashlib.blake2b(b"receipt:" + salt, digest_size=32, key=bytes.fromhex(secret)).digest()


def _digest(key: bytes, kind: int, data: bytes) -> bytes:
    return hashlib.blake2b(bytes([kind]) + data, digest_size=_HASH_BYTES, key=key[:32]).digest()


def sampled(words: Words, kind: str) -> npt.NDArray[np.bool_]:
    """Which windows, as little-endian words, hashed runs of a kind may begin with: one in 16, or 32; no zeros."""
    mixed = words * _MIX
    np.right_shift(mixed, np.uint64(64 - _SAMPLE_BITS.get(kind, 4)), out=mixed)
    chosen: npt.NDArray[np.bool_] = mixed == _SAMPLE
    return chosen


def sampled_heads(needles: Needles) -> npt.NDArray[np.bool_]:
    """Which of plain needles begin with a window that is sampled, bool [n]."""
    heads = head_words(needles.proofs)
    chosen = np.zeros(len(needles), np.bool_)
    for number, kind in enumerate(KINDS):
        mine = needles.kinds == number
        chosen[mine] = sampled(heads[mine], kind)
    return chosen


def head_words(pieces: Sequence[bytes]) -> Words:
    """The first 8 bytes of each as a little-endian word; shorter ones with zeros behind."""
    return np.frombuffer(b"".join(piece[:WINDOW].ljust(WINDOW, b"\0") for piece in pieces), "<u8").astype(np.uint64)


def tag_words(words: Words, key: bytes) -> Words:
    """The 32 lowest bits of SipHash-2-4 of each word's 8 bytes, with the last 16 bytes of ``key``."""
    batches = [siphash(words[i : i + _BATCH], key[32:]) & _TAG for i in range(0, len(words), _BATCH)]
    return np.concatenate(batches) if batches else words


def siphash(words: Words, key: bytes) -> Words:
    """SipHash-2-4 of many messages of 8 bytes, uint64 [n]; ``key`` has 16 bytes."""
    low, high = np.frombuffer(key, "<u8").astype(np.uint64)
    shape = words.shape
    v = [np.full(shape, k ^ np.uint64(c)) for k, c in (
        (low, 0x736F6D6570736575), (high, 0x646F72616E646F6D), (low, 0x6C7967656E657261), (high, 0x7465646279746573)
    )]  # fmt: skip
    for message in (words, np.uint64(8 << 56)):
        v[3] ^= message
        _rounds(v, 2)
        v[0] ^= message
    v[2] ^= np.uint64(0xFF)
    _rounds(v, 4)
    mixed: Words = v[0] ^ v[1] ^ v[2] ^ v[3]
    return mixed


def _rounds(v: list[Words], count: int) -> None:
    spare = np.empty_like(v[0])

    def rotate(x: Words, bits: int) -> None:
        np.right_shift(x, np.uint64(64 - bits), out=spare)
        np.left_shift(x, np.uint64(bits), out=x)
        np.bitwise_or(x, spare, out=x)

    for _ in range(count):
        for a, b, c, d, first, second in ((0, 1, 2, 3, 13, 16), (2, 1, 0, 3, 17, 21)):
            v[a] += v[b]
            v[c] += v[d]
            rotate(v[b], first)
            rotate(v[d], second)
            v[b] ^= v[a]
            v[d] ^= v[c]
            rotate(v[a], 32)


class Matcher:
    """Looks for the needles of some kinds: of cells, or of runs that are sampled alike."""

    def __init__(self, needles: Needles, kinds: Sequence[str]) -> None:
        self._needles, self._kind = needles, kinds[0] if kinds else ""
        wanted = [KINDS.index(kind) for kind in kinds]
        rows = np.flatnonzero(np.isin(needles.kinds, wanted))
        tags = head_words([needles.proofs[i] for i in rows.tolist()]) if needles.tags is None else needles.tags[rows]
        self._size = len(rows)
        of_kind = needles.kinds[rows]
        self._of_each = {kind: _OfKind(needles, kind, rows[of_kind == kind], tags[of_kind == kind]) for kind in wanted}
        self._of_each = {kind: some for kind, some in self._of_each.items() if len(some.rows)}
        per_needle = 64 if needles.key is None else 16
        bits = max(16, int(per_needle * len(rows)).bit_length())
        self._shift = np.uint64((64 if needles.key is None else 32) - min(bits, 32))
        self._bitmap = np.zeros(1 << min(bits, 32), np.bool_)
        self._bitmap[self._place(tags)] = True

    def __len__(self) -> int:
        """Needles that are looked for."""
        return self._size

    def runs(self, data: bytes) -> Iterator[tuple[int, int]]:
        """Where in ``data`` a run stands, and its number; up to a few megabytes at once."""
        if not self._size or len(data) < WINDOW:
            return
        found: list[tuple[Places, Words]] = []
        for start in range(min(WINDOW, len(data) - WINDOW + 1)):
            words = np.frombuffer(data, "<u8", (len(data) - start) // WINDOW, start)
            places = np.flatnonzero(self._may_begin(words))
            found.append((start + WINDOW * places, words[places]))
        places = np.concatenate([places for places, _ in found])
        tags = self._tags(np.concatenate([words for _, words in found]))
        may = np.flatnonzero(self._bitmap.take(self._place(tags)))
        places, tags = places[may], tags[may]
        every = np.frombuffer(data, np.uint8)
        for kind, mine in self._of_each.items():
            length = self._needles.lengths[KINDS[kind]]
            some = places[mine.begins(tags) & (places + length <= len(data))]
            if len(some):
                windows = np.lib.stride_tricks.sliding_window_view(every, length)[some]
                # What is common comes up often, and is hashed once.
                pieces, inverse = np.unique(windows.view(f"V{length}").reshape(-1), return_inverse=True)
                yield from _spread(some, inverse, mine.numbers([piece.tobytes() for piece in pieces]))

    def _may_begin(self, words: Words) -> npt.NDArray[np.bool_]:
        if self._needles.key is not None:
            return sampled(words, self._kind)
        return self._bitmap.take(self._place(words), mode="clip")

    def _tags(self, words: Words) -> Words:
        return words if self._needles.key is None else tag_words(words, self._needles.key)

    def _place(self, tags: Words) -> Places:
        """Where in the bitmap tags are; those of hashes are spread already."""
        spread = tags * _SPREAD if self._needles.key is None else tags.copy()
        np.right_shift(spread, self._shift, out=spread)
        return spread.view(np.int64)

    def cells(self, data: bytes, starts: Places, ends: Places) -> Iterator[tuple[int, int]]:
        """Which of the cells ``data[start:end]`` are needles: place of the cell, and number of the needle."""
        if not self._size or not len(starts):
            return
        padded = np.frombuffer(data + bytes(WINDOW), np.uint8)
        # One word at every byte, without a copy.
        every = np.lib.stride_tricks.as_strided(padded, (len(data) + 1, WINDOW), (1, 1))
        words = np.ascontiguousarray(every[starts]).view("<u8").reshape(-1)
        short = np.minimum(ends - starts, WINDOW).astype(np.uint64) * np.uint64(8)
        # A shift by all 64 bits is not defined.
        words = np.where(short < 64, words & ((np.uint64(1) << np.minimum(short, np.uint64(63))) - np.uint64(1)), words)
        tags = self._tags(words)
        may = np.flatnonzero(self._bitmap.take(self._place(tags)))
        for mine in self._of_each.values():
            some = may[mine.begins(tags[may])]
            pieces = [data[start:end] for start, end in zip(starts[some].tolist(), ends[some].tolist(), strict=True)]
            yield from _spread(some, np.arange(len(some)), mine.numbers(pieces))


class _OfKind:
    """The needles of one kind, ``rows``, by what they begin with, and by their digests."""

    def __init__(self, needles: Needles, kind: int, rows: Places, tags: Words) -> None:
        self._needles, self._kind = needles, kind
        self._tags = np.unique(tags)
        digests = self._hashes([needles.proofs[i] for i in rows.tolist()])
        order = np.argsort(digests, kind="stable")
        self._digests, self.rows = digests[order], rows[order]

    def _hashes(self, proofs: Sequence[bytes]) -> Words:
        """64 bits of each; of plain needles, of which many may begin alike, by Python's own hash."""
        if self._needles.key is not None:
            return head_words(proofs)
        return np.fromiter(map(hash, proofs), np.int64, len(proofs)).view(np.uint64)

    def begins(self, tags: Words) -> npt.NDArray[np.bool_]:
        """Which tags are those of a needle."""
        place = np.minimum(np.searchsorted(self._tags, tags), len(self._tags) - 1)
        found: npt.NDArray[np.bool_] = self._tags[place] == tags
        return found

    def numbers(self, pieces: Sequence[bytes]) -> list[list[int]]:
        """The numbers of the needles that each piece is."""
        proofs = pieces if self._needles.key is None else self._needles.digests(self._kind, pieces)
        heads = self._hashes(proofs)
        low, high = (np.searchsorted(self._digests, heads, side) for side in ("left", "right"))
        return [
            [row for row in self.rows[a:b].tolist() if self._needles.proofs[row] == proof]
            for a, b, proof in zip(low.tolist(), high.tolist(), proofs, strict=True)
        ]


def _spread(places: Places, inverse: Places, numbers: list[list[int]]) -> Iterator[tuple[int, int]]:
    """(place, number) for each of the places, whose piece is the one that ``inverse`` says."""
    found = np.flatnonzero(np.array([bool(some) for some in numbers], np.bool_)[inverse])
    for place, piece in zip(places[found].tolist(), inverse[found].tolist(), strict=True):
        for number in numbers[piece]:
            yield place, number
