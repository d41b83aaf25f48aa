"""A loaded encoder: token ids in, float16 vectors out, on one device.

The BERT family runs through the packed forward, other models through ``transformers``; ``verify`` compares
them. Rows of token ids are in one flat array, cut into batches (about 20 million tokens per second and core).
Batches are prepared in a thread and several are in flight, so that reading, tokenising, copying, computing
and writing overlap. When memory runs out, batches are halved.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from retrotool.encoder import devices
from retrotool.encoder.encoder_identity import find_encoder, json_object
from retrotool.errors import NotFiniteError, UsageError
from retrotool.lazy import torch
from retrotool.machine import give_memory_back
from retrotool.ranges import Int64s, expand_ranges
from retrotool.read_ahead import ahead
from retrotool.tokenizers import FastTokenizer, Tokenizer, find_tokenizer


@dataclass(frozen=True, slots=True)
class Rows:
    """``ids`` int32 [tokens] of all rows, concatenated; ``lengths`` int64 [n]."""

    ids: npt.NDArray[np.int32]
    lengths: Int64s

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Rows:
        """Convert lists, one per row."""
        ids = np.fromiter(chain.from_iterable(rows), np.int32)
        return cls(ids, np.fromiter(map(len, rows), np.int64, len(rows)))

    @classmethod
    def of_matrix(cls, tokens: npt.NDArray[Any], n_tokens: npt.NDArray[Any]) -> Rows:
        """Convert ``tokens`` [n, length], of which the first ``n_tokens`` [n] count."""
        used = np.arange(tokens.shape[1]) < n_tokens[:, None]
        return cls(tokens[used].astype(np.int32), n_tokens.astype(np.int64))

    @property
    def starts(self) -> Int64s:
        """Start of each row in ``ids``, int64 [n]."""
        return np.asarray(np.cumsum(self.lengths) - self.lengths)

    def take(self, which: Int64s) -> Rows:
        """Return some rows, in the order given."""
        lengths = self.lengths[which]
        return Rows(self.ids[expand_ranges(self.starts[which], lengths)], lengths)

    def framed(self, before: Sequence[int], after: Sequence[int], longest: int) -> Rows:
        """Return the rows with special tokens around them, truncated to ``longest`` tokens in all."""
        kept = np.minimum(self.lengths, max(longest - len(before) - len(after), 0))
        lengths = kept + len(before) + len(after)
        starts = np.cumsum(lengths) - lengths
        ids = np.empty(int(lengths.sum()), np.int32)
        ids[expand_ranges(starts + len(before), kept)] = self.ids[expand_ranges(self.starts, kept)]
        ids[starts[:, None] + np.arange(len(before))] = before
        ids[(starts + len(before) + kept)[:, None] + np.arange(len(after))] = after
        return Rows(ids, lengths)


def check_vocabulary(what: str, ids: npt.NDArray[Any], vocabulary: int | None) -> None:
    """Raise ``UsageError`` for a token id outside the vocabulary, which would crash a GPU."""
    highest = int(ids.max(initial=0))
    if vocabulary is not None and highest >= vocabulary:
        raise UsageError(
            f"{what}: its tokenizer returned token {highest}, but the vocabulary of its model has {vocabulary:,}",
            "Use the tokenizer.json that belongs to the model.",
        )


def batches(lengths: Int64s, tokens: int, *, most_rows: int, padded: bool) -> list[Int64s]:
    """Return the row indices of each batch, longest rows first; empty rows are omitted.

    A batch has up to ``most_rows`` rows and ``tokens`` tokens (``padded``: with padding), but at least a row.
    """
    order = np.argsort(-lengths, kind="stable")[: int((lengths > 0).sum())]
    ends = np.cumsum(lengths[order])
    found = []
    start = 0
    while start < len(order):
        if padded:
            stop = start + tokens // int(lengths[order[start]])
        else:
            before = int(ends[start - 1]) if start else 0
            stop = int(np.searchsorted(ends, before + tokens, "right"))
        stop = max(start + 1, min(stop, start + most_rows, len(order)))
        found.append(order[start:stop])
        start = stop
    return found


if TYPE_CHECKING:
    from retrotool.encoder.forwards import Forward, Handle, Ready

Vectors = npt.NDArray[np.float16]

LEAST_COSINE = {"float32": 0.99999, "float16": 0.9995, "bfloat16": 0.998}  # with the true vector
_LEAST_TOKENS = 256  # smallest batch after halving
_SHORTEST = 16  # mean row length of a full batch at least: a GPU runs at most 65,535 rows at a time
_PROBES = (  # texts for ``verify`` without a sample
    "The store is a directory with one commit log; a reader sees one commit.",
    "def spread(starts, lengths): return np.arange(total) + np.repeat(starts - ends + lengths, lengths)",
    "Le vent se lève, il faut tenter de vivre.",
    "1 + 1 = 2",
    "a",
    " ".join(f"word {i} of a text that is longer than the others" for i in range(12)),
)


@dataclass(slots=True)
class _Batch:
    """Framed rows of a block, longest first; ``first``: rows in earlier blocks; ``ready`` None: its end.

    ``progress``: rows to report, by the batch's share of the block's tokens, as the longest come first.
    """

    vectors: Vectors
    first: int
    which: npt.NDArray[np.int64]
    rows: Rows
    ready: Ready | None
    progress: int


def say(message: str) -> None:
    """Print a message to stderr, above a progress bar."""
    tqdm.write(f"retrotool: {message}", file=sys.stderr)


def cosines(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the cosine of each row of ``a`` [n, d] with that of ``b``, float64 [n]; 1 for two zero rows."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = (a * b).sum(1) / np.where(lengths > 0, lengths, 1.0)
    return np.asarray(np.where((a == b).all(axis=1), 1.0, cosine))


class Encoder:
    """A loaded encoder on a device; ``forward`` is "packed" or "transformers".

    Since it was verified, it has computed ``tokens``, special ones included, in ``seconds`` of the device.
    """

    def __init__(
        self,
        spec: str,
        device: str = "auto",
        dtype: str = "auto",
        *,
        pooling: str = "auto",
        name: str | None = None,
        dimension: int | None = None,
        batch_tokens: int | None = None,
        forward: str = "auto",
        say: Callable[[str], object] = say,
    ) -> None:
        path, self.identity = find_encoder(spec, pooling=pooling, name=name, dimension=dimension)
        devices.check_device(device, dtype)
        self.device = devices.pick_device(device)
        self.dtype, self._asked = devices.pick_dtype(self.device, dtype), dtype
        self.batch_tokens = batch_tokens or devices.BATCH_TOKENS[self.device.split(":")[0]]
        self.tokens, self.seconds = 0, 0.0
        self.cosine: float | None = None  # the least with ``transformers`` in float32, set by ``verify``
        self._spec, self._path, self.say = spec, path, say
        self.tokenizer = Tokenizer(find_tokenizer(str(path)))
        self.fast: FastTokenizer | None = None  # for very many texts: testing it takes seconds
        try:
            self._before, self._after = self.tokenizer.special_tokens()
        except Exception as error:  # the library raises plain exceptions
            raise UsageError(f"encoder {spec!r}: its tokenizer fails: {error}", "Repair tokenizer.json.") from error
        self._vocabulary = json_object(path / "config.json").get("vocab_size")
        self._load(forward)

    def _load(self, way: str) -> None:
        from retrotool.encoder.forwards import CpuRunner, CudaRunner, PackedForward, PaddedForward, Runner
        from retrotool.encoder.packed import NotPackedError

        loaded: Forward | None = None
        self.forward, self.why = "packed", ""
        if way != "transformers":
            try:
                loaded = PackedForward(self._path, self.identity, self.device, self.dtype, self.say)
            except NotPackedError as reason:
                if way == "packed":
                    raise UsageError(f"encoder {self._spec!r} has no packed forward: {reason}") from reason
                self.why = str(reason)
            except Exception as error:  # safetensors raises errors of its parts
                why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                raise UsageError(f"encoder {self._spec!r} can't be loaded: {why}") from error
        if loaded is None:
            self.forward = "transformers"
            loaded = PaddedForward(self._spec, self._path, self.identity, self.device, self.dtype)
        # The weights were hashed before they were read; make sure they did not change in between.
        again = find_encoder(self._spec, **self.identity.settings)[1]
        if again.sha256 != self.identity.sha256:
            raise UsageError(f"encoder {self._spec!r} was changed while it was loaded", "Run the same command again.")
        self._loaded = loaded
        self._runner: Runner = CpuRunner(loaded) if self.device == "cpu" else CudaRunner(loaded, self.device)

    @property
    def gelu(self) -> str:
        """The form of GELU computed in place of the model's exact one: "tanh", or "" for none."""
        return self._loaded.gelu

    @property
    def device_name(self) -> str:
        """The device: "cpu", or the name of the GPU."""
        return torch.cuda.get_device_name(self.device) if self.device != "cpu" else self.device

    def tokenize(self, texts: Sequence[str], prompt: str | None = None) -> Rows:
        """Return plain tokens of texts after ``prompt`` (None: that of chunks); raises ``TokensDiffer``."""
        prompt = self.identity.prompt if prompt is None else prompt
        texts = [prompt + text for text in texts] if prompt else texts
        texts = [text.lower() for text in texts] if self.identity.lower else texts
        ids, lengths = (self.fast or self.tokenizer).encode_flat(texts)
        return Rows(ids.astype(np.int32), lengths)

    def tokenize_query(self, text: str) -> Rows:
        """Tokenise a single text that may be a chunk as displayed, beginning inside a word."""
        if self.identity.query_prompt or self.identity.lower:
            return self.tokenize([text], self.identity.query_prompt)
        return Rows.of([self.tokenizer.encode_chunk_text(text)])

    def verify(self, sample: Rows | None = None) -> None:
        """Compare the vectors of ``sample``, or of built-in texts, with ``transformers`` in float32.

        If the cosine is too low, ``transformers`` replaces a packed forward that is wrong in float32, and
        float32 an automatic type; a requested type is kept. Before that, exact GELU replaces the tanh form
        that a GPU computes. A message reports each case.
        """
        rows = sample if sample is not None and len(sample) else self.tokenize(_PROBES)
        if self.forward == "transformers" and self.dtype == "float32":
            self.cosine = 1.0
            return
        true = self._other("transformers").embed(rows)
        self.cosine = self._cosine(rows, true)
        if self.cosine < LEAST_COSINE[self.dtype] and self.gelu:
            why = f"{self.gelu} GELU gave a cosine of {self.cosine:.5f}"
            self.say(f"{why}: exact GELU is used instead, which is slower")
            self._loaded.use_exact_gelu()
            self.cosine = self._cosine(rows, true)
        if self.cosine < LEAST_COSINE[self.dtype] and self.forward == "packed" and not self._is_right(rows, true):
            why = f"the packed forward gave a cosine of {self.cosine:.5f}"
            self.say(f"{why}: transformers is used instead")
            self._load_again("transformers", why, rows, true)
        if self.cosine < LEAST_COSINE[self.dtype]:
            why = f"{self.dtype} gave a cosine of {self.cosine:.5f}"
            if self._asked == "auto":
                self.say(f"{why}: float32 is used instead, which is slower")
                self.dtype = "float32"
                self._load_again(self.forward, why, rows, true)
            else:
                self.say(f"{why}; use --dtype float32 for exact vectors")
        self.tokens, self.seconds = 0, 0.0

    def _is_right(self, rows: Rows, true: Vectors) -> bool:
        return self.dtype != "float32" and self._other("packed")._cosine(rows, true) > LEAST_COSINE["float32"]

    def _other(self, forward: str) -> Encoder:
        settings = self.identity.settings
        other = Encoder(self._spec, self.device, "float32", forward=forward, say=self.say, **settings)
        if other.identity.sha256 != self.identity.sha256:
            raise UsageError(f"encoder {self._spec!r} was changed since it was loaded", "Run the same command again.")
        return other

    def _load_again(self, way: str, why: str, rows: Rows, true: Vectors) -> None:
        self.close()
        del self._loaded, self._runner  # two models may be more than the device holds
        self._load(way)
        self.why = why
        self.cosine = self._cosine(rows, true)

    def _cosine(self, rows: Rows, true: Vectors) -> float:
        """Return the least cosine with true vectors, −1 if not finite; rows are repeated to fill a batch."""
        tokens = len(rows.framed(self._before, self._after, self.identity.max_tokens).ids)
        least = self.batch_tokens // 2 + 1 if self._loaded.constant else 1  # smaller batches are not filled up
        copies = -(-least // max(tokens, 1))
        which = np.tile(np.arange(len(rows)), copies)
        try:
            return round(float(cosines(self.embed(rows.take(which)), true[which]).min()), 6)
        except NotFiniteError:
            return -1.0

    def embed(self, rows: Rows | Sequence[Sequence[int]], report: Callable[[int], object] = lambda _: None) -> Vectors:
        """Embed rows of the encoder's token ids, without special tokens, as float16 [n, dimension].

        Empty rows become the special tokens alone (zeros without any); long rows are truncated. Raises
        ``NotFiniteError`` for vectors that exceed float16, ``AbortError`` if the device is lost.
        """
        block = rows if isinstance(rows, Rows) else Rows.of(rows)
        return next(self.vectors([block], report))

    def vectors(self, blocks: Iterable[Rows], report: Callable[[int], object] = lambda _: None) -> Iterator[Vectors]:
        """Yield the vectors of each block, as ``embed`` does; blocks are read ahead in other threads."""
        flying: deque[tuple[_Batch, Handle | None]] = deque()
        with (
            devices.checking_device(self.device),
            closing(ahead(blocks, 1)) as made,
            closing(ahead(self._batches(made), 2)) as batched,
        ):
            for batch in batched:
                flying.append((batch, None if batch.ready is None else self._runner.submit(batch.ready)))
                while len(flying) > self._runner.depth:
                    yield from self._land(*flying.popleft(), report)
            while flying:
                yield from self._land(*flying.popleft(), report)

    @contextmanager
    def stream(
        self, blocks: Iterable[Rows], report: Callable[[int], object] = lambda _: None
    ) -> Iterator[Iterator[Vectors]]:
        """Yield ``vectors`` computed ahead in a thread; on exit batches in flight finish, others don't."""
        left = threading.Event()

        def progress(rows: int) -> None:
            if left.is_set():
                raise CancelledError
            report(rows)

        with closing(ahead(self.vectors(blocks, progress), 1)) as coming:
            try:
                yield coming
            finally:
                left.set()

    def _batches(self, blocks: Iterable[Rows]) -> Iterator[_Batch]:
        first = 0
        for rows in blocks:
            vectors = np.zeros((len(rows), self.identity.dimension), np.float16)
            framed = rows.framed(self._before, self._after, self.identity.max_tokens)
            check_vocabulary(f"encoder {self._spec!r}", framed.ids, self._vocabulary)
            done = shown = 0
            tokens, left = self.batch_tokens, deque(self._cut(framed.lengths, self.batch_tokens))
            while left:
                if self.batch_tokens < tokens:  # memory ran out since the last batch
                    tokens, rest = self.batch_tokens, np.concatenate(left)
                    left = deque(rest[which] for which in self._cut(framed.lengths[rest], tokens))
                some = framed.take(which := left.popleft())
                done += len(some.ids)
                before, shown = shown, len(rows) * done // len(framed.ids)
                yield _Batch(vectors, first, which, some, self._runner.ready(some, tokens), shown - before)
            empty = np.flatnonzero(framed.lengths == 0)
            yield _Batch(vectors, first, empty, framed, None, len(rows) - shown)
            first += len(rows)

    def _cut(self, lengths: npt.NDArray[np.int64], tokens: int) -> list[npt.NDArray[np.int64]]:
        most = max(1, tokens // _SHORTEST) if self._loaded.constant else sys.maxsize  # in a constant shape
        return batches(lengths, tokens, most_rows=most, padded=self._loaded.padded)

    def _land(self, batch: _Batch, handle: Handle | None, report: Callable[[int], object]) -> Iterator[Vectors]:
        if handle is None:
            report(batch.progress)
            yield batch.vectors
            return
        vectors, finite = self._result(batch.rows, handle)
        if not finite:
            row = batch.first + int(batch.which[np.argmin(np.isfinite(vectors).all(axis=1))])
            raise NotFiniteError(f"encoder {self.identity.name}: row {row} gives NaN or infinity", row)
        batch.vectors[batch.which] = vectors
        self.tokens += len(batch.rows.ids)
        report(batch.progress)

    def _result(self, rows: Rows, handle: Handle) -> tuple[Vectors, bool]:
        """Return a batch's vectors, and if all are finite; out of memory, split it and halve later ones."""
        try:
            vectors, finite, seconds = handle()
            self.seconds += seconds
            return vectors, finite
        except Exception as error:
            what = f"encoder {self.identity.name}"
            devices.check_divisible(error, what, self.device, len(rows), len(rows.ids))
        give_memory_back()
        if _LEAST_TOKENS < len(rows.ids) <= self.batch_tokens:  # not cut before the last halving, nor small
            while self.batch_tokens >= len(rows.ids):
                self.batch_tokens = max(self.batch_tokens // 2, _LEAST_TOKENS)
            self.say(f"{self.device} is out of memory: continuing with {self.batch_tokens:,} tokens per batch")
        tokens = min(self.batch_tokens, max(1, len(rows.ids) // 2))
        pieces = [rows.take(which) for which in self._cut(rows.lengths, tokens)]
        handles = (self._runner.submit(self._runner.ready(some, self.batch_tokens)) for some in pieces)
        halves = [self._result(some, handle) for some, handle in zip(pieces, handles, strict=True)]
        return np.concatenate([vectors for vectors, _ in halves]), all(finite for _, finite in halves)

    def close(self) -> None:
        """Release the device."""
        self._runner.close()
