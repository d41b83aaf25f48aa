"""What was measured of an index as a page to look at: HTML that stands alone, with its pictures as SVG in it.

Two charts, recall against queries a second and recall@10 against probed lists by re-rank depth, and tables of what they
show. No script, nothing is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from retrotool.stages.recall import Measurement, Recall

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 640, 320, 56, 44, 16, 120
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .15rem .8rem; text-align: right; }
th { border-bottom: 1px solid #888; } td:first-child, th:first-child { text-align: left; }
tr.chosen { background: #fff3c4; } svg text { font: 12px system-ui, sans-serif; fill: #444; } svg { max-width: 100%; }
"""

Line = tuple[str, Sequence[tuple[float, float]]]


def page(name: str, record: Mapping[str, Any], found: Measurement) -> str:
    """The page of an index's record and what was measured of it."""
    point = found.point
    of = (
        f"all {found.vectors:,} vectors"
        if found.share == 1
        else f"{100 * found.share:.2g} % of {found.vectors:,} vectors"
    )
    at_depth = [p for p in found.curve if p.depth == point.depth]
    depths = sorted({p.depth for p in found.curve})
    by_depth = [(f"re-rank {d}", [(p.nprobe, p.recall_at_10) for p in found.curve if p.depth == d]) for d in depths]
    by_rate = [
        (f"recall@{k}", [(p.rate, getattr(p, f"recall_at_{k}")) for p in at_depth if p.rate > 0]) for k in (1, 10, 100)
    ]
    pieces = [
        f"<h1>Index {escape(name)}</h1>",
        f"<p>{escape(str(record['kind']))} ({escape(str(record['factory']))}): {record['vectors']:,} vectors of "
        f"{escape(str(record['encoder']))}, {record['bytes_per_vector']:,} bytes each.</p>",
        f"<p>True recall@10 <b>{point.recall_at_10:.4f} ± {point.error:.4f}</b> at {point.nprobe:,} lists probed and "
        f"{point.depth:,} candidates re-ranked, target {record['target']}. Measured on {found.queries:,} random chunks "
        f"against exact search over {of}, their own documents left out.</p>",
    ]
    if len(at_depth) > 1:
        pieces += [
            f"<h2>Recall and speed, {point.depth:,} candidates re-ranked</h2>",
            chart(by_rate, "queries a second (in batches)", float(record["target"])),
        ]
    if len({p.nprobe for p in found.curve}) > 1:
        pieces += ["<h2>Recall@10 and probed lists</h2>", chart(by_depth, "lists probed", float(record["target"]))]
    pieces.append(_points(found.curve, point))
    for kind, groups in found.groups.items():
        rows = [(n, f"{recall:.4f}", f"± {error:.4f}", f"{q:,}") for n, (recall, error, q) in groups.items()]
        pieces += [f"<h2>By {escape(kind)}</h2>", _table((kind, "recall@10", "", "queries"), rows)]
    body = "\n".join(pieces)
    title = f"Recall of {escape(name)}"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/><title>{title}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _points(curve: Iterable[Recall], chosen: Recall) -> str:
    rows = [
        (f"{p.nprobe:,}", f"{p.depth:,}", f"{p.recall_at_1:.4f}", f"{p.recall_at_10:.4f}", f"{p.recall_at_100:.4f}",
         f"{p.scanned:,.0f}", f"{p.rate:,.0f}")
        for p in curve
    ]  # fmt: skip
    header = ("lists probed", "re-ranked", "recall@1", "recall@10", "recall@100", "codes a query", "queries/s")
    marked = next((i for i, p in enumerate(curve) if p == chosen), -1)
    return "<h2>All points</h2>" + _table(header, rows, marked)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], marked: int = -1) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = []
    for i, row in enumerate(rows):
        kind = ' class="chosen"' if i == marked else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    return f"<table><tr>{head}</tr>\n" + "\n".join(lines) + "</table>"


def chart(lines: Sequence[Line], across: str, target: float) -> str:
    """Lines of (x > 0, recall) over a logarithmic x, with the target dashed, as SVG."""
    points = [point for _, some in lines for point in some]
    if not points:
        return ""
    low_x, high_x = math.log10(min(x for x, _ in points)), math.log10(max(x for x, _ in points))
    span = max(high_x - low_x, 1e-9)
    least = min(*(y for _, y in points), target)
    low_y = math.floor(least * 10) / 10 if least < 1 else 0.9
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def at(x: float, y: float) -> str:
        across_share = (math.log10(x) - low_x) / span
        up = (y - low_y) / max(1 - low_y, 1e-9)
        return f"{_LEFT + across_share * (right - _LEFT):.1f},{bottom - up * (bottom - _TOP):.1f}"

    drawn = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="recall against {escape(across)}">']
    for i in range(6):
        y = low_y + i * (1 - low_y) / 5
        place = at(10**low_x, y).split(",")[1]
        drawn.append(f'<line x1="{_LEFT}" x2="{right}" y1="{place}" y2="{place}" stroke="#ddd"/>')
        drawn.append(f'<text x="{_LEFT - 8}" y="{float(place) + 4:.1f}" text-anchor="end">{y:.2f}</text>')
    for x in _ticks(low_x, high_x):
        place = at(x, low_y).split(",")[0]
        drawn.append(f'<line x1="{place}" x2="{place}" y1="{_TOP}" y2="{bottom}" stroke="#eee"/>')
        drawn.append(f'<text x="{place}" y="{bottom + 18}" text-anchor="middle">{x:,.0f}</text>')
    place = at(10**low_x, target).split(",")[1]
    drawn.append(f'<line x1="{_LEFT}" x2="{right}" y1="{place}" y2="{place}" stroke="#888" stroke-dasharray="5 4"/>')
    drawn.append(f'<text x="{right + 6}" y="{float(place) + 4:.1f}">target {target:g}</text>')
    for i, (label, some) in enumerate(lines):
        colour = _COLOURS[i % len(_COLOURS)]
        path = " ".join(at(x, y) for x, y in some)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        drawn += [
            f'<circle cx="{p[0]}" cy="{p[1]}" r="2.5" fill="{colour}"/>' for p in (at(x, y).split(",") for x, y in some)
        ]
        y = bottom - 14 * (len(lines) - i)
        drawn.append(f'<text x="{right + 6}" y="{y}" style="fill:{colour}">{escape(label)}</text>')
    drawn.append(
        f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(across)}</text></svg>'
    )
    return "\n".join(drawn)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between two powers of ten, few enough to be read."""
    steps = (1, 2, 5) if high - low < 2 else (1,)
    found = [s * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for s in steps]
    return [x for x in found if low - 1e-9 <= math.log10(x) <= high + 1e-9]
