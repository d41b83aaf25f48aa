"""``retrotool plan``."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

from retrotool.ann.choice import TARGET_RECALL
from retrotool.chunk import CHUNK_LENGTH
from retrotool.cli import output
from retrotool.cli.command_lines import SAVED
from retrotool.cli.options import Json, opt, parse_count
from retrotool.errors import UsageError

if TYPE_CHECKING:
    from retrotool.plan.run import Plan, Rate

EPILOG = """\b
Examples:
  retrotool plan --tokens 1.75T --encoder bert-base --gpus 64
  retrotool plan --tokens 1.75T --encoder models/bert-base-uncased --gpus 64 --memory-per-host 512GB
  retrotool plan --tokens 20G --hosts 4 --cores 32 --rate embed=20 --rate read=500M"""

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
    gpus: Annotated[int, _machines("Total number of GPUs; 0: CPU only.", metavar="N")] = 0,
    hosts: Annotated[int | None, _machines("Number of hosts.  [default: one per 8 GPUs]", metavar="N")] = None,
    cores: Annotated[int | None, _machines("CPU cores per host.  [default: as here]", metavar="N")] = None,
    memory_per_host: Annotated[str | None, _machines("Memory per host.  [default: as here]", metavar="SIZE")] = None,
    rate: Annotated[
        list[str] | None,
        _machines("Rate of a stage, in the plan's unit, such as embed=25k. Repeatable.", metavar="STAGE=NUMBER"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Estimate the size of a database's files and index, and the GPU-hours, core-hours and hours to build it.

    The estimate needs no store and no corpus. It is computed from rates, which are printed with their source.
    Hours are a lower bound, as disks and networks are rarely as fast as assumed.
    """
    from retrotool.plan import run as plan_run

    result = plan_run.plan(
        tokens, encoder=encoder, gpus=gpus, hosts=hosts, cores=cores, memory_per_host=memory_per_host,
        tokens_per_document=tokens_per_document, chunk_length=chunk_length, saved=neighbours,
        target_recall=target_recall, rates=dict(map(_parse_rate, rate or ())),
    )  # fmt: skip
    output.show(result, as_json, _text)


def _parse_rate(text: str) -> tuple[str, float]:
    stage, separator, number = text.partition("=")
    if not separator:
        raise UsageError(f"--rate {text} is not STAGE=NUMBER, such as embed=25k")
    return stage, float(parse_count(f"--rate {stage}", number))


def _text(plan: Plan) -> str:
    encoder, machines, index = plan.encoder, plan.machines, plan.index
    where = f"{output.count(machines.gpus, 'GPU')} on " if machines.gpus else ""
    memory = output.size(machines.memory)
    files = [(one.kind, output.size(one.bytes), one.each) for one in plan.files]
    stages = [(one.name, one.gpu_hours, one.core_hours, one.wall_hours, one.limit) for one in plan.stages]
    stages.append(("all", plan.gpu_hours, plan.core_hours, plan.wall_hours, ""))
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
            [(name, *map(_hours, hours), _duration(wall), limit) for name, *hours, wall, limit in stages],
            ("", "GPU-hours", "core-hours", "time", "limited by"),
            right=(1, 2, 3),
        ),
        "",
        "Rates",
        output.table([(one.stage, _rate(one), f"per {one.per}", one.source) for one in plan.rates], right=(1,)),
        "",
        "Assumed",
        *(f"  {one}" for one in plan.assumptions),
    ])  # fmt: skip


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
