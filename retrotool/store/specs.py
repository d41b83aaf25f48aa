"""Specs (``retrotool.store.schema``) of the JSON in a store: only the fields that are read.

``docs/format.md`` explains the fields. The specs of plans, inputs and recall files are where these are read.
"""

from __future__ import annotations

import re
from typing import Any

from retrotool.store.paths import DATA_KINDS, NAME, NAMED_KINDS, PART_KINDS, PATH, UNNUMBERED_KINDS
from retrotool.store.schema import Keyed, Maybe, Spec

COUNT, PART, INT64 = range(1 << 53), range(1 << 31), range(-(1 << 63), 1 << 63)
_AMOUNT = range(-(1 << 53), 1 << 53)  # of counts that are added to
HEX64, RUN = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{8}")
PLACE = re.compile(r"[^\0]+")  # a path of the file system, or a URI
_K = range(1, 1001)
_DIMENSION = range(1, 1 << 20)
_SLOT = re.compile("[0-9]{6}|[1-9][0-9]{6,8}|1[0-9]{9}")  # of a part: its number, below 2^31
_SPANS = [(PART, PART)]
_TIME = re.compile(r"[0-9]{4}(-[0-9]{2}){2}T[0-9]{2}(:[0-9]{2}){2}(\.[0-9]+)?Z")
_TOKEN = r"[0-9a-f]{16,32}\.[a-z0-9]{1,16}"  # noqa: S105
_ANYTHING: dict[Any, Spec] = {}

# Records, by their keys.

_COUNTS = dict.fromkeys(("documents", "chunks", "tokens", "rejected"), _AMOUNT)
_PLAN = {
    **_COUNTS, "parts": PART, "units": COUNT, "done": COUNT, "finished": bool, "order": COUNT,
    "purged?": {NAME: _AMOUNT}, "duplicates?": str, "existing?": str,
    **dict.fromkeys(("blocked?", "damaged?", "known_documents?", "keys_cut?", "compared?", "exact?"), _AMOUNT),
    **dict.fromkeys(("duplicates_by_id?", "duplicates_by_text?", "replaced?", "removed?", "differing?"), _AMOUNT),
}  # fmt: skip
_FINDINGS = {
    "versions": str, "substrings": [str], "runs?": [(str, str, range(1, 1 << 16), str)], "frames": (str, str),
    "why": str,
}  # fmt: skip
_ENCODER = {
    "origin": PLACE, "sha256": str, "pooling": str, "dimension": _DIMENSION, "tokenizer?": str,
    **dict.fromkeys(("overridden?", "truncated?", "foreign?"), bool),
}  # fmt: skip
_INDEX = {
    "encoder": NAME, "factory": str, "target_met?": bool,
    **dict.fromkeys(("kind?", "why?", "files?", "retrain_reason?"), str),
    **dict.fromkeys(("nlist?", "bytes_per_vector?", "trained_bytes?", "vectors?", "queries?"), COUNT),
    **dict.fromkeys(("generation?", "nprobe?", "depth?"), PART),
    **dict.fromkeys(("target?", "recall_at_1?", "recall_at_10?", "recall_at_100?", "recall_error?"), float),
    **dict.fromkeys(("share?", "rate?", "imbalance?"), float),
}  # fmt: skip
_FILTERS = {"max_overlap?": float, "near_copies?": bool, "exclude_sources?": [str], "only_sources?": [str]}
_RERANK = frozenset(("overlap",))
_TABLE = {
    "database": str, "uri": PLACE, "within": bool, "index": str, "encoder": str, "saved": _K, "k": _K,
    "filters?": _FILTERS, "text?": bool, "rerank?": _RERANK,
}  # fmt: skip
_MIXTURE = {"mix": [{"table": NAME, "weight": float}]}
_DEPENDENT = {
    "uri": PLACE, "uuid": str, "table": NAME, "since": str,
    "again": {"index": str, "encoder?": str, "k": _K, "saved": _K},
}  # fmt: skip
_PURGE = {
    "commit": COUNT, "erased": bool, "plan?": NAME, **dict.fromkeys(("selector", "hash", "reason", "who"), str),
    **dict.fromkeys(("documents", "chunks", "tokens"), COUNT),
}  # fmt: skip
_RESTORED = {
    **_PURGE, "undone": COUNT, "undone_by": str, "undone_reason": str, "parts": _SPANS, "repeats": COUNT,
}  # fmt: skip


def _with(field: str, there: Spec, else_: Spec) -> Spec:
    """Choose between two specs: ``there`` for objects with the field, ``else_`` for others."""
    return lambda value: there if type(value) is dict and field in value else else_


_RECORDS: dict[str, Spec] = {
    "totals": _COUNTS, "parts": PART, "pending": PART, "plan:": _PLAN, "guard": _FINDINGS,
    "fenced:": {"commit": COUNT, "staged": [str]}, "encoder:": _ENCODER, "fidelity:": {"recall_at_10": float},
    "index:": _INDEX, "default_index": NAME, "neighbours:": _with("mix", _MIXTURE, _TABLE), "dependent:": _DEPENDENT,
    "purge:": _with("undone", _RESTORED, _PURGE),
}  # fmt: skip
_NAMES = re.compile(rf"[a-z_]+(:{NAME.pattern}){{0,3}}")
RECORDS = Keyed(_RECORDS, _NAMES)

# Files, by their kinds; those of an index also by what their slots begin with.

_ABOUT: dict[str, Spec] = {
    "chunks": Maybe({"keys?": PART}),
    "embeddings": Maybe({"cosine?": float, "from?": str, "parts?": _SPANS}),
    "neighbours": {
        "version": str, "index": str, "encoder": str, "commit": COUNT, "head": str, "purges": str, "searched": _SPANS,
        "probed?": PART, "erased?": str, "undone?": str, "k?": _K, "text?": _K, "filters?": _FILTERS,
        "rerank?": _RERANK,
    },
    "scans": {"reads": [PATH], "names": [[str]]},
    "edits": {"rows": COUNT, "bans": COUNT},
    "routes": {
        "plan": str, "asked?": [COUNT], "parts?": [PART], "tiles?": COUNT, "of?": str, "encoder?": str,
        "asking?": _SPANS, "searched?": _SPANS, "commit?": COUNT, "head?": str, "probed?": PART,
    },
    "tombstones": Maybe({"within?": [(INT64, INT64)]}),
    "trained": {
        **dict.fromkeys(("encoder", "factory", "why"), str), "dimension": _DIMENSION, "vectors": COUNT, "held?": COUNT,
        "trained_parts": _SPANS, "shard_rows": range(1, 1 << 53), "sample": COUNT, "seed": INT64,
        **dict.fromkeys(("error", "code_error", "imbalance"), float),
        "asked": {"memory?": COUNT, "nlist?": PART, "code?": str, "factory?": str, "shard_rows?": COUNT},
    },
    "shard": Maybe({"parts?": [PART], "fit?": [(float, float, float)], "imbalance?": float}),
}  # fmt: skip


def _file_of(kind: str) -> dict[str, Spec]:
    about = _ABOUT.get(kind, Maybe(_ANYTHING))
    slot, rows = (_SLOT, PART) if kind in PART_KINDS else (NAME, COUNT)
    needed = "about?" if isinstance(about, Maybe) else "about"
    return {"path": PATH, "slot": slot, "rows": rows, "bytes": COUNT, "sha256": HEX64, needed: about}


_FILES = {kind: _file_of(kind) for kind in (*DATA_KINDS, "trained", "shard")}


def _file(value: Any) -> Spec:
    """Return the spec of a file in a commit. If its name has a slot, its slot must be the same."""
    path, slot = (value.get("path"), value.get("slot")) if type(value) is dict else (None, None)
    if type(path) is not str or type(slot) is not str or not PATH.fullmatch(path):
        return _FILES["inputs"]  # does not fit, whichever spec is used
    kind, begins = path.partition("/")[0], slot.partition("-")[0].partition(".")[0]
    spec = _FILES[begins if kind == "index" and begins in ("trained", "shard") else kind]
    own = path.rpartition("/")[2].rpartition("-")[0]
    return spec if own in ("", slot) else {**spec, "slot": frozenset((own,))}


def _unnumbered(kind: str) -> dict[str, Spec]:
    return {**_FILES[kind], "path": re.compile(f"{kind}/{_TOKEN}"), "slot": frozenset(("",))}


def _columns(kind: str) -> Spec:
    """Return the spec of a group in a checkpoint: kind, name, and files in columns."""
    spec = _FILES[kind]
    file = re.compile(_TOKEN if kind in UNNUMBERED_KINDS else f"{NAME.pattern}-{_TOKEN}")
    columns = {"slot": spec["slot"], "file": file, "rows": spec["rows"], "bytes": COUNT, "sha256": str}
    columns["about"] = spec.get("about?", spec.get("about"))
    name = NAME if kind in NAMED_KINDS else frozenset(("",))
    return frozenset((kind,)), name, {column: [one] for column, one in columns.items()}


_GROUPS = {kind: _columns(kind) for kind in DATA_KINDS}


def _group(value: Any) -> Spec:
    kind = value[0] if type(value) is list and value else None
    return _GROUPS.get(kind, (frozenset(DATA_KINDS), str, _ANYTHING)) if type(kind) is str else (str, str, _ANYTHING)


# Whole files.

_CHANGE = {"kind": str, "settings": _ANYTHING, "reads": [PATH], "add": [_file], "remove": [PATH]}
COMMIT = {
    **_CHANGE, "number": COUNT, "uuid": str, "parent": HEX64, "time": _TIME, "tool": str,
    "records": Keyed({key: Maybe(spec) for key, spec in _RECORDS.items()}, _NAMES),
}  # fmt: skip
STAGED = {
    **_CHANGE, "run": RUN, "records": RECORDS, "piece?": Maybe((PART, PART)),
    "unit": Maybe(
        {
            "plan": NAME, "index": COUNT, "parts": [tuple(map(_unnumbered, UNNUMBERED_KINDS))],
            "quarantine": Maybe(_FILES["quarantine"]), "seen?": Maybe(_FILES["seen"]), "counts": {NAME: COUNT},
            "blocked": Maybe([NAME]),
        }
    ),
}  # fmt: skip
FILES = [_file]
CHECKPOINT_HEADER = {"commit": COUNT, "head": HEX64, "sha256": HEX64}
CHECKPOINT = {"groups": [_group], "records": RECORDS}
LEASE = {"host": str, "boot": str, "namespace": str, "process": PART, "started": str}
CLAIM = {"run": RUN}
FORMAT = {"format": COUNT}
IDENTITY = {
    "uuid": str, "created": str, "chunk_length": range(1, 4097), "secret": HEX64,
    "tokenizer": {
        "name": str, "file": re.compile(r"tokenizer-[0-9a-f]{12}\.json"), "sha256": HEX64,
        "vocabulary": range(1, (1 << 32) + 1), "token_bytes": frozenset((2, 4)), "lossless": bool,
    },
}  # fmt: skip
