"""Blocks of given text, without a store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from retrotool.purge.selectors.selector import Decoder, TextBlock
from retrotool.store.parts import Chunks


@dataclass
class Spelled:
    """Stands for a decoder: gives the text it was made with."""

    texts: list[bytes]
    lossless: bool = True

    def __call__(self, chunks: Chunks) -> tuple[Any, memoryview]:
        return np.cumsum([0, *map(len, self.texts)]), memoryview(b"".join(self.texts))


def block_of(documents: Sequence[Sequence[bytes]], *, lossless: bool = True) -> TextBlock:
    """A block of documents, each given by the texts of its chunks; an empty text is an erased chunk."""
    sizes = [len(document) for document in documents]
    texts = [text for document in documents for text in document]
    doc = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    index = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes] or [np.zeros(0, np.int32)])
    n_tokens = np.array([min(len(text), 64) for text in texts], np.int32)
    chunks = Chunks(0, doc, index, n_tokens, np.zeros((len(texts), 64), np.uint16), np.ones(len(texts), np.bool_))
    decoder = cast(Decoder, Spelled(texts, lossless))
    return TextBlock(chunks, 0, np.cumsum([0, *sizes]), decoder)


def cut(text: bytes, size: int) -> list[bytes]:
    """A text in chunks of so many bytes."""
    return [text[at : at + size] for at in range(0, len(text), size)] or [b""]
