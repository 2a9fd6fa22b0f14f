"""From the ticks of a loop to windows that are long enough to forecast from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from dynamo_core.planning import TrafficStats

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
