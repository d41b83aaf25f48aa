"""``--like``: chunks near a text in embedding space, whatever words they use.

A chunk is selected if the squared L2 distance of its stored vector to a query is at most ``within``.
``retrotool search`` prints the same distance. The queries:

- A text given directly is one query, as for ``search``. A text longer than the encoder's limit is refused.
- The text of a file is cut into chunks like a document, by the store's tokenizer and chunk length. Each chunk
  is a query, embedded like the store's chunks, so a document's own text finds its chunks at distance 0.

All stored vectors are compared, without an index: lists that are not probed would be missed, and reading all
vectors costs less than decoding text. A part without embeddings is an error. Values of key-value records have
no vector and are never selected; ``--whole-documents`` selects them with their key. Purged chunks are
selected unless erased.

A float32 product excludes chunks that are farther by more than its rounding error. The other distances are
computed as ``search`` does (``ann.ranking``).

Cost: reading tokens, and 2 bytes per dimension and chunk; at 384 dimensions 0.6 to 1 µs per chunk and core
for up to 20 queries, and 15 ns per further query. Memory: about 20 MB per thread, or 64 rows times the
queries of a long file.
"""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from retrotool.ann.matmul import one_thread
from retrotool.ann.ranking import exact_distances
from retrotool.chunk.chunker import cut_chunks
from retrotool.cli.command_lines import command_line, embed_command
from retrotool.cli.options import read_given_file
from retrotool.embed.search_scope import pick_encoder, read_part_vectors
from retrotool.embed.store_encoder import EncoderRows, load_encoder
from retrotool.encoder import Encoder
from retrotool.errors import UsageError
from retrotool.index.index_records import default_index, index_record
from retrotool.lazy import torch
from retrotool.purge.selectors.selector import BlockHits, Matcher, Selector, TextBlock
from retrotool.ranges import as_slice, in_steps
from retrotool.store import parts
from retrotool.store.store import Store
from retrotool.tokenizers import stored_tokenizer

Vectors = npt.NDArray[np.float32]

_SLICE_ROWS, _LEAST_ROWS, _SLICE_PAIRS = 1 << 12, 64, 1 << 20
_PAIRS = 1 << 14  # fewer than what ``ann.ranking`` distributes among threads


@dataclass(frozen=True, slots=True)
class Like(Selector):
    """Chunks within a squared L2 distance of a text; ``cut``: the text is cut into chunks first.

    ``encoder`` and ``sha256`` identify the embeddings; ``device`` is where the text is embedded.
    """

    kind: ClassVar[str] = "like"
    text: str
    within: float
    encoder: str
    sha256: str
    cut: bool = False
    device: str = field(default="auto", compare=False)

    def reads(self, store: Store, part: int) -> list[str]:
        """Return the path of the part's embeddings; ``UsageError`` if it has none."""
        entry = store.state.part_file("embeddings", part, self.encoder)
        if entry is None:
            raise UsageError(
                f"--like: part {part} has no embeddings of {self.encoder} yet, so it can't be searched",
                f"Embed it first: {embed_command(store, self.encoder)}",
            )
        return [entry.path]

    def open(self, store: Store) -> Matcher:
        """Embed the text; ``UsageError`` if the encoder is not available, or the text is too long for it."""
        with closing(load_encoder(store, self.encoder, self.device)) as encoder:
            queries = _embed_pieces(store, encoder, self.text) if self.cut else _embed_whole(encoder, self.text)
        return _matcher(store, self.encoder, queries, np.float32(self.within))


def near(store: Store, given: str | Path, within: float | None, encoder: str | None, device: str = "auto") -> Like:
    """Return the selector for ``--like``; ``given`` is a text or the ``Path`` of a text file.

    ``encoder`` None: that of the default index, else the only one. ``UsageError`` for an invalid distance, an
    empty text, and a store without embeddings.
    """
    if within is None:
        raise UsageError("--like needs --within DISTANCE", "Give the largest squared L2 distance, as search prints it.")
    if not (math.isfinite(within) and within >= 0):
        raise UsageError(f"--within {within} is not a distance", "Give 0 or more, as retrotool search prints it.")
    is_file = isinstance(given, Path)
    text = read_given_file("--like", given) if is_file else str(given)
    if not text.strip():
        raise UsageError(f"--like: {given} has no text" if is_file else "--like: the text is empty")
    searched = index_record(store.state, default_index(store.state))
    wanted = encoder or (searched.encoder if searched is not None else None)
    if wanted is None and len(names := store.state.names("embeddings")) > 1:
        choose = f"Choose one by its index: {command_line('index', store.place)} --encoder NAME --default"
        raise UsageError(f"--like: the store has embeddings of {', '.join(names)}", choose)
    name = pick_encoder(store, wanted)
    return Like(text, float(within), name, str(store.state.records[f"encoder:{name}"]["sha256"]), is_file, device)


def _embed_whole(encoder: Encoder, text: str) -> Vectors:
    """Embed a text as ``search`` does, float32 [1, d]."""
    rows = encoder.tokenize_query(text)
    limit = encoder.identity.max_tokens
    before, after = encoder.tokenizer.special_tokens()
    room, n = limit - len(before) - len(after), int(rows.lengths[0])
    if n > room:
        raise UsageError(
            f"--like: the text has {n:,} tokens, and the encoder {encoder.identity.name} takes at most {room:,}",
            "Give it as @FILE: the text of a file is cut into chunks, and each is a query.",
        )
    return encoder.embed(rows).astype(np.float32)


def _embed_pieces(store: Store, encoder: Encoder, text: str) -> Vectors:
    """Embed the chunks of a text as ``chunk`` and ``embed`` do, float32 [q, d]."""
    own = store.identity
    ids, lengths = stored_tokenizer(store).encode_flat([text])
    if not len(ids):
        raise UsageError("--like: the text has no token of the store's tokenizer")
    cut = cut_chunks(ids, lengths, own.chunk_length, parts.token_dtype(own.tokenizer.token_bytes))
    found = encoder.embed(EncoderRows(store, encoder).rows(cut.tokens, cut.n_tokens))
    return np.unique(found.astype(np.float32), axis=0)


def _matcher(store: Store, encoder: str, queries: Vectors, within: np.float32) -> Matcher:
    """Return the matcher of chunks ``within`` a distance of one of ``queries``, float32 [q, d]."""
    lengths, threads = np.square(queries).sum(1), torch.get_num_threads()
    size = max(min(_SLICE_ROWS, _SLICE_PAIRS // len(queries)), _LEAST_ROWS)

    def near(vectors: npt.NDArray[np.float16], rows: npt.NDArray[np.int64]) -> BlockHits:
        """Return those ``rows`` of vectors [n, d] that are near enough, with their distances."""
        # torch widens float16 with the processor's instruction, numpy does not.
        wide = torch.from_numpy(np.require(vectors[as_slice(rows)], requirements=("C", "W"))).float()
        norms = torch.einsum("nd,nd->n", wide, wide).numpy()[:, None]
        least = norms + lengths  # |x|² + |q|², which bounds the rounding error
        # Each of d products and sums in float32 is rounded by at most 2^-24; this is several times that.
        slack = wide.shape[1] * 2.0**-21 * least + 1e-12
        least += torch.mm(wide, torch.from_numpy(queries).T).mul_(-2).numpy()
        least -= slack
        # Exact distances are needed only to queries that may be near enough and may be the nearest.
        row, query = np.nonzero(least <= np.minimum(within, (least + 2 * slack).min(1, keepdims=True)))
        nearest = np.full(len(rows), np.inf, np.float32)
        for q in np.unique(query).tolist():
            for pairs in in_steps(row[query == q], _PAIRS):
                apart = exact_distances(queries[q : q + 1], pairs[None], lambda ids: vectors[rows[ids]])[0]
                nearest[pairs] = np.minimum(nearest[pairs], apart)
        found = nearest <= within
        return BlockHits.whole(rows[found], nearest[found])

    def match(block: TextBlock) -> BlockHits:
        vectors = read_part_vectors(store, encoder, block.chunks.part)[block.first :][: len(block)]
        with one_thread(threads):  # blocks are processed in parallel
            steps = in_steps(np.flatnonzero(block.chunks.embedded), size)
            return BlockHits.joined([near(vectors, rows) for rows in steps])

    return match
