"""What a purge selects: the options of a caller, their files read, and the chunks that they mean.

Chunk ids, document ids and an expression over document columns are looked up (``selectors.lookup``); selectors by
content are compared with all tokens or all text of the store (``selectors.scan``). The selection is what any selector
means, or with ``every`` what all of them mean; with ``whole_documents`` all chunks of the documents that it touches.
"""

from __future__ import annotations

import getpass
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from retrotool.chunk.chunk_plan import chunks_of_purges, documents_within
from retrotool.encoder.devices import check_device
from retrotool.engine.task import Report
from retrotool.errors import UsageError
from retrotool.purge import purged_chunks
from retrotool.purge.selectors.classified import classified
from retrotool.purge.selectors.contaminates import Contaminates
from retrotool.purge.selectors.copies import NearDuplicates
from retrotool.purge.selectors.like import near
from retrotool.purge.selectors.lookup import Lookup, chunks_of, select_ids
from retrotool.purge.selectors.patterns import Patterns, read_patterns
from retrotool.purge.selectors.pii import KINDS, PersonalData
from retrotool.purge.selectors.scan import ScanStage, read_scan
from retrotool.purge.selectors.selector import GivenValue, Selector, Values, check_selector_text, read_values
from retrotool.purge.selectors.terms import Terms, read_terms
from retrotool.store import blocked, parts
from retrotool.store.blocked import Hashes, read_blocked
from retrotool.store.parts import Ids, rows_by_part
from retrotool.store.state import State
from retrotool.store.store import Store
from retrotool.store.tombstones import Record, Tombstones, named_chunks, read_tombstones, standing_purges

_ADVICE = "Nothing was purged. See: retrotool purge --help"


@dataclass(frozen=True, slots=True, kw_only=True)
class Selectors:
    """What to select: the union of all selectors, or with ``every`` their intersection.

    A ``Values`` is a value, a ``Path`` (a file with a value a line), or several of these.

    * ``chunk``, ``document``: ids of chunks and of documents.
    * ``where``: an expression over document columns.
    * ``pattern``: RE2 patterns over text. ``terms``: a file of words and names. ``pii``: kinds of personal data
      (``selectors.pii.KINDS``).
    * ``near_duplicates_of``: ids of chunks whose copies to select. ``contaminates``: a store of evaluation text.
      ``duplicates``: chunks that repeat an earlier one.
    * ``like``: a text, or the ``Path`` of a text file; selects chunks whose stored vector is ``within`` that squared L2
      distance of it, by the embeddings of ``encoder`` (None: those that are searched by default).
    * ``classifier``: a model directory; selects chunks to which it gives ``label`` with a score of at least ``above``.
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
        """Read what is in files; ``UsageError`` if nothing is asked for, or what can't be looked for in this store."""
        for name in ("where", "like", "contaminates", "encoder", "label"):
            if (value := getattr(self, name)) is not None:
                check_selector_text(f"--{name}", str(value))
        ids = (("chunk", self.chunk), ("document", self.document))
        lookups = [Lookup(kind, values) for kind, given in ids if (values := read_values(f"--{kind}", given, "id"))]
        if self.where is not None:
            lookups.append(Lookup("where", (GivenValue(self.where),)))
        if self.duplicates:
            lookups.append(Lookup("duplicates"))
        scanned = self._scanned(store)
        if not lookups and not scanned:
            raise UsageError("nothing says what to purge", "Give --document, --where, --pattern or another.")
        if not self.allow_lossy and not store.identity.tokenizer.lossless:
            for selector in scanned:
                if selector.reads_text:
                    raise UsageError(
                        f"--{selector.kind}: the tokenizer of {store.place} loses case or spacing, so text can't be "
                        "looked at as it was",
                        "With --allow-lossy it is compared with what is left, in lower case if the tokenizer has only "
                        "that, with one space between two words and none beside anything else.",
                    )
        return Request(tuple(lookups), tuple(scanned), self.every, self.whole_documents)

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
            found.append(Contaminates(str(Path(self.contaminates).absolute()), as_of=as_of))
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
    """What ``Selectors`` ask of a store, their files read: one selector or more.

    ``every``: what all of them mean; ``whole_documents``: all chunks of the documents.
    """

    lookups: tuple[Lookup, ...] = ()
    scanned: tuple[Selector, ...] = ()
    every: bool = False
    whole_documents: bool = False

    @property
    def _selectors(self) -> list[tuple[str, dict[str, Any]]]:
        several: list[Lookup | Selector] = [*self.lookups, *self.scanned]
        return [(one.kind, one.literal()) for one in several]

    @property
    def kind(self) -> str:
        """The kinds of its selectors."""
        return (" and " if self.every else ", ").join(kind for kind, _ in self._selectors)

    @property
    def literal(self) -> str:
        """All that was asked for, as JSON: the same for the same."""
        asked = {
            "selectors": self._selectors,
            "every": self.every,
            "whole_documents": self.whole_documents,
        }
        return orjson.dumps(asked, option=orjson.OPT_SORT_KEYS).decode()

    @property
    def scan(self) -> ScanStage | None:
        """The scan that has to be done before; None: there is nothing to scan for."""
        return ScanStage(self.scanned) if self.scanned else None


@dataclass(frozen=True, slots=True)
class Match:
    """How many chunks a selector means, by its kind and one of its names ("": it has only one)."""

    selector: str
    name: str
    chunks: int


@dataclass(frozen=True, slots=True)
class Selection:
    """The chunks that a ``request`` means in ``state``.

    ``matches`` are how many each selector means, and ``found`` is where in text scans found some. ``chunks`` are all
    ids, ascending, and ``live`` those that were not purged before; ``weights`` are what these take
    from the totals. ``blocked`` are the hashes that keep what is purged from coming back, and ``newly_blocked`` says
    how many of them the store does not have yet.

    For an erase ``copies`` are the chunks, and ``copied`` the number, of documents that repeat one selected and are
    tombstones for that; ``unerased`` counts the chunks of all that still have tokens. ``open_parts`` are the parts of
    open plans that were searched for copies, which are among ``chunks``.
    """

    request: Request
    state: State
    matches: tuple[Match, ...]
    found: pa.Table
    chunks: Ids
    live: Ids
    weights: purged_chunks.Weights
    blocked: Hashes
    newly_blocked: int
    copies: Ids
    copied: int = 0
    unerased: int = 0
    open_parts: tuple[int, ...] = ()


def same_selector(store: Store, request: Request) -> dict[str, Record]:
    """Records of the purges that asked for the same before, and were not undone, by their ids; the newest first."""
    wanted = (request.kind, store.identity.keyed_hash(request.literal))
    same = {p: r for p, r in standing_purges(store.state).items() if (r["selector"], r["hash"]) == wanted}
    return dict(sorted(same.items(), key=lambda item: -int(item[1]["commit"])))


def select(store: Store, request: Request, *, erase: bool = False, report: Report = lambda _: None) -> Selection:
    """Select the chunks that a request means; its scan must have been done. ``report`` is called with 1 a part read.

    A purge by the same selectors may have been interrupted in its erase, so that its documents can't be found any more:
    then missing ones are no error, and with ``erase`` all that it names is selected, too.
    """
    earlier = same_selector(store, request)
    found, names = read_scan(store, request.scan) if request.scan else (parts.SCANS_SCHEMA.empty_table(), [])
    sets: list[Ids] = []
    matches: list[Match] = []
    for lookup in request.lookups:
        sets.append(lookup.select(store, missing_ok=bool(earlier), report=report))
        matches.append(Match(lookup.kind, "", len(sets[-1])))
    for number, (selector, labels) in enumerate(zip(request.scanned, names, strict=True)):
        mine = found.filter(pc.equal(found["selectors"], number))
        sets.append(np.unique(mine["chunks"].to_numpy()))
        matches += _matches(selector, labels, mine["labels"].to_numpy())
    chunks = sets[0]
    for some in sets[1:]:
        chunks = np.intersect1d(chunks, some) if request.every else np.union1d(chunks, some)
    if request.whole_documents:
        chunks = widen(store, chunks)
    hashes = hashes_to_block(store, chunks)  # earlier purges have blocked what they named
    open_parts = purged_chunks.parts_of_open_plans(store)
    chunks = np.union1d(chunks, purged_chunks.find_in_open_plans(store, open_parts, chunks, hashes))
    copies, copied = np.zeros(0, np.int64), 0
    if erase:
        chunks = np.union1d(
            chunks, named_chunks(store, [purge for purge, record in earlier.items() if not record["erased"]])
        )
        copies, copied = purged_chunks.find_copies(store, chunks)
    live, weights = purged_chunks.weigh_chunks(store, chunks, read_tombstones(store))
    return Selection(
        request, store.state, tuple(matches), found, chunks, live, weights, hashes,
        int((~read_blocked(store).contains(hashes)).sum()), copies, copied,
        len(purged_chunks.unerased(store, np.union1d(chunks, copies))) if erase else 0, tuple(open_parts),
    )  # fmt: skip


def _matches(selector: Selector, names: list[str], labels: Ids) -> list[Match]:
    counts = np.bincount(labels, minlength=len(names))
    only = names in ([""], [selector.kind])
    counted = [("" if only else name, int(n)) for name, n in zip(names, counts, strict=True)]
    return [Match(selector.kind, name, n) for name, n in counted if n or only]


def widen(store: Store, chunks: Ids) -> Ids:
    """All chunks of the documents of which any of some chunks is, ascending."""
    found = [np.zeros(0, np.int64)]
    for part, rows in rows_by_part(chunks):
        first = parts.read_documents(store, part, ["first_row"])["first_row"].to_numpy()
        found.append(chunks_of(store, part, np.unique(np.searchsorted(first, rows, side="right") - 1)))
    return np.concatenate(found)


def hashes_to_block(store: Store, chunks: Ids) -> Hashes:
    """What a purge of ``chunks`` blocks: ids of documents purged as a whole then; texts and tokens of all it touches.

    Chunks of earlier purges count as purged, those of documents that repeat do not. What is erased can't be hashed.
    Reads all row groups of chunks that hold a document that it touches.
    """
    purged = Tombstones(np.union1d(chunks, chunks_of_purges(store).ids))
    secret = store.identity.secret
    found = [np.zeros(0, blocked.HASH)]
    for part, rows in rows_by_part(chunks):
        table = parts.read_documents(store, part, ["id", "text_hash", "first_row", "n_chunks"])
        docs = np.unique(np.searchsorted(table["first_row"].to_numpy(), rows, side="right") - 1)
        whole = np.intersect1d(docs, documents_within(store, part, purged))
        for column, of, hashed in (("id", whole, blocked.id_hashes), ("text_hash", docs, blocked.keyed_texts)):
            found.append(hashed(secret, table[column].take(pa.array(of)).drop_null().to_pylist()))
        tokens = blocked.stored_tokens(store, parts.part_entry(store, "chunks", part), table.take(pa.array(docs)))
        found.append(tokens[tokens != b""])
    return np.unique(np.concatenate(found))


def signed(reason: str, who: str | None) -> str:
    """Return who purges, for the log: ``who``, else ``$RETROTOOL_WHO``, else the user of this process.

    ``UsageError`` for a ``reason`` or name that can't be stored.
    """
    if not reason.strip():
        raise UsageError("--reason is empty", "Say why, in words that name no person: it stays in the log for ever.")
    if (who := who or os.environ.get("RETROTOOL_WHO")) is None:
        try:
            who = getpass.getuser()
        except (KeyError, OSError):  # a container's user may have a number and no name
            who = f"user {os.getuid()}"
    check_selector_text("--reason", reason)
    check_selector_text("RETROTOOL_WHO", who)
    return who


def kinds_of(text: str | None) -> tuple[str, ...]:
    """Return the kinds of personal data as ``--pii`` is given them, "all" or some apart by commas."""
    if text is None:
        return ()
    return KINDS if text == "all" else tuple(dict.fromkeys(kind.strip() for kind in text.split(",")))
