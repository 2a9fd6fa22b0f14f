"""Observations from a Prometheus server: the frontend's counters and histograms over the last window."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import aiohttp
import msgspec
import structlog

from dynamo_core.clock import Clock
from dynamo_core.errors import ConfigurationError, UnavailableError
from dynamo_core.planning import Observation, PoolState, TrafficStats

SAMPLES = 512
MAX_BODY_BYTES = 8 << 20

_log = structlog.get_logger(__name__)


class PrometheusSource:
    """Asks a Prometheus server for the traffic of the last window.

    A server that cannot be reached, an error, an empty answer and a value that is not finite all mean: no data.

    Args:
        url: Address of the server.
        clock: Time.
        window_s: Seconds that a query looks back; at least two scrapes.
        prefix: Prefix of the frontend's metric names.
        model: Only this model; all if empty.
        token: Bearer token; none if empty.
        timeout_s: Limit of a query.

    Raises:
        ConfigurationError: if the address is no HTTP URL, or the model cannot stand in a query.
    """

    def __init__(  # noqa: PLR0913 - keyword-only options of one call
        self,
        url: str,
        clock: Clock,
        *,
        window_s: float,
        prefix: str = "dynamo_frontend",
        model: str = "",
        token: str = "",
        timeout_s: float = 10.0,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigurationError(f"--prometheus-url {url!r} is no HTTP address; give http://host:9090")
        if any(character in model for character in '"\\\n'):
            raise ConfigurationError(f"--prometheus-model {model!r} holds a quote; give the model's plain name")
        self._url = url.rstrip("/") + "/api/v1/query"
        self._clock = clock
        self._window_s = window_s
        self._selector = f'{{model="{model}"}}' if model else ""
        self._model = model
        self._prefix = prefix
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._session: aiohttp.ClientSession | None = None
        self.lost_reports = 0

    async def run(self) -> None:
        """Nothing runs between observations."""

    async def observe(self, pools: Mapping[str, PoolState]) -> Observation:
        """Return the traffic of the last window, with the given pools."""
        try:
            traffic = await self._traffic()
        except UnavailableError as error:
            self.lost_reports += 1
            _log.warning("prometheus gives no traffic", error=error.message)
            traffic = None
        return Observation(
            at_s=self._clock.time(),
            traffic=() if traffic is None else (traffic,),
            pools=dict(pools),
            stale=("traffic",) if traffic is None else (),
        )

    async def close(self) -> None:
        """Close the connections. Idempotent."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _traffic(self) -> TrafficStats | None:
        requests = await self._increase("requests_total")
        prompt = await self._increase("input_sequence_tokens_sum")
        output = await self._increase("output_sequence_tokens_sum")
        if requests is None:
            return None
        return TrafficStats(
            self._model or "*",
            self._window_s,
            requests=round(requests),
            prompt_tokens=round(prompt or 0.0),
            output_tokens=round(output or 0.0),
            cached_tokens=round(await self._increase("cached_tokens_sum") or 0.0),
            ttft_s=await self._histogram("time_to_first_token_seconds_bucket"),
            itl_s=await self._histogram("inter_token_latency_seconds_bucket"),
            ended_at_s=self._clock.time(),
        )

    async def _increase(self, metric: str) -> float | None:
        rows = await self._query(f"sum({self._over_window(metric)})")
        value = _number(rows[0]["value"][1]) if rows else math.nan
        return max(value, 0.0) if math.isfinite(value) else None

    async def _histogram(self, metric: str) -> tuple[float, ...]:
        """Return values spread as the histogram's buckets say: each one's middle, as often as its share."""
        rows = await self._query(f"sum by (le) ({self._over_window(metric)})")
        pairs = [(_number(row["metric"]["le"]), _number(row["value"][1])) for row in rows if "le" in row["metric"]]
        return _values(sorted(pair for pair in pairs if math.isfinite(pair[1])))

    def _over_window(self, metric: str) -> str:
        return f"increase({self._prefix}_{metric}{self._selector}[{max(1, round(self._window_s))}s])"

    async def _query(self, query: str) -> list[Any]:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=self._timeout, headers=self._headers)
        try:
            async with self._session.get(self._url, params={"query": query}) as response:
                body = await response.content.read(MAX_BODY_BYTES)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise UnavailableError(f"prometheus cannot be reached: {type(error).__name__}: {error}") from error
        try:
            answer = msgspec.json.decode(body)
            return list(answer["data"]["result"])
        except (msgspec.MsgspecError, KeyError, TypeError) as error:
            raise UnavailableError(f"prometheus answered {response.status} without a result") from error


def _values(buckets: list[tuple[float, float]]) -> tuple[float, ...]:
    total = buckets[-1][1] if buckets else 0.0
    if total <= 0:
        return ()
    values: list[float] = []
    edge = below = 0.0
    for upper, cumulative in buckets:
        share = max(0.0, cumulative - below) / total
        # What lies beyond the last edge is at least that edge.
        middle = (edge + upper) / 2 if math.isfinite(upper) else edge
        values += [middle] * round(share * min(total, SAMPLES))
        edge, below = (upper if math.isfinite(upper) else edge), max(below, cumulative)
    return tuple(values[:SAMPLES])


def _number(text: Any) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan
