"""RETRO-pytorch's files, read as its RETRODataset does, in plain numpy, and put into words that can be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class RetroFiles:
    """What a training loop gets of an exported folder, told by nothing but the arguments beside it."""

    def __init__(self, folder: Path) -> None:
        told = json.loads((folder / "export.json").read_text())["details"]
        given = self.given = told["arguments"]
        self.length, self.total, self.end = given["chunk_size"], given["num_chunks"], given["eos_id"]
        self.shift = told["token_shift"]
        self.rows_of_sequence = given["seq_len"] // self.length
        padded = self.total + self.rows_of_sequence
        chunks = np.fromfile(folder / given["chunk_memmap_path"], "<i4")
        nearest = np.fromfile(folder / given["chunk_nn_memmap_path"], "<i4")
        self.chunks = chunks.reshape(padded, self.length + 1)
        self.nearest = nearest.reshape(padded, given["num_neighbors"])
        self.starts = np.fromfile(folder / given["seq_memmap_path"], "<i4")
        assert len(self.starts) == given["num_sequences"]
        self.documents = np.fromfile(folder / "doc_ids.dat", "<i4")
        self.ids = np.load(folder / "chunk_ids.npy")
        assert len(self.documents) == len(self.ids) == self.total

    def sequence(self, number: int) -> list[int]:
        """The tokens [seq_len + 1] of a sequence: of its rows, and the one that follows; nothing after an end token."""
        start = int(self.starts[number])
        rows = self.chunks[start : start + self.rows_of_sequence]
        tokens = [int(token) for row in rows for token in row[:-1]] + [int(rows[-1][-1])]
        assert len(tokens) == self.given["seq_len"] + 1
        stop = tokens.index(self.end) + 1 if self.end in tokens else len(tokens)
        return tokens[:stop] + [0] * (len(tokens) - stop)

    def retrieved(self, row: int) -> list[tuple[int, list[int], list[int]]]:
        """(row, N, F) of each neighbour of a row, as they stand there; all zero where there is none."""
        found = []
        for near in self.nearest[row].tolist():
            if near == -1:
                found.append((-1, [0] * self.length, [0] * self.length))
                continue
            chunk = self.chunks[near].tolist()
            following = self.chunks[min(near + 1, self.total - 1)].tolist()
            # The only border between documents that the reader knows is the end token, in any of the columns.
            continued = [0] * self.length if self.end in chunk else following[:-1]
            found.append((near, chunk[:-1], continued))
        return found

    def as_row(self, tokens: list[int], *, ends: bool) -> list[int]:
        """The tokens of a chunk of the store as they should stand in a row without its last column."""
        row = [token + self.shift for token in tokens] + ([self.end] if ends else [])
        return (row + [0] * self.length)[: self.length]
