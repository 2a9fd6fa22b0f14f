"""The frontend as a component of a process, and its plug-in entry."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import cast

import structlog

from dynamo_core import plugins
from dynamo_core.component import ComponentContext, Health
from dynamo_core.discovery import ModelRecord
from dynamo_core.enums import HealthState
from dynamo_core.planes import TRAFFIC, Publisher, Topic
from dynamo_core.routing import Router, RouterFactory, RouterScope
from dynamo_core.settings import DynamoSettings
from dynamo_core.telemetry import Metrics
from dynamo_frontend._access.access import open_door
from dynamo_frontend._admission import Admission, BusyThresholds
from dynamo_frontend._anthropic.api import AnthropicApi
from dynamo_frontend._anthropic.writers import anthropic_error
from dynamo_frontend._catalog import Catalog
from dynamo_frontend._decisions_api import DECISIONS_PREFIX, DecisionsApi
from dynamo_frontend._embeddings.api import EmbeddingsApi
from dynamo_frontend._generate_api import GenerateApi
from dynamo_frontend._index_page import index_page
from dynamo_frontend._kserve.credentials import TlsFiles
from dynamo_frontend._kserve.grpc_server import KserveGrpcServer
from dynamo_frontend._kserve.rest_api import MODELS_PREFIX, KserveRest, kserve_error
from dynamo_frontend._kserve.runner import CompletionRunner
from dynamo_frontend._media.policy import MediaLimits
from dynamo_frontend._media.source import MediaSource
from dynamo_frontend._metrics import FrontendMetrics, MediaMetrics, ResumeMetrics, TraceMetrics
from dynamo_frontend._model import ModelText, load_model_text
from dynamo_frontend._openapi import openapi
from dynamo_frontend._parsers.chain import check_parsers
from dynamo_frontend._rerank.api import RerankApi
from dynamo_frontend._responses.api import ResponsesApi
from dynamo_frontend._resume.streams import ResumableStreams, ResumeLimits
from dynamo_frontend._routes import Route, Routes
from dynamo_frontend._server import HttpServer
from dynamo_frontend._services import GenerationServices
from dynamo_frontend._settings import FrontendSettings
from dynamo_frontend._status_api import MODELS_PATH, StatusApi
from dynamo_frontend._tokenize import TokenCache
from dynamo_frontend._tokens.generate_api import TokenApi
from dynamo_frontend._tokens.text_api import TextApi
from dynamo_frontend._trace import TraceLog, TraceOptions
from dynamo_frontend._traffic import TrafficLog, publish_traffic

_log = structlog.get_logger(__name__)
_MIB = 1 << 20
_DRAIN_POLL_S = 0.05


class Frontend:
    """Serves the OpenAI APIs for every model that discovery shows.

    Args:
        context: The process.
        settings: Options.
    """

    name = "frontend"

    def __init__(self, context: ComponentContext, settings: FrontendSettings) -> None:
        self._context = context
        self._settings = settings
        self._metrics = FrontendMetrics(context.metrics)
        self._cache = TokenCache(settings.tokenizer_cache_mb * _MIB, self._metrics.tokenizer_bytes.set)
        self._catalog = Catalog(context, self._metrics, self._admit)
        self._traffic = TrafficLog(context.seed)
        self._state = Health(HealthState.STARTING)
        services = GenerationServices(
            self._catalog,
            context.request_plane,
            context.clock,
            self._metrics,
            migration_limit=settings.migration_limit,
            timeout_s=settings.request_timeout_s,
        )
        thresholds = BusyThresholds(settings.busy_kv_share, settings.busy_prompt_tokens)
        self._admission = Admission(settings.max_concurrent_requests, thresholds, context.clock)
        self._trace = _trace_log(settings, context.metrics)
        self._api = GenerateApi(
            services,
            self._traffic,
            self._admission,
            overload_status=settings.overload_status,
            keep_alive_s=settings.sse_keep_alive_s,
            trace=self._trace,
        )
        self._media = MediaSource(_media_limits(settings), MediaMetrics(context.metrics))
        self._runner = CompletionRunner(self._api)
        self._streams = ResumableStreams(_resume_limits(settings), context.clock, ResumeMetrics(context.metrics))
        self._access = open_door(settings, context.clock, context.metrics)
        self.server = HttpServer(self._routes(), context.clock, settings.http_limits())
        self.kserve = KserveGrpcServer(self._runner, self._access)
        self._router_factory: RouterFactory | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._publisher: Publisher | None = None

    @property
    def url(self) -> str:
        """Where it listens; valid once started."""
        host = self._settings.http_host
        shown = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
        return f"{self.server.scheme}://{f'[{shown}]' if ':' in shown else shown}:{self.server.port}"

    async def start(self) -> None:
        """Load the router plug-in, listen, and begin to watch for models.

        Raises:
            ConfigurationError: if the router or a parser is not installed, a file of keys or certificates cannot be
                read, or the port cannot be had.
        """
        context = self._context
        check_parsers(tools=self._settings.tool_call_parser, reasoning=self._settings.reasoning_parser)
        self._router_factory = cast("RouterFactory", plugins.load("routers", self._settings.router))
        settings = self._settings
        if self._access is not None:
            self._access.load()
        if self._trace is not None:
            self._trace.start()
        await self.server.start(
            settings.http_host,
            settings.http_port,
            backlog=settings.http_backlog,
            reuse_port=settings.http_reuse_port,
            tls=settings.server_tls(),
        )
        await self._start_kserve()
        self._publisher = await context.event_bus.publisher(Topic(TRAFFIC, context.namespace))
        interval = self._settings.traffic_interval_s
        self._tasks = [
            context.spawn(self._catalog.watch_instances(), name="frontend-instances"),
            context.spawn(self._catalog.watch_models(), name="frontend-models"),
            context.spawn(
                publish_traffic(self._traffic, self._publisher, context.clock, interval), name="frontend-traffic"
            ),
        ]
        if self._access is not None:
            self._tasks.append(context.spawn(self._access.watch(), name="frontend-keys"))
        self._state = Health(HealthState.READY)
        context.admin_routes["busy_threshold"] = self._admission.operate
        context.health.register(self.name, lambda: self._state)
        _log.info("frontend listens", url=self.url)

    async def drain(self, timeout_s: float) -> None:
        """Accept nothing new and let running replies finish within the time."""
        self._state = Health(HealthState.DRAINING)
        answered, _ = await asyncio.gather(self.server.drain(timeout_s), self.kserve.stop(timeout_s))
        if not answered:
            _log.warning("replies were cut at the end of the drain time", connections=self.server.connections)

    async def stop(self) -> None:
        """Release everything. Idempotent."""
        self._state = Health(HealthState.STOPPED)
        await self.server.stop()
        await self.kserve.stop()
        await self._streams.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        await self._catalog.close()
        if self._trace is not None:
            await asyncio.to_thread(self._trace.close)
        await self._media.close()
        if self._publisher is not None:
            await self._publisher.close()
            self._publisher = None
        self._context.admin_routes.pop("busy_threshold", None)
        self._context.health.unregister(self.name)

    async def _admit(self, record: ModelRecord) -> tuple[ModelText, Router]:
        assert self._router_factory is not None, "models are watched after start"
        text = await load_model_text(record.card, self._settings, self._cache, self._context.clock)
        text.media = self._media
        scope = RouterScope(
            endpoint=record.endpoint,
            card=record.card,
            policy=self._settings.policy,
            options=dict(self._settings.router_options),
        )
        router = self._router_factory(self._context, scope)
        await router.start()
        return text, router

    async def _start_kserve(self) -> None:
        settings = self._settings
        if settings.kserve_grpc_port is not None:
            files = (settings.tls_cert_path, settings.tls_key_path, settings.tls_client_ca_cert_path)
            await self.kserve.start(
                settings.http_host,
                settings.kserve_grpc_port,
                body_bytes=settings.body_limit_mb * _MIB,
                reuse_port=settings.http_reuse_port,
                tls=TlsFiles(*files) if settings.tls_cert_path else None,
            )

    def _routes(self) -> Routes:
        status = StatusApi(
            self._catalog, self._context.health, self._metrics, lambda: self._state.state is not HealthState.READY
        )
        anthropic = AnthropicApi(self._api, overload_status=self._settings.overload_status)
        responses = ResponsesApi(self._api)
        text = TextApi(self._api)
        decisions = DecisionsApi(lambda: [model.router for model in self._catalog.models()])
        kserve = KserveRest(self._runner, overload_status=self._settings.overload_status)
        resumable = self._streams.resumable
        messages = resumable(anthropic.messages, anthropic.refuse)
        table = {
            "/v1/chat/completions": Route({"POST": resumable(self._api.chat)}),
            "/v1/completions": Route({"POST": resumable(self._api.completions)}),
            "/v1/messages": Route({"POST": messages}, error_body=anthropic_error),
            "/v1/messages/count_tokens": Route({"POST": anthropic.count_tokens}, error_body=anthropic_error),
            "/v1/responses": Route({"POST": resumable(responses.responses)}),
            "/v1/responses/input_tokens": Route({"POST": responses.input_tokens}),
            "/v1/embeddings": Route({"POST": EmbeddingsApi(self._api).embeddings}),
            "/v1/rerank": Route({"POST": RerankApi(self._api).rerank}),
            "/tokenize": Route({"POST": text.tokenize}),
            "/detokenize": Route({"POST": text.detokenize}),
            "/inference/v1/generate": Route({"POST": resumable(TokenApi(self._api).generate)}),
            "/v2": Route({"GET": kserve.server}, error_body=kserve_error),
            "/v2/health/live": Route({"GET": kserve.live}, open=True),
            "/v2/health/ready": Route({"GET": kserve.ready}, open=True),
            MODELS_PREFIX: Route({"GET": kserve.show, "POST": kserve.act}, prefix=True, error_body=kserve_error),
            MODELS_PATH: Route({"GET": status.models}),
            f"{MODELS_PATH}/": Route({"GET": status.model}, prefix=True),
            DECISIONS_PREFIX: Route({"GET": decisions.decision}, prefix=True),
            "/": Route({"GET": index_page}, open=True),
            "/openapi.json": Route({"GET": openapi}),
            "/health": Route({"GET": status.health}, open=True),
            "/live": Route({"GET": status.live}, open=True),
            "/ready": Route({"GET": status.ready}, open=True),
            "/metrics": Route({"GET": status.metrics}, open=True),
        }
        return Routes(table, overload_status=self._settings.overload_status, door=self._access)


def _trace_log(settings: FrontendSettings, metrics: Metrics) -> TraceLog | None:
    if not settings.request_trace_file:
        return None
    options = TraceOptions(
        Path(settings.request_trace_file),
        payloads=settings.request_trace_payloads,
        roll_bytes=settings.request_trace_roll_mb * _MIB,
        files=settings.request_trace_files,
        capacity=settings.request_trace_capacity,
    )
    return TraceLog(options, TraceMetrics(metrics))


def _resume_limits(settings: FrontendSettings) -> ResumeLimits:
    return ResumeLimits(
        always=settings.stream_resume,
        grace_s=settings.stream_grace_s,
        stream_bytes=settings.stream_replay_kb << 10,
        total_bytes=settings.stream_replay_total_mb * _MIB,
    )


def _media_limits(settings: FrontendSettings) -> MediaLimits:
    return MediaLimits(
        urls=settings.media_urls,
        max_bytes=settings.media_limit_mb * _MIB,
        max_items=settings.media_items,
        timeout_s=settings.media_timeout_s,
        allowed_hosts=frozenset(host.lower() for host in settings.media_allowed_hosts),
    )


class FrontendPlugin:
    """Entry ``frontend`` of ``dynamo_core.components``."""

    settings_types: tuple[type[DynamoSettings], ...] = (FrontendSettings,)
    takes_extra_args = False

    def create(
        self, context: ComponentContext, settings: tuple[DynamoSettings, ...], extra_args: list[str]
    ) -> Frontend:
        """Build the frontend; no I/O."""
        (own,) = settings
        return Frontend(context, cast("FrontendSettings", own))


plugin = FrontendPlugin()
