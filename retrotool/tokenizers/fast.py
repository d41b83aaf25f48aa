"""Tokenise ten to twenty times as fast as ``tokenizers``, with exactly the same ids.

``tokie`` is fast but wrong on some texts: its Unicode tables have another version, it splits a few pairs of
characters differently, and it cuts texts of 10,000 bytes or more where that changes tokens. Therefore

* it gets pieces of less than 10,000 bytes, cut where no token crosses (``cut``);
* a guard (``equivalence``) sends those that may come out wrong to ``tokenizers``, after finer cuts;
* the first texts and a random sample are compared with ``tokenizers``; a difference raises ``TokensDiffer``.

It is not used for Unigram models, for which it breaks ties differently, nor for texts that can't be cut.
Guard and comparison cost about a tenth. Each call of ``tokie`` starts a thread per CPU of the process's
affinity (``os.sched_getaffinity``), whatever ``RAYON_NUM_THREADS`` says. What the guard found, which takes
seconds, is kept in ``cache_folder()`` for the user's next store.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import re
import tempfile
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from retrotool.errors import AbortError
from retrotool.ranges import runs_up_to
from retrotool.store.cache import cache_folder
from retrotool.tokenizers.cut import cut_texts, isolate_tabs, places_beside_digits, tabs_to_isolate, why_not_cut
from retrotool.tokenizers.equivalence import CODE_POINTS, Encode, Findings, Flat, Guard, Pair, States
from retrotool.tokenizers.tokenizer import Tokenizer, TokenizerFile, byte_level_alphabet

_PIECE_BYTES = 9_600  # tokie is wrong from 10,000 bytes on
_WIDEST = 4  # bytes of a character
_PARTS = (256, 32)  # characters of the parts of an unsafe piece, of the unsafe ones of these, and so on
_GROUP = 4 << 20  # characters tokenised at a time, which bounds memory
Encoded = tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64], npt.NDArray[np.bool_]]
_CHARACTERS = re.compile(rb"[\x80-\xbf]+|[^\x80-\xbf][\x80-\xbf]*")  # of UTF-8; the first may be the end of one
_LONG_TEXT, _JUDGED_LENGTH = 32 << 10, 16 << 10


class TokensDiffer(AbortError):  # noqa: N818
    """The fast tokenizer gave other ids than ``tokenizers``; ``summary`` has no document text."""

    def __init__(self, version: str, position: int, excerpt: str) -> None:
        self.summary = f"tokie {version} and tokenizers differ at token {position} of a text"
        super().__init__(
            f"{self.summary}, near {excerpt}",
            "Tokenise again without tokie; the tokens of `tokenizers` are the right ones.",
        )


class FastTokenizer:
    """The ids of ``tokenizer``, by ``engine``: tokie, or ``tokenizers`` and the reason in ``why``."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        check: float = 0.001,  # share of texts to compare
        first: int = 32,  # texts to compare before that
        use_tokie: bool = True,
        findings: Findings | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._check, self._first = check, first
        self._random = np.random.default_rng(0)
        self._seen = self.compared = 0
        self.judged = 0  # texts sent to ``tokenizers``, in whole or in part
        fields = orjson.loads(tokenizer.file.content)
        self._fast, self.why = _load(tokenizer, fields) if use_tokie else (None, "tokie was not requested")
        self._inside, tab = places_beside_digits(fields), tabs_to_isolate(fields)
        self._cuts = [functools.partial(isolate_tabs, tab=tab)] if tab else []
        for most in _PARTS:
            self._cuts.append(functools.partial(cut_texts, least=most // 2, most=most, inside=self._inside))
        if self._fast is not None:
            self._kept = _Kept(tokenizer.file.content)
            if findings is None or findings.versions != library_versions():
                findings = self._kept.findings()
            self._guard = _guard(self._fast, tokenizer, fields, findings, self._kept.states())
            found = self._guard.findings
            if findings is None:
                self._kept.keep_findings(found)
            self.why = f"tokie {version('tokie')} is not used: {found.why}" if found.why else ""
        self.engine = "tokenizers" if self.why else "tokie"

    @property
    def findings(self) -> Findings | None:
        """What the guard found, for others with the same tokenizer; None if tokie could not be loaded."""
        return None if self._fast is None else self._guard.findings

    def keep_states(self) -> None:
        """Keep what was found about code points since the last call, for others with the same tokenizer."""
        if self._fast is not None and self._guard.classified:
            self._kept.keep_states(self._guard.states)
            self._guard.classified = 0

    def encode_flat(self, texts: Sequence[str]) -> Flat:
        """Tokenise like ``Tokenizer.encode_flat``; raise ``TokensDiffer`` if a compared text differs."""
        if self.engine == "tokenizers" or not len(texts):
            return self._tokenizer.encode_flat(texts)
        ids, lengths, sure = self._encode(texts)
        self.judged += len(texts) - int(sure.sum())
        chosen = self._random.random(len(texts)) < self._check
        chosen[: max(self._first - self._seen, 0)] = True
        for i in np.flatnonzero(chosen).tolist():
            self._compare(texts[i], ids, lengths, i)
        self._seen += len(texts)
        return ids, lengths

    def _encode(self, texts: Sequence[str]) -> Encoded:
        """Return ids and lengths without comparing, and which texts [n] only the fast tokenizer did."""
        pieces, n_pieces = cut_texts(texts, _PIECE_BYTES * 3 // 4, _PIECE_BYTES, widest=_WIDEST, inside=self._inside)
        done = [self._encode_pieces(some) for some in runs_up_to(_GROUP, pieces, len)]
        ids, lengths, unsure = (np.concatenate(column) for column in zip(*done, strict=True))
        starts = np.cumsum(n_pieces, dtype=np.intp) - n_pieces
        return ids, np.add.reduceat(lengths, starts), ~np.logical_or.reduceat(unsure, starts)

    def _encode_pieces(self, pieces: list[str]) -> Encoded:
        slow = unsure = self._unsure(pieces)
        if not unsure.any():
            return *self._quick(pieces), unsure
        # Usually a few places make a piece unsafe, and only the parts around them go to ``tokenizers``.
        parts, n_parts = pieces, np.ones(len(pieces), np.intp)
        for cut in self._cuts:
            parts, counts = cut(parts, chosen=slow.tolist())
            n_parts = np.add.reduceat(counts, np.cumsum(n_parts) - n_parts)
            slow = np.repeat(slow, counts)
            slow[slow] = self._unsure(list(itertools.compress(parts, slow)))
        lengths = np.empty(len(parts), np.int64)
        quick, lengths[~slow] = self._quick(list(itertools.compress(parts, ~slow)))
        exact, lengths[slow] = self._tokenizer.encode_flat(list(itertools.compress(parts, slow)))
        is_exact = np.repeat(slow, lengths)
        ids = np.empty(len(is_exact), np.uint32)
        ids[is_exact], ids[~is_exact] = exact, quick  # both are in the order of the parts
        starts = np.cumsum(n_parts) - n_parts
        return ids, np.add.reduceat(lengths, starts), np.logical_or.reduceat(slow, starts)

    def _quick(self, texts: list[str]) -> Flat:
        assert self._fast is not None
        return self._fast(texts) if texts else (np.empty(0, np.uint32), np.empty(0, np.int64))

    def _unsure(self, pieces: list[str]) -> npt.NDArray[np.bool_]:
        """Return which pieces [n] are for ``tokenizers``: those that may come out wrong, and long ones."""
        unsure = self._guard.unsure(pieces)
        sizes = np.fromiter(map(len, pieces), np.int64, len(pieces))
        for i in np.flatnonzero(sizes > _PIECE_BYTES // _WIDEST).tolist():
            unsure[i] |= len(pieces[i].encode(errors="replace")) > _PIECE_BYTES
        return unsure

    def _compare(self, text: str, ids: npt.NDArray[np.uint32], lengths: npt.NDArray[np.int64], i: int) -> None:
        self.compared += 1
        start = int(lengths[:i].sum())
        got = ids[start : start + int(lengths[i])]
        if len(text) > _LONG_TEXT and self._check < 1:
            start = int(self._random.integers(len(text) - _JUDGED_LENGTH))
            text = text[start : start + _JUDGED_LENGTH]
            got = self._encode([text])[0]
        expected = self._tokenizer.encode_flat([text])[0]
        if np.array_equal(got, expected):
            return
        pairs = enumerate(zip(got, expected, strict=False))
        position = next((i for i, (one, other) in pairs if one != other), min(len(got), len(expected)))
        offsets = self._tokenizer.backend.encode(text, add_special_tokens=False).offsets
        place = offsets[position][0] if position < len(expected) else len(text)
        raise TokensDiffer(version("tokie"), position, ascii(text[max(place - 20, 0) : place + 20]))


class _Kept:
    """What was found about ``tokie`` and a tokenizer: the findings, and states of code points that occurred.

    Each has a small file, named by the SHA-256 of the tokenizer's content and by the library versions. Both
    can be deleted at any time. What can't be read is found again, and what can't be written is not kept.
    """

    def __init__(self, content: bytes) -> None:
        about = hashlib.sha256(library_versions().encode()).hexdigest()[:16]
        name = f"{hashlib.sha256(content).hexdigest()[:32]}-{about}"
        folder = cache_folder() / "tokenizers"
        self._findings, self._states = folder / f"{name}.json", folder / f"{name}.points"

    def findings(self) -> Findings | None:
        try:
            found = Findings.from_json(orjson.loads(self._findings.read_bytes()))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if found.versions == library_versions() else None

    def keep_findings(self, findings: Findings) -> None:
        _keep(self._findings, orjson.dumps({**asdict(findings), "runs": [[*run] for run in findings.runs]}))

    def states(self) -> States | None:
        """Return the states of code points, uint8 [``CODE_POINTS``]; None if there are none."""
        try:
            found = zlib.decompress(self._states.read_bytes())
        except (OSError, zlib.error):
            return None
        return np.frombuffer(found, np.uint8) if len(found) == CODE_POINTS else None

    def keep_states(self, states: States) -> None:
        """Keep the states of code points, with those that others have kept."""
        known = self.states()
        merged = states if known is None else np.where(states, states, known)
        _keep(self._states, zlib.compress(merged.tobytes(), 1))


def _keep(path: Path, content: bytes) -> None:
    """Write a file in one step, as other processes may do the same."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        Path(file.name).replace(path)


def _load(tokenizer: Tokenizer, fields: Mapping[str, Any]) -> tuple[Encode | None, str]:
    if why := why_not_cut(fields):
        return None, f"tokie is not used: {why}"
    try:
        return _read(tokenizer.file.content), ""
    except (ImportError, OSError) as error:
        return None, f"tokie can't be imported: {error}"
    except Exception as error:  # whatever it raises, there is another way
        return None, f"tokie {version('tokie')} can't load this tokenizer: {error}"


def _read(content: bytes) -> Encode:
    import tokie

    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        file.write(content)
        file.flush()
        fast: Any = tokie.Tokenizer.from_json(file.name)
    fast.no_truncation()
    fast.no_padding()

    def encode(texts: Sequence[str]) -> Flat:
        ids, lengths = fast.encode_batch_flat(list(texts), add_special_tokens=False)
        return ids, lengths.astype(np.int64)

    return encode


def library_versions() -> str:
    """Return the versions that a guard's findings depend on."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("tokie", "tokenizers"))
    return f"{libraries}, Unicode {unicodedata.unidata_version}, guard 6"


def _guard(
    fast: Encode, tokenizer: Tokenizer, fields: dict[str, Any], findings: Findings | None, states: States | None
) -> Guard:
    """Return a guard with ``findings``, or with what it finds if there are none."""
    from tokenizers import decoders

    whole: Pair = (fast, tokenizer.encode_flat)
    vocabulary: dict[str, int] = fields["model"]["vocab"]
    is_bpe = fields["model"]["type"] == "BPE"
    last = [letter for letter, byte in byte_level_alphabet().items() if byte < 0xC0]
    first = [letter for letter, byte in byte_level_alphabet().items() if byte < 0x80 or 0xC2 <= byte < 0xF5]
    # Slow, so it is made at the first character above ASCII.
    strict = functools.cache(functools.partial(_pairs, fields, set(product(last, first)))) if is_bpe else None
    matters = _crossings(vocabulary) if is_bpe else None
    guard = Guard(whole, findings or Findings(library_versions()), strict, matters=matters, states=states)
    if findings is None:
        neighbours = {two for token in vocabulary for two in pairwise(token)} if is_bpe else set()
        ascii_of = {letter: chr(byte) for letter, byte in byte_level_alphabet().items() if byte < 128}
        decode = decoders.ByteLevel().decode
        rows = np.random.default_rng(0).integers(0, tokenizer.vocabulary, (1000, 8))
        guard.explore(
            _pairs(fields, neighbours) if is_bpe else whole,
            neighbours=[(ascii_of[a], ascii_of[b]) for a, b in sorted(neighbours) if a in ascii_of and b in ascii_of],
            tokens=[decode([token]) for token in vocabulary] if neighbours else [],
            added=[token.content for token in tokenizer.backend.get_added_tokens_decoder().values()],
            trials=tokenizer.backend.decode_batch(rows.tolist(), skip_special_tokens=True),
            longest=_PIECE_BYTES,
        )
    return guard


def _crossings(vocabulary: Iterable[str]) -> Callable[[int], bool]:
    """Return whether vocabulary tokens cross the border of a code point, so that splitting there matters."""

    @functools.cache
    def found() -> set[bytes]:
        # Characters, and ends and beginnings of some, in tokens of more than one character.
        byte_of = byte_level_alphabet()
        names = (name for name in vocabulary if not name.isascii() and byte_of.keys() >= set(name))
        tokens = (_CHARACTERS.findall(bytes(byte_of[letter] for letter in name)) for name in names)
        return {piece for pieces in tokens if len(pieces) > 1 for piece in pieces}

    def has(point: int) -> bool:
        data = chr(point).encode()
        return any(data[i:] in found() or data[:i] in found() for i in range(len(data)))

    return has


def _pairs(fields: dict[str, Any], neighbours: set[tuple[str, str]]) -> Pair:
    """Return tokenizers with a BPE model of bytes and byte pairs; their tokens show where a text is split."""
    byte_of = byte_level_alphabet()
    # Nothing is split inside a character; without pairs there, its first and last byte can pair up.
    inside = {(a, b) for a, b in neighbours if byte_of.get(a, 0) >= 0x80 and 0x80 <= byte_of.get(b, 0) < 0xC0}
    pairs = sorted((a, b) for a, b in neighbours - inside if a in byte_of and b in byte_of)
    order = np.random.default_rng(0).permutation(len(pairs))
    tokens = [*byte_of, *("".join(pairs[i]) for i in order)]
    model = {
        "type": "BPE",
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": [" ".join(pairs[i]) for i in order],
    }
    content = orjson.dumps({**fields, "added_tokens": [], "model": model})
    return _read(content), Tokenizer(TokenizerFile("pairs of bytes", content)).encode_flat
