"""A loaded tokenizer: encode text, and decode tokens without a Python loop.

Ids are those of the ``tokenizers`` library without special tokens, truncation or padding. Byte-level BPE and
WordPiece decode by an Arrow ``take`` from a table of each token's bytes, about 100 MB/s; the table is checked
against the library when it is built. Other decoders use the library.

``split_texts`` cuts a text around a run of its tokens. A token's text depends on its place, so the text up to
the run's first and last token is decoded as well. A character that is only partly in the run is outside it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from retrotool.errors import UsageError
from retrotool.ranges import Int64s, runs_up_to
from retrotool.store.identity import TokenizerIdentity
from retrotool.tokenizers.cut import cut_texts, why_not_cut

if TYPE_CHECKING:
    import tokenizers

    from retrotool.store.store import Store

_CONTINUATION = "##"
_HELD = 1 << 20
_SURROGATE = re.compile("[\ud800-\udfff]")
_CODE_POINTS = [*range(0x800), *range(0x800, 0xD800, 0x800), *range(0xE000, 0x10FFFF, 0x4000)]
_PROBE = "a  b\n\n \tc " + "".join(map(chr, _CODE_POINTS))  # every byte of UTF-8, white space of all kinds


@dataclass(frozen=True, slots=True)
class TokenizerFile:
    """The bytes of a ``tokenizer.json`` and the name it was requested by."""

    name: str
    content: bytes


class Tokenizer:
    """A loaded tokenizer; ``vocabulary`` is the highest id plus one, ``lossless``: decoding restores text."""

    def __init__(self, file: TokenizerFile) -> None:
        import tokenizers

        try:
            fields = orjson.loads(file.content)
            self.backend = tokenizers.Tokenizer.from_str(file.content.decode())
        except Exception as error:  # the library raises bare Exception
            advice = "A tokenizer is a file tokenizer.json as the `tokenizers` library writes it."
            raise UsageError(f"tokenizer {file.name!r} can't be loaded: {error}", advice) from error
        # Many published files truncate or pad to 128 tokens.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.file = file
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise UsageError(f"tokenizer {file.name!r} can't be loaded: it has no tokens", "Train it first.")
        self.vocabulary = max(vocabulary.values()) + 1
        self._decoder = str((fields.get("decoder") or {}).get("type"))
        self.is_wordpiece = (fields.get("model") or {}).get("type") == "WordPiece"
        self.lossless = self._decoder == "ByteLevel" and fields.get("normalizer") is None
        if self.lossless:
            tokens = self.backend.encode(_PROBE, add_special_tokens=False).ids
            self.lossless = self.backend.decode(tokens, skip_special_tokens=False) == _PROBE
        self._may_cut = not why_not_cut(fields)

    @property
    def identity(self) -> TokenizerIdentity:
        """What a store keeps of it."""
        return TokenizerIdentity.of(self.file.name, self.file.content, self.vocabulary, self.lossless)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, without special tokens."""
        return [encoding.ids for encoding in self._encodings(list(texts))]

    def encode_flat(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], Int64s]:
        """Return all ids, uint32 [tokens], and the number of tokens of each text, int64 [texts]."""
        counts = [1] * len(texts)
        if self._may_cut and any(len(text) > _HELD for text in texts):
            texts, counts = cut_texts(texts, _HELD // 4, _HELD // 2)
        ids = [np.empty(0, np.uint32)]
        for run in runs_up_to(_HELD, texts, len):  # as the library needs over 100 bytes per token
            ids += [np.array(encoding.ids, np.uint32) for encoding in self._encodings(run)]
        lengths = np.array([len(some) for some in ids[1:]], np.int64)
        if len(counts) < len(lengths):
            lengths = np.add.reduceat(lengths, (np.cumsum(counts) - counts).astype(np.intp))
        return np.concatenate(ids), lengths

    def _encodings(self, texts: list[str]) -> list[tokenizers.Encoding]:
        try:
            return self.backend.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError as error:  # raised for text that is not valid UTF-8
            lone = next(filter(None, map(_SURROGATE.search, texts)), None)
            if lone is None:
                raise
            raise UsageError(
                f"text with the surrogate U+{ord(lone[0]):04X} at character {lone.start()} has no UTF-8",
                "Replace it, as text.encode(errors='replace').decode() does.",
            ) from error

    def encode_chunk_text(self, text: str) -> list[int]:
        """Return the token ids of a chunk's text, which may begin inside a word (``##...`` in WordPiece)."""
        if not (self.is_wordpiece and text.startswith(_CONTINUATION)):
            return self.encode_batch([text])[0]
        # Only the first word is normalised here: special tokens such as [UNK] are found before normalising.
        head, space, tail = text.removeprefix(_CONTINUATION).partition(" ")
        normalizer, splitter = self.backend.normalizer, self.backend.pre_tokenizer
        plain = normalizer.normalize_str(head) if normalizer is not None else head
        words = splitter.pre_tokenize_str(plain) if splitter is not None else [(plain, (0, len(plain)))]
        if not words or words[0][1][0] != 0:
            return self.encode_batch([text])[0]
        word, (_, end) = words[0]
        if splitter is not None and len(splitter.pre_tokenize_str("a" + word)) > 1:
            return self.encode_batch([text])[0]  # not the continuation of a word
        pieces: list[int] = []
        while word:
            for length in range(len(word), 0, -1):
                token = self.backend.token_to_id(_CONTINUATION + word[:length])
                if token is not None:
                    pieces.append(token)
                    word = word[length:]
                    break
            else:
                return self.encode_batch([text])[0]
        return pieces + self.encode_batch([plain[end:] + space + tail])[0]

    def special_tokens(self) -> tuple[list[int], list[int]]:
        """Return the ids that the tokenizer's template puts before and after a text, as [CLS] and [SEP]."""
        whole = self.backend.encode("a", add_special_tokens=True).ids
        bare = self.backend.encode("a", add_special_tokens=False).ids
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return whole[:start], whole[start + len(bare) :]
        return [], []

    def decode(self, tokens: npt.NDArray[Any], n_tokens: npt.NDArray[Any]) -> pa.LargeBinaryArray:
        """Return the UTF-8 bytes of rows of ``tokens`` [n, chunk_length], of which ``n_tokens`` [n] count."""
        if self._byte_table is not None:
            return self._join(self._byte_table, tokens, n_tokens)
        rows = [row[:n].tolist() for row, n in zip(tokens, n_tokens, strict=True)]
        texts = self.backend.decode_batch(rows, skip_special_tokens=False)
        return pa.array([text.encode() for text in texts], pa.large_binary())

    def _join(self, table: pa.Array, tokens: npt.NDArray[Any], n_tokens: npt.NDArray[Any]) -> pa.LargeBinaryArray:
        ids = tokens.astype(np.int64)
        if self._decoder == "WordPiece":
            ids[:, :1] += self.vocabulary  # the first token has no space before it
        starts, data = joined_rows(table, ids[np.arange(tokens.shape[1]) < n_tokens[:, None]], n_tokens)
        return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(tokens), [None, pa.py_buffer(starts), data])

    def decode_text(
        self, tokens: npt.NDArray[Any], n_tokens: npt.NDArray[Any], errors: Literal["replace", "ignore"] = "replace"
    ) -> list[str]:
        """Decode as strings; a character that a chunk's border cuts is U+FFFD, or with "ignore" left out."""
        return _as_text(self.decode(tokens, n_tokens), errors)

    @functools.cached_property
    def _byte_table(self) -> pa.Array | None:
        """Bytes of every token [V] (WordPiece: [2V], with and without a space); None: use the library."""
        table = self._spell_tokens()
        if table is None:
            return None
        # It and the library must decode 256 random rows alike.
        rows = np.random.default_rng(0).integers(0, self.vocabulary, (256, 32))
        used = np.fromiter(self.backend.get_vocab(with_added_tokens=True).values(), np.int64)
        rows = rows[np.isin(rows, used).all(axis=1)]
        ours = _as_text(self._join(table, rows, np.full(len(rows), 32)))
        return table if ours == self.backend.decode_batch(rows.tolist(), skip_special_tokens=False) else None

    def names(self) -> list[str]:
        """Return the name of each id in the vocabulary; "" for unused ids."""
        found = [""] * self.vocabulary
        for token, number in self.backend.get_vocab(with_added_tokens=True).items():
            found[number] = token
        return found

    def _spell_tokens(self) -> pa.Array | None:
        tokens = self.names()
        if self._decoder == "ByteLevel":
            added = {token.content for token in self.backend.get_added_tokens_decoder().values()}
            byte_of = byte_level_alphabet()
            try:
                spelled = [t.encode() if t in added else bytes(byte_of[c] for c in t) for t in tokens]
            except KeyError:
                return None
            return pa.array(spelled, pa.large_binary())
        if self._decoder == "WordPiece":
            # Decoding each token separately keeps the decoder's clean-up rules.
            decode = self.backend.decoder.decode
            anchor = decode(["a"])
            later = [decode(["a", token]).removeprefix(anchor) for token in tokens]
            first = [decode([token]) for token in tokens]
            return pa.array([text.encode() for text in (*later, *first)], pa.large_binary())
        return None


def joined_rows(table: pa.Array, ids: npt.NDArray[Any], n_tokens: npt.NDArray[Any]) -> tuple[Int64s, pa.Buffer]:
    """Join ``table`` entries of flat ``ids``; return where rows begin and the last ends [n + 1], and data."""
    pieces = table.take(pa.array(ids))
    offsets = np.frombuffer(pieces.buffers()[1], np.int64, count=len(pieces) + 1, offset=8 * pieces.offset)
    return offsets[np.concatenate([[0], np.cumsum(n_tokens, dtype=np.int64)])], pieces.buffers()[2]


def _as_text(decoded: pa.LargeBinaryArray, errors: str = "replace") -> list[str]:
    return [value.as_py().decode("utf-8", errors) for value in decoded]


@functools.lru_cache(8)
def stored_tokenizer(store: Store) -> Tokenizer:
    """Load the tokenizer of a store."""
    return Tokenizer(TokenizerFile(store.identity.tokenizer.name, store.tokenizer_json()))


def byte_level_alphabet() -> dict[str, int]:
    """Return the byte of each character in a byte-level BPE vocabulary (Radford et al. 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


@dataclass(frozen=True, slots=True)
class Split:
    """A text in three pieces, which may be empty; without a run all of it is ``before``."""

    before: str
    run: str
    after: str


def split_texts(
    tokenizer: Tokenizer, tokens: npt.NDArray[Any], n_tokens: Int64s, start: Int64s, stop: Int64s
) -> list[Split]:
    """Cut the text of rows of ``tokens`` [n, w], of which ``n_tokens`` count, around tokens [start, stop)."""
    whole = tokenizer.decode_text(tokens, n_tokens)
    found = [Split(text, "", "") for text in whole]
    some = np.flatnonzero(start < stop)
    heads = tokenizer.decode_text(tokens[some], start[some])
    tails = tokenizer.decode_text(tokens[some], stop[some])
    for row, head, tail in zip(some.tolist(), heads, tails, strict=True):
        text = whole[row]
        low, inside = _beginning_in(text, head)
        high = max(low + inside, _beginning_in(text, tail)[0])
        found[row] = Split(text[: low + inside], text[low + inside : high], text[high:])
    return found


def _beginning_in(text: str, beginning: str) -> tuple[int, bool]:
    """Return how much of ``beginning`` is in ``text``, and whether it ends inside the next character."""
    if text.startswith(beginning):
        return len(beginning), False
    pairs = enumerate(zip(text, beginning, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(text), len(beginning))), True
