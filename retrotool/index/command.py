"""``retrotool index``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from retrotool.cli import output
from retrotool.cli.command_lines import next_command
from retrotool.cli.options import LEAST_MEMORY, DevicesOption, EncoderOption, Json, NoWaitOption, StoreArgument, opt
from retrotool.errors import UsageError
from retrotool.index.index_records import RECALL_SAMPLE
from retrotool.sizes import parse_size

if TYPE_CHECKING:
    from retrotool.index.run import Dropped, IndexResult

EPILOG = """\b
Examples:
  retrotool index store
  retrotool index store --name precise --target-recall 0.99 --default
  retrotool index store --name small --memory 500MB
  retrotool index store --name wide --factory IVF4,SQ8
  retrotool index store --tune --target-recall 0.9
  retrotool index store --tune --sample 5000
  retrotool index store --retrain
  retrotool index store --shard 3/16
  retrotool index store --merge
  retrotool index store --name wide --drop"""

_SOURCES = 8


def command(
    store: StoreArgument,
    name: Annotated[
        str | None, opt("Name of the index.  [default: the default index, else main]", metavar="NAME")
    ] = None,
    target_recall: Annotated[
        float | None,
        opt("Share of the true 10 nearest to find.  [default: the index's current target, else 0.95]", metavar="R"),
    ] = None,
    memory: Annotated[
        str | None, opt("Memory limit for building and searching; decides the code length.", metavar="SIZE")
    ] = None,
    nlist: Annotated[int | None, opt("Number of lists; 0: exact search.", metavar="N", least=0)] = None,
    code: Annotated[str | None, opt("float16, float32, sq8, pqM or opqM: M bytes per vector.", metavar="CODE")] = None,
    factory: Annotated[
        str | None, opt("Lists and code as a faiss string, such as OPQ64,IVF4096,PQ64.", metavar="STRING")
    ] = None,
    shard_size: Annotated[
        int | None, opt("Vectors per shard.  [default: a million, or what fits]", metavar="N", least=1, most=1 << 40)
    ] = None,
    no_wait: NoWaitOption = False,
    devices: DevicesOption = "auto",
    encoder: EncoderOption = None,
    sample: Annotated[
        int, opt("Number of random chunks to measure recall with.", metavar="N", least=1)
    ] = RECALL_SAMPLE,
    tune: Annotated[
        bool, opt("Measure again and choose the cheapest operating point that reaches the target.", "--tune")
    ] = False,
    retrain: Annotated[bool, opt("Train and build beside the current index, then switch.", "--retrain")] = False,
    merge: Annotated[bool, opt("Merge the small shards of parts added later.", "--merge")] = False,
    default: Annotated[bool, opt("Make it the default index.", "--default")] = False,
    drop: Annotated[bool, opt("Delete the index and all its files.", "--drop")] = False,
    as_json: Json = False,
) -> None:
    """Build the nearest-neighbour index and measure its true recall.

    Small stores are searched exactly. In larger ones vectors are stored in inverted lists as codes, 72 bytes
    each with the id, and candidates are re-ranked by the embeddings. Parts embedded later are added without
    retraining. Recall is measured with random chunks against exact search, leaving out their own documents;
    it decides how many lists are probed and how many candidates are re-ranked.
    """
    from retrotool.ann.choice import IndexOptions
    from retrotool.engine import is_a_job
    from retrotool.index import run as index_run

    if drop:
        _refuse_with_drop(
            tune=tune, retrain=retrain, merge=merge, default=default, target_recall=target_recall, memory=memory,
            nlist=nlist, code=code, factory=factory, shard_size=shard_size, encoder=encoder,
        )  # fmt: skip
        if name is None:
            raise UsageError("--drop needs the name of the index", "Give it with --name.")
        output.show(index_run.drop(store, name=name), as_json, _dropped)
        return
    size = None if memory is None else parse_size("--memory", memory, least=LEAST_MEMORY)
    wanted = IndexOptions(memory=size, nlist=nlist, code=code, factory=factory, shard_rows=shard_size)
    options = index_run.Options(wanted, devices, sample, tune, retrain, merge, default, not no_wait)
    result = index_run.index(store, name=name, encoder=encoder, target_recall=target_recall, options=options)
    output.show(result, as_json, index_text)
    if result.added and not (is_a_job() or result.not_embedded or result.in_other_runs or as_json):
        output.note(f"Next: {next_command(store, 'index', result.name)}")
    if result.not_embedded:
        output.note(f"Not indexed: {output.count(result.not_embedded, 'chunk')} without embeddings. Next:")
        output.note("\n".join(f"  {command}" for command in result.next))


def _refuse_with_drop(**others: object) -> None:
    for name, on in others.items():
        if on not in (None, False):
            raise UsageError(f"--drop and --{name.replace('_', '-')} can't be combined", "Give only one of them.")


def _dropped(result: Dropped) -> str:
    files = f"{output.count(result.files, 'file')}, {output.size(result.bytes)}"
    kept = f"\nNeighbours found with it are kept: {', '.join(result.tables)}." if result.tables else ""
    return f"Index {result.name!r} deleted: {files} (commit {result.commit}).{kept}"


def index_text(result: IndexResult) -> str:
    """Render a result of ``index`` as text."""
    new = "none" if not result.added else f"{result.added:,}"
    added = f", {new} of them new" if result.added < result.vectors else ""
    lines = [
        f"Index {result.name!r}: {output.count(result.vectors, 'vector')} of {result.encoder}{added}, {result.kind}, "
        f"{output.count(result.shards, 'shard')} (commit {result.commit})."
    ]
    if result.in_other_runs:
        are = "is" if result.in_other_runs == 1 else "are"
        return lines[0] + (
            f"\n{output.count(result.in_other_runs, 'shard')} {are} being built by other runs. The last of them "
            "measures the recall. If one fails, run the same command again."
        )
    if result.nlist:
        trained = output.size(result.trained_bytes)
        lines.append(
            f"In memory: {result.bytes_per_vector:,} bytes a vector, plus {trained} of training. "
            f"Read for re-ranking: {output.size(result.embedding_bytes)} of embeddings."
        )
        point = f" at {output.count(result.nprobe, 'list')} probed"
        point += f", {result.depth:,} candidates ranked" if result.depth else ""
    else:
        lines.append(f"In memory: {result.bytes_per_vector:,} bytes a vector ({result.why}).")
        point = ""
    if not result.queries:
        return "\n".join([*lines, "Recall was not measured: there are no vectors to search."])
    lines.append(f"True recall@10: {result.recall_at_10:.4f} ± {result.recall_error:.4f}{point}")
    if result.share < 1:
        lines.append(f"(estimated from {100 * result.share:.2g} % of the vectors)")
    if not result.target_met:
        lines.append(f"The target of {result.target} is not reached: recall@10 is {result.recall_at_10:.4f} at best.")
    if len(result.curve) > 1:
        # Only points that share the chosen depth or number of lists.
        shown = [p for p in result.curve if p.depth == result.depth or p.nprobe == result.nprobe]
        header = ("probed", "ranked", "recall@1", "recall@10", "recall@100", "codes/query", "queries/s")
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
    if result.retrain_reason:
        lines.append(f"Retraining is recommended: {result.retrain_reason}. Next:\n  {result.retrain_command}")
    return "\n".join(lines)
