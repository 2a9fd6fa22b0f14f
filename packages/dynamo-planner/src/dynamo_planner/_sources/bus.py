"""Observations from the event bus: traffic that frontends report, loads and passes that workers report."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping

import structlog

from dynamo_core import wire
from dynamo_core.clock import Clock
from dynamo_core.errors import DynamoError
from dynamo_core.events import SequenceGap
from dynamo_core.ids import EndpointId, WorkerId
from dynamo_core.load import ForwardPassMetrics, ReportedLoad
from dynamo_core.planes import FORWARD_PASS, LOAD, TRAFFIC, EventBus, Subscription, Topic
from dynamo_core.planning import Observation, PoolState, TrafficStats, total_traffic

MAX_PENDING_REPORTS = 10_000
MAX_LATENCY_SAMPLES = 512
MAX_PASSES = 4096
MAX_WORKERS = 10_000

_log = structlog.get_logger(__name__)


class BusSource:
    """Collects reports between observations.

    The traffic reports of one window are folded into one ``TrafficStats`` over that window, so a rate is the requests
    of all frontends divided by the window, however often each of them reports. Of each worker the newest load counts,
    until it is stale.

    Args:
        bus: Started event bus.
        namespace: Namespace whose frontends are heard.
        clock: Time.
        stale_after_s: Silence after which an input counts as missing.
        endpoints: Worker endpoints that are heard, with the role of their workers.
    """

    def __init__(
        self,
        bus: EventBus,
        namespace: str,
        clock: Clock,
        stale_after_s: float,
        endpoints: Mapping[EndpointId, str] | None = None,
    ) -> None:
        self._bus = bus
        self._clock = clock
        self._stale_after_s = stale_after_s
        self._takers: dict[Topic, Callable[[bytes], None]] = {Topic(TRAFFIC, namespace): self._take_traffic}
        for endpoint, role in (endpoints or {}).items():
            self._takers[Topic.of(LOAD, endpoint)] = self._load_taker(role)
            self._takers[Topic.of(FORWARD_PASS, endpoint)] = self._take_pass
        self._pending: deque[TrafficStats] = deque(maxlen=MAX_PENDING_REPORTS)
        self._passes: deque[ForwardPassMetrics] = deque(maxlen=MAX_PASSES)
        self._loads: dict[str, tuple[float, str, ReportedLoad]] = {}
        self._subscriptions: list[Subscription] = []
        self._window_start = clock.monotonic()
        self._last_report = clock.monotonic()
        self.lost_reports = 0

    async def run(self) -> None:
        """Subscribe and collect until closed."""
        async with asyncio.TaskGroup() as group:
            for topic, take in self._takers.items():
                subscription = await self._bus.subscribe(topic)
                self._subscriptions.append(subscription)
                group.create_task(self._collect(subscription, take), name=f"planner-{topic.name}")

    async def observe(self, pools: Mapping[str, PoolState]) -> Observation:
        """Return what was reported since the last call, with the given pools."""
        now = self._clock.monotonic()
        window_s = max(now - self._window_start, 1e-9)
        self._window_start = now
        folded = total_traffic(list(self._pending))
        self._pending.clear()
        passes = tuple(self._passes)
        self._passes.clear()
        self._loads = {key: item for key, item in self._loads.items() if now - item[0] <= self._stale_after_s}
        return Observation(
            at_s=self._clock.time(),
            traffic=() if folded is None else (_over_window(folded, window_s),),
            pools=dict(pools),
            loads={key: load for key, (_, _, load) in self._loads.items()},
            passes=passes,
            stale=() if now - self._last_report <= self._stale_after_s else ("traffic",),
            roles={key: role for key, (_, role, _) in self._loads.items()},
        )

    async def close(self) -> None:
        """Leave the topics. Idempotent."""
        for subscription in self._subscriptions:
            await subscription.close()

    async def _collect(self, subscription: Subscription, take: Callable[[bytes], None]) -> None:
        async for item in subscription:
            if isinstance(item, SequenceGap):
                self.lost_reports += item.last - item.first + 1
                continue
            try:
                take(item.payload)
            except DynamoError as error:
                self.lost_reports += 1
                _log.warning("report cannot be read", error=str(error))

    def _take_traffic(self, payload: bytes) -> None:
        self._pending.append(wire.TRAFFIC_STATS.decode(payload))
        self._last_report = self._clock.monotonic()

    def _take_pass(self, payload: bytes) -> None:
        self._passes.append(wire.FORWARD_PASS_METRICS.decode(payload))

    def _load_taker(self, role: str) -> Callable[[bytes], None]:
        def take(payload: bytes) -> None:
            load = wire.WORKER_LOAD.decode(payload)
            key = _key(load.worker)
            if load.reported is not None and (key in self._loads or len(self._loads) < MAX_WORKERS):
                self._loads[key] = (self._clock.monotonic(), role, load.reported)

        return take


def _key(worker: WorkerId) -> str:
    rank = f".{worker.dp_rank}" if worker.dp_rank else ""
    return f"{worker.instance_id:x}{rank}"


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
