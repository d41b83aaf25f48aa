"""Count what a store holds by source and by top-level domain, exactly, now and before its purges.

Erased text is not counted, as nothing of it is left, nor are documents that ``chunk`` rejected as repeats.

Cost: sources and URLs of all documents and lengths of all chunks are read; a million URLs take a second.
Memory: those of one part, and less than 1 kB per source.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrotool.store import parts
from retrotool.store.store import Store
from retrotool.store.tombstones import read_rejected, read_tombstones

URL = "url"  # the kept column that domains are taken from
NONE, ADDRESS = "(none)", "(IP address)"
_HOST = r"^\s*(?:[A-Za-z][A-Za-z0-9+.-]*:)?//(?:[^/?#\\]*@)?(?P<host>\[[^\]]*\]|[^/?#\\:\s]*[^/?#\\:\s.])"
_COUNTS = ("documents", "chunks", "tokens", "documents_before", "chunks_before", "tokens_before")


@dataclass(frozen=True, slots=True)
class SourceCount:
    """What is live of a source or domain, and what was before purges."""

    by: str  # source or domain
    name: str  # a domain can also be NONE or ADDRESS
    share: float  # of all live tokens
    documents: int
    chunks: int
    tokens: int
    documents_before: int
    chunks_before: int
    tokens_before: int


@dataclass(frozen=True, slots=True)
class SourceCounts:
    """The sources of a store at a commit, then its domains if it has URLs; the most tokens first."""

    path: str
    commit: int
    counts: tuple[SourceCount, ...]


def count_sources(root: str | Path) -> SourceCounts:
    """Count the documents, chunks and tokens of a store by source and by top-level domain."""
    store = Store.open(root)
    purged, rejected = read_tombstones(store), read_rejected(store)
    sums = dict[tuple[str, str], list[int]]()
    for part in store.state.parts():
        of_part = [parts.part_entry(store, kind, part) for kind in ("documents", "chunks")]
        documents = parts.read_parquet(store, of_part[0], ["source"], optional=[URL])
        chunks = parts.read_parquet(store, of_part[1], ["doc", "n_tokens"])
        doc, n_tokens = (chunks[name].to_numpy() for name in ("doc", "n_tokens"))
        before = n_tokens > 0
        before[rejected.rows(part)] = False
        live = before.copy()
        live[purged.rows(part)] = False
        counts = []
        for some in (live, before):
            of_each = [np.bincount(doc[some], weights, len(documents)) for weights in (None, n_tokens[some])]
            counts += [values.astype(np.int64) for values in (of_each[0] > 0, *of_each)]
        urls = documents[URL] if URL in documents.schema.names else pa.nulls(len(documents), pa.string())
        for by, names in (("source", documents["source"]), ("domain", _domains(urls))):
            table = pa.table([names.fill_null(NONE), *counts], ["name", *_COUNTS]).filter(pc.field("chunks_before") > 0)
            for row in table.group_by("name").aggregate([(name, "sum") for name in _COUNTS]).to_pylist():
                old = sums.get((by, row["name"]), [0] * len(_COUNTS))
                sums[by, row["name"]] = [n + row[f"{name}_sum"] for n, name in zip(old, _COUNTS, strict=True)]
    if {name for by, name in sums if by == "domain"} == {NONE}:
        del sums["domain", NONE]
    tokens = max(sum(values[2] for (by, _), values in sums.items() if by == "source"), 1)
    found = (SourceCount(*key, round(values[2] / tokens, 6), *values) for key, values in sums.items())
    ranked = sorted(found, key=lambda one: (one.by != "source", -one.tokens, one.name))
    return SourceCounts(str(root), store.state.number, tuple(ranked))


def _domains(urls: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    """Return the last label of each URL's host; null without a host."""
    hosts = pc.struct_field(pc.extract_regex(urls, _HOST), "host")
    labels = pc.utf8_lower(pc.replace_substring_regex(hosts, r"^.*\.", ""))
    return pc.if_else(pc.match_substring_regex(hosts, r"^\[|(^|\.)([0-9]+|0[xX].*)$"), ADDRESS, labels)
