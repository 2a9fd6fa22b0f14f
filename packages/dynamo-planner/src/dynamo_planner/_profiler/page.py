"""The report of a profile: three drawings and the table, in one file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from dynamo_planner._lab.report import COLOURS, HEIGHT, MARGIN, WIDTH, page, table_of
from dynamo_planner._profiler.sweep import EngineProfile, Measurement

BASELINE = HEIGHT - MARGIN
TOP = 24
Curve = Sequence[tuple[float, float]]


def profile_report(profile: EngineProfile) -> str:
    """Return the page of a profile."""
    plan = profile.plan
    by_isl = [(f"{isl} tokens", isl, "isl") for isl in plan.isls]
    by_load = [(f"{count} at once", count, "concurrency") for count in plan.concurrencies]
    told = f"<p>{len(profile.points)} points, {plan.osl} output tokens each, {_gpus(plan.gpus)}. {profile.schema}.</p>"
    plots = (
        ("Time to first token, ms, over prompt tokens", by_load, _ttft),
        ("Inter-token latency, ms, over requests at once", by_isl, _itl),
        ("Output tokens a second, over requests at once", by_isl, _rate),
    )
    body = told + "".join(f"<h2>{title}</h2>{_plot(profile, lines, of)}" for title, lines, of in plots)
    rows = [
        (str(p.isl), str(p.concurrency), f"{p.ttft_ms:.1f}", f"{p.itl_ms:.2f}", f"{p.output_tokens_s:.1f}")
        for p in profile.points
    ]
    head = ("prompt tokens", "at once", "TTFT ms", "ITL ms", "output tokens/s")
    return page(f"Profile of {plan.subject}", body + table_of(head, rows))


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"


def _plot(
    profile: EngineProfile,
    lines: Sequence[tuple[str, int, str]],
    of: Callable[[Measurement], tuple[float, float]],
) -> str:
    curves = {
        name: sorted(of(point) for point in profile.points if getattr(point, field) == value)
        for name, value, field in lines
    }
    return curves_chart(curves)


def curves_chart(curves: Mapping[str, Curve]) -> str:
    """Return an SVG of lines with dots over a logarithmic axis, for both of which values are above 0."""
    xs = sorted({x for curve in curves.values() for x, _ in curve})
    most_y = max((y for curve in curves.values() for _, y in curve), default=0.0) or 1.0
    low, high = math.log(xs[0]), math.log(xs[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        share = (math.log(x) - low) / (high - low) if high > low else 0.5
        return MARGIN + 10 + (WIDTH - MARGIN - 40) * share, BASELINE - (BASELINE - TOP) * y / most_y

    drawn: list[str] = []
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        spots = [place(x, y) for x, y in curve]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in spots]
        drawn.append(f'<text x="{MARGIN + 10 + 115 * number}" y="14" fill="{colour}">{name}</text>')
    ticks = [f'<text x="{place(x, 0)[0]:.1f}" y="{HEIGHT - 20}" text-anchor="middle">{x:g}</text>' for x in _spread(xs)]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-size="12">'
        f'<line x1="{MARGIN}" y1="{BASELINE}" x2="{WIDTH}" y2="{BASELINE}" stroke="#999"/>'
        f'<text x="2" y="34">{most_y:.4g}</text><text x="2" y="{BASELINE}">0</text>' + "".join(drawn + ticks) + "</svg>"
    )


def _ttft(point: Measurement) -> tuple[float, float]:
    return point.isl, point.ttft_ms


def _itl(point: Measurement) -> tuple[float, float]:
    return point.concurrency, point.itl_ms


def _rate(point: Measurement) -> tuple[float, float]:
    return point.concurrency, point.output_tokens_s


def _spread(xs: Sequence[float]) -> Sequence[float]:
    return xs[:: max(1, len(xs) // 8)]
