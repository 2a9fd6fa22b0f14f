"""Fetches missed KV events from the worker that emitted them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from dynamo_core.clock import Clock
from dynamo_core.discovery import Instance
from dynamo_core.errors import DynamoError, UnavailableError
from dynamo_core.events import KvEventBatch, KvEventQuery
from dynamo_core.ids import WorkerId
from dynamo_core.planes import CallOptions, RequestPlane
from dynamo_core.streams import call_unary
from dynamo_core.wire import KV_EVENT_BATCH, KV_EVENT_QUERY

_log = structlog.get_logger(__name__)
QUERY_ENDPOINT = "worker_kv_indexer_query"
_FIRST_PAUSE_S = 0.1


class Recovery:
    """Answers an indexer's queries, one at a time per worker, with a pause that doubles between attempts.

    Args:
        apply: Takes an answer and returns what is still missing.
        abandon: Hears that a worker's state cannot be had, and why.
        plane: Carries the queries.
        find: Returns the query endpoint of an instance, if it has one at this moment.
        clock: Time between attempts.
        attempts: Queries before a stream is abandoned.
        timeout_s: Seconds to wait for one answer.
    """

    def __init__(  # noqa: PLR0913 - keyword-only parts of one assembly
        self,
        apply: Callable[[KvEventBatch], KvEventQuery | None],
        abandon: Callable[[WorkerId, str], None],
        *,
        plane: RequestPlane,
        find: Callable[[int], Instance | None],
        clock: Clock,
        attempts: int,
        timeout_s: float,
    ) -> None:
        self._apply = apply
        self._abandon = abandon
        self._plane = plane
        self._find = find
        self._clock = clock
        self._attempts = attempts
        self._timeout_s = timeout_s
        self._running: dict[WorkerId, asyncio.Task[None]] = {}

    def request(self, query: KvEventQuery) -> None:
        """Begin to fetch what a query asks for; a worker's running recovery goes on instead."""
        if query.worker not in self._running:
            task = asyncio.create_task(self._run(query), name=f"kv-recovery-{query.worker}")
            self._running[query.worker] = task
            task.add_done_callback(lambda _: self._running.pop(query.worker, None))

    def cancel(self, worker: WorkerId) -> None:
        """End a worker's recovery, because the worker is gone."""
        task = self._running.pop(worker, None)
        if task is not None:
            task.cancel()

    async def close(self) -> None:
        """End all recoveries. Idempotent."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, query: KvEventQuery) -> None:
        pause, reason = _FIRST_PAUSE_S, ""
        for _ in range(self._attempts):
            try:
                further = await self._ask(query)
            except DynamoError as error:
                reason = error.message
                await self._clock.sleep(pause)
                pause *= 2
                continue
            if further is None:
                return
            query, reason = further, "the worker's answers leave a gap"
        _log.warning("kv_recovery_abandoned", worker=str(query.worker), reason=reason)
        self._abandon(query.worker, reason)

    async def _ask(self, query: KvEventQuery) -> KvEventQuery | None:
        instance = self._find(query.worker.instance_id)
        if instance is None:
            raise UnavailableError(f"worker {query.worker} has no {QUERY_ENDPOINT} endpoint to ask for KV events")
        payload = await call_unary(
            self._plane,
            instance.address,
            instance.endpoint,
            KV_EVENT_QUERY.encode(query),
            CallOptions(deadline_s=self._timeout_s),
        )
        return self._apply(KV_EVENT_BATCH.decode(payload))
