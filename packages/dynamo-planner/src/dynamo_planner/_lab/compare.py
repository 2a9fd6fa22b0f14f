"""Comparing policies fairly: settings chosen on another part of the trace, and costs at equal attainment.

A policy that misses more targets is cheaper, so GPU-hours alone say nothing. A rule is run at many of its settings;
what it costs at the attainment that the planner reached lies on the frontier of those runs. The planner gets no such
sweep: its setting is chosen on a part of the trace that it is then not judged by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from dynamo_core.planning import Planner
from dynamo_planner._build import create_planner, windows_of
from dynamo_planner._lab.fleet import Outcome
from dynamo_planner._settings import PlannerSettings
from dynamo_planner._trace import Trace

PLANNING_QUANTILES = (0.9, 0.95, 0.97, 0.99)


@dataclass(frozen=True)
class Point:
    """What one setting of a policy gave.

    Attributes:
        attained: Share of requests within their targets.
        gpu_hours: Replica-hours.
    """

    attained: float
    gpu_hours: float


def cost_at(points: Iterable[Point], attained: float) -> float:
    """Return the GPU-hours at which these runs attain a share, between the two nearest that are worth their cost.

    Infinite if none attains it.
    """
    frontier = _frontier(points)
    for below, above in zip([None, *frontier], frontier, strict=False):
        if above.attained < attained:
            continue
        if below is None:
            return above.gpu_hours
        share = (attained - below.attained) / (above.attained - below.attained)
        return below.gpu_hours + share * (above.gpu_hours - below.gpu_hours)
    return math.inf


def chosen_settings(
    settings: PlannerSettings,
    run: Callable[[Planner], Outcome],
    share: float,
    quantiles: Sequence[float] = PLANNING_QUANTILES,
) -> PlannerSettings:
    """Return the settings with the planning quantile that attains the share with room to spare at least cost.

    What barely attains it here barely misses it elsewhere, so only half of the allowed misses may happen. If no
    quantile does so well, the one that attains most is returned.
    """
    safe = (1 + share) / 2
    tried = [settings.model_copy(update={"planning_quantile": quantile}) for quantile in quantiles]
    outcomes = [run(create_planner(one)) for one in tried]
    ranked = sorted(
        zip(tried, outcomes, strict=True),
        key=lambda item: (0.0, item[1].gpu_hours) if item[1].attained >= safe else (1.0, -item[1].attained),
    )
    return ranked[0][0]


def warmed_planner(settings: PlannerSettings, past: Trace) -> Planner:
    """Return a planner whose forecasters have seen a recorded past, as ``warmup_trace`` gives it to them."""
    planner = create_planner(settings)
    planner.warm_up(windows_of(past, settings.window_s))
    return planner


def _frontier(points: Iterable[Point]) -> list[Point]:
    """Return the runs that no cheaper one attains as much as, cheapest first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (point.gpu_hours, -point.attained)):
        if not kept or point.attained > kept[-1].attained:
            kept.append(point)
    return kept
