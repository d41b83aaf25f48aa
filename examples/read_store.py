"""Read a store from Python: a chunk, its neighbours, and what follows each of them.

    python examples/read_store.py STORE [TABLE]

TABLE is the name of the neighbour tables, by default ``main``. No encoder is needed, because ``retrotool
neighbours`` has computed the neighbours before.
"""

from __future__ import annotations

import sys
import textwrap

import retrotool
from retrotool.errors import RetrotoolError
from retrotool.reader import Chunk, Reader


def paragraph(label: str, chunk: Chunk | None) -> str:
    """Return a chunk's text, wrapped, after a label; ``(end of the document)`` for no chunk."""
    text = "(end of the document)" if chunk is None else " ".join(chunk.text.split())
    return textwrap.fill(f"{label:<14}{text}", 100, subsequent_indent=" " * 14)


def first_chunk(reader: Reader) -> int | None:
    """Return the lowest live chunk id of the store; None if everything is purged."""
    for part in reader.parts():
        ids = reader.chunk_ids(part)
        if len(ids):
            return int(ids[0])
    return None


def main(store: str, table: str = "main") -> None:
    reader = retrotool.open(store)
    chunk_id = first_chunk(reader)
    if chunk_id is None:
        sys.exit(f"{store} has no live chunk")
    chunk = reader.chunk(chunk_id)
    print(f"{store} at commit {reader.commit}; chunk {chunk.id} of document {chunk.document}, {chunk.n_tokens} tokens")
    print(paragraph("chunk", chunk))
    for neighbour in reader.neighbours(chunk_id, table):
        found = neighbour.chunk
        print(f"\nneighbour {neighbour.id} of document {found.document}, squared distance {neighbour.distance:.4f}")
        print(paragraph("neighbour", found))
        print(paragraph("continuation", neighbour.continuation))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except RetrotoolError as error:
        print(f"error: {error}", error.advice, sep="\n", file=sys.stderr)
        sys.exit(error.exit_code)
