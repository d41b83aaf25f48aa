"""Planning ``chunk``: which inputs are new, and the ordered list of units they are cut into.

Units are cut from names and sizes alone (a file, a run of small files, a byte range of a plain ``.jsonl``), never
from the number of workers; so chunk ids are decided when the plan is committed. Inputs that the store has, or has
planned, are recognised by their fingerprints and left out.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from retrotool.errors import CorruptError, ErasedError, UsageError
from retrotool.sources import Fields, InputFile
from retrotool.store import atomic
from retrotool.store.atomic import FileEntry
from retrotool.store.log import Draft
from retrotool.store.paths import FileName
from retrotool.store.runs import Run
from retrotool.store.staging import COUNTS
from retrotool.store.state import State
from retrotool.store.store import Store

BYTES_PER_TOKEN = 4
_SPREAD = 16
_LEAST_UNIT_BYTES = 8 << 20
_COMPRESSION_RATIO = 4


@dataclass(frozen=True, slots=True)
class Piece:
    """A file, by its number in the plan, or the byte range [start, end) of one."""

    file: int
    start: int = 0
    end: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """The content of a plan file."""

    files: tuple[InputFile, ...]
    fingerprints: tuple[str, ...]
    fields: Fields
    part_size: int
    units: tuple[tuple[Piece, ...], ...]

    def weight(self, unit: int) -> int:
        """Bytes of input that a unit reads."""
        return sum((self.files[p.file].size if p.end is None else p.end) - p.start for p in self.units[unit])


def cut_units(files: Sequence[InputFile], part_size: int, chunk_length: int) -> list[tuple[Piece, ...]]:
    """Cut files into units of about a part, or a 16th of everything if that is less (but not below 8 MiB)."""
    whole = sum(map(_text_bytes, files))
    target = max(_LEAST_UNIT_BYTES, min(part_size * chunk_length * BYTES_PER_TOKEN, whole // _SPREAD))
    units: list[tuple[Piece, ...]] = []
    small: list[Piece] = []
    gathered = 0

    def close() -> None:
        nonlocal gathered
        if small:
            units.append(tuple(small))
        small.clear()
        gathered = 0

    for number, file in enumerate(files):
        size = _text_bytes(file)
        if gathered + size > target:
            close()
        if size <= target:
            small.append(Piece(number))
            gathered += size
        elif file.splittable:
            ranges = -(-size // target)
            cuts = [size * i // ranges for i in range(ranges + 1)]
            units += [(Piece(number, start, end),) for start, end in itertools.pairwise(cuts)]
        else:
            units.append((Piece(number),))
    close()
    return units


def _text_bytes(file: InputFile) -> int:
    """About how many bytes of text a file holds."""
    return file.size * (_COMPRESSION_RATIO if file.format.endswith((".gz", ".zst", "parquet")) else 1)


def commit_plan(
    store: Store, run: Run, files: Sequence[InputFile], fields: Fields, part_size: int
) -> tuple[str | None, int]:
    """Plan those of ``files`` new to the store; return the plan's id (None: all known) and how many were known."""
    try:
        fingerprints = [file.fingerprint() for file in files]
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}", "Nothing was changed.") from error
    known = 0
    plan_id = secrets.token_hex(4)

    def build(state: State) -> Draft | None:
        nonlocal known
        seen = set(_known_fingerprints(store, state))
        new: dict[str, InputFile] = {}
        for file, fingerprint in zip(files, fingerprints, strict=True):
            # Read by another field, a file is another input: a wrong --text-field must not shut it out.
            field = "" if file.format == "txt" else fields.text
            hidden = store.identity.keyed_hash(f"{fingerprint} {field}")
            if hidden not in seen:
                new.setdefault(hidden, file)
        known = len(files) - len(new)
        if not new:
            return None
        units = cut_units(list(new.values()), part_size, store.identity.chunk_length)
        plan = Plan(tuple(new.values()), tuple(new), fields, part_size, tuple(units))
        entry = _write_plan(store, run, plan_id, plan)
        record = {
            **dict.fromkeys(COUNTS, 0),
            "parts": 0,
            "units": len(units),
            "done": 0,
            "finished": False,
            "order": state.number + 1,
        }
        settings = {
            "text_field": fields.text,
            "id_field": fields.id,
            "keep": fields.keep,
            "part_size": part_size,
            "files": len(new),
        }
        return Draft("plan", settings, add=(entry,), records={f"plan:{plan_id}": record})

    while True:
        try:
            state = store.commit(run, build)
            break
        except ErasedError:
            continue  # a plan was finished while its fingerprints were read
    return (plan_id if f"plan:{plan_id}" in state.records else None), known


def _write_plan(store: Store, run: Run, plan_id: str, plan: Plan) -> FileEntry:
    return write_json(store.root, FileName.new(run.id, "plans", plan_id, "json"), asdict(plan), len(plan.units))


def write_json(root: Path, name: FileName, content: Mapping[str, Any], rows: int) -> FileEntry:
    """Write a small JSON file through the store's door."""

    def write(path: Path) -> int:
        path.write_bytes(orjson.dumps(content, option=orjson.OPT_SORT_KEYS))
        return rows

    return atomic.write_file(root, name, write)


def read_json(store: Store, entry: FileEntry) -> dict[str, Any]:
    """Read a small JSON file of the store's view, checked against its sum."""
    path = store.path(entry)
    if atomic.file_sha256(path) != entry.sha256:
        raise CorruptError(f"{path} is not what the log says", f"See what else is wrong: retrotool verify {store.root}")
    content: dict[str, Any] = orjson.loads(path.read_bytes())
    return content


def read_plan(store: Store, entry: FileEntry) -> Plan:
    """Inverse of writing a plan."""
    content = read_json(store, entry)
    fields = Fields(content["fields"]["text"], content["fields"]["id"], tuple(content["fields"]["keep"]))
    units = tuple(tuple(Piece(**piece) for piece in unit) for unit in content["units"])
    files = tuple(InputFile(**file) for file in content["files"])
    return Plan(files, tuple(content["fingerprints"]), fields, int(content["part_size"]), units)


def _known_fingerprints(store: Store, state: State) -> Iterator[str]:
    for kind in ("inputs", "plans"):
        group = state.group(kind)
        for slot in group:
            entry = group.get(slot)
            assert entry is not None
            yield from read_json(store, entry)["fingerprints"]


def unfinished_plans(state: State) -> list[str]:
    """Ids of the plans that are not finished, in their order."""
    plans = state.with_prefix("plan:")
    return sorted((plan for plan in plans if not plans[plan]["finished"]), key=lambda plan: int(plans[plan]["order"]))
