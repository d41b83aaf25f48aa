"""``retrotool search``."""

from __future__ import annotations

import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from retrotool.cli import options, output
from retrotool.cli.command_lines import SHOWN, command_line
from retrotool.cli.options import IndexOption, Json, SourceOption, StoreArgument, WhereOption, arg, opt
from retrotool.errors import StoreNotFoundError, UsageError
from retrotool.store.store import Store, retry_overtaken

if TYPE_CHECKING:
    from retrotool.index.searching import Database
    from retrotool.reader import Neighbour

EPILOG = """\b
Examples:
  retrotool search store "how do I open a file for reading?"
  retrotool search store "file objects" -k 3 --json
  retrotool search store "file objects" --source a --where "n_chunks > 1"
  retrotool search store @questions.txt
  retrotool search store "file objects" --index precise --nprobe 64 --rerank 200"""

_MOST = 1 << 40


@dataclass(frozen=True, slots=True)
class FoundChunk:
    """A chunk that was found; ``distance`` is squared L2."""

    id: int
    distance: float
    document: str
    text: str
    continuation: str | None


@dataclass(frozen=True, slots=True)
class Missing:
    """Broken shards, the number of ``vectors`` in them, and the ``share`` that is of the index."""

    shards: list[str]
    vectors: int
    share: float


@dataclass(frozen=True, slots=True)
class Answer:
    """The chunks that were found for a query."""

    query: str
    results: list[FoundChunk]


@dataclass(frozen=True, slots=True)
class Results:
    """Result of a search, see ``docs/json.md``: ``queries`` of a file, else ``results``."""

    results: list[FoundChunk] | None
    missing: Missing | None = None
    not_indexed: int = 0
    next: tuple[str, ...] = ()
    queries: list[Answer] | None = None


def command(
    store: StoreArgument,
    text: Annotated[str, arg("What to search for; @FILE (@- standard input): one query a line.", metavar="TEXT")],
    k: Annotated[int, opt("Number of chunks to show.", "-k", metavar="K", least=1, most=1000)] = SHOWN,
    where: WhereOption = None,
    sources: SourceOption = None,
    index: IndexOption = None,
    nprobe: Annotated[int | None, opt("Lists to probe.  [default: as tuned]", metavar="N", least=1, most=_MOST)] = None,
    rerank: Annotated[
        int | None, opt("Candidates to re-rank per 10 results.  [default: as tuned]", metavar="N", least=1, most=10**6)
    ] = None,
    allow_missing_shards: Annotated[
        bool, opt("Search the remaining shards if some are broken or missing.", "--allow-missing-shards")
    ] = False,
    devices: options.Device = "auto",
    as_json: Json = False,
) -> None:
    """Show the chunks nearest to a text, with their continuations."""
    from retrotool.embed.search_scope import count_left
    from retrotool.index.searching import commands_to_index
    from retrotool.reader import Reader
    from retrotool.store.expressions import with_sources
    from retrotool.store.identity import is_store
    from retrotool.store.storage import storage_at

    if not text.strip():
        raise UsageError("TEXT is empty")
    options.check_utf8("TEXT", text)
    given = options.at_file(text)
    many = isinstance(given, Path)
    lines = options.read_given_lines("TEXT", given, "query") if isinstance(given, Path) else [given]
    texts = [line for line in lines if line.strip()]

    def attempt() -> tuple[list[list[Neighbour]], Database, int]:
        if not is_store(storage_at(store)) and is_store(storage_at(text)):
            swapped = f"{command_line('search', text)} {shlex.quote(store)}"
            raise StoreNotFoundError(f"{store} is not a store, but {text} is", f"Give the store first: {swapped}")
        opened = Store.open(store)
        filtered, reader = with_sources(opened, where, sources or ()), Reader(opened)
        encoder = reader.load_encoder(index, devices)
        found = reader.search_many(
            texts, k, index, encoder, where=filtered, nprobe=nprobe, rerank=rerank,
            allow_missing=allow_missing_shards,
        )  # fmt: skip
        database = reader.database(index, allow_missing=allow_missing_shards)
        return found, database, count_left(database.store, database.held(), database.tombstones)

    found, database, left = retry_overtaken(attempt)
    broken = database.missing
    lost = sum(entry.rows for entry in broken)
    share = lost / max(database.vectors_in_log, 1)
    missing = Missing([entry.path for entry in broken], lost, share) if broken else None
    then = commands_to_index(database.store, database.encoder, database.name) if left else []
    state = database.store.state
    foreign = state.records[f"encoder:{database.encoder}"].get("foreign")
    if len(then) > 1 and state.with_prefix("neighbours:") and not foreign:
        then = [command_line("build", store)]
    answers = [Answer(query, list(map(_found, near))) for query, near in zip(texts, found, strict=True)]
    results, queries = (None, answers) if many else (answers[0].results, None)
    output.show(Results(results, missing, left, tuple(then), queries), as_json, _text)
    if 0 < (fewest := min(map(len, found))) < k:
        what = "--where and --source leave" if where or sources else "the index has"
        output.note(f"Fewer than {k}: {what} {output.count(fewest, 'live chunk')}.")
    if left:
        are = "is" if left == 1 else "are"
        commands = "".join(f"\n  {command}" for command in then)
        output.note(f"Not searched: {output.count(left, 'chunk')} that {are} not in the index. Next:{commands}")
    if missing is not None:
        output.note(
            f"Not searched: {100 * missing.share:.2f} % of the index, {output.count(missing.vectors, 'vector')} in "
            f"{output.count(len(missing.shards), 'broken shard')}. Repair it: {command_line('repair', store)}"
        )


def _found(near: Neighbour) -> FoundChunk:
    continuation = near.continuation.text if near.continuation else None
    return FoundChunk(near.id, near.distance, near.chunk.document, near.chunk.text, continuation)


def _text(found: Results) -> str:
    if found.queries is None:
        return _results(found.results or [])
    blocks = (f"{output.one_line(answer.query)}\n{_results(answer.results)}" for answer in found.queries)
    return "\n\n".join(blocks)


def _results(results: list[FoundChunk]) -> str:
    if not results:
        return "Nothing found: no live chunk is in the index, or none matches."
    from retrotool.store.parts import format_id

    blocks = []
    for place, result in enumerate(results, 1):
        document = output.one_line(result.document)
        blocks.append(f"{place}. distance {result.distance:.4f}  chunk {format_id(result.id)}  document {document}")
        blocks.append(_wrapped(result.text))
        if result.continuation is not None:
            blocks.append(_wrapped("… " + result.continuation, "     "))
    return "\n".join(blocks)


def _wrapped(text: str, indent: str = "   ") -> str:
    return textwrap.fill(" ".join(text.split()), output.line_width(), initial_indent=indent, subsequent_indent=indent)
