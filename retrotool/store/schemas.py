"""What columns the Parquet files of a store have, and of what types."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

HASH_BYTES = 16

RESERVED_COLUMNS = (
    "id", "key", "text_hash", "source", "first_row", "n_chunks", "n_tokens", "input", "position", "doc", "part",
)  # fmt: skip
"""Names that a kept column can't have."""


def documents_schema(keep: Sequence[str]) -> pa.Schema:
    """Schema of a documents file with the kept columns ``keep``."""
    return pa.schema(
        [
            ("id", pa.string()),
            ("key", pa.binary(HASH_BYTES)),
            ("text_hash", pa.binary(HASH_BYTES)),
            ("source", pa.string()),
            ("first_row", pa.int32()),
            ("n_chunks", pa.int32()),
            ("n_tokens", pa.int64()),
            ("input", pa.string()),
            ("position", pa.int64()),
            *((name, pa.string()) for name in keep),
        ]
    )


TOMBSTONES_SCHEMA = pa.schema([("chunk", pa.int64())])
BLOCKED_SCHEMA = pa.schema([("hash", pa.binary(HASH_BYTES))])
SCANS_SCHEMA = pa.schema(
    [
        ("chunks", pa.int64()),
        ("selectors", pa.int16()),
        ("labels", pa.int32()),
        ("begin", pa.int64()),
        ("end", pa.int64()),
        ("figures", pa.float32()),
    ]
)
QUARANTINE_SCHEMA = pa.schema(
    [
        ("input", pa.string()),
        ("line", pa.int64()),
        ("offset", pa.int64()),
        ("reason", pa.string()),
        ("excerpt", pa.string()),
        ("damage", pa.bool_()),
    ]
)


KEY = pa.field("key", pa.bool_(), nullable=False)


def chunks_schema(chunk_bytes: int, *, key: bool = False) -> pa.Schema:
    """Schema of a chunks file whose tokens take ``chunk_bytes`` bytes a chunk; ``key``: with the optional column."""
    names = ("row", "doc", "index", "n_tokens")
    columns = [*((name, pa.int32()) for name in names), ("tokens", pa.binary(chunk_bytes))]
    return pa.schema([*columns, KEY] if key else columns)


def of_kind(kind: str, chunk_bytes: int) -> pa.Schema:
    """The columns that a file of this kind has at least; none of kinds whose columns differ."""
    known = {
        "documents": documents_schema(()),
        "chunks": chunks_schema(chunk_bytes),
        "quarantine": QUARANTINE_SCHEMA,
        "tombstones": TOMBSTONES_SCHEMA,
        "restored": TOMBSTONES_SCHEMA,
        "scans": SCANS_SCHEMA,
        "blocked": BLOCKED_SCHEMA,
    }
    return known.get(kind, pa.schema([]))
