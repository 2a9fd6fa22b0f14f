"""From the ticks of a loop to windows that are long enough to forecast from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from dynamo_core.load import ReportedLoad
from dynamo_core.planning import Observation, PoolState, TrafficStats

MAX_SAMPLES = 2048


@dataclass(frozen=True)
class TrafficWindow:
    """Traffic of one window.

    Attributes:
        requests: Requests that ended.
        seconds: Its length.
        isl: Mean prompt tokens; None without requests.
        osl: Mean output tokens; None without requests.
        cached_share: Share of prompt tokens from a cache; None without requests.
        ttft_s: Times to first token, or a sample.
        itl_s: Inter-token latencies, or a sample.
    """

    requests: int
    seconds: float
    isl: float | None
    osl: float | None
    cached_share: float | None
    ttft_s: tuple[float, ...]
    itl_s: tuple[float, ...]

    @property
    def requests_s(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds


@dataclass
class WindowBuilder:
    """Adds up ticks until they make a window.

    Attributes:
        length_s: Length of a window.
    """

    length_s: float
    _parts: list[TrafficStats] = field(default_factory=list[TrafficStats])
    _seconds: float = 0.0

    def add(self, stats: TrafficStats) -> TrafficWindow | None:
        """Take one tick's traffic; return the window it completes."""
        self._parts.append(stats)
        self._seconds += stats.interval_s
        if self._seconds < self.length_s * (1 - 1e-6):
            return None
        window = _window(self._parts, self._seconds)
        self.reset()
        return window

    def reset(self) -> None:
        """Drop the window that is being built."""
        self._parts, self._seconds = [], 0.0


class Arrivals:
    """Counts requests as they arrive, where frontends report them once they end.

    What arrived is what ended plus the growth of what is in flight. That is known while the same workers report; when
    one leaves, or a report is missing, what ended has to do.
    """

    def __init__(self) -> None:
        self._workers: frozenset[str] = frozenset()
        self._in_flight = 0

    def counted(self, stats: TrafficStats, observation: Observation, pools: Mapping[str, PoolState]) -> TrafficStats:
        """Return the report with its sums scaled to the requests that arrived."""
        workers, before = frozenset(observation.loads), self._workers
        in_flight, was = sum(_in_flight(load) for load in observation.loads.values()), self._in_flight
        self._workers, self._in_flight = workers, in_flight
        leaving = any(pool.draining for pool in pools.values())
        if not stats.requests or "loads" in observation.stale or leaving or not workers or not before <= workers:
            return stats
        arrived = max(0, stats.requests + in_flight - was)
        share = arrived / stats.requests
        return msgspec.structs.replace(
            stats,
            requests=arrived,
            prompt_tokens=round(stats.prompt_tokens * share),
            output_tokens=round(stats.output_tokens * share),
            cached_tokens=round(stats.cached_tokens * share),
        )

    def reset(self) -> None:
        """Forget what was in flight."""
        self._workers, self._in_flight = frozenset(), 0


def _in_flight(load: ReportedLoad) -> int:
    return max(0, load.active_requests) + max(0, load.waiting_requests)


def usable(stats: TrafficStats) -> bool:
    """Whether a report can be true: a finite positive interval and no negative sums."""
    sums = (stats.requests, stats.prompt_tokens, stats.output_tokens, stats.cached_tokens, stats.errors)
    return math.isfinite(stats.interval_s) and stats.interval_s > 0 and min(sums) >= 0


def _window(parts: list[TrafficStats], seconds: float) -> TrafficWindow:
    requests = sum(part.requests for part in parts)
    prompt = sum(part.prompt_tokens for part in parts)
    cached = sum(part.cached_tokens for part in parts)
    output = sum(part.output_tokens for part in parts)
    return TrafficWindow(
        requests=requests,
        seconds=seconds,
        isl=prompt / requests if requests else None,
        osl=output / requests if requests else None,
        cached_share=min(1.0, cached / prompt) if prompt else None,
        ttft_s=_samples([part.ttft_s for part in parts]),
        itl_s=_samples([part.itl_s for part in parts]),
    )


def _samples(parts: list[tuple[float, ...]]) -> tuple[float, ...]:
    values = [value for part in parts for value in part if math.isfinite(value) and value >= 0]
    return tuple(values[-MAX_SAMPLES:])
