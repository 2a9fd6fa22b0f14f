"""Observations from the event bus: traffic that frontends report and loads that workers report."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import structlog

from dynamo_core import wire
from dynamo_core.clock import Clock
from dynamo_core.errors import DynamoError
from dynamo_core.events import SequenceGap
from dynamo_core.planes import TRAFFIC, EventBus, Subscription, Topic
from dynamo_core.planning import Observation, PoolState, TrafficStats, total_traffic

MAX_PENDING_REPORTS = 10_000
MAX_LATENCY_SAMPLES = 512

_log = structlog.get_logger(__name__)


class BusSource:
    """Collects traffic reports between observations.

    The reports of one window are folded into one ``TrafficStats`` over that window, so a rate is the requests of all
    frontends divided by the window, however often each of them reports.

    Args:
        bus: Started event bus.
        namespace: Namespace whose frontends are heard.
        clock: Time.
        stale_after_s: Silence after which traffic counts as missing.
    """

    def __init__(self, bus: EventBus, namespace: str, clock: Clock, stale_after_s: float) -> None:
        self._bus = bus
        self._topic = Topic(TRAFFIC, namespace)
        self._clock = clock
        self._stale_after_s = stale_after_s
        self._pending: deque[TrafficStats] = deque(maxlen=MAX_PENDING_REPORTS)
        self._subscription: Subscription | None = None
        self._window_start = clock.monotonic()
        self._last_report = clock.monotonic()
        self.lost_reports = 0

    async def run(self) -> None:
        """Subscribe and collect until closed."""
        self._subscription = await self._bus.subscribe(self._topic)
        async for item in self._subscription:
            if isinstance(item, SequenceGap):
                self.lost_reports += item.last - item.first + 1
                continue
            self._take(item.payload)

    def observe(self, pools: Mapping[str, PoolState]) -> Observation:
        """Return what was reported since the last call, with the given pools."""
        now = self._clock.monotonic()
        window_s = max(now - self._window_start, 1e-9)
        self._window_start = now
        reports = list(self._pending)
        self._pending.clear()
        stale = () if now - self._last_report <= self._stale_after_s else ("traffic",)
        folded = total_traffic(reports)
        traffic = () if folded is None else (_over_window(folded, window_s),)
        return Observation(at_s=self._clock.time(), traffic=traffic, pools=dict(pools), stale=stale)

    async def close(self) -> None:
        """Leave the topic. Idempotent."""
        if self._subscription is not None:
            await self._subscription.close()

    def _take(self, payload: bytes) -> None:
        try:
            self._pending.append(wire.TRAFFIC_STATS.decode(payload))
        except DynamoError as error:
            self.lost_reports += 1
            _log.warning("traffic report cannot be read", error=str(error))
            return
        self._last_report = self._clock.monotonic()


def _over_window(stats: TrafficStats, window_s: float) -> TrafficStats:
    return TrafficStats(
        model=stats.model,
        interval_s=window_s,
        requests=stats.requests,
        prompt_tokens=stats.prompt_tokens,
        output_tokens=stats.output_tokens,
        cached_tokens=stats.cached_tokens,
        errors=stats.errors,
        ttft_s=stats.ttft_s[-MAX_LATENCY_SAMPLES:],
        itl_s=stats.itl_s[-MAX_LATENCY_SAMPLES:],
        ended_at_s=stats.ended_at_s,
    )
