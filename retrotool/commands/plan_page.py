"""A plan as one HTML page: bars drawn as SVG, no scripts, and nothing that is fetched from anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from retrotool.commands import figures
from retrotool.commands.plan_result import Plan

_WIDTH, _ROW, _LABEL, _VALUE = 720, 26, 120, 90
"""Of a drawing: its width, the height of a bar with its margin, and the room for labels and values."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #5c6470; --line: #d9dde3; --page: #ffffff; --bar: #2f6fab; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7eaee; --soft: #a3abb8; --line: #3a414c; --page: #16191e; --bar: #6aa7dd; }
}
body { margin: 2rem auto; max-width: 46rem; padding: 0 1rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.1rem; margin-top: 2rem; }
p, li { color: var(--soft); } svg { width: 100%; height: auto; }
text { fill: var(--ink); font: 13px system-ui, sans-serif; } rect { fill: var(--bar); }
.sums { display: flex; flex-wrap: wrap; gap: 0.5rem 2.5rem; padding: 0; list-style: none; }
.sums b { display: block; font-size: 1.4rem; color: var(--ink); }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
th, td { padding: 0.25rem 1rem 0.25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
"""


def write_page(plan: Plan, file: str | Path) -> None:
    """Write a plan's page, in place of what is there."""
    Path(file).write_text(page(plan), "utf-8")


def page(plan: Plan) -> str:
    """The page of a plan; it is XML, too."""
    title = f"A database of {figures.number(plan.tokens)} tokens, {plan.encoder.name}"
    sections = (_sums(plan), _files(plan), _index(plan), _stages(plan), _rates(plan), _assumptions(plan))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


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
    bars = _bars("Bytes of each kind of file", [(one.kind, one.bytes, figures.size(one.bytes)) for one in plan.files])
    rows = [(one.kind, figures.size(one.bytes), one.each) for one in plan.files]
    rows.append(("all", figures.size(plan.bytes), ""))
    return f"<h2>Files</h2>\n{bars}\n{_table(('kind', 'size', 'which is'), rows, numbers=(1,))}"


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
    return f"<h2>Index</h2>\n{_table((), rows)}"


def _stages(plan: Plan) -> str:
    bars = _bars(
        "Hours of each stage", [(one.name, one.wall_hours, figures.hours(one.wall_hours)) for one in plan.stages]
    )
    rows = [
        (one.name, *map(figures.hours, (one.gpu_hours, one.core_hours, one.wall_hours)), one.limit)
        for one in plan.stages
    ]
    rows.append(("all", *map(figures.hours, (plan.gpu_hours, plan.core_hours, plan.wall_hours)), ""))
    header = ("stage", "GPU-hours", "core-hours", "hours", "limited by")
    return f"<h2>Stages</h2>\n{bars}\n{_table(header, rows, numbers=(1, 2, 3))}"


def _rates(plan: Plan) -> str:
    rows = [(one.what, figures.rate(one), one.source) for one in plan.rates]
    return f"<h2>Rates</h2>\n{_table(('of', 'rate', 'from'), rows, numbers=(1,))}"


def _assumptions(plan: Plan) -> str:
    return "<h2>Assumed</h2>\n<ul>" + "".join(f"<li>{escape(one)}</li>" for one in plan.assumptions) + "</ul>"


def _bars(title: str, rows: Sequence[tuple[str, float, str]]) -> str:
    """A horizontal bar a row, of (label, value, value for people); the longest is as long as there is room for."""
    room = _WIDTH - _LABEL - _VALUE
    most = max(value for _, value, _ in rows) or 1
    drawn = []
    for i, (label, value, shown) in enumerate(rows):
        width, y = max(1.0, room * value / most), i * _ROW
        drawn.append(
            f'<text x="0" y="{y + 17}">{escape(label)}</text>'
            f'<rect x="{_LABEL}" y="{y + 4}" width="{width:.1f}" height="{_ROW - 8}" rx="2"/>'
            f'<text x="{_LABEL + width + 8:.1f}" y="{y + 17}">{escape(shown)}</text>'
        )
    box = f'viewBox="0 0 {_WIDTH} {_ROW * len(rows)}"'
    return f'<svg {box} role="img" aria-label="{escape(title)}">\n' + "\n".join(drawn) + "\n</svg>"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    """A table; columns ``numbers`` are set to the right."""

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = ['<{} class="number">' if i in numbers else "<{}>" for i in range(len(cells))]
        return "".join(f"{kind.format(tag)}{escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))

    head = f"<thead><tr>{line(header, 'th')}</tr></thead>" if header else ""
    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'
