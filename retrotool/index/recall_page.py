"""What was measured of an index as a page to look at.

Two charts, recall against queries a second and recall@10 against probed lists by re-rank depth, and tables of what they
show.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from retrotool.cli import html
from retrotool.index.recall import Measurement, Recall


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
        f"<p>{escape(str(record['kind']))} ({escape(str(record['factory']))}): {record['vectors']:,} vectors of "
        f"{escape(str(record['encoder']))}, {record['bytes_per_vector']:,} bytes each.</p>",
        f"<p>True recall@10 <b>{point.recall_at_10:.4f} ± {point.error:.4f}</b> at {point.nprobe:,} lists probed and "
        f"{point.depth:,} candidates re-ranked, target {record['target']}. Measured on {found.queries:,} random chunks "
        f"against exact search over {of}, their own documents left out.</p>",
    ]
    if len(at_depth) > 1:
        pieces += [
            f"<h2>Recall and speed, {point.depth:,} candidates re-ranked</h2>",
            html.recall_chart(by_rate, "queries a second (in batches)", float(record["target"])),
        ]
    if len({p.nprobe for p in found.curve}) > 1:
        pieces += [
            "<h2>Recall@10 and probed lists</h2>",
            html.recall_chart(by_depth, "lists probed", float(record["target"])),
        ]
    pieces.append(_points(found.curve, point))
    for kind, groups in found.groups.items():
        rows = [(n, f"{recall:.4f}", f"± {error:.4f}", f"{q:,}") for n, (recall, error, q) in groups.items()]
        pieces += [
            f"<h2>By {escape(kind)}</h2>",
            html.table((kind, "recall@10", "", "queries"), rows, numbers=(1, 2, 3)),
        ]
    return html.page(f"Index {name}", pieces)


def _points(curve: Iterable[Recall], chosen: Recall) -> str:
    rows = [
        (f"{p.nprobe:,}", f"{p.depth:,}", f"{p.recall_at_1:.4f}", f"{p.recall_at_10:.4f}", f"{p.recall_at_100:.4f}",
         f"{p.scanned:,.0f}", f"{p.rate:,.0f}")
        for p in curve
    ]  # fmt: skip
    header = ("lists probed", "re-ranked", "recall@1", "recall@10", "recall@100", "codes a query", "queries/s")
    marked = next((i for i, p in enumerate(curve) if p == chosen), -1)
    return "<h2>All points</h2>" + html.table(header, rows, numbers=range(len(header)), marked=marked)
