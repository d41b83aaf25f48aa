"""``retrotool plan``."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

from retrotool.ann.choice import TARGET_RECALL
from retrotool.chunk import CHUNK_LENGTH
from retrotool.cli import output
from retrotool.cli.command_lines import SAVED
from retrotool.cli.options import Json, opt, parse_number
from retrotool.errors import UsageError

if TYPE_CHECKING:
    from retrotool.plan.run import Plan, Rate, StagePlan

EPILOG = """\b
Examples:
  retrotool plan --tokens 1.75T --encoder bert-base --gpus 64
  retrotool plan --tokens 1.75T --encoder models/bert-base-uncased --gpus 64 --memory-per-host 512GB
  retrotool plan --tokens 20G --hosts 4 --cores 32 --rate embed=20 --rate read=500M
  retrotool plan --tokens 100B --gpus 8 --bucket --price gpu=2.50 --price get=0.0004 --price put=0.005"""

_corpus = partial(opt, panel="Database")
_machines = partial(opt, panel="Machines")


def command(
    tokens: Annotated[str, _corpus("Tokens of the corpus, such as 1.75T, 300B, 20M or 500k.", metavar="N")],
    encoder: Annotated[
        str,
        _corpus("minilm, bert-base, bert-large, a model directory, or LAYERSxDIMENSIONS, such as 12x768.", metavar="E"),
    ] = "minilm",
    tokens_per_document: Annotated[int, _corpus("Average tokens per document.", metavar="N")] = 700,
    chunk_length: Annotated[int, _corpus("Tokens per chunk.", metavar="N")] = CHUNK_LENGTH,
    neighbours: Annotated[int, _corpus("Neighbours to save per chunk.", metavar="N")] = SAVED,
    target_recall: Annotated[float, _corpus("Recall to choose the index for.", metavar="R")] = TARGET_RECALL,
    nprobe: Annotated[int, _corpus("Lists that each chunk is compared with.", metavar="N")] = 128,
    gpus: Annotated[int, _machines("Total number of GPUs; 0: CPU only.", metavar="N")] = 0,
    hosts: Annotated[int | None, _machines("Number of hosts.  [default: one per 8 GPUs]", metavar="N")] = None,
    cores: Annotated[int | None, _machines("CPU cores per host.  [default: as here]", metavar="N")] = None,
    memory_per_host: Annotated[str | None, _machines("Memory per host.  [default: as here]", metavar="SIZE")] = None,
    bucket: Annotated[bool, _machines("The store is in object storage, not on disks.")] = False,
    rate: Annotated[
        list[str] | None,
        _machines("Rate of a stage, in the plan's unit, such as embed=25k. Repeatable.", metavar="NAME=NUMBER"),
    ] = None,
    price: Annotated[
        list[str] | None,
        _machines(
            "Price of a gpu or host for an hour, of 1,000 get or put requests, or of a GB stored for a month, "
            "such as gpu=2.50. Repeatable.",
            metavar="NAME=NUMBER",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Estimate the size of a database's files and index, and the hours, bytes, requests and price of it.

    The estimate needs no store and no corpus. It is computed from rates, which are printed with their source.
    Hours are a lower bound, as disks and networks are rarely as fast as assumed.
    """
    from retrotool.plan import run as plan_run

    result = plan_run.plan(
        tokens, encoder=encoder, gpus=gpus, hosts=hosts, cores=cores, memory_per_host=memory_per_host,
        tokens_per_document=tokens_per_document, chunk_length=chunk_length, saved=neighbours,
        target_recall=target_recall, nprobe=nprobe, bucket=bucket,
        rates=dict(_parse("--rate", one, "embed=25k") for one in rate or ()),
        prices=dict(_parse("--price", one, "gpu=2.50") for one in price or ()),
    )  # fmt: skip
    output.show(result, as_json, _text)


def _parse(option: str, text: str, example: str) -> tuple[str, float]:
    name, separator, number = text.partition("=")
    if not separator:
        raise UsageError(f"{option} {text} is not NAME=NUMBER, such as {example}")
    return name, float(parse_number(f"{option} {name}", number))


def _text(plan: Plan) -> str:
    encoder, machines, index = plan.encoder, plan.machines, plan.index
    where = f"{output.count(machines.gpus, 'GPU')} on " if machines.gpus else ""
    memory = output.size(machines.memory)
    files = [(one.kind, output.size(one.bytes), one.each) for one in plan.files]
    stages = [_row(one) for one in plan.stages if one.tasks]
    requests = sum(one.gets + one.puts for one in plan.stages)
    stages.append(
        ("all", _hours(plan.gpu_hours), _hours(plan.core_hours), "", "", output.scaled(requests),
         _duration(plan.wall_hours), "" if plan.price is None else f"{plan.price:,.2f}", "")
    )  # fmt: skip
    shown = [0, 1, 2, 3, 4, *([5] if machines.bucket else []), 6, *([] if plan.price is None else [7]), 8]
    names = ("", "GPU-hours", "core-hours", "read", "written", "requests", "time", "price", "limited by")
    return "\n".join([
        f"{output.scaled(plan.tokens)} tokens: {output.scaled(plan.documents)} documents, "
        f"{output.scaled(plan.chunks)} chunks of up to {plan.chunk_length} tokens, {output.count(plan.parts, 'part')}",
        f"Encoder {encoder.name}: {encoder.layers} layers, {encoder.hidden:,} dimensions",
        f"Machines: {where}{output.count(machines.hosts, 'host')} of {output.count(machines.cores, 'core')} "
        f"and {memory} of memory",
        "",
        "Files",
        output.table([*files, ("all", output.size(plan.bytes), "")], right=(1,)),
        "",
        f"Index {index.factory}: {index.kind}",
        f"  chosen because: {index.why}",
        f"  training: {output.size(index.trained_bytes)}, from {output.scaled(index.sample)} vectors, "
        f"{output.size(index.sample_bytes)} in the memory of one host",
        f"  {output.count(index.shards, 'shard')}, {output.size(index.memory)} in memory: "
        f"{output.count(index.hosts, 'host')} of {memory}"
        + (", or read from disk" if index.hosts > machines.hosts else ""),
        "",
        "Stages, one after another",
        output.table(
            [tuple(row[n] for n in shown) for row in stages],
            tuple(names[n] for n in shown),
            right=tuple(range(1, len(shown) - 1)),
        ),
        *([] if plan.price_a_month is None else [f"Stored for a month: {plan.price_a_month:,.2f}"]),
        "",
        "Rates",
        output.table([(one.stage, _rate(one), f"per {one.per}", one.source) for one in plan.rates], right=(1,)),
        "",
        "Assumed",
        *(f"  {one}" for one in plan.assumptions),
    ])  # fmt: skip


def _row(one: StagePlan) -> tuple[str, ...]:
    return (
        one.name, _hours(one.gpu_hours), _hours(one.core_hours), output.size(one.read_bytes),
        output.size(one.written_bytes), output.scaled(one.gets + one.puts), _duration(one.wall_hours),
        "" if one.price is None else f"{one.price:,.2f}", one.limit,
    )  # fmt: skip


def _hours(n: float) -> str:
    if n < 0.005:
        return "<0.01" if n else "0"
    return f"{n:.2f}" if n < 0.995 else f"{n:.1f}" if n < 99.95 else f"{n:,.0f}"


def _duration(hours: float) -> str:
    for n, unit in ((hours, "h"), (60 * hours, "min"), (3600 * hours, "s")):
        if n >= 0.995:
            return f"{n:,.1f} {unit}" if n < (99.95 if unit == "h" else 9.95) else f"{n:,.0f} {unit}"
    return "< 1 s" if hours else "0"


def _rate(rate: Rate) -> str:
    return f"{rate.value:,.0f} {rate.unit}" if rate.unit == "chunks/s" else output.scaled(rate.value, f" {rate.unit}")
