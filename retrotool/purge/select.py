"""Selectors of a purge, and the chunks that they select.

Ids, expressions over document columns and repeated chunks are looked up (``selectors.lookup``). Other
selectors scan all text, tokens or vectors of the store (``selectors.scan``). The selection is the union of
all selectors, with ``every`` their intersection, with ``whole_documents`` widened to all chunks of its
documents.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from retrotool.chunk.chunk_plan import chunks_of, chunks_of_purges, documents_within
from retrotool.cli.options import check_utf8
from retrotool.encoder.devices import check_device
from retrotool.engine.task import Report
from retrotool.errors import UsageError
from retrotool.machine import user_name
from retrotool.purge import purged_chunks
from retrotool.purge.selectors.classified import classified
from retrotool.purge.selectors.contaminates import Contaminates
from retrotool.purge.selectors.copies import NearDuplicates
from retrotool.purge.selectors.like import near
from retrotool.purge.selectors.lookup import Lookup, select_ids
from retrotool.purge.selectors.patterns import Patterns, read_patterns
from retrotool.purge.selectors.pii import KINDS, PersonalData
from retrotool.purge.selectors.scan import ScanStage, read_scan
from retrotool.purge.selectors.selector import GivenValue, Selector, Values, read_values
from retrotool.purge.selectors.terms import Terms, read_terms
from retrotool.store import blocked, parts
from retrotool.store.blocked import Hashes
from retrotool.store.parts import Ids
from retrotool.store.state import State
from retrotool.store.store import Store
from retrotool.store.tombstones import Record, Tombstones, named_chunks, read_tombstones, standing_purges
from retrotool.store.weights import Weights, weigh_chunks

_ADVICE = "Nothing was purged. See: retrotool purge --help"


@dataclass(frozen=True, slots=True, kw_only=True)
class Selectors:
    """Selectors: the union of all given ones, or with ``every`` their intersection.

    ``Values`` is a value, a ``Path`` (a file with one value per line), or several of these.

    * ``chunk``, ``document``: ids.
    * ``where``: an expression over document columns.
    * ``pattern``: RE2 patterns over text. ``terms``: a file of words and names. ``pii``: kinds of personal
      data (``selectors.pii.KINDS``).
    * ``near_duplicates_of``: ids of chunks whose copies to select. ``contaminates``: a store of evaluation
      text.
      ``duplicates``: chunks that repeat an earlier one.
    * ``like``: a text, or the ``Path`` of a text file; selects chunks whose stored vector is ``within`` this
      squared L2 distance of it, by the embeddings of ``encoder`` (None: those that are searched by default).
    * ``classifier``: a model directory; selects chunks to which it gives ``label`` with a score of at least
      ``above``.
    * ``device``: where these two models run.
    * ``whole_documents``: extend the selection to all chunks of its documents.
    * ``allow_lossy``: search folded text (``selectors.selector``) if the tokenizer loses case or spacing.
    """

    chunk: Values = ()
    document: Values = ()
    where: str | None = None
    pattern: Values = ()
    terms: str | Path | None = None
    pii: tuple[str, ...] = ()
    near_duplicates_of: Values = ()
    contaminates: str | Path | None = None
    duplicates: bool = False
    like: str | Path | None = None
    within: float | None = None
    encoder: str | None = None
    classifier: str | Path | None = None
    label: str | None = None
    above: float | None = None
    device: str = "auto"
    every: bool = False
    whole_documents: bool = False
    allow_lossy: bool = False

    def read(self, store: Store) -> Request:
        """Read the files; ``UsageError`` if none is given, or one can't be used with this store."""
        for name in ("where", "like", "contaminates", "encoder", "label"):
            if (value := getattr(self, name)) is not None:
                check_utf8(f"--{name}", str(value))
        ids = (("chunk", self.chunk), ("document", self.document))
        lookups = [Lookup(kind, values) for kind, given in ids if (values := read_values(f"--{kind}", given, "id"))]
        if self.where is not None:
            lookups.append(Lookup("where", (GivenValue(self.where),)))
        if self.duplicates:
            lookups.append(Lookup("duplicates"))
        scanned = self._scanned(store)
        if not lookups and not scanned:
            raise UsageError("no selector was given", "Give --document, --where, --pattern or another.")
        lossy = not self.allow_lossy and not store.identity.tokenizer.lossless
        if readers := [selector for selector in scanned if lossy and selector.reads_text]:
            raise UsageError(
                f"--{readers[0].kind}: the tokenizer of {store.place} loses case or spacing, so the original text "
                "can't be searched",
                "Give --allow-lossy to search what the tokenizer keeps: perhaps in lower case, with one space "
                "between two words and none beside other characters.",
            )
        return Request(tuple(lookups), ScanStage(tuple(scanned)), self.every, self.whole_documents)

    def _scanned(self, store: Store) -> list[Selector]:
        found: list[Selector] = []
        if patterns := read_patterns(self.pattern):
            found.append(Patterns(patterns))
        if self.terms is not None:
            found.append(Terms(read_terms(Path(self.terms))))
        if self.pii:
            found.append(PersonalData(self.pii))
        if copied := read_values("--near-duplicates-of", self.near_duplicates_of, "id"):
            found.append(NearDuplicates(tuple(select_ids(store, copied).tolist())))
        if self.contaminates is not None:
            evaluation = Store.open(self.contaminates)
            as_of = f"{evaluation.identity.uuid} {evaluation.state.number}"
            found.append(Contaminates(evaluation.uri, as_of=as_of))
        check_device(self.device)
        if self.like is not None:
            found.append(near(store, self.like, self.within, self.encoder, self.device))
        elif self.within is not None or self.encoder is not None:
            alone = "--within" if self.within is not None else "an encoder"
            raise UsageError(f"{alone} needs --like TEXT", _ADVICE)
        if self.classifier is not None:
            found.append(classified(self.classifier, self.label, self.above, self.device))
        elif self.label is not None or self.above is not None:
            raise UsageError("a label and a score need a classifier", _ADVICE)
        return found


@dataclass(frozen=True, slots=True)
class Request:
    """``Selectors`` with their files read: at least one, to look up, or to ``scan`` for before selecting."""

    lookups: tuple[Lookup, ...]
    scan: ScanStage
    every: bool
    whole_documents: bool

    @property
    def _selectors(self) -> tuple[Lookup | Selector, ...]:
        return *self.lookups, *self.scan.selectors

    @property
    def kind(self) -> str:
        """The kinds of the selectors, as one text."""
        return (" and " if self.every else ", ").join(one.kind for one in self._selectors)

    @property
    def literal(self) -> str:
        """The request as JSON, equal for equal requests."""
        selectors = [(one.kind, one.literal()) for one in self._selectors]
        request = {"selectors": selectors, "every": self.every, "whole_documents": self.whole_documents}
        return orjson.dumps(request, option=orjson.OPT_SORT_KEYS).decode()


@dataclass(frozen=True, slots=True)
class Match:
    """How many chunks a selector selects by one of its names ("": it has only one)."""

    selector: str
    name: str
    chunks: int


@dataclass(frozen=True, slots=True)
class Selection:
    """The chunks that a ``request`` selects in ``state``.

    * ``matches``: how many each selector selects. ``found``: what scans found (``parts.SCANS_SCHEMA``).
    * ``chunks``: all ids, ascending. ``live``: those not purged before. ``weights``: what these take from the
      totals.
    * ``blocked``: hashes that keep what is purged from coming back; ``whole``: those of whole documents.
    * ``open_parts``: parts of open plans that were searched for copies, which are among ``chunks``.
    * ``named``: ``chunks``, and for an erase those of ``copied`` rejected documents that repeat these.
    """

    request: Request
    state: State
    matches: tuple[Match, ...]
    found: pa.Table
    chunks: Ids
    live: Ids
    weights: Weights
    blocked: Hashes
    whole: Hashes
    named: Ids
    copied: int
    open_parts: tuple[int, ...]


def same_selector(store: Store, request: Request) -> dict[str, Record]:
    """Return the records, by id, of standing purges by the same selectors, the newest first."""
    wanted = (request.kind, store.identity.keyed_hash(request.literal))
    same = {p: r for p, r in standing_purges(store.state).items() if (r["selector"], r["hash"]) == wanted}
    return dict(sorted(same.items(), key=lambda item: -int(item[1]["commit"])))


def select(store: Store, request: Request, *, erase: bool = False, report: Report = lambda _: None) -> Selection:
    """Select the chunks of a request, whose scan must be done; ``report`` is called with 1 per part read.

    The erase of a purge by the same selectors may have been interrupted, so that its documents can't be found
    any more. Then missing documents are not an error, and with ``erase`` all chunks that it names are
    selected too.
    """
    earlier = same_selector(store, request)
    found = read_scan(store, request.scan)
    sets: list[Ids] = []
    matches: list[Match] = []
    for lookup in request.lookups:
        sets.append(lookup.select(store, missing_ok=bool(earlier), report=report))
        matches.append(Match(lookup.kind, "", len(sets[-1])))
    for number, selector in enumerate(request.scan.selectors):
        originals = np.array(selector.chunks) if isinstance(selector, NearDuplicates) else None
        if originals is not None and not earlier and not len(purged_chunks.unerased(store, originals)):
            raise UsageError("--near-duplicates-of: all of these chunks are erased, so copies can't be found")
        mine = found.filter(pc.equal(found["selectors"], number))
        sets.append(np.unique(mine["chunks"].to_numpy()))
        matches += _matches(selector, mine["labels"].to_numpy())
    chunks: Ids = functools.reduce(np.intersect1d if request.every else np.union1d, sets)
    if request.whole_documents:
        several = purged_chunks.documents_of(store, chunks, [])
        whole = (chunks_of(store, part, table["doc"].to_numpy()) for part, table in several)
        chunks = np.concatenate([chunks[:0], *whole])
    hashes, of_whole = hashes_to_block(store, chunks)  # earlier purges have blocked what they named
    open_parts = purged_chunks.parts_of_open_plans(store)
    chunks = np.union1d(chunks, purged_chunks.find_in_open_plans(store, open_parts, chunks, hashes, of_whole))
    named, copied = chunks, 0
    if erase:
        begun = [purge for purge, record in earlier.items() if not record["erased"]]
        chunks = np.union1d(chunks, named_chunks(store, begun))
        copies, copied = purged_chunks.find_copies(store, chunks)
        named = np.union1d(chunks, copies)
    live, weights = weigh_chunks(store, chunks, read_tombstones(store))
    return Selection(
        request, store.state, tuple(matches), found, chunks, live, weights, hashes, of_whole, named, copied,
        tuple(open_parts),
    )  # fmt: skip


def _matches(selector: Selector, labels: Ids) -> list[Match]:
    names = list(selector.names)
    counts = np.bincount(labels, minlength=len(names)).tolist()
    if names in ([""], [selector.kind]):
        return [Match(selector.kind, "", counts[0])]
    return [Match(selector.kind, name, n) for name, n in zip(names, counts, strict=True) if n]


def hashes_to_block(store: Store, chunks: Ids) -> tuple[Hashes, Hashes]:
    """Return the hashes to block: ids of wholly purged documents; texts and tokens of all concerned.

    The second hashes are those of wholly purged documents alone.

    Chunks of earlier purges count as purged, rejected documents do not. Erased documents can't be hashed.
    Reads all row groups that hold one of these documents.
    """
    purged = Tombstones(np.union1d(chunks, chunks_of_purges(store).ids))
    secret = store.identity.secret
    found, of_whole = [np.zeros(0, blocked.HASH)], [np.zeros(0, blocked.HASH)]
    for part, table in purged_chunks.documents_of(store, chunks, ["id", "text_hash", "n_chunks"]):
        whole = np.isin(table["doc"].to_numpy(), documents_within(store, part, purged))
        tokens = blocked.stored_tokens(store, parts.part_entry(store, "chunks", part), table)
        of_whole.append(blocked.id_hashes(secret, table["id"].filter(pa.array(whole)).drop_null().to_pylist()))
        for into, which in ((of_whole, whole), (found, ~whole)):
            texts = table["text_hash"].filter(pa.array(which)).drop_null().to_pylist()
            into += [blocked.keyed_texts(secret, texts), tokens[which & (tokens != b"")]]
    return np.unique(np.concatenate([*found, *of_whole])), np.unique(np.concatenate(of_whole))


def signed(reason: str | None, who: str | None) -> str:
    """Return who purges, for the log: ``who``, else ``$RETROTOOL_WHO``, else the user of this process.

    ``UsageError`` for a ``reason`` or name that can't be stored.
    """
    if reason is None or not reason.strip():
        what = "missing" if reason is None else "empty"
        raise UsageError(f"--reason is {what}", "Say why, without naming a person: it stays in the log.")
    who = who or user_name()
    check_utf8("--reason", reason)
    check_utf8("RETROTOOL_WHO", who)
    return who


def kinds_of(text: str | None) -> tuple[str, ...]:
    """Parse ``--pii``: "all", or kinds of personal data separated by commas."""
    if text is None:
        return ()
    return KINDS if text == "all" else tuple(dict.fromkeys(kind.strip() for kind in text.split(",")))
