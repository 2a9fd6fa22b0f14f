"""The process host: builds the planes, gives each component its context, and runs all in one task group."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import structlog

from dynamo_core.clock import Clock, SystemClock
from dynamo_core.component import Component, ComponentContext, ComponentPlugin, Health, HealthBoard
from dynamo_core.errors import ConfigurationError, DynamoError, as_dynamo_error
from dynamo_core.settings import DynamoSettings
from dynamo_runtime import _metrics
from dynamo_runtime._admin import ProcessState, combined_report, discovery_health
from dynamo_runtime._lifecycle import Lifecycle, finishes_before, task_failure
from dynamo_runtime._logging import configure_logging
from dynamo_runtime._settings import NO_PORT, RuntimeSettings
from dynamo_runtime._signals import StopRequest, die_with_parent, stop_signals
from dynamo_runtime._substrate import build_planes
from dynamo_runtime._tracing import configure_tracing
from dynamo_runtime._tracked import TrackedDiscovery, TrackedRequestPlane

EXIT_CRASHED = 1
EXIT_MISCONFIGURED = 2
READY_POLL_S = 0.02
GC_THRESHOLDS = (50_000, 20, 50)

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class HostedComponent:
    """One component to run.

    Attributes:
        name: Label in logs, health and metrics; unique in the process.
        plugin: What builds it.
        settings: One value per class of ``plugin.settings_types``, in order.
        extra_args: Unknown flags for the component to parse.
    """

    name: str
    plugin: ComponentPlugin
    settings: tuple[DynamoSettings, ...] = ()
    extra_args: list[str] = field(default_factory=list[str])


OnReady = Callable[[], Awaitable[None]]


def run_components(
    components: Sequence[HostedComponent], settings: RuntimeSettings, *, on_ready: OnReady | None = None
) -> int:
    """Run components until a signal, a request to stop, or a failure; return the exit status.

    SIGTERM or SIGINT drains: leave discovery, wait the grace period, drain, stop in reverse order. A second signal
    skips what is left of the drain.

    Args:
        components: What to run, in start order.
        settings: Of the process.
        on_ready: Awaited once, when every part is ready.

    Returns:
        0 after a clean stop, 1 after a failure, 2 for a configuration that cannot work (one line on stderr).
    """
    try:
        if settings.parent_pid:
            die_with_parent(settings.parent_pid)
        configure_logging(settings.log_level, settings.log_format)
        service = components[0].name if components else "runtime"
        flush = configure_tracing(settings.otlp_endpoint, settings.trace_sample_ratio, service, settings.namespace)
        try:
            with asyncio.Runner(loop_factory=_loop_factory(settings)) as runner:
                runner.run(Host(components, settings, on_ready=_then_settle(on_ready)).run())
        finally:
            flush()
    except DynamoError as error:
        return report_failure(error)
    return 0


def _then_settle(on_ready: OnReady | None) -> OnReady:
    async def ready() -> None:
        settle_garbage_collector()
        if on_ready is not None:
            await on_ready()

    return ready


def settle_garbage_collector() -> None:
    """Spare the garbage collector what lives as long as the process, and let it look at requests more rarely.

    By default it looks at new objects after every 700 that outlive a call, and at all of a process's some 300,000 ever
    so often: in a frontend an eighth of the CPU of a request. Requests leave no cycles behind, so nearly all of what it
    looks at dies by its reference count; what does not is still found, after 50,000 objects.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


def report_failure(error: DynamoError) -> int:
    """Print one line on stderr for what ended a process; return its exit status."""
    text = "; ".join(line.strip() for line in error.message.splitlines() if line.strip())
    if isinstance(error, ConfigurationError):
        print(f"dynamo: error: {text}", file=sys.stderr, flush=True)  # noqa: T201 - the command's message
        return EXIT_MISCONFIGURED
    print(f"dynamo: error: {text} ({error.reason})", file=sys.stderr, flush=True)  # noqa: T201 - the command's message
    return EXIT_CRASHED


class Host:
    """One process: its planes, its status server, its components.

    Args:
        components: What to run, in start order.
        settings: Of the process.
        clock: Time.
        on_ready: Awaited once, when every part is ready.
    """

    def __init__(
        self,
        components: Sequence[HostedComponent],
        settings: RuntimeSettings,
        *,
        clock: Clock | None = None,
        on_ready: OnReady | None = None,
    ) -> None:
        self._hosted = list(components)
        self._settings = settings
        self._clock = clock or SystemClock()
        self._on_ready = on_ready
        self._metrics = _metrics.process_metrics(settings.namespace)
        self._planes = build_planes(settings, self._clock, self._metrics)
        self._discovery = TrackedDiscovery(self._planes.discovery)
        self._plane = TrackedRequestPlane(self._planes.request_plane)
        self._contexts: list[tuple[str, ComponentContext]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.state = ProcessState(self._discovery, self._plane)
        self.stop = StopRequest(self._clock)
        self.status_url = ""

    def report(self) -> dict[str, Health]:
        """Return the health of every part of the process."""
        boards = [(label, context.health) for label, context in self._contexts]
        return combined_report(lambda: self.state.health, self._planes.discovery, boards)

    async def run(self) -> None:
        """Run until asked to stop. Cancelling stops at once, without a drain.

        Raises:
            DynamoError: what made the process fail; a failing background task's error included.
        """
        with stop_signals(self.stop):
            async with AsyncExitStack() as stack:
                await self._planes.start(stack)
                await self._start_status_server(stack)
                await self._run_components()

    async def _run_components(self) -> None:
        lifecycle: Lifecycle | None = None
        try:
            async with asyncio.TaskGroup() as group:
                lifecycle = Lifecycle(self._create(group), self._clock)
                await self._live(lifecycle)
                for task in self._tasks:
                    task.cancel()
        except BaseExceptionGroup as errors:
            raise _reason_of(errors) from errors
        finally:
            self.state.stopping = True
            if lifecycle is not None:
                await lifecycle.stop()

    async def _live(self, lifecycle: Lifecycle) -> None:
        if await finishes_before(lifecycle.start(), self.stop.drain.wait()):
            self.state.started()
            await finishes_before(self._announce_ready(), self.stop.drain.wait())
            await self.stop.drain.wait()
        _log.info("stopping", reason=self.stop.reason)
        self.state.stopping = True
        started_s = self._clock.monotonic()
        clean = await finishes_before(self._drain(lifecycle), self.stop.abort.wait())
        drained_s = self._clock.monotonic() - started_s
        self._metrics.gauge(_metrics.DRAIN_SECONDS, "Duration of the last drain.").set(drained_s)
        _log.info("drained" if clean else "drain cut short", duration_s=round(drained_s, 3))
        await lifecycle.stop()

    async def _drain(self, lifecycle: Lifecycle) -> None:
        announced = self._discovery.announced
        try:
            await self.state.leave(self.stop.reason)
        except DynamoError as error:
            # The announcements end with the lease; running work must be drained all the same.
            _log.warning("could not leave discovery", reason=error.reason, error=error.message)
        if announced and self._settings.grace_period_s:
            await self._clock.sleep(self._settings.grace_period_s)
        await lifecycle.drain(self._settings.drain_timeout_s)

    async def _announce_ready(self) -> None:
        while not all(health.ready for health in self.report().values()):
            await self._clock.sleep(READY_POLL_S)
        _log.info("ready", status_url=self.status_url)
        if self._settings.ready_fd >= 0:
            line = json.dumps({"status_url": self.status_url, "pid": os.getpid()})
            os.write(self._settings.ready_fd, line.encode() + b"\n")
            os.close(self._settings.ready_fd)
        if self._on_ready is not None:
            await self._on_ready()

    async def _start_status_server(self, stack: AsyncExitStack) -> None:
        if self._settings.status_port == NO_PORT:
            return
        from dynamo_runtime._status import StatusServer

        self._metrics.gauge(_metrics.DISCOVERY_CONNECTED, "1 while the discovery backend answers.").set_function(
            lambda: float(discovery_health(self._planes.discovery).state.value == "ready")
        )
        server = StatusServer(self.report, self._metrics.registry, self._admin_routes)
        stack.push_async_callback(server.close)
        await server.start(self._settings.status_host, self._settings.status_port)
        self.status_url = server.url

    def _admin_routes(self) -> dict[str, Any]:
        routes: dict[str, Any] = dict(self.state.routes())
        for label, context in self._contexts:
            for name, route in context.admin_routes.items():
                routes[name if len(self._contexts) == 1 else f"{label}/{name}"] = route
        return routes

    def _create(self, group: asyncio.TaskGroup) -> list[tuple[str, Component]]:
        created: list[tuple[str, Component]] = []
        for hosted in self._hosted:
            context = self._context(hosted.name, group)
            self._contexts.append((hosted.name, context))
            created.append((hosted.name, hosted.plugin.create(context, hosted.settings, list(hosted.extra_args))))
        return created

    def _context(self, label: str, group: asyncio.TaskGroup) -> ComponentContext:
        def spawn(coroutine: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
            task = group.create_task(_typed(coroutine, label, name), name=f"{label}:{name}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return task

        return ComponentContext(
            namespace=self._settings.namespace,
            discovery=self._discovery,
            request_plane=self._plane,
            event_bus=self._planes.event_bus,
            metrics=self._metrics.child(dynamo_component=label),
            clock=self._clock,
            spawn=spawn,
            health=HealthBoard(),
            admin_routes={},
            seed=self._settings.seed,
            request_stop=self.stop.request,
        )


async def _typed(coroutine: Coroutine[Any, Any, None], label: str, name: str) -> None:
    try:
        await coroutine
    except DynamoError:
        raise
    except Exception as error:
        raise task_failure(label, name, error) from error


def _reason_of(errors: BaseExceptionGroup[BaseException]) -> DynamoError:
    """Return the error that ends the process: wrong configuration before all else, then the first one."""
    leaves = list(_leaves(errors))
    for error in leaves:
        if isinstance(error, ConfigurationError):
            return error
    return as_dynamo_error(leaves[0])


def _leaves(error: BaseException) -> Sequence[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for child in error.exceptions for leaf in _leaves(child)]
    return [error]


def _loop_factory(settings: RuntimeSettings) -> Callable[[], asyncio.AbstractEventLoop] | None:
    if not settings.uvloop or sys.platform == "win32":
        return None
    import uvloop

    return uvloop.new_event_loop
