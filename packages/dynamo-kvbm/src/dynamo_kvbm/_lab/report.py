"""Hit rates as a text table, and as one HTML page with a plot inside."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from dynamo_kvbm._lab.simulator import ORACLE, Outcome

WIDTH, HEIGHT, MARGIN = 760, 400, 56
LEGEND_STEP = 92
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")
MAX_GRID_LINES = 6

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 820px; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.4rem; overflow-wrap: anywhere }}
table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }}
td, th {{ padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #8884 }}
td:first-child, th:first-child {{ text-align: left }}
svg {{ width: 100%; height: auto }} svg text {{ fill: currentColor }}
</style></head><body><h1>{title}</h1><p>{summary}</p>{plot}{tables}</body></html>
"""


def text_table(outcomes: Sequence[Outcome], tokens_per_s: float | None = None) -> str:
    """Return hit rates by policy and size; with a prefill rate, mean prefill times too."""
    sizes = sorted({outcome.capacity_blocks for outcome in outcomes})
    lines = [_row("hit %", [f"{size:,}" for size in sizes])]
    cells = {(outcome.policy, outcome.capacity_blocks): outcome for outcome in outcomes}
    names = list(dict.fromkeys(outcome.policy for outcome in outcomes))
    lines += [_row(name, [f"{cells[name, size].hit_percent:.2f}" for size in sizes]) for name in names]
    if tokens_per_s is not None:
        lines += ["", _row("prefill s", [f"{size:,}" for size in sizes])]
        lines += [
            _row(name, [f"{cells[name, size].mean_prefill_s(tokens_per_s):.3f}" for size in sizes]) for name in names
        ]
    return "\n".join(lines)


def html_report(outcomes: Sequence[Outcome], trace_name: str, tokens_per_s: float | None = None) -> str:
    """Return one page without outside references."""
    first = outcomes[0]
    title = f"Prefix hits of {html.escape(trace_name)}"
    summary = f"{first.requests:,} requests, {first.asked_blocks:,} blocks asked for."
    tables = _html_table("hit %", outcomes, [f"{outcome.hit_percent:.2f}" for outcome in outcomes])
    if tokens_per_s is not None:
        times = [f"{outcome.mean_prefill_s(tokens_per_s):.3f}" for outcome in outcomes]
        tables += _html_table("mean prefill, s", outcomes, times)
    return _PAGE.format(title=title, summary=summary, plot=plot(outcomes), tables=tables)


def plot(outcomes: Sequence[Outcome]) -> str:
    """Return an SVG of hit rate over capacity, logarithmic in the capacity."""
    sizes = sorted({outcome.capacity_blocks for outcome in outcomes})
    top = max(1.0, *(outcome.hit_percent for outcome in outcomes)) * 1.05
    names = list(dict.fromkeys(outcome.policy for outcome in outcomes))
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="hit rate over capacity">']
    parts += _axes(sizes, top)
    for place, (name, colour) in enumerate(zip(names, COLOURS * (1 + len(names) // len(COLOURS)), strict=False)):
        points = sorted((one.capacity_blocks, one.hit_percent) for one in outcomes if one.policy == name)
        dashes = ' stroke-dasharray="6 4"' if name == ORACLE else ""
        stroke = f'fill="none" stroke="{colour}" stroke-width="2"{dashes}'
        line = " ".join(f"{_x(size, sizes):.1f},{_y(value, top):.1f}" for size, value in points)
        parts.append(f'<polyline points="{line}" {stroke}/>')
        parts += [_mark(name, colour, size, value, _x(size, sizes), _y(value, top)) for size, value in points]
        x, y = MARGIN + LEGEND_STEP * place, MARGIN / 2
        parts.append(f'<line x1="{x}" x2="{x + 24}" y1="{y}" y2="{y}" {stroke}/>')
        parts.append(f'<text x="{x + 30}" y="{y + 4}" font-size="13">{html.escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def _mark(name: str, colour: str, size: int, value: float, x: float, y: float) -> str:
    label = html.escape(f"{name}, {size:,} blocks: {value:.2f} %")
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"><title>{label}</title></circle>'


def _axes(sizes: Sequence[int], top: float) -> list[str]:
    parts: list[str] = []
    step = _round_step(top)
    for number in range(int(top / step) + 1):
        value = step * number
        y = _y(value, top)
        parts.append(f'<line x1="{MARGIN}" x2="{WIDTH - 16}" y1="{y:.1f}" y2="{y:.1f}" stroke="#8884"/>')
        parts.append(f'<text x="{MARGIN - 8}" y="{y + 4:.1f}" text-anchor="end" font-size="12">{value:g} %</text>')
    for size in sizes:
        x = _x(size, sizes)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 32}" text-anchor="middle" font-size="12">{size:,}</text>')
    label = "blocks of cache, logarithmic"
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle" font-size="12">{label}</text>')
    return parts


def _round_step(top: float) -> float:
    """Return the smallest of 1, 2, 5, 10, 20 and so on that needs no more grid lines than there may be."""
    power = 10.0 ** math.floor(math.log10(top / MAX_GRID_LINES))
    return next(power * factor for factor in (1, 2, 5, 10) if top / (power * factor) <= MAX_GRID_LINES)


def _x(size: int, sizes: Sequence[int]) -> float:
    low, high = math.log(sizes[0]), math.log(sizes[-1])
    share = (math.log(size) - low) / (high - low) if high > low else 0.5
    return MARGIN + 24 + share * (WIDTH - 2 * MARGIN - 24)


def _y(value: float, top: float) -> float:
    return HEIGHT - MARGIN - value / top * (HEIGHT - 2 * MARGIN)


def _row(name: str, cells: Sequence[str]) -> str:
    return f"{name:<12}" + "".join(f"{cell:>10}" for cell in cells)


def _html_table(head: str, outcomes: Sequence[Outcome], cells: Sequence[str]) -> str:
    sizes = sorted({outcome.capacity_blocks for outcome in outcomes})
    by_place = {(outcome.policy, outcome.capacity_blocks): cell for outcome, cell in zip(outcomes, cells, strict=True)}
    rows = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in (head, *(f"{size:,}" for size in sizes))) + "</tr>"]
    for name in dict.fromkeys(outcome.policy for outcome in outcomes):
        row = "".join(f"<td>{by_place[name, size]}</td>" for size in sizes)
        rows.append(f"<tr><td>{html.escape(name)}</td>{row}</tr>")
    return "<table>" + "".join(rows) + "</table>"
