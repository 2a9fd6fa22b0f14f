"""Back-tests of forecasters on a recorded series, by rolling origin."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dynamo_core import plugins
from dynamo_core.errors import ConfigurationError
from dynamo_core.planning import SupportsQuantiles
from dynamo_planner._lab.trace import Floats

UNDER_COST = 9.0
WARM_POINTS = 10


@dataclass(frozen=True)
class Score:
    """How one forecaster did.

    Attributes:
        name: The forecaster.
        mase: Mean absolute error over that of the last value; below 1 beats it.
        pinball: Mean pinball loss of its quantile.
        coverage: Share of values at or below its quantile.
        over_s: Request-seconds planned for that did not come, a point.
        under_s: Request-seconds that came unplanned, a point.
        cost: Over-provision plus nine times under-provision.
    """

    name: str
    mase: float
    pinball: float
    coverage: float
    over_s: float
    under_s: float
    cost: float


def backtest(
    series: Floats,
    *,
    horizon: int,
    quantile: float,
    makers: Mapping[str, Callable[..., Any]] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Score]:
    """Score every installed forecaster on a series, cheapest first.

    Args:
        series: Values at equal distances.
        horizon: Points ahead.
        quantile: Quantile to plan for.
        makers: Forecasters by name; all that are installed if omitted.
        options: Options by name.

    Raises:
        ConfigurationError: if the series is too short to score anything.
    """
    if len(series) < WARM_POINTS + horizon + 1:
        raise ConfigurationError(
            f"a back-test needs more than {WARM_POINTS + horizon} points and the trace gives {len(series)}; "
            "shorten the interval"
        )
    found = installed() if makers is None else makers
    naive = _naive_error(series, horizon)
    scores = [
        _score(name, make(**(options or {}).get(name, {})), series, (horizon, quantile, naive))
        for name, make in found.items()
    ]
    return sorted(scores, key=lambda score: score.cost)


def installed() -> dict[str, Callable[..., Any]]:
    """Return the forecasters that can be made, by name; those that lack their library are left out."""
    found: dict[str, Callable[..., Any]] = {}
    for name in sorted(plugins.available("load_predictors")):
        try:
            make = plugins.load("load_predictors", name)
            make()
        except ConfigurationError:
            continue
        found[name] = make
    return found


def table(scores: list[Score]) -> str:
    """Return the scores as a table of text."""
    head = f"{'forecaster':<16}{'MASE':>8}{'pinball':>10}{'coverage':>10}{'over':>9}{'under':>9}{'cost':>9}"
    lines = [head, "-" * len(head)]
    lines += [
        f"{score.name:<16}{score.mase:>8.3f}{score.pinball:>10.4f}{score.coverage:>10.1%}"
        f"{score.over_s:>9.3f}{score.under_s:>9.3f}{score.cost:>9.3f}"
        for score in scores
    ]
    return "\n".join(lines)


def _score(name: str, predictor: Any, series: Floats, how: tuple[int, float, float]) -> Score:
    horizon, quantile, naive = how
    issued: list[tuple[float, float]] = []
    errors: list[float] = []
    losses: list[float] = []
    over = under = 0.0
    covered = 0
    for place, value in enumerate(series.tolist()):
        if place >= WARM_POINTS + horizon:
            point, upper = issued[place - horizon]
            errors.append(abs(value - point))
            losses.append(max(quantile * (value - upper), (quantile - 1) * (value - upper)))
            over += max(0.0, upper - value)
            under += max(0.0, value - upper)
            covered += value <= upper
        predictor.observe(value)
        issued.append(_forecast(predictor, horizon, quantile))
    count = len(errors)
    over, under = over / count, under / count
    mase = sum(errors) / count / naive if naive > 0 else math.nan
    return Score(name, mase, sum(losses) / count, covered / count, over, under, over + UNDER_COST * under)


def _forecast(predictor: Any, horizon: int, quantile: float) -> tuple[float, float]:
    point = float(predictor.predict(horizon))
    if isinstance(predictor, SupportsQuantiles):
        return point, float(predictor.predict_quantile(quantile, horizon))
    return point, point


def _naive_error(series: Floats, horizon: int) -> float:
    values: list[float] = series.tolist()
    errors = [abs(values[place] - values[place - horizon]) for place in range(WARM_POINTS + horizon, len(values))]
    return sum(errors) / len(errors)
