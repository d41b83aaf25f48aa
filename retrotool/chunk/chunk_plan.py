"""Plan ``chunk``: select the new inputs and cut them into an ordered list of units.

Units depend on the inputs alone, never on the number of workers, so chunk ids are fixed when the plan is
committed. Known inputs are recognised by fingerprint and skipped. Of a changed input the documents that are
unchanged are skipped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from retrotool import sources
from retrotool.chunk import PART_SIZE
from retrotool.errors import CorruptError, ErasedError, UsageError
from retrotool.ranges import expand_ranges
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
from retrotool.store.tombstones import Tombstones, named_chunks, standing_purges, undone_purges
from retrotool.tokenizers import Findings

BYTES_PER_TOKEN = 4
EXPANSION = {"gz": 3.0, "zst": 4.0, "bz2": 4.0, "xz": 4.0, "parquet": 3.0}  # bytes of text per byte
_READERS = 8  # threads that read inputs for their hashes
GUARD = "guard"  # record of the findings about the fast tokenizer, made once per store
EXACT = "tokenizers"  # record of why this store is tokenised by ``tokenizers`` alone
SMALL_PLAN = 12 << 20  # bytes of text that do not pay for starting the fast tokenizer
Duplicates = Literal["skip", "keep", "fail"]
Existing = Literal["skip", "replace", "fail", "mirror"]
_SPREAD = 16
_LEAST_UNIT_BYTES = 8 << 20
_FEW_SLICES = 3  # of a stream: they cost next to nothing
_WALKED_BYTES = 1 << 20  # size of a zstd archive from which its headers are read for a better estimate
HASHES = np.dtype(f"S{2 * parts.HASH_BYTES}")  # key and text hash of a document


@dataclass(frozen=True, slots=True)
class InputPiece:
    """A file, by its number in the plan, or a slice of one; ``weight`` is in bytes of input."""

    file: int
    weight: int
    where: Slice = sources.WHOLE


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """The content of a plan file."""

    files: tuple[InputFile, ...]
    fingerprints: tuple[str, ...]  # keyed hashes of content
    places: tuple[str, ...]  # keyed hashes of path
    fields: Fields
    part_size: int
    units: tuple[tuple[InputPiece, ...], ...]
    fast: bool = True
    allow_purged: bool = False
    read_before: Mapping[int, tuple[str, ...]] = field(default_factory=dict)  # plans, by file, of earlier versions
    owner: str = ""  # the only run that can read the standard input among the files
    existing: Existing = "skip"


@dataclass(frozen=True, slots=True)
class ChunkOptions:
    """Options of ``chunk``. ``check``: share of documents whose tokens are compared with ``tokenizers``."""

    fields: Fields = field(default_factory=Fields)
    require_id: bool = False  # whether every input must have the id field in a row
    format: str | None = None  # of all inputs, whatever their names
    encoding: str | None = None
    keep_end: bool = False  # whether a token with which all documents end may be text
    part_size: int = PART_SIZE
    workers: int = 1
    exclude: tuple[str, ...] = ()  # patterns of files and folders to leave out, also of interrupted work
    duplicates: Duplicates = "skip"
    existing: Existing | None = None  # None: as the plan says; skip for a new one
    allow_purged: bool = False
    max_bad: int | None = None  # rejected rows that do not stop the run; None: any number
    check: float = 0.001
    exact_tokenizer: bool = False
    wait: bool = True  # for standard input that another run reads
    note: Callable[[str], object] = str


def cut_units(
    files: Sequence[InputFile], fields: Fields, part_size: int, chunk_length: int
) -> list[tuple[InputPiece, ...]]:
    """Cut files into units of about a part, or of a 16th of all input if that is less (at least 8 MiB)."""
    sizes = [_text_bytes_by_headers(file) for file in files]
    whole = sum(sizes)
    target = max(_LEAST_UNIT_BYTES, min(part_size * chunk_length * BYTES_PER_TOKEN, whole // _SPREAD))
    share = max(1, whole // (2 * (os.cpu_count() or 1)))  # half of what a core gets
    units: list[tuple[InputPiece, ...]] = []
    small: list[InputPiece] = []
    gathered = 0
    for number, (file, size) in enumerate(zip(files, sizes, strict=True)):
        if small and gathered + size > target:
            units.append(tuple(small))
            small, gathered = [], 0
        if size <= target:
            small.append(InputPiece(number, file.size))
            gathered += size
        else:
            # A stream is cut where a core would have too much of it, or be left with it at the end.
            few = min(-(-4 * size // share), _FEW_SLICES)
            slices = sources.cut_input(file, fields, target, max(-(-size // share), few))
            units += [(InputPiece(number, file.size // len(slices), where),) for where in slices]
    return [*units, tuple(small)] if small else units


def text_bytes(file: InputFile) -> int:
    """Estimate how many bytes of text a file holds."""
    return int(file.size * EXPANSION.get(file.compression or file.base, 1.0))


def _text_bytes_by_headers(file: InputFile) -> int:
    """Estimate how many bytes of text a file holds, of a large zstd archive by the headers of its blocks."""
    if file.compression == "zst" and file.size >= _WALKED_BYTES and not file.is_remote:
        with contextlib.suppress(OSError):
            return file.estimated_text()
    return text_bytes(file)


def changed_inputs(store: Store, run: Run, files: Sequence[InputFile], options: ChunkOptions) -> list[InputFile]:
    """Return the ``files`` that were planned before with other content."""
    known = known_inputs(store, store.refresh(), options, leases.others(store.storage, run.id))
    again = [file for file in files if not is_spooled(file) and _place(store, file, options.fields) in known.places]
    hashes = hashes_of(store, again, options.fields)
    return [file for file, (fingerprint, _) in zip(again, hashes, strict=True) if fingerprint not in known.fingerprints]


def commit_plan(
    store: Store, run: Run, files: Sequence[InputFile], options: ChunkOptions, findings: Findings | None = None
) -> tuple[str | None, dict[str, tuple[str, ...]]]:
    """Plan those ``files`` that are new to the store.

    Return the plan's id, if any, and for the path of each other file the plans that read it.
    """
    hashes = hashes_of(store, files, options.fields)
    others = leases.others(store.storage, run.id)
    read: dict[str, tuple[str, ...]] = {}
    plan_id = secrets.token_hex(4)

    def build(state: State) -> Draft | None:
        read.clear()
        known = known_inputs(store, state, options, others)
        new: dict[str, tuple[InputFile, str]] = {}
        for file, (fingerprint, place) in zip(files, hashes, strict=True):
            if fingerprint not in known.fingerprints and fingerprint not in new:
                new[fingerprint] = (file, place)
            else:
                read[file.path] = known.readers.get(place, ())
        if not new:
            return None
        chosen, places = zip(*new.values(), strict=True)
        readers = {i: known.readers[place] for i, place in enumerate(places) if place in known.readers}
        units = cut_units(chosen, options.fields, options.part_size, store.identity.chunk_length)
        plan = ChunkPlan(
            chosen, tuple(new), places, options.fields, options.part_size, tuple(units), may_be_fast(state, chosen),
            options.allow_purged, readers, owner=run.id if any(map(is_spooled, chosen)) else "",
            existing=options.existing or "skip",
        )  # fmt: skip
        entry = write_plan(store, run, plan_id, plan)
        counts = dict.fromkeys((*PLAN_COUNTS, "parts", "done"), 0)
        record = {**counts, "units": len(plan.units), "finished": False, "order": state.number + 1}
        settings = {name: value for name, value in asdict(plan.fields).items() if value is not None}
        settings |= {"part_size": plan.part_size, "files": len(plan.files)}
        found = {} if findings is None else {GUARD: {**asdict(findings), "runs": [[*run] for run in findings.runs]}}
        return Draft("plan", settings, add=(entry,), records={f"plan:{plan_id}": record, **found})

    state = retry_overtaken(lambda: store.commit(run, build))  # a plan may be finished while its files are read
    return (plan_id if f"plan:{plan_id}" in state.records else None), read


def known_findings(state: State) -> Findings | None:
    """Return what an earlier run recorded about the fast tokenizer."""
    record = state.records.get(GUARD)
    return None if record is None else Findings.from_json(record)


def may_be_fast(state: State, files: Sequence[InputFile]) -> bool:
    """Return whether the fast tokenizer is allowed in this store and worth its start."""
    return EXACT not in state.records and sum(map(text_bytes, files)) > SMALL_PLAN


def use_exact_tokenizer(store: Store, run: Run, why: str) -> None:
    """Stop using the fast tokenizer in this store; ``why`` must not contain document text."""

    def build(state: State) -> Draft | None:
        if EXACT in state.records:
            return None
        add, remove = [], []
        for plan_id, entry, plan in open_plans(store):
            if plan.fast:  # a new plan file voids units that were staged with the fast tokenizer
                add.append(write_plan(store, run, plan_id, replace(plan, fast=False)))
                remove.append(entry.path)
        records = {EXACT: {"why": why}}
        return Draft("plan", {"exact_tokenizer": True}, add=tuple(add), remove=tuple(remove), records=records)

    store.commit(run, build)


def hashes_of(store: Store, files: Sequence[InputFile], fields: Fields) -> list[tuple[str, str]]:
    """Return keyed hashes of each file's content and path (for standard input, again its content)."""
    keyed, found = store.identity.keyed_hash, []
    try:
        with ThreadPoolExecutor(_READERS) as threads:
            contents = list(threads.map(lambda file: file.fingerprint(fields), files))
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}", "Nothing was changed.") from error
    for file, content in zip(files, contents, strict=True):
        fingerprint = keyed(f"{content} {file.reading(fields)!r}")
        found.append((fingerprint, keyed(f"stdin {fingerprint}") if is_spooled(file) else _place(store, file, fields)))
    return found


def _place(store: Store, file: InputFile, fields: Fields) -> str:
    """Return a keyed hash of a file's path and how it is read: one wrong --text-field blocks nothing."""
    return store.identity.keyed_hash(f"path {file.path} {file.reading(fields)!r}")


def write_plan(store: Store, run: Run, plan_id: str, plan: ChunkPlan) -> FileEntry:
    """Write a plan file."""
    files = [{("uri" if name == "path" else name): value for name, value in asdict(one).items()} for one in plan.files]
    read_before = {str(number): plans for number, plans in plan.read_before.items()}
    fields = {**asdict(plan), "files": files, "read_before": read_before}
    return write_json_file(store, FileName.new(run.id, "plans", plan_id, "json"), fields, len(plan.units))


def write_json_file(store: Store, name: FileName, content: Mapping[str, Any], rows: int) -> FileEntry:
    """Write a small JSON file of a store."""

    def write(sink: Sink) -> int:
        sink.write(orjson.dumps(content, option=orjson.OPT_SORT_KEYS))
        return rows

    return store.write(name, write)


_INPUT = {"uri": PLACE, "name": str, "size": COUNT, "format": str, "encoding?": str, "tag?": str}
_SLICE = {"start": COUNT, "end": Maybe(COUNT), "first": COUNT, "last": Maybe(COUNT)}
_INPUTS = {"fingerprints": [str], "places": [str], "given_up?": [str], "fields": {"max_document": COUNT}}
_PLAN = {
    **_INPUTS, "files": [_INPUT], "part_size": range(1, 1 << 31), "fast": bool, "allow_purged": bool, "owner?": str,
    "existing?": frozenset(("skip", "replace", "fail", "mirror")),
    "units": [[{"file": COUNT, "weight": COUNT, "where": _SLICE}]],
    "read_before": {re.compile("[0-9]{1,9}"): [NAME]},
    "fields": {
        "text": str, "id": str, "keep": [str], "max_document": COUNT, "end_of_document": Maybe(COUNT),
        **dict.fromkeys(("key", "value", "tokens", "separator", "token_dtype"), Maybe(str)),
    },
}  # fmt: skip


def read_json_file(store: Store, entry: FileEntry, spec: Spec) -> dict[str, Any]:
    """Read a small JSON file of the store's view; check it against its checksum and ``spec``."""
    store.check_sum(entry)
    with store.reading(entry) as storage:
        content: dict[str, Any] = schema.load(storage.get(entry.path), spec, store.where(entry.path))
    return content


def _fields_of(kind: type, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {one.name: fields[one.name] for one in dataclasses.fields(kind) if one.name in fields}


def read_plan(store: Store, entry: FileEntry) -> ChunkPlan:
    """Read a plan file."""
    content = read_json_file(store, entry, _PLAN)
    n = len(content["files"])
    pieces = [piece["file"] for unit in content["units"] for piece in unit]
    numbers = [*pieces, *map(int, content["read_before"])]
    is_whole = len(content["fingerprints"]) == len(content["places"]) == n and all(content["units"])
    if not is_whole or max(numbers, default=-1) >= n:
        raise store.corrupt(f"{store.where(entry.path)}: its files, units and fingerprints do not match")
    fields = {**_fields_of(Fields, content["fields"]), "keep": tuple(content["fields"]["keep"])}
    found = {
        **_fields_of(ChunkPlan, content),
        "files": tuple(InputFile(path=one["uri"], **_fields_of(InputFile, one)) for one in content["files"]),
        "fingerprints": tuple(content["fingerprints"]), "places": tuple(content["places"]), "fields": Fields(**fields),
        "units": tuple(
            tuple(InputPiece(p["file"], p["weight"], Slice(**_fields_of(Slice, p["where"]))) for p in unit)
            for unit in content["units"]
        ),
        "read_before": {int(number): tuple(plans) for number, plans in content["read_before"].items()},
    }  # fmt: skip
    return ChunkPlan(**found)


@dataclass(slots=True)
class KnownInputs:
    """Keyed hashes of the content and the paths of planned inputs."""

    fingerprints: set[str] = field(default_factory=set)
    places: set[str] = field(default_factory=set)
    readers: dict[str, tuple[str, ...]] = field(default_factory=dict)  # plans by path, also those that gave it up


def known_inputs(store: Store, state: State, options: ChunkOptions, running: Collection[str] = ()) -> KnownInputs:
    """Return the inputs that need not be read again: those whose newest version was read.

    A version is read again if it may have documents that were left out and are wanted now.
    """
    known = KnownInputs()
    newest: dict[str, str] = {}  # fingerprint by path
    purged = set(chunks_of_purges(store).parts()) if options.allow_purged else set[int]()
    wanted: set[str] = set()  # plans that left out documents, or whose documents were purged since
    undone = {purge["plan"]: int(purge["undone"]) for purge in undone_purges(state).values() if "plan" in purge}
    updates = options.existing in ("replace", "mirror")
    plans = state.with_prefix("plan:")
    files = ((slot, entry) for kind in ("inputs", "plans") for slot, entry in state.group(kind).items())
    for slot, entry in sorted(files, key=lambda file: int(plans[file[0]]["order"])):
        record = plans[slot]
        content = read_json_file(store, entry, _INPUTS if entry.kind == "inputs" else _PLAN)
        for place in (*content["places"], *content.get("given_up", ())):
            known.readers[place] = (*known.readers.get(place, ()), slot)
        lost: set[str] = set()  # standard input that no process can read any more
        if content.get("owner") and content["owner"] not in running:
            plan = read_plan(store, entry)
            rows = zip(plan.files, plan.fingerprints, plan.places, strict=True)
            lost.update(*(hashes for file, *hashes in rows if is_spooled(file)))
        known.places.update(set(content["places"]).difference(lost))
        if options.allow_purged and (record.get("blocked") or purged & set(parts_of_plan(state, slot))):
            wanted.add(slot)
        again = content["fields"]["max_document"] < options.fields.max_document or (updates and record.get("differing"))
        for place, fingerprint in zip(content["places"], content["fingerprints"], strict=True):
            unmirrored = options.existing == "mirror" != record.get("existing") and len(known.readers[place]) > 1
            left_out = not wanted.isdisjoint(known.readers[place])  # a later version knew its documents
            stale = updates and any(record["order"] < undone.get(plan, 0) for plan in known.readers[place])
            newest[place] = "" if again or left_out or unmirrored or stale or fingerprint in lost else fingerprint
    known.fingerprints.update(filter(None, newest.values()))
    return known


def parts_of_plan(state: State, plan_id: str) -> range:
    """Return the numbers of a plan's parts; they follow the parts of all plans before it."""
    record = state.records[f"plan:{plan_id}"]
    before = [r for r in state.with_prefix("plan:").values() if r["order"] < record["order"]]
    first = sum(r["parts"] for r in before)
    if first + record["parts"] > len(state.group("chunks")):
        raise CorruptError(f"the record 'plan:{plan_id}' counts parts that do not exist")
    return range(first, first + record["parts"])


def files_of_plan(state: State, kind: str, plan_id: str) -> list[FileEntry]:
    """Return the files of a kind that a plan or its units made."""
    return [entry for slot, entry in state.group(kind).items() if slot.partition(".")[0] == plan_id]


def open_plans(store: Store) -> Iterator[tuple[str, FileEntry, ChunkPlan]]:
    """Yield id, file and content of each unfinished plan, in order."""
    for plan_id in unfinished_plans(store.state):
        with contextlib.suppress(ErasedError):  # finished by another process
            if (entry := store.state.file("plans", plan_id)) is not None:
                yield plan_id, entry, read_plan(store, entry)


def unfinished_plans(state: State) -> list[str]:
    """Return the ids of unfinished plans, in order."""
    plans = state.with_prefix("plan:")
    return sorted((plan for plan in plans if not plans[plan]["finished"]), key=lambda plan: int(plans[plan]["order"]))


def known_documents(store: Store, name: str, plans: Sequence[str], without: Tombstones) -> npt.NDArray[Any]:
    """Return the sorted ``HASHES`` of the documents of the input ``name`` that ``plans`` read.

    Not those whose chunks are all in ``without``, nor erased ones.
    """
    live = set(store.state.all_parts())
    found = [np.zeros(0, HASHES)]
    for part in (part for plan in plans for part in parts_of_plan(store.state, plan) if part in live):
        table = parts.read_documents(store, part, ["key", "text_hash", "input"])
        wanted = pc.and_(pc.equal(table["input"], name), pc.is_valid(table["text_hash"]))
        # Without erased documents, also in part, which have no hash: the block list keeps them out.
        doc = np.flatnonzero(wanted.fill_null(False).to_numpy())
        doc = np.setdiff1d(doc, documents_within(store, part, without), assume_unique=True)
        found.append(pairs_of(table.take(pa.array(doc))))
    return np.sort(np.concatenate(found))


def pairs_of(documents: pa.Table) -> npt.NDArray[Any]:
    """Return the ``HASHES`` of documents: key and text hash, zero where it is null."""
    hashes = [parts.from_fixed_binary(documents[name], np.dtype(np.uint8)) for name in ("key", "text_hash")]
    return np.ascontiguousarray(np.hstack(hashes)).view(HASHES).reshape(-1)


def chunks_of_purges(store: Store) -> Tombstones:
    """Return the chunks named by purges; unlike all tombstones, without those of duplicates."""
    return Tombstones(named_chunks(store, standing_purges(store.state)))


def chunks_of(store: Store, part: int, docs: npt.NDArray[Any]) -> parts.Ids:
    """Return the chunks of some documents of a part, ascending."""
    if not len(docs):
        return np.zeros(0, np.int64)
    table = parts.read_documents(store, part, ["first_row", "n_chunks"]).take(pa.array(np.sort(docs)))
    return parts.chunk_ids(part, expand_ranges(table["first_row"].to_numpy(), table["n_chunks"].to_numpy()))


def documents_within(store: Store, part: int, chunks: Tombstones) -> npt.NDArray[np.int64]:
    """Return the documents of a part whose chunks are all in ``chunks``, ascending."""
    rows = chunks.rows(part)
    if not len(rows):
        return rows
    table = parts.read_documents(store, part, ["first_row", "n_chunks"])
    first, n_chunks = table["first_row"].to_numpy(), table["n_chunks"].to_numpy()
    return np.flatnonzero(np.searchsorted(rows, first + n_chunks) - np.searchsorted(rows, first) == n_chunks)
