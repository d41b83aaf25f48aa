"""``retrotool index``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from retrotool.cli import output
from retrotool.cli.options import (
    LEAST_MEMORY,
    DevicesOption,
    EncoderOption,
    Json,
    ShardOption,
    StoreArgument,
    opt,
    parse_shard,
    parse_size,
)
from retrotool.errors import UsageError
from retrotool.index.index_records import QUERIES

if TYPE_CHECKING:
    from retrotool.index.run import Dropped, IndexResult

EPILOG = """\b
Examples:
  retrotool index store
  retrotool index store --name precise --target-recall 0.99 --default
  retrotool index store --name small --memory 500MB
  retrotool index store --name wide --factory IVF4,SQ8
  retrotool index store --tune --target-recall 0.9
  retrotool index store --evaluate --queries 5000
  retrotool index store --retrain
  retrotool index store --shard 3/16
  retrotool index store --merge
  retrotool index store --repair
  retrotool index store --name wide --drop"""

_SOURCES = 8


def command(
    store: StoreArgument,
    name: Annotated[
        str | None, opt("Name of the index.  [default: the default index, else main]", metavar="NAME")
    ] = None,
    target_recall: Annotated[
        float | None,
        opt("Share of the true 10 nearest to find.  [default: what the index has, else 0.95]", metavar="R"),
    ] = None,
    memory: Annotated[
        str | None, opt("What search may hold, and building: longer codes, or shorter ones.", metavar="SIZE")
    ] = None,
    nlist: Annotated[int | None, opt("Lists; 0: exact search.", metavar="N", least=0)] = None,
    code: Annotated[str | None, opt("float16, float32, sq8, pqM or opqM: M bytes a vector.", metavar="CODE")] = None,
    factory: Annotated[str | None, opt("All of it as a faiss string, such as OPQ64,IVF4096,PQ64.", metavar="F")] = None,
    shard_size: Annotated[
        int | None, opt("Vectors of a shard.  [default: a million, or what fits]", metavar="N", least=1, most=1 << 40)
    ] = None,
    shard: ShardOption = None,
    devices: DevicesOption = "auto",
    encoder: EncoderOption = None,
    queries: Annotated[int, opt("Random chunks to measure the recall with.", metavar="N", least=1)] = QUERIES,
    tune: Annotated[
        bool, opt("Measure anew, and take the cheapest operating point that holds the target.", "--tune")
    ] = False,
    evaluate: Annotated[
        bool, opt("Measure anew at the operating point that there is; build nothing.", "--evaluate")
    ] = False,
    retrain: Annotated[bool, opt("Train anew beside the old one, and switch when all is done.", "--retrain")] = False,
    merge: Annotated[bool, opt("Join the small shards of parts that came later.", "--merge")] = False,
    repair: Annotated[bool, opt("Read every shard, and make those anew that are broken.", "--repair")] = False,
    default: Annotated[bool, opt("Make it the index that is searched where none is named.", "--default")] = False,
    drop: Annotated[bool, opt("Take the index away, with all its files.", "--drop")] = False,
    as_json: Json = False,
) -> None:
    """Build the nearest-neighbour index, and measure its true recall.

    Small stores are searched exactly. Above, vectors are put into lists, as codes of 72 bytes with their ids, and what
    is found by codes is ranked by the embeddings themselves. Parts that were embedded since are added, under the same
    training. The recall is that of random chunks against exact search over all that is indexed, their own documents
    left out; how many lists are probed, and how many candidates ranked, is chosen by it.
    """
    with output.errors(as_json):
        from retrotool.ann.choice import IndexWishes
        from retrotool.index import run as index_run

        other = {"tune": tune, "retrain": retrain, "merge": merge, "repair": repair, "default": default}
        building = {
            "nlist": nlist, "code": code, "factory": factory, "shard_size": shard_size, "shard": shard,
            "encoder": encoder,
        }  # fmt: skip
        if drop:
            _refuse("--drop", evaluate=evaluate, **other, target_recall=target_recall, memory=memory, **building)
            if name is None:
                raise UsageError("--drop takes an index away for good", "Say which, with --name.")
            output.show(index_run.drop(store, name=name), as_json, _dropped)
            return
        size = None if memory is None else parse_size("--memory", memory, least=LEAST_MEMORY)
        if evaluate:
            _refuse("--evaluate", **other, target_recall=target_recall, **building)
            found = index_run.evaluate(store, name=name, queries=queries, devices=devices, memory=size)
            output.show(found, as_json, _text)
            return
        wanted = IndexWishes(memory=size, nlist=nlist, code=code, factory=factory, shard_rows=shard_size)
        options = index_run.Options(wanted, devices, parse_shard(shard), queries, tune, retrain, merge, repair, default)
        result = index_run.index(store, name=name, encoder=encoder, target_recall=target_recall, options=options)
        output.show(result, as_json, _text)
        if result.not_embedded:
            output.note(f"Not indexed: {output.count(result.not_embedded, 'chunk')} without embeddings. Next:")
            output.note("\n".join(f"  {command}" for command in result.next))


def _refuse(option: str, **others: object) -> None:
    given = [f"--{name.replace('_', '-')}" for name, on in others.items() if on not in (None, False)]
    if given:
        raise UsageError(f"{option} and {given[0]} are two things to do", "Give one of them.")


def _dropped(result: Dropped) -> str:
    files = f"{output.count(result.files, 'file')}, {output.size(result.bytes)}"
    text = f"Index {result.name!r} is gone: {files} (commit {result.commit})."
    if result.tables:
        text += f"\nNeighbours that were found with it stay as they are: {', '.join(result.tables)}."
    return text


def _text(result: IndexResult) -> str:
    added = f", {result.added:,} of them new" if 0 < result.added < result.vectors else ""
    lines = [
        f"Index {result.name!r}: {output.count(result.vectors, 'vector')} of {result.encoder}{added}, {result.kind}, "
        f"{output.count(result.shards, 'shard')} (commit {result.commit})."
    ]
    if result.elsewhere:
        are = "is" if result.elsewhere == 1 else "are"
        return lines[0] + (
            f"\n{output.count(result.elsewhere, 'shard')} {are} left to runs that are at work. The last of them "
            "measures the recall. Should one die, run the same command again."
        )
    if result.nlist:
        trained = output.size(result.trained_bytes)
        lines.append(
            f"In memory: {result.bytes_per_vector:,} bytes a vector, and {trained} of training. "
            f"Read when candidates are ranked: {output.size(result.embedding_bytes)} of embeddings."
        )
        point = f" at {output.count(result.nprobe, 'list')} probed"
        point += f", {result.depth:,} candidates ranked" if result.depth else ""
    else:
        lines.append(f"In memory: {result.bytes_per_vector:,} bytes a vector ({result.why}).")
        point = ""
    if not result.queries:
        return "\n".join([*lines, "There are no two documents to find in one another: no recall to measure."])
    lines.append(f"True recall@10: {result.recall_at_10:.4f} ± {result.recall_error:.4f}{point}")
    if result.share < 1:
        lines.append(f"(estimated from {100 * result.share:.2g} % of the vectors)")
    if not result.holds:
        lines.append(f"The target of {result.target} is not held: it is {result.recall_at_10:.4f} at best.")
    if len(result.curve) > 1:
        # At the depth that was chosen, and at the lists that were.
        shown = [p for p in result.curve if p.depth == result.depth or p.nprobe == result.nprobe]
        header = ("probed", "ranked", "recall@1", "recall@10", "recall@100", "codes a query", "queries/s")
        points = [
            (p.nprobe, p.depth, p.recall_at_1, p.recall_at_10, p.recall_at_100, int(p.scanned), int(p.rate))
            for p in shown
        ]
        lines.append(output.table(points, header))
    sources = result.groups.get("source", {})
    if len(sources) > 1 and any(values[0] < 1 for values in sources.values()):
        rows = [(name, *values) for name, values in list(sources.items())[:_SOURCES]]
        lines.append(output.table(rows, ("source", "recall@10", "±", "queries")))
        if len(sources) > _SOURCES:
            lines.append(f"and {output.count(len(sources) - _SOURCES, 'smaller source')}, see --json")
    if result.due:
        lines.append(f"Training anew is due: {result.due}. Next:\n  {result.retrain}")
    return "\n".join(lines)
