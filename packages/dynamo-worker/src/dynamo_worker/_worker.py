"""The worker component: hosts one engine on the planes of its process, from registration to drain."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import AsyncExitStack
from importlib import metadata
from typing import Any

import structlog

from dynamo_core.component import ComponentContext, Health
from dynamo_core.discovery import Instance, ModelRecord
from dynamo_core.engine import Engine, EngineConfig, EngineContext, SupportsKvBlocks, SupportsKvEvents, SupportsLora
from dynamo_core.enums import HealthState
from dynamo_core.errors import ConfigurationError, ConflictError, DynamoError, InternalError, UnavailableError
from dynamo_core.ids import EndpointId, InstanceId, WorkerId, format_instance_id, new_instance_id
from dynamo_core.planes import FORWARD_PASS, KV_EVENTS, LOAD, Publisher, ServedEndpoint, Topic
from dynamo_core.wire import KV_EVENT_QUERY
from dynamo_worker._admin import AdminRoutes
from dynamo_worker._admission import Admission
from dynamo_worker._connectors import load_connector
from dynamo_worker._deadline import within
from dynamo_worker._disagg.role import Role
from dynamo_worker._handler import GenerateHandler
from dynamo_worker._kv_publisher import KvPublisher
from dynamo_worker._kv_query import KvQueryHandler
from dynamo_worker._load_reports import LoadReports, ranks
from dynamo_worker._lora_records import LoraRecords
from dynamo_worker._metrics import WorkerMetrics
from dynamo_worker._model_card import make_card
from dynamo_worker._probe import Probe
from dynamo_worker._registration import Registration
from dynamo_worker._settings import WorkerSettings
from dynamo_worker._status import worker_status
from dynamo_worker._watch import EngineWatch, report_death

KV_QUERY_ENDPOINT = "worker_kv_indexer_query"
UNLIMITED_REQUESTS = 10_000
_ENGINE_DRAIN_S = 1.0

log = structlog.get_logger(__name__)


class Worker:
    """A ``Component`` that serves one engine.

    Args:
        context: What the process offers.
        settings: Options of the host.
        engine: An engine that is not yet started.
        instance_id: Identity; a random one if omitted.
    """

    def __init__(
        self,
        context: ComponentContext,
        settings: WorkerSettings,
        engine: Engine,
        *,
        instance_id: InstanceId | None = None,
    ) -> None:
        self.instance_id = instance_id if instance_id is not None else new_instance_id()
        self.endpoint = EndpointId(context.namespace, settings.component_name, settings.worker_endpoint)
        self._context = context
        self._settings = settings
        self._engine = engine
        self._metrics = WorkerMetrics(context.metrics)
        self._connector = load_connector(settings, context)
        self._exit = AsyncExitStack()
        self._health = Health(HealthState.STARTING, "not started")
        self._handler: GenerateHandler | None = None
        self._registration: Registration | None = None
        self._watch: EngineWatch | None = None
        self._served: ServedEndpoint | None = None
        self._role: Role | None = None
        self._stopped = asyncio.Event()
        self._check_engine()

    @property
    def name(self) -> str:
        """Name for logs and health."""
        return f"worker-{format_instance_id(self.instance_id)}"

    @property
    def address(self) -> str:
        """URL of the generate endpoint on the request plane; empty before start."""
        return self._served.address if self._served is not None else ""

    async def start(self) -> None:
        """Start the engine, serve it, and register it; when this returns it is in discovery.

        Raises:
            ConfigurationError: if engine and options do not fit together.
            DynamoError: what the engine could not start for.
        """
        self._context.health.register(self.name, self.health)
        self._exit.callback(self._context.health.unregister, self.name)
        self._health = Health(HealthState.STARTING, "loading the model")
        role = await self._take_role(await self._start_engine())
        config = role.config
        publishers = await self._publish_kv_events(config)
        served = await self._serve(config)
        queries = await self._serve_kv_queries(publishers)
        await self._watch_engine(config, served)
        await self._register(config, served, [*role.instances, queries] if queries is not None else role.instances)
        self._health = Health(HealthState.READY, f"serving {config.model}")
        log.info("worker ready", worker=self.name, endpoint=str(self.endpoint), model=config.model)

    async def drain(self, timeout_s: float) -> None:
        """Leave discovery, refuse new requests, finish running ones in time, end the rest as migratable."""
        deadline = self._context.clock.monotonic() + timeout_s
        await self.pause(timeout_s)
        left = max(deadline - self._context.clock.monotonic(), _ENGINE_DRAIN_S)
        try:
            await within(self._context.clock, left, self._drain_engine())
        except TimeoutError:
            log.warning("engine did not drain in time", worker=self.name, seconds=left)

    async def stop(self) -> None:
        """Leave, end what still runs, and release everything. Idempotent."""
        self._health = Health(HealthState.STOPPED, "stopped")
        await self._exit.aclose()
        self._stopped.set()

    async def pause(self, timeout_s: float) -> None:
        """Leave discovery, refuse new requests as ``backend.draining``, and wait for the running ones.

        What still runs after ``timeout_s`` ends with ``backend.engine_shutdown``, so that another worker continues it.
        """
        if self._handler is None or self._registration is None:
            return
        if self._health.state is not HealthState.FAILED:
            self._health = Health(HealthState.DRAINING, "finishing running requests")
        await self._registration.leave()
        self._handler.refuse_new(UnavailableError("The worker is draining.", reason="backend.draining"))
        try:
            await within(self._context.clock, timeout_s, self._handler.wait_idle())
        except TimeoutError:
            self._handler.end_all(_shutdown("The worker's drain time ran out."))
            await self._handler.wait_idle()

    async def resume(self) -> None:
        """Serve again after ``pause``.

        Raises:
            ConflictError: if the worker is not paused.
        """
        if self._handler is None or self._registration is None or self._health.state is not HealthState.DRAINING:
            raise ConflictError(f"{self.name} is {self._health.state.value}; only a draining worker can resume")
        self._handler.accept_new()
        await self._registration.join()
        self._health = Health(HealthState.READY, "serving again")

    def health(self) -> Health:
        """Return the worker's line on the health board."""
        registration = self._registration
        if self._health.state is HealthState.READY and registration is not None and not registration.lease_valid:
            return Health(HealthState.DEGRADED, "its lease in discovery has ended")
        return self._health

    def status(self) -> dict[str, Any]:
        """Return state, requests in flight, and whether the process may go."""
        return worker_status(
            self.instance_id,
            self._health,
            running=len(self._handler.active) if self._handler is not None else 0,
            registered=self._registration is not None and self._registration.registered,
            transfers=self._role.kv_transfers if self._role is not None else None,
        )

    def _check_engine(self) -> None:
        name = type(self._engine).__name__
        if self._connector is not None and not isinstance(self._engine, SupportsKvBlocks):
            raise ConfigurationError(
                f"engine {name} gives no access to its KV blocks; "
                f"leave out --kv-connector {self._settings.kv_connector}"
            )
        asked = "kv_events" in self._settings.model_fields_set and self._settings.kv_events
        if asked and not isinstance(self._engine, SupportsKvEvents):
            raise ConfigurationError(f"engine {name} reports no KV events; leave out --kv-events")

    async def _start_engine(self) -> EngineConfig:
        self._exit.push_async_callback(self._cleanup_engine)
        context = EngineContext(
            instance_id=self.instance_id,
            clock=self._context.clock,
            metrics=self._context.metrics,
            kv_connector=self._connector,
            seed=self._context.seed,
        )
        begun = self._context.clock.monotonic()
        try:
            config = await self._engine.start(context)
        except DynamoError:
            raise
        except Exception as error:
            raise InternalError(
                f"engine {type(self._engine).__name__} could not start: {type(error).__name__}: {error}",
                reason="backend.engine_shutdown",
            ) from error
        self._metrics.model_load.set(self._context.clock.monotonic() - begun)
        return config

    async def _take_role(self, config: EngineConfig) -> Role:
        self._role = role = Role(
            self._engine, config, settings=self._settings, context=self._context, metrics=self._metrics
        )
        self._exit.push_async_callback(role.close)
        await role.start(self.endpoint, self.instance_id, _facts())
        return role

    async def _drain_engine(self) -> None:
        if self._role is not None:
            await self._role.wait_pulled()
            await self._role.engine.drain()

    async def _cleanup_engine(self) -> None:
        try:
            await self._engine.cleanup()
        finally:
            if self._connector is not None:
                self._connector.close()

    async def _publish_kv_events(self, config: EngineConfig) -> dict[int, KvPublisher]:
        engine = self._engine
        if not (self._settings.kv_events and config.kv_block_size and isinstance(engine, SupportsKvEvents)):
            return {}
        topic = await self._publisher(KV_EVENTS)
        publishers = {worker.dp_rank: self._kv_publisher(worker, config, topic) for worker in self._workers(config)}
        for dp_rank, publisher in publishers.items():
            self._exit.callback(publisher.flush)
            engine.set_kv_event_sink(publisher, dp_rank=dp_rank)
            if self._role is not None:
                publisher.on_change = self._role.notify_blocks
        if self._connector is not None:
            self._connector.bind(publishers[min(publishers)])
        return publishers

    def _kv_publisher(self, worker: WorkerId, config: EngineConfig, topic: Publisher) -> KvPublisher:
        return KvPublisher(
            worker,
            block_size=config.kv_block_size,
            ring_events=self._settings.kv_event_ring_events,
            max_blocks=self._settings.kv_index_blocks,
            publisher=topic,
            clock=self._context.clock,
            metrics=self._metrics,
        )

    async def _serve(self, config: EngineConfig) -> ServedEndpoint:
        settings = self._settings
        runtime = config.runtime_config
        limit = settings.engine_request_limit
        if limit is None and runtime.max_num_seqs:
            limit = -(-3 * runtime.max_num_seqs * max(1, runtime.data_parallel_size) // 2)
        admission = Admission(
            limit=limit or UNLIMITED_REQUESTS,
            queue_limit=settings.request_queue_limit,
            max_age_s=settings.request_queue_timeout_ms / 1000,
            clock=self._context.clock,
            metrics=self._metrics,
        )
        assert self._role is not None
        self._handler = GenerateHandler(
            self._role.engine,
            settings=settings,
            admission=admission,
            clock=self._context.clock,
            metrics=self._metrics,
            vocab_size=int(runtime.runtime_data.get("vocab_size", 0)),
            on_suspicion=self._suspect,
        )
        served = await self._context.request_plane.serve(self.endpoint, self._handler, schema=config.types.request)
        self._served = served
        self._exit.push_async_callback(served.close)
        return served

    async def _serve_kv_queries(self, publishers: dict[int, KvPublisher]) -> Instance | None:
        if not publishers:
            return None
        endpoint = EndpointId(self.endpoint.namespace, self.endpoint.component, KV_QUERY_ENDPOINT)
        handler = KvQueryHandler(self.instance_id, publishers)
        served = await self._context.request_plane.serve(endpoint, handler, schema=KV_EVENT_QUERY.schema)
        self._exit.push_async_callback(served.close)
        return Instance(endpoint, self.instance_id, served.address, metadata=_facts())

    async def _watch_engine(self, config: EngineConfig, served: ServedEndpoint) -> None:
        assert self._handler is not None
        probe = Probe(
            self._context.request_plane,
            address=served.address,
            endpoint=self.endpoint,
            model=config.model,
            timeout_s=self._settings.probe_timeout_s,
            clock=self._context.clock,
            metrics=self._metrics,
        )
        self._watch = EngineWatch(
            self._handler, probe, settings=self._settings, clock=self._context.clock, on_dead=self._fail
        )
        reports = LoadReports(
            self._engine,
            workers=self._workers(config),
            active=lambda: len(self._handler.active) if self._handler else 0,
            interval_s=self._settings.load_interval_s,
            heartbeat_s=self._settings.load_heartbeat_s,
            load=await self._publisher(LOAD),
            forward_pass=await self._publisher(FORWARD_PASS),
            clock=self._context.clock,
            metrics=self._metrics,
        )
        self._handler.on_activity = reports.notify
        loops = {"load": reports.run(), "limits": self._watch.sweep(), "canary": self._watch.canary()}
        for name, loop in loops.items():
            task = self._context.spawn(loop, name=f"{self.name} {name}")
            self._exit.push_async_callback(_cancelled, task)
        self._exit.push_async_callback(self._watch.close)

    async def _register(self, config: EngineConfig, served: ServedEndpoint, others: list[Instance]) -> None:
        card = await asyncio.to_thread(
            make_card,
            config,
            served_model_name=self._settings.served_model_name,
            tool_call_parser=self._settings.tool_call_parser,
            reasoning_parser=self._settings.reasoning_parser,
            kv_queries=any(item.endpoint.endpoint == KV_QUERY_ENDPOINT for item in others),
            aliases=self._settings.model_aliases,
        )
        instance = Instance(self.endpoint, self.instance_id, served.address, types=config.types, metadata=_facts())
        record = ModelRecord(self.endpoint, self.instance_id, card)
        self._registration = Registration(
            self._context.discovery,
            instances=[instance, *others],
            model=record,
            lease_ttl_s=self._settings.lease_ttl_s,
        )
        self._exit.push_async_callback(self._registration.close)
        await self._registration.join()
        loras = None
        if isinstance(self._engine, SupportsLora):
            loras = LoraRecords(self._engine, record, self._registration)
            await loras.publish_loaded()
        routes = AdminRoutes(
            self._context.admin_routes,
            instance=format_instance_id(self.instance_id),
            worker=self,
            engine=self._engine,
            loras=loras,
        )
        self._exit.callback(routes.remove)

    async def _publisher(self, name: str) -> Publisher:
        publisher = await self._context.event_bus.publisher(Topic.of(name, self.endpoint))
        self._exit.push_async_callback(publisher.close)
        return publisher

    def _workers(self, config: EngineConfig) -> list[WorkerId]:
        runtime = config.runtime_config
        return ranks(self.instance_id, runtime.data_parallel_start_rank, runtime.data_parallel_size)

    def _suspect(self, reason: str) -> None:
        if self._watch is not None and self._health.state is HealthState.READY:
            self._watch.suspect(reason)

    async def _fail(self, reason: str) -> None:
        """Leave discovery for good: the engine is dead."""
        if self._handler is None or self._registration is None or self._health.state is not HealthState.READY:
            return
        log.error("engine is dead", worker=self.name, reason=reason)
        self._health = Health(HealthState.FAILED, reason)
        error = _shutdown("The engine of this worker has died.")
        self._handler.refuse_new(error)
        self._handler.end_all(error)
        await self._registration.leave()
        self._context.spawn(report_death(self._stopped, f"{self.name}: {reason}"), name=f"{self.name} death")
        self._context.request_stop(f"{self.name}: {reason}")


def _shutdown(message: str) -> UnavailableError:
    return UnavailableError(message, reason="backend.engine_shutdown")


def _facts() -> dict[str, str]:
    return {"host": socket.gethostname(), "pid": str(os.getpid()), "version": metadata.version("dynamo-worker")}


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
