"""One generation over as many workers as it takes: select, call, accept, and continue elsewhere after a loss."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from dynamo_core.enums import FinishReason
from dynamo_core.errors import (
    BackendProtocolError,
    DeadlineExceededError,
    DynamoError,
    UnavailableError,
    as_dynamo_error,
)
from dynamo_core.ids import WorkerId
from dynamo_core.planes import DEFAULT_CREDIT_ITEMS, Call, CallOptions
from dynamo_core.requests import GenerateChunk, GenerateRequest, Usage
from dynamo_core.routing import RequestOutcome, RoutingDecision
from dynamo_core.tokens import token_count
from dynamo_core.wire import GENERATE_CHUNK, GENERATE_REQUEST
from dynamo_frontend._attempts import attempt_request, chunk_error, routing_request
from dynamo_frontend._catalog import ServedModel
from dynamo_frontend._ledger import TokenLedger
from dynamo_frontend._services import GenerationServices, GenerationTiming
from dynamo_frontend._sink import GenerationSink

PROGRESS_EVERY_TOKENS = 32


@dataclass(slots=True, eq=False)
class _Attempt:
    """One worker's try, and the receiver of its items."""

    owner: Generation
    decision: RoutingDecision
    call: Call | None = None
    first_token_seen: bool = False
    reported_tokens: int = 0
    owed_credit: int = 0
    booked: bool = field(default=True)

    def on_items(self, items: Sequence[bytes]) -> None:
        self.owner.take(self, items)

    def on_end(self, error: DynamoError | None) -> None:
        self.owner.ended(self, error)


class Generation:
    """A prompt's generation.

    ``start`` returns once a worker has the request; from then on output is pushed to the sink without a task. A lost
    worker costs one task for the continuation.

    Args:
        model: What serves it.
        request: The request, attempt 0.
        sink: Where output goes.
        services: What it uses.
        trace: Headers of the trace it is part of.
    """

    def __init__(
        self,
        model: ServedModel,
        request: GenerateRequest,
        sink: GenerationSink,
        services: GenerationServices,
        trace: dict[str, str] | None = None,
    ) -> None:
        self.request = request
        self._now = services.clock.monotonic()
        self.timing = GenerationTiming(self._now)
        self._deadline_at_s = None if request.deadline_s is None else self._now + request.deadline_s
        self.prompt_tokens = token_count(request.token_ids)
        self.migrations = 0
        self.decision: RoutingDecision | None = None
        self.over = False
        self._model = model
        self._sink = sink
        self._trace = trace or {}
        self._services = services
        self._ledger = TokenLedger(
            request.sampling.n,
            max_tokens=request.stop.max_tokens,
            needs_logprobs=request.output.logprobs is not None,
        )
        self._attempt: _Attempt | None = None
        self._excluded: list[WorkerId] = []
        self._task: asyncio.Task[None] | None = None
        self._cached_tokens: int | None = None
        self._reasoning_tokens = 0
        self._final_usage: Usage | None = None
        self._last_loss: DynamoError | None = None

    async def start(self) -> None:
        """Hand the request to a worker. Cancelling it frees the booking.

        Raises:
            DynamoError: if no worker could be had within the migration limit.
        """
        while not self.over:
            try:
                await self._open()
            except asyncio.CancelledError:
                self.cancel()
                raise
            except DynamoError as error:
                self._release(FinishReason.ERROR, error.reason)
                if self._attempt is None or not self._may_continue(error):
                    self.over = True
                    root = self._root_of(error)
                    if root is error:
                        raise
                    raise root from error
                self._leave_worker(error)
            else:
                return

    def cancel(self) -> None:
        """The client left: stop the worker at once. Nothing more reaches the sink. Idempotent."""
        if self.over:
            return
        self.over = True
        if self._task is not None:
            self._task.cancel()
        self._stop_call(FinishReason.CANCELLED, "request.cancelled")
        self._drop_attempt()

    def resume(self) -> None:
        """The client has caught up: grant what was held back."""
        attempt = self._attempt
        if attempt is not None and attempt.call is not None and attempt.owed_credit and not self.over:
            owed, attempt.owed_credit = attempt.owed_credit, 0
            attempt.call.grant(owed)

    @property
    def completion_tokens(self) -> int:
        """Accepted tokens of all choices."""
        return self._ledger.total_tokens

    @property
    def usage(self) -> Usage:
        """Accounting so far: the original prompt, and all accepted tokens whichever worker made them."""
        if self._final_usage is not None:
            return self._final_usage
        cached = min(self._cached_tokens or 0, self.prompt_tokens)
        return Usage(self.prompt_tokens, self._ledger.total_tokens, cached, self._reasoning_tokens)

    # --- called by attempts

    def take(self, attempt: _Attempt, items: Sequence[bytes]) -> None:
        """Take a batch of a worker's items."""
        if self.over or attempt is not self._attempt:
            return
        # One look at the clock for all that arrived together.
        self._now = self._services.clock.monotonic()
        try:
            for item in items:
                self._take_chunk(attempt, GENERATE_CHUNK.decode(item))
                if self.over:
                    return
        except DynamoError as error:
            self._sink.flush()
            self._lost(error)
            return
        self._sink.flush()
        self._report_progress(attempt)
        attempt.owed_credit += len(items)
        if self._sink.writable:
            self.resume()

    def ended(self, attempt: _Attempt, error: DynamoError | None) -> None:
        """A worker's stream ended."""
        if self.over or attempt is not self._attempt:
            return
        self._lost(
            error
            or BackendProtocolError(
                "The worker's stream ended before the answer was complete.", reason="backend.stream_incomplete"
            )
        )

    # --- one attempt

    async def _open(self) -> None:
        # None until a worker is chosen: a failure to choose one is final, there is nothing to move away from.
        self._attempt = None
        request = attempt_request(self.request, self._ledger, self._time_left_s())
        excluded = (*self._model.excluded, *self._excluded)
        decision = await self._model.router.select(routing_request(request, self._model.card, excluded))
        self.decision = decision
        attempt = self._attempt = _Attempt(self, decision)
        address = await self._services.catalog.address(self._model.endpoint, decision.worker.instance_id)
        # Looked at again: the router may have let the request wait.
        left_s = self._time_left_s()
        if left_s is not None:
            request = msgspec.structs.replace(request, deadline_s=left_s)
        options = CallOptions(
            request_id=request.request_id,
            deadline_s=left_s,
            headers=self._trace,
            credit_items=DEFAULT_CREDIT_ITEMS,
            schema=self._model.card.endpoint_types.request,
        )
        payload = GENERATE_REQUEST.encode(request)
        call = await self._services.plane.open(address, self._model.endpoint, payload, attempt, options)
        if self.over or attempt is not self._attempt:
            call.cancel(kill=True)
        else:
            attempt.call = call
            self.resume()

    def _time_left_s(self) -> float | None:
        """Return what the present attempt may take; None without a limit.

        Raises:
            DeadlineExceededError: if nothing is left.
        """
        if self._deadline_at_s is None:
            return None
        left_s = self._deadline_at_s - self._services.clock.monotonic()
        if left_s <= 0:
            raise DeadlineExceededError("The request's time ran out before a worker could take it.")
        return left_s

    def _take_chunk(self, attempt: _Attempt, chunk: GenerateChunk) -> None:
        if chunk.attempt != self._ledger.attempt:
            return
        if chunk.finish_reason is FinishReason.ERROR or chunk.error is not None:
            raise chunk_error(chunk)
        tokens, logprobs = self._ledger.accept(chunk)
        if chunk.usage is not None:
            self._cached_tokens = chunk.usage.cached_tokens
            self._reasoning_tokens = chunk.usage.reasoning_tokens
        if tokens:
            self.timing.last_token_s = self._now
            if not attempt.first_token_seen:
                self._first_token(attempt)
            counted = self._sink.tokens(chunk.choice, tokens, logprobs)
            if counted is not None:
                ledger = self._ledger.choices[chunk.choice]
                self._ledger.truncate(chunk.choice, len(ledger.tokens) - len(tokens) + counted)
                self._finish_choice(chunk.choice, FinishReason.STOP)
                return
        if chunk.finish_reason is not None:
            self._check_finish(chunk)
            self._finish_choice(chunk.choice, chunk.finish_reason)

    def _check_finish(self, chunk: GenerateChunk) -> None:
        if chunk.finish_reason is FinishReason.CANCELLED:
            raise BackendProtocolError("The worker cancelled the request on its own.", reason="backend.cancelled")
        if not 0 <= chunk.choice < len(self._ledger.choices):
            raise BackendProtocolError(f"the worker finished choice {chunk.choice} of {len(self._ledger.choices)}")
        empty = not self._ledger.choices[chunk.choice].tokens
        if empty and chunk.stop_token_id is None and self._ledger.choices[chunk.choice].open:
            raise BackendProtocolError("The worker finished without a single token.", reason="backend.empty_output")

    def _first_token(self, attempt: _Attempt) -> None:
        attempt.first_token_seen = True
        if self.timing.first_token_s is None:
            self.timing.first_token_s = self._now
        if attempt.decision.reservation is not None:
            self._model.router.first_token(attempt.decision.reservation)

    def _report_progress(self, attempt: _Attempt) -> None:
        total = self._ledger.total_tokens
        reservation = attempt.decision.reservation
        if reservation is not None and total - attempt.reported_tokens >= PROGRESS_EVERY_TOKENS:
            attempt.reported_tokens = total
            self._model.router.progress(reservation, total)

    def _finish_choice(self, choice: int, reason: FinishReason) -> None:
        if not self._ledger.finish(choice, reason):
            return
        self._sink.finished(choice, reason)
        if self._ledger.open_choices:
            return
        self.over = True
        self.timing.ended_s = self._now
        attempt = self._attempt
        if self._cached_tokens is None and self.decision is not None:
            # Ended by a stop string before the worker's own count came: the router's expectation stands in.
            self._cached_tokens = self.decision.cached_tokens
        if attempt is not None and attempt.call is not None and reason is FinishReason.STOP:
            attempt.call.cancel()
        self._release(reason, "")
        self._drop_attempt()
        self._final_usage = self.usage
        self._sink.done(self._final_usage)

    # --- losses

    def _lost(self, error: DynamoError) -> None:
        """Go on elsewhere, or give up."""
        attempt = self._attempt
        self._stop_call(FinishReason.ERROR, error.reason)
        self._drop_attempt()
        if self._finish_exhausted():
            return
        if not self._may_continue(error):
            self._fail(error)
            return
        if attempt is not None:
            self._leave_worker(error, attempt.decision.worker)
        self._task = asyncio.get_running_loop().create_task(self._continue(), name="frontend-migration")

    async def _continue(self) -> None:
        try:
            await self.start()
        except DynamoError as error:
            self.over = True
            self._report_failure(error)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - a defect must reach the client as an error, not hang its stream
            self._fail(as_dynamo_error(error))

    def _may_continue(self, error: DynamoError) -> bool:
        return error.migratable and self.migrations < self._services.migration_limit

    def _root_of(self, error: DynamoError) -> DynamoError:
        """Return what to tell the client: that no worker is left says less than why the last one was lost."""
        loss = self._last_loss
        return loss if loss is not None and isinstance(error, UnavailableError) else error

    def _leave_worker(self, error: DynamoError, worker: WorkerId | None = None) -> None:
        """Note the loss: the worker is excluded, the next attempt has the next number."""
        lost = worker or (self.decision.worker if self.decision is not None else None)
        self._last_loss = error
        self.migrations += 1
        self._ledger.attempt += 1
        self._services.metrics.migrated(self._model.name, ongoing=self._ledger.total_tokens > 0)
        if lost is not None and lost not in self._excluded:
            self._excluded.append(lost)
            if not error.reason.startswith("capacity."):
                self._model.router.inhibit(lost, error.reason)

    def _finish_exhausted(self) -> bool:
        """End choices whose budget is used up: only the worker's final word was lost."""
        limit = self.request.stop.max_tokens
        if limit is None:
            return False
        for index, choice in enumerate(self._ledger.choices):
            if choice.open and len(choice.tokens) >= limit:
                self._finish_choice(index, FinishReason.LENGTH)
        return self.over

    def _fail(self, error: DynamoError) -> None:
        self.over = True
        self._stop_call(FinishReason.ERROR, error.reason)
        self._report_failure(error)

    def _report_failure(self, error: DynamoError) -> None:
        self.timing.ended_s = self._services.clock.monotonic()
        self._sink.failed(error)

    def _drop_attempt(self) -> None:
        """Let go of the call, which holds its receiver: a circle that only the garbage collector would find."""
        if self._attempt is not None:
            self._attempt.call = None
            self._attempt = None

    def _stop_call(self, reason: FinishReason, error_reason: str) -> None:
        attempt = self._attempt
        if attempt is not None and attempt.call is not None:
            attempt.call.cancel(kill=True)
        self._release(reason, error_reason)

    def _release(self, reason: FinishReason, error_reason: str) -> None:
        """Free the booking of the present attempt, once."""
        attempt = self._attempt
        if attempt is None or not attempt.booked:
            return
        attempt.booked = False
        decision = attempt.decision
        if decision.reservation is None:
            return
        timing = self.timing
        first = timing.first_token_s
        outcome = RequestOutcome(
            decision.decision_id,
            reason,
            self.prompt_tokens,
            self._ledger.total_tokens,
            self._cached_tokens,
            None if first is None else first - timing.started_s,
            (timing.ended_s or self._services.clock.monotonic()) - timing.started_s,
            error_reason,
        )
        self._model.router.complete(decision.reservation, outcome)
