"""Replays a trace through the production router on modelled workers, in virtual time."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import msgspec

from dynamo_core.cards import ModelCard, ModelRuntimeConfig
from dynamo_core.errors import InternalError
from dynamo_core.events import KvEvent, KvEventBatch
from dynamo_core.ids import WorkerId
from dynamo_core.routing import RequestOutcome, RoutingDecision, RoutingRequest
from dynamo_router._lab_trace import TraceRequest
from dynamo_router._lab_worker import Job, ModelWorker, WorkerModel
from dynamo_router._router import KvRouter
from dynamo_router._settings import RouterSettings

T = TypeVar("T")


class VirtualClock:
    """Time of a replay; moved by its event loop only."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        """Seconds of virtual time."""
        return self.now_s

    def time(self) -> float:
        """Seconds of virtual time, as Unix time."""
        return self.now_s

    async def sleep(self, delay_s: float) -> None:
        """Refuse: nothing that replays may wait.

        Raises:
            InternalError: always.
        """
        raise InternalError(f"a replayed router tried to sleep for {delay_s} s")


class ReplayedRequest(msgspec.Struct, frozen=True):
    """What became of one request.

    Attributes:
        ttft_s: Seconds from arrival to the first token.
        duration_s: Seconds from arrival to the last.
        prompt_tokens: Length of its prompt.
        cached_tokens: Prompt tokens that the worker's cache held when its prefill began.
        predicted_tokens: What the router expected of that.
        worker: Where it ran.
    """

    ttft_s: float
    duration_s: float
    prompt_tokens: int
    cached_tokens: int
    predicted_tokens: int
    worker: WorkerId


class Workload(Protocol):
    """Where requests come from."""

    def first(self) -> Sequence[TraceRequest]:
        """Return the requests that arrive whatever happens."""
        ...

    def after(self, finished: TraceRequest, now_s: float) -> Sequence[TraceRequest]:
        """Return the requests that arrive because one finished."""
        ...


class OpenLoop:
    """A trace: requests arrive when they did, however slow the answers are."""

    def __init__(self, trace: Sequence[TraceRequest]) -> None:
        self._trace = trace

    def first(self) -> Sequence[TraceRequest]:
        """Return the whole trace."""
        return self._trace

    def after(self, finished: TraceRequest, now_s: float) -> Sequence[TraceRequest]:
        """Return nothing."""
        return ()


class Replay:
    """One run of a trace.

    Args:
        policy: Name of the policy.
        options: Options of the policy.
        workers: How many.
        model: What each is like.
        block_size: Tokens a block of the trace.
        view_delay_s: Seconds by which KV events reach the router late.
        seed: Seed of the router.
        replace_after: Requests after which a new router replaces the first; None for never.
        warm: Whether the new one takes over the old one's index.
    """

    def __init__(  # noqa: PLR0913 - keyword-only parts of one experiment
        self,
        policy: str,
        options: Mapping[str, Any],
        *,
        workers: int,
        model: WorkerModel,
        block_size: int,
        view_delay_s: float = 0.0,
        seed: int = 0,
        replace_after: int | None = None,
        warm: bool = True,
    ) -> None:
        self._clock = VirtualClock()
        self._block_size = block_size
        self._view_delay_s = view_delay_s
        self._replace_after = replace_after
        self._warm = warm
        self._make = lambda: KvRouter(
            block_size=block_size,
            policy=policy,
            policy_options=options,
            settings=RouterSettings(receipts="off", receipts_max_decisions=0, reservation_idle_s=1e9),
            clock=self._clock,
            seed=seed,
        )
        self._router = self._make()
        self._card = ModelCard(
            "replayed",
            kv_block_size=block_size,
            runtime_config=ModelRuntimeConfig(total_kv_blocks=model.kv_blocks, max_num_batched_tokens=8192),
        )
        self._workers: dict[WorkerId, ModelWorker] = {}
        for number in range(1, workers + 1):
            worker = WorkerId(number)
            self._router.upsert_worker(worker, self._card)
            self._workers[worker] = ModelWorker(worker, model, block_size)
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._done: dict[int, ReplayedRequest] = {}
        self._arrived = 0
        self._workload: Workload = OpenLoop(())

    def run(self, workload: Workload, on_progress: Callable[[int], None] | None = None) -> list[ReplayedRequest]:
        """Replay a workload; returns what became of each request, in the order of arrival."""
        self._workload = workload
        for request in workload.first():
            self._schedule(request)
        while self._agenda:
            self._clock.now_s, _, action = heapq.heappop(self._agenda)
            before = len(self._done)
            action()
            if on_progress is not None and len(self._done) > before and len(self._done) % 256 == 0:
                on_progress(len(self._done))
        return [self._done[number] for number in sorted(self._done)]

    def _schedule(self, request: TraceRequest) -> None:
        self._at(request.at_s, lambda: self._arrive(request))

    def _at(self, when_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (when_s, next(self._numbers), action))

    def _arrive(self, request: TraceRequest) -> None:
        number = self._arrived
        self._arrived += 1
        if number == self._replace_after:
            self._replace()
        asked = RoutingRequest(
            str(number),
            prompt_tokens=request.prompt_tokens,
            block_size=self._block_size,
            local_hashes=request.local,
            sequence_hashes=request.sequence,
        )
        decision = finish_now(self._router.select(asked))
        worker = self._workers[decision.worker]
        job = _Tracked(request, number, decision)
        worker.waiting.append(job)
        self._start_next(worker)

    def _replace(self) -> None:
        old, self._router = self._router, self._make()
        for worker in self._workers:
            self._router.upsert_worker(worker, self._card)
        if self._warm:
            self._router.restore(old.snapshot())

    def _start_next(self, worker: ModelWorker) -> None:
        job = worker.next_job()
        if job is not None:
            duration_s, events = worker.begin(job)
            self._publish(worker.worker, events)
            self._at(self._clock.now_s + duration_s, lambda: self._end_prefill(worker, job))

    def _end_prefill(self, worker: ModelWorker, job: Job) -> None:
        assert isinstance(job, _Tracked)
        assert job.decision.reservation is not None
        job.first_token_s = self._clock.now_s
        duration_s, events = worker.finish_prefill(job)
        self._publish(worker.worker, events)
        self._router.first_token(job.decision.reservation)
        self._at(self._clock.now_s + duration_s, lambda: self._end(worker, job))
        self._start_next(worker)

    def _end(self, worker: ModelWorker, job: _Tracked) -> None:
        assert job.decision.reservation is not None
        worker.finish(job)
        request = job.request
        done = ReplayedRequest(
            ttft_s=job.first_token_s - request.at_s,
            duration_s=self._clock.now_s - request.at_s,
            prompt_tokens=request.prompt_tokens,
            cached_tokens=min(job.cached_blocks * self._block_size, request.prompt_tokens - 1),
            predicted_tokens=job.decision.cached_tokens,
            worker=worker.worker,
        )
        self._done[job.number] = done
        outcome = RequestOutcome(
            job.decision.decision_id,
            prompt_tokens=request.prompt_tokens,
            output_tokens=request.output_tokens,
            cached_tokens=done.cached_tokens,
            ttft_s=done.ttft_s,
            duration_s=done.duration_s,
        )
        self._router.complete(job.decision.reservation, outcome)
        for following in self._workload.after(request, self._clock.now_s):
            self._schedule(following)
        self._start_next(worker)

    def _publish(self, worker: WorkerId, events: list[KvEvent]) -> None:
        if not events:
            return
        batch = KvEventBatch(worker, tuple(events), self._block_size)
        if self._view_delay_s <= 0:
            self._router.apply_events(batch)
        else:
            self._at(self._clock.now_s + self._view_delay_s, lambda: self._late(batch))

    def _late(self, batch: KvEventBatch) -> None:
        self._router.apply_events(batch)


class _Tracked(Job):
    """A job with the decision that placed it."""

    __slots__ = ("decision", "first_token_s", "number")

    def __init__(self, request: TraceRequest, number: int, decision: RoutingDecision) -> None:
        super().__init__(request)
        self.number = number
        self.decision = decision
        self.first_token_s = 0.0


def finish_now(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never waits.

    Raises:
        InternalError: if it does wait.
    """
    try:
        work.send(None)
    except StopIteration as done:
        return done.value
    work.close()
    raise InternalError("a replayed router waited for something; replay policies without queues")
