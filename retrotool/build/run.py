"""Bring a store up to date: chunk, embed, index and neighbours, with the store's settings or the defaults.

Each step is a command that resumes and does only what is new, so a build can be killed and run again. Every
encoder, index and table of neighbours of the store is updated; a store without one gets the default. Vectors
that were made elsewhere are not. On Ray, parts are embedded while others are chunked.
"""

from __future__ import annotations

import contextlib
import shlex
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from retrotool import engine
from retrotool.chunk.chunk_plan import ChunkOptions, unfinished_plans
from retrotool.chunk.run import ChunkResult, chunk, find_readable
from retrotool.cli.command_lines import command_line, embed_command, table_command
from retrotool.embed.run import EmbedResult, embed
from retrotool.encoder import find_encoder
from retrotool.errors import UsageError
from retrotool.index.run import IndexResult, Options, index
from retrotool.neighbours.run import NeighboursResult, SearchOptions, neighbours
from retrotool.neighbours.stage import database_of, members_of
from retrotool.sources.inputs import STANDARD_INPUT
from retrotool.store.identity import is_store
from retrotool.store.storage import storage_at
from retrotool.store.store import Store
from retrotool.tokenizers import BUNDLED

_LOOK_SECONDS = 0.5  # between two looks whether there is a store yet
Result = ChunkResult | EmbedResult | IndexResult | NeighboursResult


@dataclass(frozen=True, slots=True)
class Step:
    """A command of a build: its ``line``, as one would type it, and the function that runs it."""

    command: str
    line: str
    run: Callable[..., Result]


@dataclass(frozen=True, slots=True)
class BuildResult:
    """The results of the steps of a build, by command; ``chunk`` is None if there was nothing to chunk."""

    chunk: ChunkResult | None
    embed: tuple[EmbedResult, ...]
    index: tuple[IndexResult, ...]
    neighbours: tuple[NeighboursResult, ...]
    commit: int


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Options of a build: ``tokenizer`` for a new store, ``encoder`` for one without embeddings."""

    tokenizer: str | None = None
    chunk: ChunkOptions | None = None
    encoder: str | None = None
    devices: str = "auto"


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """The command lines that a build would run."""

    commands: tuple[str, ...]


def plan_build(root: str | Path, inputs: Sequence[str] = (), options: BuildOptions | None = None) -> BuildPlan:
    """Return what ``build`` would run; ``UsageError`` if that is nothing, or it can't read something."""
    given = options or BuildOptions()
    quiet = replace(given.chunk or ChunkOptions(), note=lambda _: None)  # ``chunk`` prints the notes
    find_readable([name for name in inputs if name != STANDARD_INPUT], quiet)
    steps = [*_chunk_steps(root, inputs, given), *_derived_steps(root, given)]
    if not (is_store(storage_at(root)) and Store.open(root).state.with_prefix("encoder:")):
        find_encoder(given.encoder or BUNDLED)  # before hours of chunking
    return BuildPlan(tuple(step.line for step in steps))


def build(
    root: str | Path,
    inputs: Sequence[str] = (),
    options: BuildOptions | None = None,
    *,
    before: Callable[[BuildPlan], object] = lambda _: None,
    after: Callable[[Step, Result], object] = lambda _, __: None,
) -> BuildResult:
    """Run ``chunk`` on inputs and whatever is unfinished, then update embeddings, indexes and neighbours.

    ``before`` is called with the plan, ``after`` with each finished step and its result.
    """
    given = options or BuildOptions()
    before(plan_build(root, inputs, given))
    done: dict[str, list[Any]] = {"chunk": [], "embed": [], "index": [], "neighbours": []}
    with engine.doing_everything():
        chunk_steps = list(_chunk_steps(root, inputs, given))
        with _embedding(root, given, beside=chunk_steps) as embedded:
            done["chunk"] = [step.run() for step in chunk_steps]
        done["embed"] = [result for _, result in embedded]
        for step, result in [*zip(chunk_steps, done["chunk"], strict=True), *embedded]:
            after(step, result)
        given = replace(given, encoder=None) if embedded else given
        for step in _derived_steps(root, given):  # the first step may have made the store
            if not (embedded and step.command == "embed"):
                done[step.command].append(result := step.run())
                after(step, result)
    return BuildResult(
        next(iter(done["chunk"]), None), tuple(done["embed"]), tuple(done["index"]), tuple(done["neighbours"]),
        Store.open(root).state.number,
    )  # fmt: skip


@contextlib.contextmanager
def _embedding(root: str | Path, given: BuildOptions, beside: Sequence[Step]) -> Iterator[list[tuple[Step, Result]]]:
    """Embed parts in a thread as they are chunked, on Ray; yield a list for the steps and their results.

    So nodes with GPUs work while others chunk. Elsewhere both would compete for the same cores.
    """
    found: list[tuple[Step, Result]] = []
    if engine.engine_in_use().name == "local" or not beside:
        yield found
        return
    is_over = threading.Event()

    def follow() -> None:
        while not is_store(storage_at(root)):
            if is_over.wait(_LOOK_SECONDS):
                return  # no store was made
        steps = [step for step in _derived_steps(root, given) if step.command == "embed"]
        found.extend((step, step.run(more=lambda: not is_over.is_set())) for step in steps)

    with ThreadPoolExecutor(1, "retrotool-embed") as thread:
        following = thread.submit(follow)
        try:
            yield found
        finally:
            is_over.set()
        following.result()


def _chunk_steps(root: str | Path, inputs: Sequence[str], given: BuildOptions) -> Iterator[Step]:
    exists = is_store(storage_at(root))
    if not inputs and not exists:
        raise UsageError(f"{root} is not a store, and no input was given", "Name files or folders to chunk.")
    if inputs or unfinished_plans(Store.open(root).state):
        line = _chunk_line(root, inputs, given.tokenizer, given.chunk or ChunkOptions())
        yield Step("chunk", line, partial(chunk, root, inputs, tokenizer=given.tokenizer, options=given.chunk))


def _chunk_line(root: str | Path, inputs: Sequence[str], tokenizer: str | None, options: ChunkOptions) -> str:
    """Return the command line of ``chunk`` with the options that ``build`` has too."""
    fields = options.fields
    kept = [word for name in fields.keep for word in ("--keep", name)]
    kept += [word for pattern in options.exclude for word in ("--exclude", pattern)]
    named = {
        "text-field": None if fields.text == "text" else fields.text,
        "id-field": fields.id if options.require_id else None,
        "existing": options.existing,
    }
    line = command_line("chunk", root, tokenizer=tokenizer, **named)
    return " ".join([line, *map(shlex.quote, (*kept, *inputs))])


def _is_known(encoder: str, records: Mapping[str, Any]) -> bool:
    with contextlib.suppress(UsageError):  # it is not there
        return find_encoder(encoder)[1].sha256 in {record["sha256"] for record in records.values()}
    return False


def _derived_steps(root: str | Path, given: BuildOptions) -> Iterator[Step]:
    """Yield the steps after ``chunk``: for what the store has, and for what it has none of, the defaults."""
    store = Store.open(root) if is_store(storage_at(root)) else None
    encoders, indexes, tables = (
        {} if store is None else store.state.with_prefix(prefix) for prefix in ("encoder:", "index:", "neighbours:")
    )
    if given.encoder is not None and encoders and not _is_known(given.encoder, encoders):
        advice = f"To add an encoder: {command_line('embed', root, encoder=given.encoder)}"
        raise UsageError(f"{root} has embeddings of another encoder, and --encoder is for a store without any", advice)
    devices = given.devices
    if not encoders:
        line = command_line("embed", root, encoder=given.encoder)
        yield Step("embed", line, partial(embed, root, encoder=given.encoder or BUNDLED, devices=devices))
    for name, record in encoders.items():
        assert store is not None, "it has an encoder"
        if not record.get("foreign"):
            pooling = str(record["pooling"]) if record.get("overridden") else "auto"
            work = partial(
                embed, root, encoder=str(record["origin"]), name=name, pooling=pooling,
                dimension=int(record["dimension"]) if record.get("truncated") else None, devices=devices,
            )  # fmt: skip
            yield Step("embed", embed_command(store, name), work)
    for name in indexes or ["main"]:
        line = command_line("index", root) if store is None else command_line("index", store, name=name)
        yield Step("index", line, partial(index, root, name=name, options=Options(devices=devices)))
    if not tables:
        search = SearchOptions(devices=devices)
        yield Step("neighbours", command_line("neighbours", root), partial(neighbours, root, search=search))
    for name in tables:
        assert store is not None, "it has a table"
        if any(name == table for mixture in tables if mixture != name for table, _ in members_of(store, mixture)):
            continue
        table = members_of(store, name)[0][0]  # of a mixture, the first: its command updates all
        database, record = database_of(store, table)
        exact = not record["index"]
        update = partial(
            neighbours, database.place, queries=None if database is store else store.place, name=name, k=record["k"],
            saved=record["saved"], index=record["index"] or None,
            search=SearchOptions(exact, record["encoder"] if exact else None, devices=devices),
        )  # fmt: skip
        yield Step("neighbours", table_command(store, table, database), update)
