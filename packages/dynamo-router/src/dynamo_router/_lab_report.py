"""Reports of the lab: a table for the terminal, and one HTML page with curves that needs nothing else."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from dynamo_router._lab_replay import ReplayedRequest
from dynamo_router._lab_stats import FIGURES, Estimate, percentile

_WIDTH, _HEIGHT, _POINTS = 720, 320, 200
_MARGIN, _ROW = 170, 28
# Okabe and Ito's colours, which most eyes tell apart, without the yellow that white paper swallows.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#7f7f7f")
_STYLE = (
    "body{font:14px system-ui,sans-serif;margin:2em auto;max-width:1240px;padding:0 1em;color:#1b1f24}"
    "h1{font-size:22px}h2{font-size:17px;margin-top:2em}p{color:#57606a}"
    "table{border-collapse:collapse}td,th{border-bottom:1px solid #d0d7de;padding:.4em .9em;text-align:right}"
    "td:first-child,th:first-child{text-align:left;font-weight:600}small{display:block;color:#57606a}"
    "svg{max-width:100%;font:13px system-ui,sans-serif}.grid{stroke:#d8dee4}.tick{text-anchor:middle;fill:#57606a}"
    ".name{text-anchor:end}"
)


def table(summaries: Mapping[str, Mapping[str, Estimate]]) -> str:
    """Return the figures of every policy, one a line, each with its 95 % interval."""
    width = max(len("policy"), *(len(policy) for policy in summaries))
    lines = [f"{'policy':<{width}}  " + "  ".join(f"{name:>24}" for name in FIGURES)]
    for policy, figures in summaries.items():
        cells = "  ".join(f"{_cell(name, figures[name]):>24}" for name in FIGURES)
        lines.append(f"{policy:<{width}}  {cells}")
    return "\n".join(lines)


def page(
    title: str,
    summaries: Mapping[str, Mapping[str, Estimate]],
    results: Mapping[str, Sequence[ReplayedRequest]],
) -> str:
    """Return an HTML page with the table, the intervals, and the distribution of times to first token."""
    colours = {policy: _COLOURS[number % len(_COLOURS)] for number, policy in enumerate(summaries)}
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>"
        f"<table>{_table_head()}{_table_rows(summaries, colours)}</table>"
        "<p>In brackets: 95 % interval over resampled requests. Bold: best of its column.</p>"
        f"<h2>Mean time to first token, with its interval</h2>{_intervals(summaries, colours)}"
        f"<h2>Requests whose first token came within a time</h2>{_curves(results, colours)}"
        "</html>\n"
    )


def _table_head() -> str:
    return "<tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in ("policy", *FIGURES)) + "</tr>"


def _table_rows(summaries: Mapping[str, Mapping[str, Estimate]], colours: Mapping[str, str]) -> str:
    best = {
        name: (max if name == "hit_rate" else min)(figures[name].value for figures in summaries.values())
        for name in FIGURES
    }
    rows: list[str] = []
    for policy, figures in summaries.items():
        cells = "".join(_html_cell(name, figures[name], best=figures[name].value == best[name]) for name in FIGURES)
        rows.append(f"<tr><td style='color:{colours[policy]}'>{html.escape(policy)}</td>{cells}</tr>")
    return "".join(rows)


def _html_cell(name: str, estimate: Estimate, *, best: bool) -> str:
    value, _, interval = _cell(name, estimate).partition(" [")
    return f"<td>{f'<b>{value}</b>' if best else value}<small>[{interval}</small></td>"


def _cell(name: str, estimate: Estimate) -> str:
    if name == "hit_rate":
        return f"{estimate.value:.1%} [{estimate.low:.1%}, {estimate.high:.1%}]"
    return f"{estimate.value:.3f} s [{estimate.low:.3f}, {estimate.high:.3f}]"


def _intervals(summaries: Mapping[str, Mapping[str, Estimate]], colours: Mapping[str, str]) -> str:
    """Return one line a policy: a dot at the mean, a bar over its interval."""
    estimates = {policy: figures["ttft_mean"] for policy, figures in summaries.items()}
    longest = max(estimate.high for estimate in estimates.values()) or 1.0
    height = _ROW * len(estimates)
    drawn = [_vertical(longest, height)]
    for number, (policy, estimate) in enumerate(estimates.items()):
        y, colour = _ROW * number + _ROW // 2, colours[policy]
        low, middle, high = (_WIDTH * value / longest for value in (estimate.low, estimate.value, estimate.high))
        drawn.append(f"<text class=name x=-8 y={y + 4}>{html.escape(policy)}</text>")
        drawn.append(f"<line x1={low:.1f} x2={high:.1f} y1={y} y2={y} stroke='{colour}' stroke-width=3 />")
        drawn.append(f"<circle cx={middle:.1f} cy={y} r=4 fill='{colour}'/>")
    return _picture("".join(drawn), height)


def _curves(results: Mapping[str, Sequence[ReplayedRequest]], colours: Mapping[str, str]) -> str:
    """Return the distributions up to the 99th percentile, longest time at the right edge."""
    longest = max(percentile([one.ttft_s for one in each], 0.99) for each in results.values()) or 1.0
    drawn = [_vertical(longest, _HEIGHT)]
    for share in (0.25, 0.5, 0.75, 0.99):
        y = _HEIGHT * (1.0 - share)
        drawn.append(f"<line class=grid x1=0 x2={_WIDTH} y1={y:.1f} y2={y:.1f} />")
        drawn.append(f"<text class=name x=-8 y={y + 4:.1f}>{share:.0%}</text>")
    for number, (policy, each) in enumerate(results.items()):
        colour = colours[policy]
        drawn.append(f"<polyline fill=none stroke='{colour}' stroke-width=2 points='{_points(each, longest)}'/>")
        y = _HEIGHT - 20 - 20 * (len(results) - 1 - number)
        drawn.append(f"<line x1=560 x2=584 y1={y - 4} y2={y - 4} stroke='{colour}' stroke-width=3 />")
        drawn.append(f"<text x=592 y={y}>{html.escape(policy)}</text>")
    return _picture("".join(drawn), _HEIGHT)


def _points(each: Sequence[ReplayedRequest], longest: float) -> str:
    ordered = sorted(one.ttft_s for one in each)
    shares = [0.99 * step / _POINTS for step in range(_POINTS + 1)]
    return " ".join(
        f"{ordered[min(int(share * len(ordered)), len(ordered) - 1)] / longest * _WIDTH:.1f},"
        f"{_HEIGHT * (1.0 - share):.1f}"
        for share in shares
    )


def _vertical(longest: float, height: int) -> str:
    """Return vertical grid lines at round seconds, with their labels."""
    step = _round_step(longest)
    ticks = [step * number for number in range(int(longest / step) + 1)]
    return "".join(
        f"<line class=grid x1={_WIDTH * tick / longest:.1f} x2={_WIDTH * tick / longest:.1f} y1=0 y2={height} />"
        f"<text class=tick x={_WIDTH * tick / longest:.1f} y={height + 18}>{tick:g} s</text>"
        for tick in ticks
    )


def _round_step(longest: float) -> float:
    """Return a step of 1, 2 or 5 times a power of ten that gives at most eight ticks."""
    power = 10.0 ** math.floor(math.log10(longest / 8))
    return next(float(f"{power * digit:.6g}") for digit in (1, 2, 5, 10) if power * digit >= longest / 8)


def _picture(content: str, height: int) -> str:
    return (
        f"<svg viewBox='{-_MARGIN} -10 {_WIDTH + _MARGIN + 40} {height + 36}' width={_WIDTH + _MARGIN + 40}>"
        f"{content}</svg>"
    )
