"""A plan as one HTML page, with bars of its files and stages."""

from __future__ import annotations

from html import escape
from pathlib import Path

from retrotool.cli import html
from retrotool.cli.result_file import check_file, written
from retrotool.plan import figures
from retrotool.plan.plan_result import Plan


def write_page(plan: Plan, file: str | Path) -> None:
    """Write a plan's page, in place of what is there."""
    check_file("--html", file)
    with written(file) as scratch:
        scratch.write_text(page(plan), "utf-8")


def page(plan: Plan) -> str:
    """The page of a plan; it is XML, too."""
    title = f"A database of {figures.number(plan.tokens)} tokens, {plan.encoder.name}"
    sections = (_sums(plan), _files(plan), _index(plan), _stages(plan), _rates(plan), _assumptions(plan))
    return html.page(title, sections)


def _sums(plan: Plan) -> str:
    machines = plan.machines
    where = f"{machines.gpus:,} GPUs on " if machines.gpus else ""
    told = (
        f"{plan.documents:,} documents, {plan.chunks:,} chunks of up to {plan.chunk_length} tokens, "
        f"{plan.parts:,} parts. {plan.encoder.layers} layers, {plan.encoder.dimension:,} dimensions. "
        f"{where}{machines.hosts:,} hosts of {machines.cores:,} cores and {figures.size(machines.memory)} of memory."
    )
    sums = [("on disk", figures.size(plan.bytes)), ("hours, stages one after another", figures.hours(plan.wall_hours))]
    if machines.gpus:
        sums.append(("GPU-hours", figures.hours(plan.gpu_hours)))
    sums.append(("core-hours", figures.hours(plan.core_hours)))
    items = "".join(f"<li><b>{escape(value)}</b>{escape(what)}</li>" for what, value in sums)
    return f'<p>{escape(told)}</p>\n<ul class="sums">{items}</ul>'


def _files(plan: Plan) -> str:
    bars = html.bars(
        "Bytes of each kind of file", [(one.kind, one.bytes, figures.size(one.bytes)) for one in plan.files]
    )
    rows = [(one.kind, figures.size(one.bytes), one.each) for one in plan.files]
    rows.append(("all", figures.size(plan.bytes), ""))
    return f"<h2>Files</h2>\n{bars}\n{html.table(('kind', 'size', 'which is'), rows, numbers=(1,))}"


def _index(plan: Plan) -> str:
    index = plan.index
    more = ", else it is read from disk" if index.hosts > plan.machines.hosts else ""
    rows = [
        ("factory string", index.factory),
        ("kind", index.kind),
        ("chosen because", index.why),
        ("bytes a vector", f"{index.bytes_per_vector:,}"),
        ("training", f"{figures.size(index.trained_bytes)}, learnt from {index.sample:,} vectors"),
        ("sample in memory of one host", figures.size(index.sample_bytes)),
        ("shards", f"{index.shards:,}"),
        ("memory to hold all of it", figures.size(index.memory)),
        ("hosts for that", f"{index.hosts:,} of {figures.size(plan.machines.memory)}{more}"),
    ]
    return f"<h2>Index</h2>\n{html.table((), rows)}"


def _stages(plan: Plan) -> str:
    bars = html.bars(
        "Hours of each stage", [(one.name, one.wall_hours, figures.hours(one.wall_hours)) for one in plan.stages]
    )
    rows = [
        (one.name, *map(figures.hours, (one.gpu_hours, one.core_hours, one.wall_hours)), one.limit)
        for one in plan.stages
    ]
    rows.append(("all", *map(figures.hours, (plan.gpu_hours, plan.core_hours, plan.wall_hours)), ""))
    header = ("stage", "GPU-hours", "core-hours", "hours", "limited by")
    return f"<h2>Stages</h2>\n{bars}\n{html.table(header, rows, numbers=(1, 2, 3))}"


def _rates(plan: Plan) -> str:
    rows = [(one.what, figures.rate(one), one.source) for one in plan.rates]
    return f"<h2>Rates</h2>\n{html.table(('of', 'rate', 'from'), rows, numbers=(1,))}"


def _assumptions(plan: Plan) -> str:
    return "<h2>Assumed</h2>\n<ul>" + "".join(f"<li>{escape(one)}</li>" for one in plan.assumptions) + "</ul>"
