"""The planner contract: observation in, decision out, and something that carries it out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import msgspec

from dynamo_core.component import ComponentContext
from dynamo_core.load import ForwardPassMetrics, ReportedLoad


class TrafficStats(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one frontend saw in one interval; sums, so that several frontends add up.

    Attributes:
        model: Model name.
        interval_s: Length of the interval.
        requests: Requests that ended.
        prompt_tokens: Sum over them.
        output_tokens: Sum over them.
        cached_tokens: Sum over them.
        errors: Of them, those that failed on our side.
        ttft_s: Time to first token of each, or a sample of at most 512.
        itl_s: Mean inter-token latency of each, or a sample of at most 512.
        ended_at_s: Unix time of the interval's end.
    """

    model: str
    interval_s: float
    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    errors: int = 0
    ttft_s: tuple[float, ...] = ()
    itl_s: tuple[float, ...] = ()
    ended_at_s: float = 0.0


class PoolState(msgspec.Struct, frozen=True, omit_defaults=True):
    """Replicas of one role.

    Attributes:
        ready: Serving.
        starting: Asked for and not yet ready.
        draining: Leaving.
        desired: What was last asked for.
        failed: Ended on their own more often than the restart limit allows.
        startup_s: Measured seconds from ask to ready, recent median; None if never seen.
    """

    ready: int = 0
    starting: int = 0
    draining: int = 0
    desired: int = 0
    failed: int = 0
    startup_s: float | None = None


class Observation(msgspec.Struct, frozen=True, omit_defaults=True):
    """Everything a decision may look at, as of one moment. Absent inputs are None or empty, never guessed.

    Attributes:
        at_s: Unix time.
        traffic: Per model, over the last interval; empty if no frontend reported.
        pools: Replicas by role (``worker``, ``prefill``, ``decode``).
        loads: Reported load per worker, by hex instance id.
        passes: Recent forward passes.
        stale: Names of inputs that are older than their limit.
        roles: Role of each worker in ``loads``, by hex instance id; empty where there is but one role.
    """

    at_s: float
    traffic: tuple[TrafficStats, ...] = ()
    pools: dict[str, PoolState] = {}
    loads: dict[str, ReportedLoad] = {}
    passes: tuple[ForwardPassMetrics, ...] = ()
    stale: tuple[str, ...] = ()
    roles: dict[str, str] = {}


class ScalingDecision(msgspec.Struct, frozen=True, omit_defaults=True):
    """One decision with its inputs.

    Attributes:
        decision_id: Identity; grows by one.
        at_s: Unix time.
        replicas: Replicas wanted by role.
        previous: Replicas wanted before, by role.
        reason: Machine-readable, for example ``scale_up`` or ``no_traffic_data``.
        reasons: Reason of each part that had a say, by name, for example ``load.decode``.
        explanation: In words, with numbers.
        values: Intermediate values by name.
        advisory: True if it is only a proposal.
    """

    decision_id: int
    at_s: float
    replicas: dict[str, int] = {}
    previous: dict[str, int] = {}
    reason: str = ""
    explanation: str = ""
    values: dict[str, float] = {}
    advisory: bool = False
    reasons: dict[str, str] = {}


@runtime_checkable
class Planner(Protocol):
    """The pure decision maker: no I/O, no clock of its own; same inputs, same outputs."""

    def decide(self, observation: Observation) -> ScalingDecision:
        """Take the next observation, return the next decision."""
        ...


@runtime_checkable
class LoadPredictor(Protocol):
    """Forecasts one series.

    An entry of ``dynamo_core.load_predictors`` is a callable ``(**options)`` that returns one.
    """

    def observe(self, value: float) -> None:
        """Add the newest point; a value that is not finite counts as missing."""
        ...

    def predict(self, horizon: int = 1) -> float:
        """Return the forecast ``horizon`` intervals ahead, at least 0; 0 without data."""
        ...


@runtime_checkable
class SupportsQuantiles(Protocol):
    """A load predictor that also says how high the series may go."""

    def predict_quantile(self, quantile: float, horizon: int = 1) -> float:
        """Return what the series stays below with this probability, at least 0; 0 without data.

        Raises:
            InvalidRequestError: if the quantile is not between 0 and 1.
        """
        ...


@runtime_checkable
class ScalingTarget(Protocol):
    """Something with replicas by role. Calls may be repeated: asking for what already is changes nothing."""

    async def start(self) -> None:
        """Connect."""
        ...

    async def state(self) -> Mapping[str, PoolState]:
        """Return the pools by role.

        Raises:
            UnavailableError: if it cannot be read.
        """
        ...

    async def scale(self, replicas: Mapping[str, int], *, decision_id: int = 0) -> None:
        """Ask for these replica counts; returns once asked, not once done. Scaling down drains first.

        Args:
            replicas: Wanted count by role; roles left out stay as they are.
            decision_id: For idempotence: a repeated or older id is ignored. 0 always applies.

        Raises:
            NotFoundError: for an unknown role.
            InvalidRequestError: for a count below 0 or above the target's limit.
        """
        ...

    async def close(self) -> None:
        """Disconnect; replicas stay. Idempotent."""
        ...


class ScalingTargetFactory(Protocol):
    """Entry of ``dynamo_core.scaling_targets``."""

    def __call__(self, context: ComponentContext, options: Mapping[str, Any]) -> ScalingTarget:
        """Return a target that is not yet started."""
        ...


def total_traffic(stats: Sequence[TrafficStats]) -> TrafficStats | None:
    """Add up the reports of several frontends or intervals; None if there are none."""
    if not stats:
        return None
    return TrafficStats(
        model=stats[0].model if len({item.model for item in stats}) == 1 else "*",
        interval_s=max(item.interval_s for item in stats),
        requests=sum(item.requests for item in stats),
        prompt_tokens=sum(item.prompt_tokens for item in stats),
        output_tokens=sum(item.output_tokens for item in stats),
        cached_tokens=sum(item.cached_tokens for item in stats),
        errors=sum(item.errors for item in stats),
        ttft_s=tuple(value for item in stats for value in item.ttft_s),
        itl_s=tuple(value for item in stats for value in item.itl_s),
        ended_at_s=max(item.ended_at_s for item in stats),
    )
