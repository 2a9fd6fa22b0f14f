"""The router of a process: finds workers, KV events and loads through the planes of its context."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import structlog
from pydantic import ValidationError

from dynamo_core.cards import ModelCard
from dynamo_core.component import ComponentContext, Health
from dynamo_core.discovery import INSTANCES_PREFIX, MODELS_PREFIX, Instance, ModelRecord, endpoint_prefix
from dynamo_core.enums import HealthState
from dynamo_core.errors import ConfigurationError, DynamoError, InvalidRequestError
from dynamo_core.events import KvEventBatch, SequenceGap
from dynamo_core.ids import EndpointId, PublisherId, WorkerId
from dynamo_core.planes import DECISIONS, KV_EVENTS, LOAD, Subscription, Topic
from dynamo_core.routing import RouterScope
from dynamo_core.wire import INSTANCE, KV_EVENT_BATCH, MODEL_RECORD, WORKER_LOAD
from dynamo_router._engine_address import EngineAddress, read_dp_size, read_engine_address
from dynamo_router._engines import Engines
from dynamo_router._indexer import StreamState
from dynamo_router._metrics import LISTENERS
from dynamo_router._recovery import QUERY_ENDPOINT, Recovery
from dynamo_router._replicated import ReplicatedRouter
from dynamo_router._settings import RouterSettings
from dynamo_router._truth import IndexMode
from dynamo_router._watch import PrefixWatch

_log = structlog.get_logger(__name__)
UPKEEP_S = 1.0
DEFAULT_BLOCK_SIZE = 16


_TROUBLED = (StreamState.LIVE, StreamState.LOSSY, StreamState.REFUSED)


def create_router(context: ComponentContext, scope: RouterScope) -> HostedRouter:
    """Make the router of one worker set; entry ``kv`` of ``dynamo_core.routers``.

    ``scope.options`` holds router settings and policy options together; the card's ``router_config``, if there is
    one, replaces them wholesale.

    Raises:
        ConfigurationError: for an unknown policy or option.
    """
    options = scope.options if scope.card.router_config is None else scope.card.router_config
    settings, policy_options = split_options(options)
    return HostedRouter(context, scope, settings, policy_options)


def split_options(options: dict[str, Any]) -> tuple[RouterSettings, dict[str, Any]]:
    """Part router settings from policy options by name.

    Raises:
        ConfigurationError: for a setting out of range.
    """
    mine = {name: value for name, value in options.items() if name in RouterSettings.model_fields}
    try:
        settings = RouterSettings(**mine)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        raise ConfigurationError(f"router option {name} is {first['input']!r}: {first['msg']}") from error
    others = {name: value for name, value in options.items() if name not in mine}
    return settings, {**settings.policy_options, **others}


class HostedRouter(ReplicatedRouter):
    """A router that watches discovery, KV events and loads.

    A worker is a candidate while its instance is in discovery and its card, if it has published one, belongs to the
    scope's worker set.
    """

    def __init__(
        self,
        context: ComponentContext,
        scope: RouterScope,
        settings: RouterSettings,
        policy_options: dict[str, Any],
    ) -> None:
        super().__init__(
            block_size=scope.card.kv_block_size or DEFAULT_BLOCK_SIZE,
            policy=scope.policy or settings.policy,
            policy_options=policy_options,
            settings=settings,
            clock=context.clock,
            metrics=context.metrics,
            model=scope.card.name,
            seed=context.seed,
            recoverable=True,
        )
        self._context = context
        self._scope = scope
        self._instances: dict[str, Instance] = {}
        self._queries: dict[int, Instance] = {}
        self._records: dict[str, ModelRecord] = {}
        self._problems: dict[WorkerId, str] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._subscriptions: list[Subscription] = []
        self._listener_gauge = context.metrics.gauge(
            LISTENERS, "Engines whose KV events are followed", ["model", "state"]
        )
        self._engines = Engines(self._on_engine_events)
        self._unsynced = 0
        self._synced = asyncio.Event()
        self._recovery = Recovery(
            self.apply_recovered,
            self.indexer.abandon,
            plane=context.request_plane,
            find=self._queries.get,
            clock=context.clock,
            attempts=settings.recovery_attempts,
            timeout_s=settings.recovery_timeout_s,
        )

    async def start(self) -> None:
        """Subscribe and watch; returns when the workers present have been seen."""
        endpoint = self._scope.endpoint
        self._context.health.register(self._health_name, self.health)
        # Events first: what a worker's dump does not contain any more must already be heard.
        if self.settings.use_kv_events:
            await self._subscribe(KV_EVENTS, self._on_events)
        await self._subscribe(LOAD, self._on_load)
        if self.settings.replica_sync:
            await self.join(context=self._context, topic=Topic.of(DECISIONS, endpoint))
        query = EndpointId(endpoint.namespace, endpoint.component, QUERY_ENDPOINT)
        self._watch(MODELS_PREFIX + endpoint_prefix(endpoint), self._on_record, self._on_record_gone)
        self._watch(INSTANCES_PREFIX + endpoint_prefix(query), self._on_query_endpoint, self._on_query_endpoint_gone)
        self._watch(INSTANCES_PREFIX + endpoint_prefix(endpoint), self._on_instance, self._on_instance_gone)
        self._spawn(self._engines.run(), "engines")
        self._spawn(self._upkeep(), "upkeep")
        await self._synced.wait()

    async def stop(self) -> None:
        """Stop watching. Idempotent."""
        await self.leave()
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._engines.close()
        await self._recovery.close()
        subscriptions, self._subscriptions = self._subscriptions, []
        for subscription in subscriptions:
            await subscription.close()
        self._context.health.unregister(self._health_name)
        await super().stop()

    def upsert_worker(self, worker: WorkerId, card: ModelCard) -> None:
        """Add a worker or refresh its card; the cache of a new one is asked for.

        Raises:
            InvalidRequestError: if its block size or hash algorithm is not this router's.
        """
        self._add(worker, card, engine=False)

    def _add(self, worker: WorkerId, card: ModelCard, *, engine: bool) -> None:
        query = self.add_worker(worker, card, recoverable=not engine)
        if query is None:
            return
        if card.runtime_config.enable_local_indexer and card.kv_block_size:
            self._recovery.request(query)
        else:
            self.indexer.abandon(worker, "the worker answers no KV event queries")

    def remove_worker(self, worker: WorkerId) -> None:
        """Forget a worker, its bookings and what its cache held; unknown ones are ignored."""
        self._recovery.cancel(worker)
        super().remove_worker(worker)

    def on_distrust(self, worker: WorkerId) -> None:
        """Ask a worker for its whole state, since the index of it has proved wrong."""
        super().on_distrust(worker)
        if self.indexer.stream(worker).recoverable:
            self._recovery.request(self.indexer.resync(worker))

    def health(self) -> Health:
        """Return whether it can choose, and what it does not know."""
        if not self._synced.is_set():
            return Health(HealthState.STARTING, "discovery has not answered yet")
        if problems := [*self._problems.values(), *self._engines.problems.values()]:
            return Health(HealthState.DEGRADED, "; ".join(problems))
        if not self.workers():
            return Health(HealthState.DEGRADED, "no worker is known")
        bad = [
            f"{worker} is routed {mode.value}: {self.indexer.stream(worker).detail or self._doubt(worker)}"
            for worker, mode in self.index_modes().items()
            if mode is not IndexMode.EXACT and self.indexer.stream(worker).state in _TROUBLED
        ]
        if bad:
            return Health(HealthState.DEGRADED, "; ".join(bad))
        return Health(HealthState.READY)

    def _doubt(self, worker: WorkerId) -> str:
        return f"predictions agree with reports by {self.truth_of(worker):.2f}"

    @property
    def _health_name(self) -> str:
        return f"router:{self._scope.endpoint}:{self._scope.card.name}"

    # -- discovery ---------------------------------------------------------------------------------------------------

    def _watch(self, prefix: str, on_put: Callable[[str, bytes], None], on_delete: Callable[[str], None]) -> None:
        self._unsynced += 1
        seen = False

        def synced() -> None:
            nonlocal seen
            if not seen:
                seen = True
                self._unsynced -= 1
                if not self._unsynced:
                    self._synced.set()

        watch = PrefixWatch(
            self._context.discovery,
            prefix,
            on_put=on_put,
            on_delete=on_delete,
            on_synced=synced,
            clock=self._context.clock,
        )
        self._spawn(watch.run(), f"watch-{prefix}")

    def _on_instance(self, key: str, value: bytes) -> None:
        instance = _decoded(key, value, INSTANCE.decode)
        if instance is not None:
            self._instances[key] = instance
            self._reconcile(instance.instance_id)

    def _on_instance_gone(self, key: str) -> None:
        instance = self._instances.pop(key, None)
        if instance is not None:
            self._reconcile(instance.instance_id)

    def _on_record(self, key: str, value: bytes) -> None:
        record = _decoded(key, value, MODEL_RECORD.decode)
        if record is not None:
            self._records[key] = record
            self._reconcile(record.instance_id)

    def _on_record_gone(self, key: str) -> None:
        record = self._records.pop(key, None)
        if record is not None:
            self._reconcile(record.instance_id)

    def _on_query_endpoint(self, key: str, value: bytes) -> None:
        instance = _decoded(key, value, INSTANCE.decode)
        if instance is None:
            return
        self._queries[instance.instance_id] = instance
        for worker, stream in self.indexer.streams().items():
            mine = worker.instance_id == instance.instance_id and stream.recoverable
            if mine and stream.state is StreamState.LOSSY:
                self._recovery.request(self.indexer.resync(worker))

    def _on_query_endpoint_gone(self, key: str) -> None:
        instance_id = int(key.rsplit("/", 1)[1], 16)
        self._queries.pop(instance_id, None)

    def _reconcile(self, instance_id: int) -> None:
        """Make the candidates of one instance what discovery says they are."""
        self._problems = {worker: text for worker, text in self._problems.items() if worker.instance_id != instance_id}
        instance = next((each for each in self._instances.values() if each.instance_id == instance_id), None)
        card = None if instance is None else self._card_of(instance)
        ranks, address = range(0), None
        if instance is not None and card is not None:
            ranks, address = self._layout(instance, card)
        wanted = {WorkerId(instance_id, rank) for rank in ranks}
        for worker in self.workers():
            if worker.instance_id == instance_id and worker not in wanted:
                self.remove_worker(worker)
        for worker in sorted(wanted):
            assert card is not None
            self._admit(worker, card, engine=address is not None)
        self._engines.want(instance_id, address)

    def _layout(self, instance: Instance, card: ModelCard) -> tuple[range, EngineAddress | None]:
        """Return the dp ranks of an instance, and where its engine publishes if it does so by itself."""
        first, size = card.runtime_config.data_parallel_start_rank, card.runtime_config.data_parallel_size
        ranks = range(first, first + size)
        try:
            ranks = range(first, first + (read_dp_size(instance) or size))
            return ranks, read_engine_address(instance, ranks) if self.settings.use_kv_events else None
        except InvalidRequestError as error:
            # It can still be routed to by what this router sends there.
            _log.warning("engine_not_followed", instance=f"{instance.instance_id:x}", reason=error.message)
            self._problems[WorkerId(instance.instance_id, first)] = error.message
            return ranks, None

    def _admit(self, worker: WorkerId, card: ModelCard, *, engine: bool) -> None:
        try:
            self._add(worker, card, engine=engine)
        except InvalidRequestError as error:
            _log.warning("worker_refused", worker=str(worker), reason=error.message)
            self._problems[worker] = error.message
            self.remove_worker(worker)

    def _card_of(self, instance: Instance) -> ModelCard | None:
        cards = [record.card for record in self._records.values() if record.instance_id == instance.instance_id]
        if not cards:
            return self._scope.card
        checksum = self._scope.card.checksum
        return next((card for card in cards if card.checksum == checksum), None)

    # -- events ------------------------------------------------------------------------------------------------------

    async def _subscribe(self, name: str, on_payload: Callable[[bytes], None]) -> None:
        subscription = await self._context.event_bus.subscribe(Topic.of(name, self._scope.endpoint))
        self._subscriptions.append(subscription)
        self._spawn(self._follow(subscription, name, on_payload), name)

    async def _follow(self, subscription: Subscription, name: str, on_payload: Callable[[bytes], None]) -> None:
        async for item in subscription:
            if isinstance(item, SequenceGap):
                await self._replay(subscription, item, name, on_payload)
            else:
                _guarded(name, on_payload, item.payload)

    async def _replay(
        self, subscription: Subscription, gap: SequenceGap, name: str, on_payload: Callable[[bytes], None]
    ) -> None:
        if name != KV_EVENTS:
            return
        try:
            missed = await subscription.replay(PublisherId(gap.publisher_id), gap.first, gap.last)
        except DynamoError as error:
            # The workers' event ids show the same gap, and the worker itself is asked then.
            _log.info("kv_event_replay_failed", error=error.message)
            return
        for envelope in missed:
            _guarded(name, on_payload, envelope.payload)

    def _on_events(self, payload: bytes) -> None:
        batch: KvEventBatch = KV_EVENT_BATCH.decode(payload)
        # Events of a worker that discovery does not list are either early, and then in its dump, or late.
        if batch.worker in self._fleet:
            query = self.apply_events(batch)
            if query is not None:
                self._recovery.request(query)

    def _on_engine_events(self, batch: KvEventBatch) -> None:
        # Of ranks that are no candidates, such as one refused for its block size, nothing is kept.
        if batch.worker in self._fleet:
            self.apply_events(batch)

    def _on_load(self, payload: bytes) -> None:
        load = WORKER_LOAD.decode(payload)
        if load.reported is not None:
            self.report_load(load.worker, load.reported)

    # -- upkeep ------------------------------------------------------------------------------------------------------

    async def _upkeep(self) -> None:
        while True:
            self.expire()
            self.beat()
            self.refresh_metrics()
            for state, count in self._engines.counts().items():
                self._listener_gauge.labels(model=self._scope.card.name, state=state.value).set(count)
            await self._context.clock.sleep(UPKEEP_S)

    def _spawn(self, work: Awaitable[None], name: str) -> None:
        async def run() -> None:
            await work

        self._tasks.append(self._context.spawn(run(), name=f"router-{name}"))


def _decoded(key: str, value: bytes, decode: Callable[[bytes], Any]) -> Any:
    try:
        return decode(value)
    except DynamoError as error:
        _log.warning("discovery_record_unreadable", key=key, error=error.message)
        return None


def _guarded(name: str, on_payload: Callable[[bytes], None], payload: bytes) -> None:
    try:
        on_payload(payload)
    except DynamoError as error:
        _log.warning("event_refused", topic=name, error=error.message)
