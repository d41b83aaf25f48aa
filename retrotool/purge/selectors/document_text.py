"""Whole documents of a part as one run of tokens and of bytes, which matchers look at block by block.

The text of a block is that of its chunks one behind the other, so a match may lie across the border of two chunks of a
document. It may not lie across two documents: ``documents`` says where each begins. Erased chunks have no bytes.
Purged ones do, as what is purged may still be erased.

With a lossless tokenizer the text is what went in, byte for byte. Otherwise it is **folded**: what the tokenizer
leaves of it, with a single space between two words, and none beside what is neither a letter nor a digit. So
``John.Doe+x@Example.com`` is ``john.doe+x@example.com`` for a tokenizer that loses case, and ``Hello , world`` is
``hello,world``. Patterns are searched in that.

Cost: decoding, 70 to 150 MB/s a core. Memory: tokens and text of a block, some 10 MB, or of its one document.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from retrotool.ranges import expand_ranges
from retrotool.store import parts
from retrotool.store.parts import Chunks
from retrotool.store.store import Store
from retrotool.tokenizers import stored_tokenizer
from retrotool.tokenizers.fold import Folder

Offsets = npt.NDArray[np.int64]

BLOCK_ROWS = 1 << 14
"""Chunks that a block has at least, if its part has as many."""


class Decoder:
    """Decodes chunks of a store, folded if its tokenizer is not lossless. Several threads may use it."""

    def __init__(self, store: Store) -> None:
        self._tokenizer = stored_tokenizer(store)
        self.lossless = self._tokenizer.lossless
        self._folder = None if self.lossless else Folder(self._tokenizer)

    def __call__(self, chunks: Chunks) -> tuple[Offsets, memoryview]:
        """Where the text of each chunk begins and the last ends, int64 [n + 1], and the bytes of all."""
        if self._folder is not None:
            starts, data = self._folder(chunks.tokens, chunks.n_tokens, chunks.index == 0)
        else:
            decoded = self._tokenizer.decode(chunks.tokens, chunks.n_tokens)
            _, offsets, data = decoded.buffers()
            starts = np.frombuffer(offsets, np.int64, len(chunks) + 1, 8 * decoded.offset)
        # An array of nothing has no buffer of bytes.
        return starts - starts[0], memoryview(data or b"")[int(starts[0]) : int(starts[-1])]


@dataclass(frozen=True)
class TextBlock:
    """Whole documents of a part: ``chunks``, of which the first is row ``first`` of the part.

    ``documents`` are the rows of the block at which a document begins, and the number of rows, int64 [m + 1].
    """

    chunks: Chunks
    first: int
    documents: Offsets
    decoder: Decoder

    @property
    def part(self) -> int:
        """Number of the part."""
        return self.chunks.part

    def __len__(self) -> int:
        """Chunks, erased ones too."""
        return len(self.chunks)

    @cached_property
    def _decoded(self) -> tuple[Offsets, memoryview]:
        return self.decoder(self.chunks)

    @property
    def starts(self) -> Offsets:
        """Where in ``text`` each chunk begins, and the last ends, int64 [n + 1]."""
        return self._decoded[0]

    @property
    def text(self) -> memoryview:
        """The text of all chunks, one behind the other, in UTF-8."""
        return self._decoded[1]

    def rows_of(self, begin: Offsets, end: Offsets) -> tuple[Offsets, Offsets]:
        """Return the rows that spans of bytes [begin, end) touch, [h]: (span, row) of each, both int64 [r].

        An empty span touches the chunk that has the byte behind it.
        """
        low = np.searchsorted(self.starts, begin, side="right") - 1
        high = np.searchsorted(self.starts, np.maximum(end - 1, begin), side="right") - 1
        low, high = np.minimum(low, len(self) - 1), np.minimum(high, len(self) - 1)
        count = high - low + 1
        span = np.repeat(np.arange(len(begin)), count)
        row = expand_ranges(low, count)
        full = self.chunks.n_tokens[row] > 0  # what is erased has no bytes, and is touched by none
        return span[full], row[full]


def text_blocks(store: Store, decoder: Decoder, part: int, rows: int = BLOCK_ROWS) -> Iterator[TextBlock]:
    """A part in blocks of whole documents, of at least so many rows each but the last."""
    total = parts.part_entry(store, "chunks", part).rows
    first = parts.read_documents(store, part, ["first_row"])["first_row"].to_numpy().astype(np.int64)
    start = 0
    while start < total:
        after = int(np.searchsorted(first, start + rows))
        stop = int(first[after]) if after < len(first) else total
        groups = range(start // parts.ROW_GROUP, -(-stop // parts.ROW_GROUP))
        read = parts.read_chunks(store, part, list(groups))
        chunks = read.between(start - groups[0] * parts.ROW_GROUP, stop - groups[0] * parts.ROW_GROUP)
        bounds = np.append(first[np.searchsorted(first, start) : after], stop)
        yield TextBlock(chunks, start, bounds - start, decoder)
        start = stop
