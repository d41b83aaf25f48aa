"""``retrotool plan``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retrotool.cli import output
from retrotool.cli.options import Json, parse_count, parse_size
from retrotool.errors import UsageError

if TYPE_CHECKING:
    from retrotool.plan.calibrating import Calibration
    from retrotool.plan.plan_result import Plan
    from retrotool.plan.rates import Rate

EPILOG = """\b
Examples:
  retrotool plan --tokens 1.75T --encoder bert-base-uncased --gpus 64
  retrotool plan --tokens 1.75T --encoder models/bert-base-uncased --gpus 64 --memory-per-host 512GB
  retrotool plan --tokens 20G --hosts 4 --cores 32 --html plan.html
  retrotool plan --calibrate"""

_CORPUS, _MACHINES, _SPEED = "What is planned", "What it runs on", "How fast that is"


def command(
    tokens: Annotated[
        str | None,
        typer.Option(
            metavar="N", help="Tokens of the corpus, such as 1.75T; k, M, B or G, and T.", rich_help_panel=_CORPUS
        ),
    ] = None,
    encoder: Annotated[
        str,
        typer.Option(metavar="E", help="minilm, a model directory, or a well-known name.", rich_help_panel=_CORPUS),
    ] = "minilm",
    tokens_per_document: Annotated[
        int, typer.Option(metavar="N", help="Tokens of a document, on average.", rich_help_panel=_CORPUS)
    ] = 700,
    chunk_length: Annotated[int, typer.Option(metavar="N", help="Tokens a chunk.", rich_help_panel=_CORPUS)] = 64,
    neighbours: Annotated[
        int, typer.Option(metavar="N", help="Neighbours to save of each chunk.", rich_help_panel=_CORPUS)
    ] = 20,
    target_recall: Annotated[
        float, typer.Option(metavar="R", help="Recall that the index is chosen for.", rich_help_panel=_CORPUS)
    ] = 0.95,
    gpus: Annotated[
        int, typer.Option(metavar="N", help="GPUs in all; 0: everything on CPU cores.", rich_help_panel=_MACHINES)
    ] = 0,
    hosts: Annotated[
        int | None,
        typer.Option(metavar="N", help="Hosts.  [default: one for every 8 GPUs]", rich_help_panel=_MACHINES),
    ] = None,
    cores: Annotated[
        int | None,
        typer.Option(metavar="N", help="CPU cores of a host.  [default: this machine's]", rich_help_panel=_MACHINES),
    ] = None,
    memory_per_host: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory of a host, such as 512GB or 256GiB.  [default: this machine's]",
            rich_help_panel=_MACHINES,
        ),
    ] = None,
    rates: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSON of measured rates, instead of those built in.  [default: what --calibrate wrote, if anything]",
            rich_help_panel=_SPEED,
        ),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Measure this machine, in a minute or two, and write its rates to --rates, "
            "or to ~/.cache/retrotool/rates.json.",
            rich_help_panel=_SPEED,
        ),
    ] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the plan as a page, too.")] = None,
    as_json: Json = False,
) -> None:
    """Say what a database will take: files, the index, GPU-hours, core-hours, hours.

    Needs no store, and looks at no corpus: it is arithmetic on rates, each of which is shown with where it comes from.
    Hours are a lower bound, as disks and networks are seldom as fast as that.
    """
    with output.errors(as_json):
        from retrotool.plan import calibrating, plan_page
        from retrotool.plan import run as plan_run

        if tokens is None and (html or not calibrate):
            raise UsageError("--tokens is missing", "Say how large the corpus is, such as --tokens 1.75T.")
        size = None if tokens is None else parse_count("--tokens", tokens)
        memory = None if memory_per_host is None else parse_size("--memory-per-host", memory_per_host)
        measured = calibrating.calibrate(rates) if calibrate else None
        if size is None:
            output.show(measured, as_json, _calibration)
            return
        result = plan_run.plan(
            size,
            encoder=encoder,
            gpus=gpus,
            hosts=hosts,
            cores=cores,
            memory_per_host=memory,
            tokens_per_document=tokens_per_document,
            chunk_length=chunk_length,
            saved=neighbours,
            target_recall=target_recall,
            rates=rates,
        )
        if html is not None:
            plan_page.write_page(result, html)
        for one in measured.not_measured if measured else ():
            output.note(f"Not measured: {one.key}: {one.why}")
        output.show(result, as_json, lambda plan: _text(plan, html))


def _text(plan: Plan, html: Path | None) -> str:
    from retrotool.plan import figures

    encoder, machines, index = plan.encoder, plan.machines, plan.index
    where = f"{output.count(machines.gpus, 'GPU')} on " if machines.gpus else ""
    memory = figures.size(machines.memory)
    lines = [
        f"{figures.number(plan.tokens)} tokens: {figures.number(plan.documents)} documents, "
        f"{figures.number(plan.chunks)} chunks of up to {plan.chunk_length} tokens, {output.count(plan.parts, 'part')}",
        f"Encoder {encoder.name}: {encoder.layers} layers, {encoder.dimension:,} dimensions",
        f"Machines: {where}{output.count(machines.hosts, 'host')} of {output.count(machines.cores, 'core')} "
        f"and {memory} of memory",
        "",
        "Files",
        _table(
            [(one.kind, figures.size(one.bytes), one.each) for one in plan.files]
            + [("all", figures.size(plan.bytes), "")],
            right=(1,),
        ),
        "",
        f"Index {index.factory}: {index.kind}",
        f"  chosen because: {index.why}",
        f"  training: {figures.size(index.trained_bytes)}, from {figures.number(index.sample)} vectors, "
        f"{figures.size(index.sample_bytes)} in the memory of one host",
        f"  {output.count(index.shards, 'shard')}, {figures.size(index.memory)} to hold in memory: "
        f"{output.count(index.hosts, 'host')} of {memory}"
        + (", else it is read from disk" if index.hosts > machines.hosts else ""),
        "",
        "Stages, one after another",
        _stages(plan),
        "",
        "Rates" + (f", those of {plan.rates_file} where it has them" if plan.rates_file else ""),
        _rates(plan.rates),
        "",
        "Assumed",
        *(f"  {one}" for one in plan.assumptions),
    ]
    return "\n".join(lines + ([] if html is None else ["", f"Page: {html}"]))


def _stages(plan: Plan) -> str:
    from retrotool.plan import figures

    rows = [
        (one.name, *map(figures.hours, (one.gpu_hours, one.core_hours, one.wall_hours)), one.limit)
        for one in plan.stages
    ]
    rows.append(("all", *map(figures.hours, (plan.gpu_hours, plan.core_hours, plan.wall_hours)), ""))
    return _table([("", "GPU-hours", "core-hours", "hours", "limited by"), *rows], right=(1, 2, 3))


def _rates(rates: Sequence[Rate]) -> str:
    from retrotool.plan import figures

    return _table([(one.key, figures.rate(one), one.source) for one in rates], right=(1,))


def _table(rows: Sequence[Sequence[str]], *, right: Sequence[int]) -> str:
    """Columns of equal width, those of ``right`` set to the right."""
    widths = {i: max(len(row[i]) for row in rows) for i in right}
    return output.table([[cell.rjust(widths.get(i, 0)) for i, cell in enumerate(row)] for row in rows])


def _calibration(found: Calibration) -> str:
    lines = [
        f"Measured in {found.seconds:.0f} s on {found.machine}; its disk in {found.directory}",
        _rates(found.rates),
        f"Written to {found.file}",
    ]
    if found.not_measured:
        lines += [
            "Not measured, so what is built in stays:",
            _table([(m.key, m.why) for m in found.not_measured], right=()),
        ]
    return "\n".join(lines)
