"""Reports of the lab: a table for the terminal, and one HTML page with curves that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from dynamo_router._lab_replay import ReplayedRequest
from dynamo_router._lab_stats import FIGURES, Estimate, percentile

_WIDTH, _HEIGHT, _POINTS = 720, 320, 200
_COLOURS = ("#1f6feb", "#d29922", "#2da44e", "#cf222e", "#8250df", "#0b7285", "#953800", "#57606a")


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
    """Return an HTML page with the table and the distribution of times to first token."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("policy", *FIGURES))
    rows = "".join(
        "<tr><td>"
        + "</td><td>".join([html.escape(policy), *(_cell(name, figures[name]) for name in FIGURES)])
        + "</td></tr>"
        for policy, figures in summaries.items()
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
        "<style>body{font:14px system-ui;margin:2em}table{border-collapse:collapse}"
        "td,th{border:1px solid #ccc;padding:.3em .6em;text-align:right}td:first-child{text-align:left}</style>"
        f"<h1>{html.escape(title)}</h1><table><tr>{head}</tr>{rows}</table>"
        f"<h2>Time to first token: share of requests at most so long, up to the 99th percentile</h2>{_curves(results)}"
        "</html>\n"
    )


def _cell(name: str, estimate: Estimate) -> str:
    if name == "hit_rate":
        return f"{estimate.value:.1%} [{estimate.low:.1%}, {estimate.high:.1%}]"
    return f"{estimate.value:.3f} s [{estimate.low:.3f}, {estimate.high:.3f}]"


def _curves(results: Mapping[str, Sequence[ReplayedRequest]]) -> str:
    longest = max(percentile([one.ttft_s for one in each], 0.99) for each in results.values()) or 1.0
    drawn: list[str] = []
    for number, (policy, each) in enumerate(results.items()):
        ordered = sorted(one.ttft_s for one in each)
        shares = [0.99 * step / _POINTS for step in range(_POINTS + 1)]
        points = " ".join(
            f"{ordered[min(int(share * len(ordered)), len(ordered) - 1)] / longest * _WIDTH:.1f},"
            f"{_HEIGHT * (1.0 - share):.1f}"
            for share in shares
        )
        colour = _COLOURS[number % len(_COLOURS)]
        drawn.append(f"<polyline fill=none stroke='{colour}' stroke-width=2 points='{points}'/>")
        drawn.append(f"<text x=560 y={200 + 16 * number} fill='{colour}'>{html.escape(policy)}</text>")
    axis = (
        f"<text x=0 y={_HEIGHT + 18}>0 s</text><text x={_WIDTH} y={_HEIGHT + 18} text-anchor=end>{longest:.2f} s</text>"
    )
    return (
        f"<svg width={_WIDTH} height={_HEIGHT + 24} style='border-bottom:1px solid #ccc'>{''.join(drawn)}{axis}</svg>"
    )
