"""Traffic statistics: what ended in an interval, summed per model, for planners to read."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from dynamo_core.clock import Clock
from dynamo_core.planes import Publisher
from dynamo_core.planning import TrafficStats
from dynamo_core.wire import TRAFFIC_STATS

MAX_SAMPLES = 512


class Sample:
    """A uniform sample of bounded size, by reservoir."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._seen = 0
        self.values: list[float] = []

    def add(self, value: float) -> None:
        """Take a value in, or not."""
        self._seen += 1
        if len(self.values) < MAX_SAMPLES:
            self.values.append(value)
            return
        # Not randrange, which costs three times as much to be exact where thousands are not.
        place = int(self._random.random() * self._seen)
        if place < MAX_SAMPLES:
            self.values[place] = value


@dataclass(slots=True)
class EndedRequest:
    """What traffic statistics need of a request that ended."""

    model: str
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    failed: bool = False
    ttft_s: float | None = None
    itl_s: float | None = None


@dataclass(slots=True)
class _Sums:
    ttft: Sample
    itl: Sample
    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    errors: int = 0


@dataclass(slots=True)
class TrafficLog:
    """Sums of the present interval.

    Attributes:
        seed: Seed of the samples.
    """

    seed: int = 0
    _models: dict[str, _Sums] = field(default_factory=dict[str, _Sums])

    def note(self, ended: EndedRequest) -> None:
        """Add a request."""
        sums = self._models.get(ended.model)
        if sums is None:
            sums = self._models[ended.model] = _Sums(Sample(self.seed), Sample(self.seed + 1))
        sums.requests += 1
        sums.prompt_tokens += ended.prompt_tokens
        sums.output_tokens += ended.output_tokens
        sums.cached_tokens += ended.cached_tokens
        sums.errors += ended.failed
        if ended.ttft_s is not None:
            sums.ttft.add(ended.ttft_s)
        if ended.itl_s is not None:
            sums.itl.add(ended.itl_s)

    def take(self, interval_s: float, ended_at_s: float) -> list[TrafficStats]:
        """Return the interval's statistics and begin the next one. A model that was idle once is reported idle."""
        found = [
            TrafficStats(
                model=name,
                interval_s=interval_s,
                requests=sums.requests,
                prompt_tokens=sums.prompt_tokens,
                output_tokens=sums.output_tokens,
                cached_tokens=sums.cached_tokens,
                errors=sums.errors,
                ttft_s=tuple(sums.ttft.values),
                itl_s=tuple(sums.itl.values),
                ended_at_s=ended_at_s,
            )
            for name, sums in self._models.items()
        ]
        # An idle interval is news once; a model silent for a whole interval is dropped after it.
        self._models = {
            name: _Sums(Sample(self.seed), Sample(self.seed + 1))
            for name, sums in self._models.items()
            if sums.requests
        }
        return found


async def publish_traffic(log: TrafficLog, publisher: Publisher, clock: Clock, interval_s: float) -> None:
    """Publish the statistics of each interval until cancelled."""
    while True:
        began = clock.monotonic()
        await clock.sleep(interval_s)
        for stats in log.take(clock.monotonic() - began, clock.time()):
            publisher.publish(TRAFFIC_STATS.encode(stats), schema=TRAFFIC_STATS.schema)
