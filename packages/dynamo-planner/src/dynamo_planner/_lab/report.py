"""Reports as one HTML file each, with drawings in it and nothing to load from anywhere."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from dynamo_planner._lab.backtest import Score
from dynamo_planner._lab.simulate import Study, equal_text
from dynamo_planner._trace import Trace

WIDTH, HEIGHT, MARGIN = 860, 240, 44
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b", "#7f7f7f")
MAX_POINTS = 800
MAX_DECISIONS = 500

Line = tuple[Sequence[float], Sequence[float]]

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:14px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;color:#222}}
table{{border-collapse:collapse;margin:1rem 0}}td,th{{padding:.25rem .7rem;border-bottom:1px solid #ddd;
text-align:right}}td:first-child,th:first-child{{text-align:left}}svg{{max-width:100%;height:auto}}
details{{margin:1rem 0}}</style><h1>{title}</h1>{body}</html>
"""


def simulation_report(trace: Trace, study: Study, *, title: str) -> str:
    """Return the page of a study: table, load, replicas, and the planner's decisions in words."""
    rates = trace.rates(60.0).tolist()
    # What is left of the last minute is no minute's rate.
    rates = rates[: max(1, int(trace.duration_s // 60.0))]
    load = {"requests/s": ([60.0 * place for place in range(len(rates))], rates)}
    replicas = {
        result.name: (result.outcome.times_s, [float(count) for count in result.outcome.replicas])
        for result in study.results
    }
    rows = [
        (
            result.name,
            f"{result.outcome.attained:.2%}",
            f"{result.outcome.gpu_hours:.2f}",
            f"{result.outcome.gpu_hours / study.bound_gpu_hours:.2f}",
            equal_text(result, study),
            str(result.outcome.changes),
            result.setting,
        )
        for result in study.results
    ]
    head = ("policy", "attained", "GPU-hours", "of lower bound", "at equal attainment", "changes", "setting")
    decisions = [decision for result in study.results for decision in result.outcome.decisions]
    changed = [decision for decision in decisions if decision.replicas != decision.previous][:MAX_DECISIONS]
    told = [(f"{item.at_s:.0f} s", _counts(item.replicas), item.reason, item.explanation) for item in changed]
    body = (
        table_of(head, rows) + f"<p>Lower bound: {study.bound_gpu_hours:.2f} GPU-hours of work alone; "
        f"{study.staffed_gpu_hours:.2f} of whole replicas that take their time to start.</p>"
        + "<h2>Load</h2>"
        + chart(load)
        + "<h2>Replicas</h2>"
        + chart(replicas)
        + "<details><summary>Decisions that changed the fleet</summary>"
        + table_of(("at", "replicas", "reason", "because"), told)
        + "</details>"
    )
    return page(title, body)


def backtest_report(series: Sequence[float], interval_s: float, scores: Sequence[Score], *, title: str) -> str:
    """Return the page of a back-test: the series and the scores."""
    line = {"requests/s": ([interval_s * place for place in range(len(series))], list(series))}
    rows = [
        (
            score.name,
            *(f"{value:.4f}" for value in (score.mase, score.pinball)),
            f"{score.coverage:.1%}",
            *(f"{value:.4f}" for value in (score.over_s, score.under_s, score.cost)),
        )
        for score in scores
    ]
    head = ("forecaster", "MASE", "pinball", "coverage", "over", "under", "cost")
    return page(title, chart(line) + table_of(head, rows))


def chart(lines: Mapping[str, Line]) -> str:
    """Return an SVG of step lines over time, given in seconds."""
    if not any(len(times) for times, _ in lines.values()):
        return "<p>Nothing to draw.</p>"
    most_x = max(max(times, default=0.0) for times, _ in lines.values()) or 1.0
    most_y = max(max(values, default=0.0) for _, values in lines.values()) or 1.0
    drawn = [
        _path(_thinned(line), most_x, most_y, COLOURS[place % len(COLOURS)])
        for place, line in enumerate(lines.values())
    ]
    legend = [
        f'<text x="{MARGIN + 150 * place}" y="14" fill="{COLOURS[place % len(COLOURS)]}">{html.escape(name)}</text>'
        for place, name in enumerate(lines)
    ]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-size="12">'
        f'<line x1="{MARGIN}" y1="{HEIGHT - MARGIN}" x2="{WIDTH}" y2="{HEIGHT - MARGIN}" stroke="#999"/>'
        f'<text x="2" y="30">{most_y:.4g}</text><text x="2" y="{HEIGHT - MARGIN}">0</text>'
        f'<text x="{WIDTH - 60}" y="{HEIGHT - 20}">{_duration(most_x)}</text>' + "".join(drawn + legend) + "</svg>"
    )


def _duration(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def _path(line: Line, most_x: float, most_y: float, colour: str) -> str:
    points: list[str] = []
    for time_s, value in zip(*line, strict=True):
        x = MARGIN + (WIDTH - MARGIN) * time_s / most_x
        y = HEIGHT - MARGIN - (HEIGHT - MARGIN - 24) * value / most_y
        points.append(f"H{x:.1f}V{y:.1f}" if points else f"M{x:.1f} {y:.1f}")
    return f'<path d="{"".join(points)}" fill="none" stroke="{colour}" stroke-width="1.3"/>'


def _thinned(line: Line) -> Line:
    """Keep the highest of every few points, so that no peak is lost."""
    times, values = line
    stride = max(1, len(times) // MAX_POINTS)
    chunks = range(0, len(times), stride)
    return [times[start] for start in chunks], [max(values[start : start + stride]) for start in chunks]


def table_of(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{body}</table>"


def _counts(replicas: Mapping[str, int]) -> str:
    return ", ".join(f"{role} {count}" for role, count in replicas.items())


def page(title: str, body: str) -> str:
    """Return a page that needs nothing else."""
    return _PAGE.format(title=html.escape(title), body=body)
