"""Measures the simulated engine: what a profile of the analytic step times would be."""

from __future__ import annotations

import math

from dynamo_planner._lab.engine import SimulatedEngine
from dynamo_planner._profiler.sweep import Measurement
from dynamo_planner._timing import AnalyticTiming


class SimulatedProbe:
    """Runs points on the simulated engine, in no time.

    Args:
        timing: Step times.
        osl: Output tokens of each request.
    """

    def __init__(self, timing: AnalyticTiming, osl: int) -> None:
        self._timing = timing
        self._osl = osl

    async def measure(self, isl: int, concurrency: int) -> Measurement:
        """Run that many requests that arrive at once."""
        times: list[tuple[float, float]] = []
        engine = SimulatedEngine(self._timing, lambda _, first_s, end_s: times.append((first_s, end_s)), 0.0)
        for request in range(concurrency):
            engine.submit(request, 0.0, isl, self._osl)
        while not engine.empty:
            engine.advance(math.nextafter(engine.now_s, math.inf))
        spans = [(end_s - first_s) / (self._osl - 1) for first_s, end_s in times]
        return Measurement(
            isl,
            concurrency,
            ttft_ms=1000 * sum(first_s for first_s, _ in times) / concurrency,
            itl_ms=1000 * sum(spans) / concurrency,
            output_tokens_s=concurrency * self._osl / max(end_s for _, end_s in times),
        )
