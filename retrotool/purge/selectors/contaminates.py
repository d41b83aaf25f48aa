"""``--contaminates``: documents nearly equal to evaluation text, so that no test data is retrieved.

The rule is that of RETRO (arXiv 2112.04426, section 2.5 and appendix A): the distinct 13-grams of tokens of a
document and of an evaluation document are two sets. If their Jaccard similarity |A ∩ B| / |A ∪ B| is 0.8 or
more, all chunks of the document are selected. The similarity is computed exactly, not estimated from
sketches.

- The evaluation text is a store, chunked with the same tokenizer. Its purged chunks do not count. Purged
  chunks of the searched store do, because they may still be erased.
- No n-gram crosses purged evaluation text, erased chunks, or the border of key and value.
- A document too short for an n-gram matches documents with exactly the same tokens.

Not found: evaluation text quoted within a longer document (see ``near-duplicates-of``), or paraphrased.

Cost: reading, and 1 to 2 µs per chunk where little is found, 4 µs where a tenth of all n-grams are evaluation
text; and 0.4 µs per token of longer documents that have 0.8 of an evaluation document's n-grams. See
``ngrams``. Memory: 100 bytes per token of the evaluation text.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retrotool.errors import UsageError
from retrotool.purge.selectors.ngrams import Flags, GramSets, Ints, Tokens, distinct_rows, follows, reach
from retrotool.purge.selectors.selector import BlockHits, Selector, TextBlock
from retrotool.ranges import expand_ranges, pairs_of_ranges
from retrotool.store import parts
from retrotool.store.parts import Chunks
from retrotool.store.store import Store, check_compatible
from retrotool.store.tombstones import read_tombstones

GRAM = 13  # tokens of an n-gram
SIMILAR = 0.8  # the smallest Jaccard similarity of a selected document


@dataclass(frozen=True, slots=True)
class Contaminates(Selector):
    """Documents similar to one of the store ``evaluation``, as defined by the module."""

    kind: ClassVar[str] = "contaminates"
    evaluation: str
    as_of: str = ""
    """Identifies the evaluation store and its commit, so that a scan for another commit is not resumed."""

    def open(self, store: Store) -> ContaminationMatcher:
        """Read the evaluation text; ``UsageError`` if it has another tokenizer or is empty."""
        evaluation = Store.open(self.evaluation)
        advice = f"Chunk the evaluation text again, with --tokenizer {store.where(store.identity.tokenizer.file)}."
        check_compatible(evaluation, store, "their tokens can't be compared", advice, lengths=False)
        return read_evaluation(evaluation, GRAM, SIMILAR)


@dataclass(frozen=True, slots=True)
class _Grams:
    """Where n-grams begin in the tokens of chunks, concatenated with their padding.

    ``begin`` [r]: how many begin in each row, at its first tokens. ``of_document`` [d]: how many begin in
    each document; ``documents`` [d + 1] are the first rows of documents.
    """

    flat: Tokens
    length: int
    n_tokens: Ints
    begin: Ints
    documents: Ints
    of_document: Ints

    @classmethod
    def of(cls, chunks: Chunks, n_tokens: Ints, documents: Ints, n: int) -> _Grams:
        length = chunks.tokens.shape[1]
        row = reach(n_tokens, follows(chunks, n_tokens), length)
        begin = np.clip(row - n + 1, 0, n_tokens)
        total = np.append(0, np.cumsum(begin))
        flat = np.ascontiguousarray(chunks.tokens).reshape(-1)
        return cls(flat, length, n_tokens, begin, documents, np.diff(total[documents]))

    def without(self) -> Ints:
        total = np.append(0, np.cumsum(self.n_tokens))
        return np.flatnonzero((self.of_document == 0) & (np.diff(total[self.documents]) > 0))

    def tokens(self, document: int) -> bytes:
        """Return all tokens of a document as little-endian uint32."""
        rows = np.arange(self.documents[document], self.documents[document + 1])
        table = self.flat.reshape(-1, self.length)[rows]
        return table[np.arange(self.length) < self.n_tokens[rows, None]].astype("<u4").tobytes()


def read_evaluation(evaluation: Store, n: int, share: float) -> ContaminationMatcher:
    """Return the matcher for documents similar to those of a store."""
    tombstones = read_tombstones(evaluation)
    dtype = parts.token_dtype(evaluation.identity.tokenizer.token_bytes)
    grams, owners = [np.zeros((0, n), dtype)], [np.zeros(0, np.int64)]
    short: set[bytes] = set()
    for part in evaluation.state.parts():
        chunks = parts.read_chunks(evaluation, part)
        n_tokens = chunks.n_tokens.astype(np.int64)
        n_tokens[tombstones.rows(part)] = 0
        first = parts.read_documents(evaluation, part, ["first_row"])["first_row"].to_numpy().astype(np.int64)
        text = _Grams.of(chunks, n_tokens, np.append(first, len(chunks)), n)
        starts = np.arange(len(chunks)) * text.length
        row, places = pairs_of_ranges(starts, starts + text.begin)
        if len(row):
            grams.append(np.lib.stride_tricks.sliding_window_view(text.flat, n)[places])
            owners.append(parts.chunk_ids(part, chunks.doc[row]))
        short.update(text.tokens(document) for document in text.without().tolist())
    if not short and len(grams) == 1:
        raise UsageError(f"{evaluation.place} has no live text to compare with")
    sets = GramSets(np.concatenate(grams), np.unique(np.concatenate(owners), return_inverse=True)[1], share)
    return ContaminationMatcher(sets, short)


class ContaminationMatcher:
    """Finds documents similar to those of ``sets``, or equal to one of ``short`` (tokens as uint32)."""

    def __init__(self, sets: GramSets, short: set[bytes]) -> None:
        self._sets, self._short = sets, short

    def __call__(self, block: TextBlock) -> BlockHits:
        """Find matching rows of a block."""
        chunks, documents = block.chunks, block.documents
        text = _Grams.of(chunks, chunks.n_tokens.astype(np.int64), documents, self._sets.n)
        alike = np.zeros(len(documents) - 1, np.bool_)
        if len(self._sets):
            self._find(text, alike)
        if self._short:
            alike[[i for i in text.without().tolist() if text.tokens(i) in self._short]] = True
        rows = np.flatnonzero(np.repeat(alike, np.diff(documents)) & (chunks.n_tokens > 0))
        return BlockHits.whole(rows)

    def _find(self, text: _Grams, alike: Flags) -> None:
        """Mark similar documents in ``alike`` [d], which also excludes them from further comparisons."""
        at, hashes, least = self._sets.likely(text.flat)
        row = at // text.length
        begins = at - row * text.length < text.begin[row]
        at, hashes, least = at[begins], hashes[begins], least[begins]
        document = np.searchsorted(text.documents, at // text.length, side="right") - 1
        there = np.bincount(document, minlength=len(alike))
        # |A| is not known yet, so this excludes only documents with too little of B.
        enough = there[document] >= least
        at, gram = self._sets.identify(text.flat, at[enough], hashes[enough])
        document = np.searchsorted(text.documents, at // text.length, side="right") - 1
        entries, _ = self._sets.entries(document, gram)

        @functools.cache
        def size(document: int) -> int:  # distinct n-grams: ``of_document`` counts repeated ones too
            windows = np.lib.stride_tricks.sliding_window_view(text.flat, self._sets.n)
            rows = np.arange(text.documents[document], text.documents[document + 1])
            return len(distinct_rows(windows[expand_ranges(rows * text.length, text.begin[rows])])[0])

        up, down = self._sets.share
        for shared in self._sets.shared(entries, alike):
            columns = (shared.place, shared.count, self._sets.size[shared.owner])
            for place, both, theirs in zip(*(column.tolist() for column in columns), strict=True):
                most = down * both // up - theirs + both  # distinct n-grams of a similar document
                if not alike[place]:
                    alike[place] = int(text.of_document[place]) <= most or size(place) <= most
