"""Replicas that a load needs: how much one engine serves within its latency targets, and how many that makes.

An engine's throughput follows from its step times. With ``B`` requests decoding, ``P`` seconds of prefill and ``O``
output tokens a request, a step that also carries its share of prefills lasts ``d(B) + B * P / O``, and the engine
serves ``B / (O * d(B) + B * P)`` requests a second. The largest ``B`` whose step is within the inter-token target is
the operating point. The first token also waits for other prompts; that wait is the tail of a queue with as many
servers as replicas (Erlang's delay formula), which is why ten replicas carry more each than one does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

from dynamo_core.errors import ConfigurationError
from dynamo_planner._regress import StepRegression
from dynamo_planner._timing import TimingModel

MAX_REPLICAS_SEARCHED = 4096
FULLEST = 0.94
EPSILON = 1e-9
STEP_TOKENS = (256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Workload:
    """What is to be served.

    Attributes:
        requests_s: Requests a second.
        isl: Mean prompt tokens.
        osl: Mean output tokens.
        cached_share: Share of prompt tokens found in a cache.
        expected_s: Requests a second without the margin for bursts, if that is known.
    """

    requests_s: float
    isl: float = 0.0
    osl: float = 0.0
    cached_share: float = 0.0
    expected_s: float | None = None

    @property
    def new_tokens(self) -> float:
        """Prompt tokens of a request that are computed."""
        return self.isl * (1 - min(max(self.cached_share, 0.0), 1.0))

    def plus(self, requests_s: float) -> Workload:
        """Return the workload with more requests of the same kind."""
        expected_s = None if self.expected_s is None else self.expected_s + requests_s
        return replace(self, requests_s=self.requests_s + requests_s, expected_s=expected_s)


@dataclass(frozen=True)
class Slo:
    """Latency targets, met by a share of the requests.

    Attributes:
        ttft_s: Time to first token.
        itl_s: Inter-token latency.
        percentile: Share of requests, in percent, that must be within each.
    """

    ttft_s: float = 0.5
    itl_s: float = 0.05
    percentile: float = 99.0

    def __post_init__(self) -> None:
        if self.ttft_s <= 0 or self.itl_s <= 0 or not 0 < self.percentile < 100:
            raise ConfigurationError(f"targets must be above 0 and the percentile between 0 and 100, got {self}")


@dataclass(frozen=True)
class Need:
    """Replicas that a workload needs.

    Attributes:
        replicas: How many.
        engine_requests_s: What each serves at most.
        ttft_s: Expected time to first token at the percentile.
        itl_s: Expected inter-token latency.
        batch: Requests that decode at once on each.
        meets_slo: Whether any number of replicas meets the targets.
    """

    replicas: int
    engine_requests_s: float
    ttft_s: float = 0.0
    itl_s: float = 0.0
    batch: float = 0.0
    meets_slo: bool = True


@dataclass(frozen=True)
class Offer:
    """What one replica gives a workload, for fleets of several kinds.

    Attributes:
        requests_s: Requests a second that it serves at most.
        steady_share: Share of that to plan the expected rate with.
        burst_share: Share of that which bursts may fill.
        first_s: Time to first token without a queue.
        cv2: Squared coefficient of variation of its service times; None where no queue is modelled.
        queues_bursts: Whether the queue is that of the planned rate rather than of the expected one.
        meets_slo: Whether a request meets the targets at all.
    """

    requests_s: float
    steady_share: float = 1.0
    burst_share: float = 1.0
    first_s: float = 0.0
    cv2: float | None = None
    queues_bursts: bool = False
    meets_slo: bool = True


class CapacityModel(Protocol):
    """Turns a workload into replicas."""

    @property
    def ready(self) -> bool:
        """Whether it knows enough to answer."""
        ...

    def need(self, workload: Workload, slo: Slo) -> Need:
        """Return the fewest replicas that serve the workload within the targets."""
        ...


@dataclass(frozen=True)
class RateCapacity:
    """Capacity of one replica as a request rate.

    Attributes:
        requests_per_replica_s: What one replica serves within its latency target.
        utilization: Share of it to plan with.
    """

    requests_per_replica_s: float
    utilization: float
    ready: bool = True

    def offer(self, workload: Workload, slo: Slo) -> Offer:
        """Return what one replica gives."""
        whole = self.utilization if workload.expected_s is None else 1.0
        return Offer(self.requests_per_replica_s, self.utilization, whole)

    def replicas_for(self, requests_per_s: float) -> int:
        """Return the fewest replicas whose planned capacity covers the rate."""
        return _ceil(requests_per_s / (self.requests_per_replica_s * self.utilization))

    def need(self, workload: Workload, slo: Slo) -> Need:
        """Return the fewest replicas whose planned share covers the expected rate, and whose whole the bursts."""
        if workload.expected_s is None:
            return Need(self.replicas_for(workload.requests_s), self.requests_per_replica_s)
        bursts = _ceil(workload.requests_s / self.requests_per_replica_s)
        return Need(max(bursts, self.replicas_for(workload.expected_s)), self.requests_per_replica_s)


class PrefillCapacity:
    """Capacity of engines that only compute prompts.

    Args:
        timing: Step times of one.
        service_cv2: Squared coefficient of variation of prompt times; 1 is as variable as an exponential.
    """

    ready = True

    def __init__(self, timing: TimingModel, service_cv2: float = 1.0) -> None:
        self._timing = timing
        self._cv2 = service_cv2

    def offer(self, workload: Workload, slo: Slo) -> Offer:
        """Return what one replica gives."""
        service = max(self._timing.prefill_s(workload.new_tokens), EPSILON)
        meets = service <= slo.ttft_s
        return Offer(1 / service, FULLEST, FULLEST, service, self._cv2, queues_bursts=True, meets_slo=meets)

    def need(self, workload: Workload, slo: Slo) -> Need:
        """Return the fewest replicas whose queue is short enough at the percentile."""
        service = self._timing.prefill_s(workload.new_tokens)
        if workload.requests_s <= 0 or service <= 0:
            return Need(0, math.inf if service <= 0 else 1 / service, service)
        replicas, ttft_s, met = _fewest(workload.requests_s, service, slo, self._cv2)
        return Need(replicas, 1 / service, ttft_s, meets_slo=met)


class DecodeCapacity:
    """Capacity of engines that only decode.

    Args:
        timing: Step times of one.
    """

    ready = True

    def __init__(self, timing: TimingModel) -> None:
        self._timing = timing

    def offer(self, workload: Workload, slo: Slo) -> Offer:
        """Return what one replica gives."""
        batch, step_s, met = operating_point(self._timing, workload, slo.itl_s, prefill_s=0.0)
        return Offer(batch / max(workload.osl * step_s, EPSILON), meets_slo=met)

    def need(self, workload: Workload, slo: Slo) -> Need:
        """Return the fewest replicas whose batches stay within the inter-token target."""
        if workload.requests_s <= 0 or workload.osl <= 0:
            return Need(0, math.inf)
        batch, step_s, met = operating_point(self._timing, workload, slo.itl_s, prefill_s=0.0)
        rate = batch / (workload.osl * max(step_s, EPSILON))
        return Need(_ceil(workload.requests_s / rate), rate, itl_s=step_s, batch=batch, meets_slo=met)


class AggregatedCapacity:
    """Capacity of engines that prefill and decode.

    Args:
        timing: Step times of one.
        service_cv2: Squared coefficient of variation of prompt times.
    """

    ready = True

    def __init__(self, timing: TimingModel, service_cv2: float = 1.0) -> None:
        self._timing = timing
        self._cv2 = service_cv2

    def offer(self, workload: Workload, slo: Slo) -> Offer:
        """Return what one replica gives."""
        return self._offer(workload, slo)[0]

    def need(self, workload: Workload, slo: Slo) -> Need:
        """Return the fewest replicas that keep both targets."""
        if workload.requests_s <= 0:
            return Need(0, math.inf)
        offer, batch, step_s, met = self._offer(workload, slo)
        rate = offer.requests_s
        # Bursts are in the planned rate already; the queue of a steady stream is that of the expected one.
        steady_s = workload.requests_s if workload.expected_s is None else workload.expected_s
        replicas, ttft_s, met_ttft = _fewest(steady_s, 1 / rate, slo, self._cv2, alone_s=offer.first_s)
        replicas = max(replicas, _ceil(workload.requests_s / rate / FULLEST))
        return Need(replicas, rate, ttft_s, step_s, batch, met and met_ttft)

    def _offer(self, workload: Workload, slo: Slo) -> tuple[Offer, float, float, bool]:
        """Return the offer, and of its operating point batch, step and whether it is within the target."""
        # Under load a step carries chunks of several prompts, so a prompt costs its tokens at the size of step at which
        # they are cheapest; alone, as for its own first token, it costs a step of its own.
        work_s = workload.new_tokens * cheapest_token_s(self._timing)
        batch, step_s, met = operating_point(self._timing, workload, slo.itl_s, prefill_s=work_s)
        rate = batch / max(workload.osl * step_s, work_s, EPSILON)
        alone_s = self._timing.prefill_s(workload.new_tokens) + self._timing.decode_s(batch, _context(workload))
        meets = met and alone_s <= slo.ttft_s
        return Offer(rate, FULLEST, FULLEST, alone_s, self._cv2, meets_slo=meets), batch, step_s, met


class LearnedCapacity:
    """A capacity model over step times that are still being learned: ready once they are."""

    def __init__(self, model: CapacityModel, steps: StepRegression) -> None:
        self._model = model
        self._steps = steps

    @property
    def ready(self) -> bool:
        """Whether the step times are known."""
        return self._steps.ready

    def need(self, workload: Workload, slo: Slo) -> Need:
        """Return what the model over the learned times says."""
        return self._model.need(workload, slo)


def operating_point(
    timing: TimingModel, workload: Workload, itl_s: float, *, prefill_s: float
) -> tuple[float, float, bool]:
    """Return the largest batch within the inter-token target, its step time, and whether it is within it."""
    context = _context(workload)
    share = prefill_s / max(workload.osl, 1.0)
    most = max(1, min(timing.max_num_seqs, int(timing.max_kv_tokens / max(context, 1.0))))

    def step(batch: int) -> float:
        return timing.decode_s(batch, context) + batch * share

    if step(1) > itl_s:
        return 1.0, step(1), False
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if step(middle) <= itl_s else (low, middle - 1)
    return float(low), step(low), True


def wait_tail_s(requests_s: float, service_s: float, servers: int, share: float, cv2: float) -> float:
    """Return the wait that this share of requests stays below; infinite if the servers cannot keep up."""
    load = requests_s * service_s
    if load >= servers * FULLEST:
        return math.inf
    waits = _erlang_c(load, servers)
    if waits <= 1 - share:
        return 0.0
    return math.log(waits / (1 - share)) * service_s / (servers - load) * (1 + cv2) / 2


def cheapest_token_s(timing: TimingModel) -> float:
    """Return the least time of a prompt token over all sizes of a step."""
    return min(timing.prefill_s(size) / size for size in STEP_TOKENS)


def _fewest(
    requests_s: float, service_s: float, slo: Slo, cv2: float, *, alone_s: float | None = None
) -> tuple[int, float, bool]:
    """Return the fewest servers whose first tokens are in time, their time, and whether they are.

    ``service_s`` is what a request costs a server; ``alone_s`` is its first token without any queue, if that differs.
    """
    share = slo.percentile / 100
    first_s = service_s if alone_s is None else alone_s

    def ttft(servers: int) -> float:
        return first_s + wait_tail_s(requests_s, service_s, servers, share, cv2)

    fewest = max(1, _ceil(requests_s * service_s / FULLEST))
    if first_s > slo.ttft_s:
        # No number of replicas helps a prompt that alone takes too long; the least that does not queue up is left.
        return fewest + (not math.isfinite(ttft(fewest))), first_s, False
    for servers in range(fewest, MAX_REPLICAS_SEARCHED):
        if ttft(servers) <= slo.ttft_s:
            return servers, ttft(servers), True
    return MAX_REPLICAS_SEARCHED, ttft(MAX_REPLICAS_SEARCHED), False


def _erlang_c(load: float, servers: int) -> float:
    """Return the probability that a request waits."""
    blocked = 1.0
    for server in range(1, servers + 1):
        blocked = load * blocked / (server + load * blocked)
    busy = load / servers
    return blocked / (1 - busy * (1 - blocked))


def _context(workload: Workload) -> float:
    return workload.isl + workload.osl / 2


def _ceil(value: float) -> int:
    # The subtraction keeps a rate that is exactly n replicas' worth from costing one more by rounding.
    return max(0, math.ceil(value - EPSILON))
