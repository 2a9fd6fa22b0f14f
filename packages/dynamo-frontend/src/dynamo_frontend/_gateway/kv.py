"""KV-aware choice of engines, by a router plug-in that hears the engines' own events."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine
from typing import Any, cast

import structlog

from dynamo_core import plugins
from dynamo_core.cards import ModelCard
from dynamo_core.clock import Clock
from dynamo_core.component import ComponentContext, HealthBoard
from dynamo_core.discovery import Instance
from dynamo_core.enums import FinishReason
from dynamo_core.errors import ConfigurationError, DynamoError
from dynamo_core.ids import EndpointId, WorkerId
from dynamo_core.memory import MemoryDiscovery, MemoryEventBus, MemoryRequestPlane
from dynamo_core.requests import RoutingHints
from dynamo_core.routing import RequestOutcome, Router, RouterFactory, RouterScope, RoutingDecision, RoutingRequest
from dynamo_core.telemetry import Metrics
from dynamo_core.tokens import BlockHasher, token_count
from dynamo_core.wire import INSTANCE
from dynamo_frontend._gateway.prompt import EnginePrompts, LocalPrompts, Prompt, PromptSource
from dynamo_frontend._gateway.upstreams import Upstream, Upstreams
from dynamo_frontend._http.request import HttpRequest
from dynamo_frontend._metrics import GatewayMetrics
from dynamo_frontend._settings import GatewaySettings

_log = structlog.get_logger(__name__)
_NAMESPACE = "gateway"
_DP_HEADER = "x-data-parallel-rank"


class Booking:
    """One routed request at its engine.

    Args:
        router: Who booked it.
        decision: The receipt.
        upstream: The engine.
        clock: Time.
        prompt_tokens: Length of the prompt.
        ranks: Data-parallel ranks of the engine.
    """

    def __init__(
        self,
        router: Router,
        decision: RoutingDecision,
        upstream: Upstream,
        clock: Clock,
        *,
        prompt_tokens: int,
        ranks: int,
    ) -> None:
        self.upstream = upstream
        self._router = router
        self._decision = decision
        self._clock = clock
        self._prompt_tokens = prompt_tokens
        self._ranks = ranks
        self._began_s = clock.monotonic()
        self._first_s: float | None = None
        self._over = False

    @property
    def request_headers(self) -> dict[str, str]:
        """Headers for the engine: which of its ranks was chosen."""
        return {_DP_HEADER: str(self._decision.worker.dp_rank)} if self._ranks > 1 else {}

    @property
    def response_headers(self) -> dict[str, str]:
        """Headers for the client."""
        return {
            "x-dynamo-worker-id": str(self._decision.worker),
            "x-dynamo-decision-id": self._decision.decision_id,
            "x-dynamo-overlap-blocks": str(self._decision.overlap_blocks),
        }

    def first_byte(self) -> None:
        """The engine has begun to answer. Idempotent."""
        if self._first_s is None:
            self._first_s = self._clock.monotonic() - self._began_s
            if self._decision.reservation is not None:
                self._router.first_token(self._decision.reservation)

    def end(self, status: int) -> None:
        """The request is over. Idempotent."""
        if self._over:
            return
        self._over = True
        if status >= 500:
            self._router.inhibit(self._decision.worker, "transport.disconnected")
        if self._decision.reservation is None:
            return
        reason = FinishReason.EOS if status < 400 else FinishReason.ERROR
        outcome = RequestOutcome(
            decision_id=self._decision.decision_id,
            finish_reason=FinishReason.CANCELLED if status == 499 else reason,
            prompt_tokens=self._prompt_tokens,
            ttft_s=self._first_s,
            duration_s=self._clock.monotonic() - self._began_s,
        )
        self._router.complete(self._decision.reservation, outcome)


class KvChooser:
    """Chooses among engines by what their caches hold.

    Each model that the engines list gets a router of its own; the engines are its workers, registered in a discovery
    inside this process with the addresses of their event sockets.

    Args:
        settings: Options.
        upstreams: The engines, in the order of ``--kv-events``.
        metrics: Where the router counts.
        counts: Counts requests that could not be routed by content.
        clock: Time.
    """

    def __init__(
        self, settings: GatewaySettings, upstreams: Upstreams, metrics: Metrics, counts: GatewayMetrics, clock: Clock
    ) -> None:
        self._settings = settings
        self._upstreams = upstreams
        self._counts = counts
        self._clock = clock
        self._discovery = MemoryDiscovery()
        self._plane = MemoryRequestPlane()
        self._bus = MemoryEventBus()
        self.health = HealthBoard()
        self._context = ComponentContext(
            _NAMESPACE, self._discovery, self._plane, self._bus, metrics, clock, self._spawn, self.health
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._routers: dict[str, Router] = {}
        self._registered: set[tuple[str, int]] = set()
        self._prompts: PromptSource = EnginePrompts()
        self._factory: RouterFactory | None = None
        self._problem = ""
        self._lock = asyncio.Lock()

    async def start(self) -> None:
        """Load the router and the tokenizer.

        Raises:
            ConfigurationError: if the router is not installed, or the tokenizer cannot be read.
        """
        self._factory = cast("RouterFactory", plugins.load("routers", self._settings.router or "kv"))
        if self._settings.tokenizer:
            local = LocalPrompts(self._settings.tokenizer, self._clock)
            await local.load()
            self._prompts = local

    async def stop(self) -> None:
        """Stop the routers. Idempotent."""
        for router in self._routers.values():
            await router.stop()
        self._routers.clear()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._plane.close()
        await self._bus.close()
        await self._discovery.close()

    @property
    def routers(self) -> list[Router]:
        """The routers, one a model."""
        return list(self._routers.values())

    @property
    def problem(self) -> str:
        """Why the last request could not be routed by content; empty if it was."""
        return self._problem

    async def follow(self) -> None:
        """Register the engines that are up for the models they serve, and take out the others."""
        async with self._lock:
            wanted = {
                (model, index)
                for index, member in enumerate(self._upstreams.members)
                if member.up
                for model in member.models
            }
            for model, index in wanted - self._registered:
                instance = self._instance(model, index)
                await self._discovery.put(instance.key, INSTANCE.encode(instance))
            for model, index in self._registered - wanted:
                await self._discovery.delete(self._instance(model, index).key)
            self._registered = wanted
            for model in sorted({model for model, _ in wanted} - self._routers.keys()):
                await self._open(model)

    async def choose(
        self, request: HttpRequest, request_id: str, model: str, excluded: Collection[Upstream]
    ) -> Booking | None:
        """Return the engine for a request, booked; None if it cannot be routed by content."""
        router = self._routers.get(model)
        if router is None:
            return None
        try:
            serving = self._upstreams.serving(model, excluded)
            prompt = await self._prompts.read(request.path, request.body, serving[0])
            if prompt is None:
                return None
            decision = await router.select(self._question(request_id, model, prompt, excluded))
        except DynamoError as error:
            self._cannot(error)
            return None
        self._problem = ""
        upstream = self._upstreams.members[decision.worker.instance_id - 1]
        self._upstreams.take(upstream)
        tokens = token_count(prompt.token_ids)
        ranks = self._settings.kv_dp_size
        return Booking(router, decision, upstream, self._clock, prompt_tokens=tokens, ranks=ranks)

    def _cannot(self, error: DynamoError) -> None:
        self._counts.unrouted(error.reason)
        if error.message != self._problem:
            self._problem = error.message
            _log.warning("requests go to the engine with the fewest in flight", reason=error.message)

    def _question(self, request_id: str, model: str, prompt: Prompt, excluded: Collection[Upstream]) -> RoutingRequest:
        size = self._settings.kv_block_size
        hashes = BlockHasher(size, "", prompt.cache_salt).hash_tokens(prompt.token_ids)
        out = {index for index, member in enumerate(self._upstreams.members, 1) if member in excluded}
        return RoutingRequest(
            request_id=request_id,
            model=model,
            prompt_tokens=token_count(prompt.token_ids),
            block_size=size,
            local_hashes=hashes.local,
            sequence_hashes=hashes.sequence,
            hints=RoutingHints(cache_salt=prompt.cache_salt),
            excluded=tuple(WorkerId(index, rank) for index in out for rank in range(self._settings.kv_dp_size)),
        )

    async def _open(self, model: str) -> None:
        settings = self._settings
        assert self._factory is not None, "engines are followed after start"
        card = ModelCard(model, kv_block_size=settings.kv_block_size)
        options = dict(settings.router_options)
        router = self._factory(self._context, RouterScope(_endpoint(model), card, settings.policy, options))
        await router.start()
        self._routers[model] = router
        _log.info("requests are routed by content", model=model)

    def _instance(self, model: str, index: int) -> Instance:
        settings = self._settings
        found = {
            "kv_events_endpoint": _at(settings.kv_events, index),
            "kv_events_replay_endpoint": _at(settings.kv_events_replay, index),
            "kv_events_dialect": settings.kv_dialect,
            "kv_events_topic": settings.kv_topic,
            "dp_size": str(settings.kv_dp_size) if settings.kv_dp_size > 1 else "",
        }
        metadata = {key: value for key, value in found.items() if value}
        return Instance(_endpoint(model), index + 1, self._upstreams.members[index].url, metadata=metadata)

    def _spawn(self, work: Coroutine[Any, Any, None], /, *, name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def kv_chooser(
    settings: GatewaySettings, upstreams: Upstreams, metrics: Metrics, counts: GatewayMetrics, clock: Clock
) -> KvChooser | None:
    """Return the chooser that the settings ask for; None without event sockets.

    Raises:
        ConfigurationError: if the sockets do not match the engines.
    """
    if not settings.kv_events:
        return None
    for name in ("kv_events", "kv_events_replay"):
        given = len(getattr(settings, name))
        if given and given != len(settings.upstream):
            raise ConfigurationError(
                f"--{name.replace('_', '-')} is given {given} times for {len(settings.upstream)} --upstream; give one "
                "for each engine, in the same order",
                param=name,
            )
    return KvChooser(settings, upstreams, metrics, counts, clock)


def _endpoint(model: str) -> EndpointId:
    # Endpoint names are plain; a model's name is told apart by its bytes.
    return EndpointId(_NAMESPACE, f"m{model.encode().hex()}", "generate")


def _at(values: list[str], index: int) -> str:
    return values[index] if index < len(values) else ""


__all__ = ["Booking", "KvChooser", "kv_chooser"]
