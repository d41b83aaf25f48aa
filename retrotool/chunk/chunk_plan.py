"""Planning ``chunk``: which inputs are new, and the ordered list of units they are cut into.

Units are cut from the inputs alone (a file, a run of small files, a slice of a large one), never from the number of
workers; so chunk ids are decided when the plan is committed. Inputs that the store has, or has planned, are
recognised by their fingerprints and left out; one that was changed in its place is refused, or read again. Of an input
that is read again the documents that the store has are skipped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow.compute as pc

from retrotool import sources
from retrotool.chunk import PART_SIZE
from retrotool.errors import CorruptError, ErasedError, UsageError
from retrotool.ranges import is_in
from retrotool.sources import Fields, InputFile, Slice
from retrotool.sources.inputs import is_spooled
from retrotool.store import leases, parts, schema
from retrotool.store.leases import Run
from retrotool.store.log import Draft, FileEntry
from retrotool.store.paths import NAME, FileName
from retrotool.store.schema import Maybe, Spec
from retrotool.store.specs import COUNT, PLACE
from retrotool.store.staging import PLAN_COUNTS
from retrotool.store.state import State
from retrotool.store.storage import Sink
from retrotool.store.store import Store, retry_overtaken
from retrotool.store.tombstones import Tombstones, named_chunks, standing_purges
from retrotool.tokenizers import Findings

BYTES_PER_TOKEN = 4
EXPANSION = {"gz": 3.0, "zst": 4.0, "bz2": 4.0, "xz": 4.0, "parquet": 3.0}
"""About how many bytes of text a byte of a compressed input holds."""
GUARD = "guard"
"""Record with what was found out about the fast tokenizer, so that it is found out once a store."""
EXACT = "tokenizers"
"""Record that says why this store is tokenised by ``tokenizers`` alone."""
SMALL_PLAN = 12 << 20
"""Bytes of text below which starting the fast tokenizer costs more than it saves."""
Duplicates = Literal["skip", "keep", "fail"]
_LEAST_ROWS = 1000
"""Rows below which a share says nothing, unless they are all."""
_SPREAD = 16
_LEAST_UNIT_BYTES = 8 << 20
_HASHES = np.dtype(f"S{2 * parts.HASH_BYTES}")


@dataclass(frozen=True, slots=True)
class InputPiece:
    """A file, by its number in the plan, or a slice of one; ``weight``: bytes of input."""

    file: int
    weight: int
    where: Slice = sources.WHOLE


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """The content of a plan file.

    ``fingerprints`` and ``places`` are keyed hashes of the files' content and path. ``fast``: whether the fast
    tokenizer may be used. ``read_before``, by file number: the plans that read an earlier version of the file, whose
    documents are skipped. ``owner``: the run that alone can read the standard input among the files, if any is.
    """

    files: tuple[InputFile, ...]
    fingerprints: tuple[str, ...]
    places: tuple[str, ...]
    fields: Fields
    part_size: int
    units: tuple[tuple[InputPiece, ...], ...]
    fast: bool = True
    allow_purged: bool = False
    read_before: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    owner: str = ""


@dataclass(frozen=True, slots=True)
class MaxBad:
    """At most ``rows``, or a ``share`` of all rows read; the rest of a damaged file counts as a row. Neither: any."""

    rows: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, text: str | None) -> MaxBad:
        """From ``100`` or ``0.5%``; ``UsageError`` for anything else."""
        if text is None:
            return cls()
        with contextlib.suppress(ValueError):
            if text.endswith("%"):
                share = float(text[:-1]) / 100
                if 0 <= share <= 1:
                    return cls(share=share)
            elif (rows := int(text)) >= 0:
                return cls(rows=rows)
        raise UsageError(f"--max-bad {text}: it is a number of rows, such as 100, or a share, such as 0.5%")

    def exceeded(self, counts: Mapping[str, Any], *, last: bool = False) -> str:
        """Return why a run with these counts must stop; "" if it may go on. ``last``: there is no more to read."""
        bad = counts["rejected"]
        if self.rows is not None:
            return f"{bad:,} rows were rejected, more than --max-bad {self.rows:,}" if bad > self.rows else ""
        if self.share is not None:
            read = counts["documents"] + bad + counts["blocked"] + counts["known_documents"]
            if read < _LEAST_ROWS and self.share and not last:
                return ""
            if bad > self.share * read:
                return f"{bad:,} of {read:,} rows were rejected, more than --max-bad {100 * self.share:g}%"
        return ""


@dataclass(frozen=True, slots=True)
class ChunkOptions:
    """How ``chunk`` goes about it; see the command's help."""

    fields: Fields = field(default_factory=Fields)
    part_size: int = PART_SIZE
    workers: int = 1
    skip_missing: bool = False
    duplicates: Duplicates = "skip"
    add_changed: bool = False
    allow_purged: bool = False
    max_bad: MaxBad = field(default_factory=MaxBad)
    check: float = 0.001
    exact_tokenizer: bool = False
    note: Callable[[str], object] = str


def cut_units(
    files: Sequence[InputFile], fields: Fields, part_size: int, chunk_length: int
) -> list[tuple[InputPiece, ...]]:
    """Cut files into units of about a part, or a 16th of everything if that is less (but not below 8 MiB)."""
    whole = sum(map(text_bytes, files))
    target = max(_LEAST_UNIT_BYTES, min(part_size * chunk_length * BYTES_PER_TOKEN, whole // _SPREAD))
    units: list[tuple[InputPiece, ...]] = []
    small: list[InputPiece] = []
    gathered = 0
    for number, file in enumerate(files):
        size = text_bytes(file)
        if small and gathered + size > target:
            units.append(tuple(small))
            small, gathered = [], 0
        if size <= target:
            small.append(InputPiece(number, file.size))
            gathered += size
        else:
            slices = sources.cut_input(file, fields, target)
            units += [(InputPiece(number, file.size // len(slices), where),) for where in slices]
    return [*units, tuple(small)] if small else units


def text_bytes(file: InputFile) -> int:
    """About how many bytes of text a file holds."""
    return int(file.size * EXPANSION.get(file.compression or file.base, 1.0))


def changed_inputs(store: Store, run: Run, files: Sequence[InputFile], options: ChunkOptions) -> list[InputFile]:
    """Those of ``files`` that were planned before, with other content."""
    known = known_inputs(store, store.refresh(), options, leases.others(store.storage, run.id))
    hashes = hashes_of(store, files, options.fields)
    return [
        file
        for file, (fingerprint, place) in zip(files, hashes, strict=True)
        if place in known.places and fingerprint not in known.fingerprints
    ]


def commit_plan(
    store: Store, run: Run, files: Sequence[InputFile], options: ChunkOptions, findings: Findings | None = None
) -> tuple[str | None, int]:
    """Plan those of ``files`` new to the store; return the plan's id (None: all known) and how many were known."""
    hashes = hashes_of(store, files, options.fields)
    others = leases.others(store.storage, run.id)
    n_known = 0
    plan_id = secrets.token_hex(4)

    def build(state: State) -> Draft | None:
        nonlocal n_known
        known = known_inputs(store, state, options, others)
        new: dict[str, tuple[InputFile, str]] = {}
        for file, (fingerprint, place) in zip(files, hashes, strict=True):
            if fingerprint not in known.fingerprints and fingerprint not in new:
                new[fingerprint] = (file, place)
        changed = [file for file, place in new.values() if place in known.places]
        if changed and not options.add_changed:
            more = f" (and {len(changed) - 1:,} more)" if len(changed) > 1 else ""
            raise UsageError(
                f"{changed[0].path}{more} was chunked before, with other content",
                "If it was repaired, or documents were added to it: the same command with --changed add; documents "
                "that the store has are skipped. To replace it, purge what came from it first. Nothing was changed.",
            )
        n_known = len(files) - len(new)
        if not new:
            return None
        chosen = [file for file, _ in new.values()]
        chosen_places = tuple(place for _, place in new.values())
        units = cut_units(chosen, options.fields, options.part_size, store.identity.chunk_length)
        plan = ChunkPlan(
            tuple(chosen), tuple(new), chosen_places, options.fields, options.part_size, tuple(units),
            fast=may_be_fast(state, chosen), allow_purged=options.allow_purged,
            read_before={
                number: known.readers[place] for number, place in enumerate(chosen_places) if place in known.readers
            },
            owner=run.id if any(map(is_spooled, chosen)) else "",
        )  # fmt: skip
        entry = write_plan(store, run, plan_id, plan)
        record = {
            **dict.fromkeys((*PLAN_COUNTS, "parts", "done"), 0),
            "units": len(plan.units),
            "finished": False,
            "order": state.number + 1,
        }
        settings = {
            **{name: value for name, value in asdict(plan.fields).items() if value is not None},
            "part_size": plan.part_size,
            "files": len(plan.files),
        }
        found = {} if findings is None else {GUARD: asdict(findings)}
        return Draft("plan", settings, add=(entry,), records={f"plan:{plan_id}": record, **found})

    state = retry_overtaken(lambda: store.commit(run, build))  # a plan may be finished while its files are read
    return (plan_id if f"plan:{plan_id}" in state.records else None), n_known


def known_findings(state: State) -> Findings | None:
    """What was found out about the fast tokenizer before."""
    record = state.records.get(GUARD)
    return None if record is None else Findings.from_json(record)


def may_be_fast(state: State, files: Sequence[InputFile]) -> bool:
    """Whether the fast tokenizer pays, and may be used in this store."""
    return EXACT not in state.records and sum(map(text_bytes, files)) > SMALL_PLAN


def use_exact_tokenizer(store: Store, run: Run, why: str) -> None:
    """Never use the fast tokenizer in this store again; ``why`` goes into the log, so it has no text of a document.

    The plans that are not finished get new files, so units that were staged with the fast tokenizer are refused and
    done again. Units that are committed stay.
    """

    def build(state: State) -> Draft | None:
        if EXACT in state.records:
            return None
        add, remove = [], []
        for plan_id, entry, plan in open_plans(store):
            if plan.fast:
                add.append(write_plan(store, run, plan_id, replace(plan, fast=False)))
                remove.append(entry.path)
        records = {EXACT: {"why": why}}
        return Draft("plan", {"exact_tokenizer": True}, add=tuple(add), remove=tuple(remove), records=records)

    store.commit(run, build)


def hashes_of(store: Store, files: Sequence[InputFile], fields: Fields) -> list[tuple[str, str]]:
    """Keyed hashes of each file's content and of its path; of standard input, which has no path of its own, of both.

    Read otherwise, a file is another input: a wrong --text-field must not shut it out.
    """
    found = []
    try:
        for file in files:
            reading = repr(fields.reading(file.base))
            fingerprint = store.identity.keyed_hash(f"{file.fingerprint(fields)} {reading}")
            place = f"stdin {fingerprint}" if is_spooled(file) else f"path {file.path} {reading}"
            found.append((fingerprint, store.identity.keyed_hash(place)))
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}", "Nothing was changed.") from error
    return found


def write_plan(store: Store, run: Run, plan_id: str, plan: ChunkPlan) -> FileEntry:
    """Write a plan file."""
    files = [{"uri": one.path, "name": one.name, "size": one.size, "format": one.format} for one in plan.files]
    fields = {
        **asdict(plan),
        "files": files,
        "read_before": {str(number): plans for number, plans in plan.read_before.items()},
    }
    return write_json_file(store, FileName.new(run.id, "plans", plan_id, "json"), fields, len(plan.units))


def write_json_file(store: Store, name: FileName, content: Mapping[str, Any], rows: int) -> FileEntry:
    """Write a small JSON file of a store."""

    def write(sink: Sink) -> int:
        sink.write(orjson.dumps(content, option=orjson.OPT_SORT_KEYS))
        return rows

    return store.write(name, write)


_INPUT = {"uri": PLACE, "name": str, "size": COUNT, "format": str}
_SLICE = {"start": COUNT, "end": Maybe(COUNT), "first": COUNT, "last": Maybe(COUNT)}
_INPUTS = {"fingerprints": [str], "places": [str], "given_up?": [str], "fields": {"max_document": COUNT}}
_PLAN = {
    **_INPUTS, "files": [_INPUT], "part_size": range(1, 1 << 31), "fast": bool, "allow_purged": bool, "owner?": str,
    "units": [[{"file": COUNT, "weight": COUNT, "where": _SLICE}]],
    "read_before": {re.compile("[0-9]{1,9}"): [NAME]},
    "fields": {
        "text": str, "id": str, "keep": [str], "max_document": COUNT, "end_of_document": Maybe(COUNT),
        **dict.fromkeys(("key", "value", "tokens", "separator", "token_dtype"), Maybe(str)),
    },
}  # fmt: skip


def read_json_file(store: Store, entry: FileEntry, spec: Spec) -> dict[str, Any]:
    """Read a small JSON file of the store's view, checked against its sum and ``spec``."""
    store.check_sum(entry)
    with store.reading(entry) as storage:
        content: dict[str, Any] = schema.load(storage.get(entry.path), spec, store.where(entry.path))
    return content


def _fields_of(kind: type, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {one.name: fields[one.name] for one in dataclasses.fields(kind) if one.name in fields}


def read_plan(store: Store, entry: FileEntry) -> ChunkPlan:
    """Inverse of writing a plan."""
    content = read_json_file(store, entry, _PLAN)
    n = len(content["files"])
    pieces = [piece["file"] for unit in content["units"] for piece in unit]
    numbers = [*pieces, *map(int, content["read_before"])]
    if not (len(content["fingerprints"]) == len(content["places"]) == n and all(content["units"])) or (
        numbers and max(numbers) >= n
    ):
        raise store.corrupt(f"{store.where(entry.path)}: its files, units and fingerprints do not go together")
    return ChunkPlan(
        files=tuple(InputFile(one["uri"], one["name"], one["size"], one["format"]) for one in content["files"]),
        fingerprints=tuple(content["fingerprints"]),
        places=tuple(content["places"]),
        fields=Fields(**{**_fields_of(Fields, content["fields"]), "keep": tuple(content["fields"]["keep"])}),
        part_size=content["part_size"],
        units=tuple(
            tuple(InputPiece(p["file"], p["weight"], Slice(**_fields_of(Slice, p["where"]))) for p in unit)
            for unit in content["units"]
        ),
        fast=content["fast"],
        allow_purged=content["allow_purged"],
        read_before={int(number): tuple(plans) for number, plans in content["read_before"].items()},
        owner=content.get("owner", ""),
    )


@dataclass(slots=True)
class KnownInputs:
    """Keyed hashes of the content, and of the path, of inputs that were planned before.

    ``readers``: by the hash of a path the plans that read an input there, also of inputs that were given up.
    """

    fingerprints: set[str] = field(default_factory=set)
    places: set[str] = field(default_factory=set)
    readers: dict[str, tuple[str, ...]] = field(default_factory=dict)


def known_inputs(store: Store, state: State, options: ChunkOptions, running: Collection[str] = ()) -> KnownInputs:
    """Inputs that need not be read again.

    Not those of plans that left documents out because they had been purged, if these are wanted now; nor, if changed
    inputs are to be added, those that were read with a smaller limit on the size of a document; nor standard input
    that an open plan has of a run that is not among those ``running``, as no process can read it any more.
    """
    known = KnownInputs()
    for kind in ("inputs", "plans"):
        for slot, entry in state.group(kind).items():
            content = read_json_file(store, entry, _INPUTS if kind == "inputs" else _PLAN)
            for place in (*content["places"], *content.get("given_up", ())):
                known.readers[place] = (*known.readers.get(place, ()), slot)
            if options.allow_purged and state.records[f"plan:{slot}"].get("blocked"):
                continue
            lost: set[str] = set()
            if content.get("owner") and content["owner"] not in running:
                plan = read_plan(store, entry)
                rows = zip(plan.files, plan.fingerprints, plan.places, strict=True)
                lost.update(*(hashes for file, *hashes in rows if is_spooled(file)))
            known.places.update(set(content["places"]).difference(lost))
            if not options.add_changed or content["fields"]["max_document"] >= options.fields.max_document:
                known.fingerprints.update(set(content["fingerprints"]).difference(lost))
    return known


def parts_of_plan(state: State, plan_id: str) -> range:
    """Numbers of the parts that a plan gave; as plans are worked in order, they follow those of the plans before."""
    record = state.records[f"plan:{plan_id}"]
    before = [r for r in state.with_prefix("plan:").values() if r["order"] < record["order"]]
    first = sum(r["parts"] for r in before)
    if first + record["parts"] > len(state.group("chunks")):
        raise CorruptError(f"the record 'plan:{plan_id}' counts parts that are not there")
    return range(first, first + record["parts"])


def open_plans(store: Store) -> Iterator[tuple[str, FileEntry, ChunkPlan]]:
    """Id, file and content of the plans that are not finished, in their order."""
    for plan_id in unfinished_plans(store.state):
        entry = store.state.file("plans", plan_id)
        if entry is None:
            continue
        try:
            plan = read_plan(store, entry)
        except ErasedError:
            continue  # another process has just finished it
        yield plan_id, entry, plan


def unfinished_plans(state: State) -> list[str]:
    """Ids of the plans that are not finished, in their order."""
    plans = state.with_prefix("plan:")
    return sorted((plan for plan in plans if not plans[plan]["finished"]), key=lambda plan: int(plans[plan]["order"]))


class KnownDocuments:
    """The documents of the input ``name`` that ``plans`` read, by their keys and text hashes, 32 bytes each.

    Of an input that changed, and is read again, these are skipped.
    Documents that are erased, also in part, are unknown: the block list keeps them out. ``without``: so are those of
    which every chunk is in it, as purged documents are where they may be added again.
    """

    def __init__(self, store: Store, name: str, plans: Sequence[str], without: Tombstones | None = None) -> None:
        live = set(store.state.all_parts())
        found = [np.zeros(0, _HASHES)]
        for part in (part for plan in plans for part in parts_of_plan(store.state, plan) if part in live):
            table = parts.read_documents(store, part, ["key", "text_hash", "input"])
            wanted = pc.and_(pc.equal(table["input"], name), pc.is_valid(table["text_hash"]))
            doc = np.flatnonzero(wanted.fill_null(False).to_numpy())
            if without is not None:
                doc = np.setdiff1d(doc, documents_within(store, part, without), assume_unique=True)
            hashes = [parts.from_fixed_binary(table[column], np.dtype(np.uint8)) for column in ("key", "text_hash")]
            found.append(np.hstack(hashes)[doc].view(_HASHES).reshape(-1))
        self._sorted = np.sort(np.concatenate(found))

    def hold(self, hashes: Sequence[tuple[bytes, bytes]]) -> npt.NDArray[np.bool_]:
        """Which documents, given by key and text hash [n], are known."""
        wanted = np.frombuffer(b"".join(itertools.chain.from_iterable(hashes)), _HASHES)
        return is_in(wanted, self._sorted)


def chunks_of_purges(store: Store) -> Tombstones:
    """Chunks that were purged: those of documents that repeat are tombstones too, but their ids stay taken."""
    return Tombstones(named_chunks(store, standing_purges(store.state)))


def documents_within(store: Store, part: int, chunks: Tombstones) -> npt.NDArray[np.int64]:
    """The docs of a part of which every chunk is in ``chunks``, ascending."""
    rows = chunks.rows(part)
    if not len(rows):
        return rows
    table = parts.read_documents(store, part, ["first_row", "n_chunks"])
    first, n_chunks = table["first_row"].to_numpy(), table["n_chunks"].to_numpy()
    return np.flatnonzero(np.searchsorted(rows, first + n_chunks) - np.searchsorted(rows, first) == n_chunks)
