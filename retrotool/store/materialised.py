"""Materialised neighbours: for every row of a part, the tokens of its nearest neighbours and of what follows them.

Row i belongs to row i of chunks, as in neighbour tables. What a training loop needs is then read in one piece, in the
order of the training text, from one file. Cost: 1 µs a row of two neighbours, 0.25 KB of disk for uint16 tokens, 60 %
of that with zstd. A file is a copy: what was purged since it was made is for the reader to leave out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrotool.errors import CorruptError
from retrotool.store import parts
from retrotool.store.atomic import FileEntry
from retrotool.store.paths import FileName
from retrotool.store.store import Store

ERASED = -2
"""In place of the id of a neighbour that was erased; ``tables.NO_NEIGHBOUR``, −1: there is none."""


@dataclass(frozen=True, slots=True)
class Materialised:
    """The k neighbours of n chunks with their continuations, [N, F].

    ``ids`` int64 [n, k] (−1: none, −2: erased) and ``databases`` uint8 [n, k], which of the databases each is of;
    ``n_tokens`` int32 [n, k, 2] of N and F, 0: none; ``tokens`` [n, k, 2, chunk_length], zero-padded.
    """

    ids: npt.NDArray[np.int64]
    databases: npt.NDArray[np.uint8]
    n_tokens: npt.NDArray[np.int32]
    tokens: npt.NDArray[Any]

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.ids)

    def rows(self, some: slice) -> Materialised:
        """Some of the rows, without a copy."""
        return Materialised(self.ids[some], self.databases[some], self.n_tokens[some], self.tokens[some])

    def nearest(self, k: int) -> Materialised:
        """The first k neighbours of each row, without a copy."""
        return Materialised(self.ids[:, :k], self.databases[:, :k], self.n_tokens[:, :k], self.tokens[:, :k])


def schema(k: int, chunk_bytes: int) -> pa.Schema:
    """Schema of a file with k neighbours, of chunks that take ``chunk_bytes`` bytes."""
    return pa.schema(
        [
            ("ids", pa.list_(pa.int64(), k)),
            ("databases", pa.list_(pa.uint8(), k)),
            ("n_tokens", pa.list_(pa.int32(), 2 * k)),
            ("tokens", pa.binary(2 * k * chunk_bytes)),
        ]
    )


def write_materialised(
    root: Path, name: FileName, k: int, chunk_bytes: int, groups: Iterable[Materialised], *, about: dict[str, Any]
) -> FileEntry:
    """Write a part's file from its row groups, one after the other."""
    form = schema(k, chunk_bytes)

    def tables() -> Iterable[pa.Table]:
        for group in groups:
            n = len(group)
            lists = [
                pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), width)
                for values, width in ((group.ids, k), (group.databases, k), (group.n_tokens, 2 * k))
            ]
            yield pa.table([*lists, parts.fixed_binary(group.tokens.reshape(n, -1))], schema=form)

    written = parts.write_batches(root, name, form, tables(), row_group=parts.ROW_GROUP)
    return replace(written, about=about)


def read_materialised(
    store: Store, entry: FileEntry, row_groups: Sequence[int] | None = None, *, tokens: bool = True
) -> Materialised:
    """Read a part's file, or some row groups of it, as it is stored; without ``tokens`` these are [n, k, 2, 0]."""
    own = store.identity
    k = int((entry.about or {}).get("k", 0))
    form = schema(k, own.chunk_length * own.tokenizer.token_bytes)
    columns = form.names if tokens else form.names[:-1]
    table = parts.read_parquet(store, entry, columns, row_groups)
    if any(table.schema.field(column).type != form.field(column).type for column in columns):
        raise CorruptError(f"{store.root / entry.path} does not hold {k} neighbours a row, as the log says")
    n = table.num_rows
    try:
        ids, databases, n_tokens = (
            np.concatenate([np.zeros(0, dtype), *(chunk.flatten().to_numpy() for chunk in table[column].chunks)])
            for column, dtype in (("ids", np.int64), ("databases", np.uint8), ("n_tokens", np.int32))
        )
        shaped = ids.reshape(n, k), databases.reshape(n, k), n_tokens.reshape(n, k, 2)
    except (pa.ArrowInvalid, ValueError) as error:  # numpy has no nulls, and those of lists are left out
        raise CorruptError(f"{store.root / entry.path} has nulls: {error}") from error
    if not tokens:
        return Materialised(*shaped, np.zeros((n, k, 2, 0), parts.token_dtype(own.tokenizer.token_bytes)))
    found = parts.from_fixed_binary(table["tokens"], parts.token_dtype(own.tokenizer.token_bytes))
    return Materialised(*shaped, found.reshape(n, k, 2, own.chunk_length))
