"""Token files of every layout, made by code from its definition, and ways to compare what is read of them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from retrotool.sources import Document

MARK = 9
CODES = {"u1": 1, "i1": 2, "<i2": 3, "<i4": 4, "<i8": 5, "<u2": 8, "<u4": 9, "<u8": 10}

sequences = st.lists(st.integers(0, 8), max_size=5)
corpora = st.lists(st.lists(sequences, max_size=3), max_size=12)
"""Documents of sequences of ids; 9 is left free as a mark."""
blocks = st.sampled_from([8, 16, 64, 1 << 20])
CORPUS = [[[1, 2], [3]], [[4]], [[5, 6]]]


def write_megatron(prefix: Path, corpus: Sequence, dtype: str, modes: bytes | None = None) -> None:
    """The layout of Megatron's index from its definition, one field after the other."""
    flat = [sequence for document in corpus for sequence in document]
    prefix.with_suffix(".bin").write_bytes(b"".join(np.array(s, dtype).tobytes() for s in flat))
    width = np.dtype(dtype).itemsize
    ends = np.cumsum([0, *map(len, corpus)])
    starts = np.cumsum([0, *map(len, flat)])[:-1] * width
    prefix.with_suffix(".idx").write_bytes(
        b"MMIDIDX\0\0"
        + struct.pack("<QBQQ", 1, CODES[dtype], len(flat), len(ends))
        + np.array([len(s) for s in flat], "<i4").tobytes()
        + starts.astype("<i8").tobytes()
        + ends.astype("<i8").tobytes()
        + (modes or b"")
    )


def ids_of(rows) -> list[list[int]]:
    """Ids of each row, [] for one rejected."""
    return [row.tokens.tolist() if isinstance(row, Document) else [] for row in rows]


def comparable(rows) -> list:
    return [
        (row.id, row.tokens.tolist(), row.position, row.source) if isinstance(row, Document) else row.reason
        for row in rows
    ]
