"""``purge``: select, confirm, commit and erase; a dry run; the list of purges.

Other processes may purge or erase concurrently. A selection made on a view overtaken by another commit is
made again, and ``confirm`` is called again if more is selected.

The commit adds tombstones, and block-list hashes that keep purged documents from coming back with their
input. It costs what is purged, not what is stored. A dry run costs the documents of the parts concerned, and
a row group per example.

Runs that scan for the same selectors concurrently, such as dry runs on several machines, share the parts. The
purge that follows finds the scan done.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrotool import engine
from retrotool.chunk.chunk_plan import write_json_file
from retrotool.cli.result_files import check_file, written
from retrotool.engine.progress import counting
from retrotool.errors import ConflictError, UsageError
from retrotool.purge import purged_chunks
from retrotool.purge.erase import EraseResult, carry_out_erase, files_of_several_parts, part_files
from retrotool.purge.select import Match, Selection, Selectors, same_selector, select, signed
from retrotool.purge.selectors.scan import KIND as SCANS
from retrotool.purge.selectors.selector import Decoder, read_rows
from retrotool.ranges import spread
from retrotool.store import blocked, log, parts
from retrotool.store.folding import writing
from retrotool.store.leases import Run
from retrotool.store.log import Draft, FileEntry
from retrotool.store.parts import distinct_parts, split_id
from retrotool.store.paths import FileName
from retrotool.store.state import State
from retrotool.store.store import Store, retry_overtaken
from retrotool.store.tombstones import PREFIX, named_chunks, tombstone_paths, write_tombstones
from retrotool.store.weights import weight_of
from retrotool.tokenizers import stored_tokenizer

EXAMPLES, LARGEST = 10, 10
_REWRITTEN = 20e6  # bytes of files that an erase rewrites per second and core: ``benchmarks/purging.py``


@dataclass(frozen=True, slots=True)
class Count:
    """How many chunks belong to a source or document."""

    name: str
    chunks: int


@dataclass(frozen=True, slots=True)
class Example:
    """A selected chunk: its text, and where the match begins and ends, in characters (both 0: no match).

    ``figure``: the distance or score, if the selector measures one. Text with a match is as the selector
    searched it.
    """

    selector: str
    chunk: int
    document: str
    source: str
    text: str
    begin: int
    end: int
    figure: float | None = None


@dataclass(frozen=True, slots=True)
class Touched:
    """What an erase would rewrite: parts, index shards and neighbour tables with their ``rows``.

    ``bytes``: size of the files. ``seconds``: estimated time on one core.
    """

    parts: int
    shards: int
    tables: int
    bytes: int
    rows: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Review:
    """A selection in detail: the ``sources`` and ``documents`` with the most chunks, and examples."""

    sources: tuple[Count, ...]
    documents: tuple[Count, ...]
    examples: tuple[Example, ...]
    touched: Touched


@dataclass(frozen=True, slots=True, kw_only=True)
class PurgeResult(EraseResult):
    """What ``purge`` did or would do.

    * ``purge``: its id, "" if there was nothing to purge.
    * ``purges``: those that were erased: this one, or earlier ones by the same selectors whose erase was
      resumed, the newest first.
    * ``unerased``: selected chunks, copies included, that are not erased yet.
    * ``blocked``: hashes of ids, texts and tokens that were not on the block list before.
    * ``same_text``: live documents with the text of a selected one that ``chunk`` had rejected.
    * ``matches``: how many chunks each selector selects.
    * ``review``: only of a dry run. ``out``: the file that it wrote the chunk ids to ("": none).
    """

    purge: str = ""
    chunks: int
    documents: int
    tokens: int
    already_purged: int
    share: float
    blocked: int
    dry_run: bool
    examples: tuple[int, ...]
    matches: tuple[Match, ...]
    same_text: purged_chunks.SameText
    review: Review | None = None
    out: str = ""


def purge(
    root: str | Path,
    selectors: Selectors,
    *,
    reason: str | None = None,
    who: str | None = None,
    dry_run: bool = False,
    out: str | Path | None = None,
    erase: bool = False,
    confirm: Callable[[PurgeResult], bool] = lambda _: True,
) -> PurgeResult:
    """Purge the chunks that ``selectors`` select; with ``erase``, also erase them.

    ``reason`` (not needed for a dry run) and ``who`` (default: see ``signed``) stay in the log. ``confirm``
    is called with what would be done; if it returns False nothing is changed. ``out``: a new file for the ids
    of the live chunks that a dry run selects, one per line, as ``Selectors.chunk`` reads them.
    """
    if not dry_run:
        who = signed(reason, who)
    if out is not None:
        if not dry_run:
            raise UsageError("--out needs --dry-run")
        check_file("--out", out, new=True)
    store = Store.open(root)
    request = selectors.read(store)
    agreed = (0, 0)  # the numbers of chunks and of unerased ones that ``confirm`` has agreed to

    def attempt() -> PurgeResult:
        nonlocal agreed
        if request.scan.plan(store):
            with writing(store) as run:
                engine.execute(request.scan, store, run)
        total = len(request.lookups) * len(store.state.all_parts())
        with counting("select", "part", total) as report:
            selection = select(store, request, erase=erase, report=report)
        planned = _planned(store, selection, dry_run, erase)
        if dry_run:
            if out is not None:
                with written(out) as path, path.open("w", encoding="ascii") as file:
                    file.writelines(f"{chunk}\n" for chunk in selection.live.tolist())
            return replace(planned, review=review(store, selection), out=str(out or ""))
        if planned.chunks > agreed[0] or planned.unerased > agreed[1]:
            if not confirm(planned):
                return planned
            agreed = planned.chunks, planned.unerased
        return _carry_out(store, selection, planned, str(reason), str(who), erase)

    return retry_overtaken(attempt, store.renew)


@dataclass(frozen=True, slots=True)
class PurgeEntry:
    """A purge in a list. ``time`` is UTC; ``state`` is "purged", "erased" or "undone"."""

    purge: str
    time: str
    state: str
    chunks: int
    documents: int
    selector: str
    reason: str
    who: str
    commit: int


@dataclass(frozen=True, slots=True)
class PurgeList:
    """The purges of a store, the newest last."""

    purges: tuple[PurgeEntry, ...]
    commit: int


def list_purges(root: str | Path) -> PurgeList:
    """List the purges of a store. Reads a commit for each."""
    state = (store := Store.open(root)).state
    found = []
    for purge, record in sorted(state.with_prefix(PREFIX).items(), key=lambda item: int(item[1]["commit"])):
        commit = log.read(store.storage, int(record["commit"]))
        found.append(
            PurgeEntry(
                purge, "" if commit is None else commit.time,
                "undone" if "undone" in record else "erased" if record["erased"] else "purged",
                *(record[name] for name in ("chunks", "documents", "selector", "reason", "who", "commit")),
            )
        )  # fmt: skip
    return PurgeList(tuple(found), state.number)


def _planned(store: Store, selection: Selection, dry_run: bool, erase: bool) -> PurgeResult:
    chunks, weight = len(selection.live), weight_of(selection.weights)
    unerased = len(purged_chunks.unerased(store, selection.named)) if erase else 0
    alive = store.state.records.get("totals", {}).get("chunks", 0)
    return PurgeResult(
        chunks=chunks, documents=weight.documents, tokens=weight.tokens,
        already_purged=len(selection.chunks) - chunks, share=chunks / max(alive, 1),
        unerased=unerased, unerased_share=unerased / max(purged_chunks.count_rows(store), 1),
        copies=selection.copied, blocked=int((~blocked.read_blocked(store).contains(selection.blocked)).sum()),
        dry_run=dry_run, commit=store.state.number,
        examples=tuple(selection.live[:10].tolist()), matches=selection.matches,
        same_text=purged_chunks.find_same_text(store, selection.chunks),
    )  # fmt: skip


def _carry_out(
    store: Store, selection: Selection, planned: PurgeResult, reason: str, who: str, erase: bool
) -> PurgeResult:
    with writing(store) as run:  # also with nothing to purge: an interrupted erase may have left files to remove
        purges = tuple(same_selector(store, selection.request))
        targets = selection.named
        # A killed erase can be resumed only if a purge names all its chunks.
        uncovered = erase and not np.isin(targets, named_chunks(store, purges)).all()
        if planned.chunks or planned.blocked or uncovered:
            purge = commit_purge(store, run, selection, reason, who)
            planned, purges = replace(planned, purge=purge), (purge,)
        if erase:
            return carry_out_erase(store, run, targets, replace(planned, purges=purges if len(targets) else ()))
        return replace(planned, commit=store.refresh().number)


def review(store: Store, selection: Selection) -> Review:
    """Describe the live chunks of a selection."""
    sources, documents = Counter[str](), Counter[str]()
    for _, table in purged_chunks.documents_of(store, selection.live, ["id", "source"]):
        for row in table.to_pylist():
            sources[row["source"] or ""] += row["chunks"]
            documents[row["id"] or ""] += row["chunks"]
    return Review(_most(sources), _most(documents), tuple(_examples(store, selection)), _touched(store, selection))


def _most(counts: Counter[str]) -> tuple[Count, ...]:
    return tuple(Count(name, n) for name, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:LARGEST])


def _examples(store: Store, selection: Selection) -> list[Example]:
    """Return up to ``EXAMPLES`` chunks per selector, evenly spread, in the order of their figures."""
    found = selection.found.filter(pa.array(np.isin(selection.found["chunks"].to_numpy(), selection.live)))
    decoder = Decoder(store)
    examples = []
    for number, selector in enumerate(selection.request.scan.selectors):
        mine = found.filter(pc.equal(found["selectors"], number)).sort_by("figures")
        for hit in mine.take(spread(mine.num_rows, EXAMPLES)).to_pylist():
            example = _example(store, decoder, selector.kind, hit["chunks"], (hit["begin"], hit["end"]))
            examples.append(example if math.isnan(hit["figures"]) else replace(example, figure=hit["figures"]))
    if not examples:
        some = selection.live[spread(len(selection.live), EXAMPLES)].tolist()
        examples = [_example(store, decoder, selection.request.kind, chunk, (0, 0)) for chunk in some]
    return examples


def _example(store: Store, decoder: Decoder, selector: str, chunk: int, span: tuple[int, int]) -> Example:
    part, row = split_id(chunk)
    first, last = max(row - 1, 0), min(row + 1, parts.part_entry(store, "chunks", part).rows - 1)
    chunks, place = read_rows(store, part, first, last + 1), row - first
    starts, text = decoder(chunks)  # folded text depends on the chunks beside it
    data = bytes(text[starts[place] : starts[place + 1]])
    begin, end = (len(data[: max(at, 0)].decode(errors="replace")) for at in span)
    documents = parts.read_documents(store, part, ["id", "source"]).slice(int(chunks.doc[place]), 1)
    shown = data.decode(errors="replace")
    if span == (0, 0):  # no match: the text as search shows it, which keeps words apart
        own = chunks.between(place, place + 1)
        shown = stored_tokenizer(store).decode_text(own.tokens, own.n_tokens)[0]
    name, source = documents["id"][0].as_py(), documents["source"][0].as_py()
    return Example(selector, chunk, name or "", source or "", shown, begin, min(end, len(shown)))


def _touched(store: Store, selection: Selection) -> Touched:
    numbers = distinct_parts(selection.live)
    files = [entry for part in numbers for entry in part_files(store, part)]
    several = list(files_of_several_parts(store, numbers))
    shards, tables = ([entry for entry in several if entry.kind == kind] for kind in ("index", "neighbours"))
    size = sum(entry.bytes for entry in (*files, *shards, *tables))
    seconds = size / _REWRITTEN if numbers else 0.0
    return Touched(len(numbers), len(shards), len(tables), size, sum(entry.rows for entry in tables), seconds)


def commit_purge(store: Store, run: Run, selection: Selection, reason: str, who: str) -> str:
    """Make all chunks of a selection tombstones and block their documents; return the id of the purge.

    Tombstones include chunks that other purges name, and rejected copies: these can't be found once their
    originals are erased. The files of the scan are removed. ``ConflictError`` if another purge, or copies in
    an unfinished plan, were committed since the selection was made.
    """
    request = selection.request
    purge = "p" + secrets.token_hex(4)
    seen = tombstone_paths(selection.state)
    add: list[FileEntry] = []
    hashed = selection.chunks, selection.blocked, selection.whole

    def build(state: State) -> Draft:
        if tombstone_paths(state) != seen:
            raise ConflictError("another purge was committed concurrently", "Run the same command again.")
        new = [part for part in purged_chunks.parts_of_open_plans(store) if part not in selection.open_parts]
        if len(purged_chunks.find_in_open_plans(store, new, *hashed)):
            raise ConflictError("copies of selected chunks were added concurrently", "Run the same command again.")
        counts = asdict(weight_of(selection.weights))
        literal_hash = store.identity.keyed_hash(request.literal)
        selector = {"selector": request.kind, "hash": literal_hash, "reason": reason, "who": who}
        record = {**counts, **selector, "commit": state.number + 1, "erased": False}
        records = {f"purge:{purge}": record, **purged_chunks.totals_after(state, selection.weights, -1)}
        gone = [entry.path for entry in state.group(SCANS, request.scan.scan(store)).entries()]
        return Draft("purge", selector, add=tuple(add), remove=tuple(gone), records=records)

    with purged_chunks.withdrawn(store, add):
        add.append(write_tombstones(store, FileName.new(run.id, "tombstones", purge, "parquet"), selection.named))
        if len(selection.blocked):
            name = FileName.new(run.id, "blocked", purge, "parquet")
            add.append(blocked.write_blocked(store, name, selection.blocked))
        # Last: it quotes the selection, and must not stay if another file can't be written.
        literal = {"kind": request.kind, "literal": request.literal}
        add.append(write_json_file(store, FileName.new(run.id, "selectors", purge, "json"), literal, 1))
        store.commit(run, build)
    return purge
