"""A simulated fleet under a planner: replicas that start, serve and drain behind a router, and what it all cost."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dynamo_core.load import ReportedLoad
from dynamo_core.planning import Observation, Planner, PoolState, ScalingDecision, TrafficStats
from dynamo_planner._capacity import Slo
from dynamo_planner._lab.engine import SimulatedEngine
from dynamo_planner._timing import AnalyticTiming
from dynamo_planner._trace import Floats, Trace

BLOCK_TOKENS = 64
SAMPLES = 512
ROLE = "worker"


@dataclass(frozen=True)
class FleetOptions:
    """The world that a planner is tried in.

    Attributes:
        timing: Step times of an engine.
        slo: Targets a request must meet.
        startup_s: Seconds from ask to ready; they cost GPUs already.
        interval_s: Seconds between decisions.
        initial_replicas: Replicas that serve at the start.
        max_replicas: Replicas that the cluster can hold.
    """

    timing: AnalyticTiming = field(default_factory=AnalyticTiming)
    slo: Slo = field(default_factory=Slo)
    startup_s: float = 60.0
    interval_s: float = 10.0
    initial_replicas: int = 1
    max_replicas: int = 64


@dataclass
class Outcome:
    """What a run gave.

    Attributes:
        ttft_s: Time to first token of each request.
        itl_s: Mean inter-token latency of each.
        gpu_hours: Replica-hours from ask to end of drain, within the trace.
        attained: Share of requests within both targets.
        times_s: Moments of decisions.
        replicas: Replicas wanted at each.
        ready: Replicas that served at each.
        changes: Decisions that changed the fleet.
        decisions: The decisions, if they were kept.
    """

    ttft_s: Floats
    itl_s: Floats
    gpu_hours: float
    attained: float
    times_s: list[float] = field(default_factory=list[float])
    replicas: list[int] = field(default_factory=list[int])
    ready: list[int] = field(default_factory=list[int])
    changes: int = 0
    decisions: list[ScalingDecision] = field(default_factory=list[ScalingDecision])


class _Replica:
    __slots__ = ("asked_s", "ended_s", "engine", "ready_s")

    def __init__(self, engine: SimulatedEngine, asked_s: float, ready_s: float) -> None:
        self.engine = engine
        self.asked_s = asked_s
        self.ready_s = ready_s
        self.ended_s: float | None = None


class SimulatedFleet:
    """Runs one trace against one planner.

    Args:
        trace: Requests.
        planner: Decides every interval.
        options: The world.
        keep_decisions: Keep every decision for a report.
    """

    def __init__(self, trace: Trace, planner: Planner, options: FleetOptions, *, keep_decisions: bool = False) -> None:
        self._trace = trace
        self._planner = planner
        self._options = options
        self._keep = keep_decisions
        count = len(trace)
        self._first_s = np.full(count, np.inf)
        self._end_s = np.full(count, np.inf)
        self._ended: list[int] = []
        self._serving: list[_Replica] = []
        self._starting: list[_Replica] = []
        self._draining: list[_Replica] = []
        self._gone: list[_Replica] = []
        self._unrouted: list[int] = []
        self.outcome = Outcome(self._first_s, self._end_s, 0.0, 0.0)

    def run(self) -> Outcome:
        """Run the whole trace, let every request finish, and return what it gave."""
        for _ in range(self._options.initial_replicas):
            self._serving.append(self._new_replica(0.0, 0.0))
        arrivals: list[float] = self._trace.at_s.tolist()
        prompts: list[float] = self._trace.prompt_tokens.tolist()
        outputs: list[float] = self._trace.output_tokens.tolist()
        next_tick_s = self._options.interval_s
        for request, at_s in enumerate(arrivals):
            while next_tick_s <= at_s:
                self._tick(next_tick_s)
                next_tick_s += self._options.interval_s
            self._route(request, at_s, prompts[request], outputs[request])
        self._finish(next_tick_s)
        return self._summary()

    def _route(self, request: int, at_s: float, prompt: float, output: float) -> None:
        best: SimulatedEngine | None = None
        least = np.inf
        for replica in self._serving:
            engine = replica.engine
            # The load of an engine without a queue is as it was left: it is small beside any queue, and looking at all
            # engines at each arrival would cost more than running them.
            if engine.waiting_tokens and engine.now_s < at_s:
                engine.advance(at_s)
            work = engine.waiting_tokens + engine.kv_tokens / BLOCK_TOKENS
            if work < least:
                best, least = engine, work
        if best is None:
            self._unrouted.append(request)
            return
        best.advance(at_s)
        best.submit(request, at_s, prompt, output)

    def _tick(self, at_s: float) -> None:
        for replica in (*self._serving, *self._draining):
            replica.engine.advance(at_s)
        self._promote(at_s)
        self._retire(at_s)
        observation = self._observe(at_s)
        decision = self._planner.decide(observation)
        wanted = decision.replicas.get(ROLE, self._desired)
        self._scale(at_s, min(wanted, self._options.max_replicas))
        self.outcome.times_s.append(at_s)
        self.outcome.replicas.append(self._desired)
        self.outcome.ready.append(len(self._serving))
        if self._keep:
            self.outcome.decisions.append(decision)

    def _observe(self, at_s: float) -> Observation:
        ended, self._ended = self._ended, []
        rows = np.asarray(ended, dtype=int)
        trace = self._trace
        ttft, itl = self._latencies(rows)
        stats = TrafficStats(
            "model",
            self._options.interval_s,
            requests=len(ended),
            prompt_tokens=int(trace.prompt_tokens[rows].sum()),
            output_tokens=int(trace.output_tokens[rows].sum()),
            ttft_s=tuple(ttft[-SAMPLES:].tolist()),
            itl_s=tuple(itl[-SAMPLES:].tolist()),
            ended_at_s=at_s,
        )
        pool = PoolState(
            ready=len(self._serving),
            starting=len(self._starting),
            draining=len(self._draining),
            desired=self._desired,
            startup_s=self._options.startup_s,
        )
        total = int(self._options.timing.max_kv_tokens / BLOCK_TOKENS)
        loads = {
            format(place, "x"): ReportedLoad(
                kv_used_blocks=int(replica.engine.kv_tokens / BLOCK_TOKENS),
                kv_total_blocks=total,
                active_requests=replica.engine.running,
                waiting_requests=replica.engine.waiting,
                waiting_prefill_tokens=int(replica.engine.waiting_tokens),
                reported_at_s=at_s,
            )
            for place, replica in enumerate(self._serving)
        }
        return Observation(at_s, (stats,), {ROLE: pool}, loads)

    @property
    def _desired(self) -> int:
        return len(self._serving) + len(self._starting)

    def _scale(self, at_s: float, wanted: int) -> None:
        self.outcome.changes += wanted != self._desired
        for _ in range(wanted - self._desired):
            self._starting.append(self._new_replica(at_s, at_s + self._options.startup_s))
        for _ in range(self._desired - wanted):
            # What does not serve yet is let go first; then the replica with the least to finish.
            if self._starting:
                replica = self._starting.pop()
                replica.ended_s = at_s
                self._gone.append(replica)
            else:
                least = min(self._serving, key=lambda item: item.engine.kv_tokens + item.engine.waiting_tokens)
                self._serving.remove(least)
                self._draining.append(least)
        self._retire(at_s)

    def _promote(self, at_s: float) -> None:
        ready = [replica for replica in self._starting if replica.ready_s <= at_s]
        self._starting = [replica for replica in self._starting if replica.ready_s > at_s]
        self._serving += ready
        if self._serving and self._unrouted:
            waiting, self._unrouted = self._unrouted, []
            for request in waiting:
                trace = self._trace
                self._route(request, at_s, float(trace.prompt_tokens[request]), float(trace.output_tokens[request]))

    def _retire(self, at_s: float) -> None:
        for replica in [item for item in self._draining if item.engine.empty]:
            self._draining.remove(replica)
            replica.ended_s = at_s
            self._gone.append(replica)

    def _finish(self, next_tick_s: float) -> None:
        """Go on until every request has ended; the planner still decides, but this time costs nothing."""
        limit_s = next_tick_s + 100 * max(self._options.startup_s, 60.0)
        while next_tick_s < limit_s and not np.isfinite(self._end_s).all():
            self._tick(next_tick_s)
            next_tick_s += self._options.interval_s
        for replica in (*self._serving, *self._draining):
            replica.engine.advance(next_tick_s)

    def _summary(self) -> Outcome:
        end_s = self._trace.duration_s
        replicas = (*self._serving, *self._starting, *self._draining, *self._gone)
        seconds = sum(
            max(0.0, min(end_s, replica.ended_s if replica.ended_s is not None else end_s) - replica.asked_s)
            for replica in replicas
        )
        outcome, slo = self.outcome, self._options.slo
        outcome.ttft_s, outcome.itl_s = self._latencies(np.arange(len(self._trace)))
        outcome.gpu_hours = seconds / 3600
        outcome.attained = float(np.mean((outcome.ttft_s <= slo.ttft_s) & (outcome.itl_s <= slo.itl_s)))
        return outcome

    def _latencies(self, rows: np.ndarray[tuple[int], np.dtype[np.int_]]) -> tuple[Floats, Floats]:
        first, end = self._first_s[rows], self._end_s[rows]
        with np.errstate(invalid="ignore"):
            itl = (end - first) / np.maximum(self._trace.output_tokens[rows] - 1, 1.0)
        return first - self._trace.at_s[rows], np.nan_to_num(itl, nan=np.inf)

    def _new_replica(self, asked_s: float, ready_s: float) -> _Replica:
        engine = SimulatedEngine(self._options.timing, self._note_end, ready_s)
        return _Replica(engine, asked_s, ready_s)

    def _note_end(self, request: int, first_s: float, end_s: float) -> None:
        self._first_s[request] = first_s
        self._end_s[request] = end_s
        self._ended.append(request)
