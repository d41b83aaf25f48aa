"""Pages to look at: HTML that stands alone, with tables and pictures as SVG in it.

Nothing is fetched. A page can be read without its script, if it has one; no other script runs in it, as the browser is
told the hash of that one. A page is XML, too. Colours follow the reader's light or dark setting.

Documents are hostile: what was found in one goes through ``text`` or ``attribute``.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from html import escape

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #5c6470; --line: #d9dde3; --page: #ffffff; --bar: #2f6fab;
  --marked: #fff3c4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7eaee; --soft: #a3abb8; --line: #3a414c; --page: #16191e; --bar: #6aa7dd; --marked: #4a4220; }
}
body { margin: 2rem auto; max-width: 50rem; padding: 0 1rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.1rem; margin-top: 2rem; }
p, li { color: var(--soft); } p b { color: var(--ink); } svg { width: 100%; height: auto; }
text { fill: var(--ink); font: 13px system-ui, sans-serif; } rect { fill: var(--bar); }
.grid { stroke: var(--line); } .target { stroke: var(--soft); stroke-dasharray: 5 4; }
.sums { display: flex; flex-wrap: wrap; gap: 0.5rem 2.5rem; padding: 0; list-style: none; }
.sums b { display: block; font-size: 1.4rem; color: var(--ink); }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
th, td { padding: 0.25rem 1rem 0.25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); } tr.marked { background: var(--marked); }
.control::before { content: attr(title); padding: 0 0.2em; font-size: 0.7em; border: 1px solid var(--soft);
  border-radius: 0.2em; color: var(--soft); }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
"""
_BARS_WIDTH, _ROW, _LABEL, _VALUE = 720, 26, 120, 90
"""Of bars: the width of the drawing, the height of a bar with its margin, and the room for labels and values."""
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 640, 320, 56, 44, 16, 120
_COLOURS = ("#3b8ac4", "#d64545", "#3aa655", "#a07cc5", "#f28e2b", "#17becf", "#a0705a")
"""Seen on white and on black."""

_MARKED = ' class="marked"'
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#x27;", "\r": "&#13;"}
_SPECIAL = re.compile("[&<>\"'\r\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff]")

Line = tuple[str, Sequence[tuple[float, float]]]


def page(title: str, sections: Iterable[str]) -> str:
    """A page of sections that are HTML already."""
    return head(title) + "\n".join(sections) + foot()


def head(title: str, *, style: str = "", script: str = "") -> str:
    """A page up to its first section, with a style besides the common one; ``script`` is what ``foot`` is given."""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n{_policy(script) if script else ""}'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{attribute(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n<body>\n<h1>{text(title)}</h1>\n"
    )


def _policy(script: str) -> str:
    """That nothing is fetched, and no other script runs: not even one that got into the page by a mistake of ours."""
    digest = base64.b64encode(hashlib.sha256(_framed(script).encode()).digest()).decode()
    rules = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    return f'<meta http-equiv="Content-Security-Policy" content="{rules}; form-action \'none\'"/>\n'


def foot(script: str = "") -> str:
    """The end of a page, with the script that its ``head`` was told of."""
    return (f"\n<script>{_framed(script)}</script>" if script else "") + "\n</body>\n</html>\n"


def _framed(script: str) -> str:
    """A script as both HTML and XML take it."""
    return f"/*<![CDATA[*/{script}/*]]>*/"


def text(value: str) -> str:
    """Any text as HTML that shows as that text, and as nothing else.

    Characters that turn the direction of others, and C1 controls, are there but not displayed; their numbers are. C0
    controls, which neither HTML nor XML can hold, become their pictures.
    """
    return _SPECIAL.sub(_shown, value)


def attribute(value: str) -> str:
    """Any text as the value of an attribute in double quotes; C0 controls become their pictures."""
    return _SPECIAL.sub(lambda found: _ENTITIES.get(found[0]) or _pictured(found[0]), value)


def _shown(found: re.Match[str]) -> str:
    character = found[0]
    if character in _ENTITIES:
        return _ENTITIES[character]
    picture = _pictured(character)
    if picture != character:
        return picture
    return f'<bdi class="control" title="U+{ord(character):04X}"><span hidden="">{character}</span></bdi>'


def _pictured(character: str) -> str:
    number = ord(character)
    if number < 0x20:
        return chr(0x2400 + number)
    if number == 0x7F:
        return "\u2421"
    return character if number < 0xFFFE else "\ufffd"


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = (), marked: int = -1
) -> str:
    """A table of text; columns ``numbers`` are set to the right, and the row ``marked`` stands out."""

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = ['<{} class="number">' if i in numbers else "<{}>" for i in range(len(cells))]
        return "".join(f"{kind.format(tag)}{text(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))

    head = f"<thead><tr>{line(header, 'th')}</tr></thead>" if header else ""
    body = "".join(f"<tr{_MARKED if i == marked else ''}>{line(row, 'td')}</tr>" for i, row in enumerate(rows))
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'


def bars(title: str, rows: Sequence[tuple[str, float, str]]) -> str:
    """A horizontal bar a row, of (label, value, value for people); the longest is as long as there is room for."""
    room = _BARS_WIDTH - _LABEL - _VALUE
    most = max(value for _, value, _ in rows) or 1
    drawn = []
    for i, (label, value, shown) in enumerate(rows):
        width, y = max(1.0, room * value / most), i * _ROW
        drawn.append(
            f'<text x="0" y="{y + 17}">{escape(label)}</text>'
            f'<rect x="{_LABEL}" y="{y + 4}" width="{width:.1f}" height="{_ROW - 8}" rx="2"/>'
            f'<text x="{_LABEL + width + 8:.1f}" y="{y + 17}">{escape(shown)}</text>'
        )
    box = f'viewBox="0 0 {_BARS_WIDTH} {_ROW * len(rows)}"'
    return f'<svg {box} role="img" aria-label="{escape(title)}">\n' + "\n".join(drawn) + "\n</svg>"


def recall_chart(lines: Sequence[Line], across: str, target: float) -> str:
    """Lines of (x > 0, recall) over a logarithmic x, with the target dashed."""
    points = [point for _, some in lines for point in some]
    if not points:
        return ""
    low_x, high_x = math.log10(min(x for x, _ in points)), math.log10(max(x for x, _ in points))
    span = max(high_x - low_x, 1e-9)
    least = min(*(y for _, y in points), target)
    low_y = math.floor(least * 10) / 10 if least < 1 else 0.9
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def column(x: float) -> float:
        return _LEFT + (math.log10(x) - low_x) / span * (right - _LEFT)

    def row(y: float) -> float:
        return bottom - (y - low_y) / max(1 - low_y, 1e-9) * (bottom - _TOP)

    drawn = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="recall against {escape(across)}">']
    for i in range(6):
        y = low_y + i * (1 - low_y) / 5
        drawn.append(f'<line x1="{_LEFT}" x2="{right}" y1="{row(y):.1f}" y2="{row(y):.1f}" class="grid"/>')
        drawn.append(f'<text x="{_LEFT - 8}" y="{row(y) + 4:.1f}" text-anchor="end">{y:.2f}</text>')
    for x in _ticks(low_x, high_x):
        drawn.append(f'<line x1="{column(x):.1f}" x2="{column(x):.1f}" y1="{_TOP}" y2="{bottom}" class="grid"/>')
        drawn.append(f'<text x="{column(x):.1f}" y="{bottom + 18}" text-anchor="middle">{x:,.0f}</text>')
    place = row(target)
    drawn.append(f'<line x1="{_LEFT}" x2="{right}" y1="{place:.1f}" y2="{place:.1f}" class="target"/>')
    drawn.append(f'<text x="{right + 6}" y="{place + 4:.1f}">target {target:g}</text>')
    for i, (label, some) in enumerate(lines):
        colour = _COLOURS[i % len(_COLOURS)]
        places = [(f"{column(x):.1f}", f"{row(y):.1f}") for x, y in some]
        path = " ".join(f"{x},{y}" for x, y in places)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        drawn += [f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>' for x, y in places]
        drawn.append(
            f'<text x="{right + 6}" y="{bottom - 14 * (len(lines) - i)}" style="fill:{colour}">{escape(label)}</text>'
        )
    middle = (_LEFT + right) / 2
    drawn.append(f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(across)}</text></svg>')
    return "\n".join(drawn)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between two powers of ten, few enough to be read."""
    steps = (1, 2, 5) if high - low < 2 else (1,)
    found = [s * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for s in steps]
    return [x for x in found if low - 1e-9 <= math.log10(x) <= high + 1e-9]
