"""The three planes of a process, made from their URLs."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from dynamo_core import plugins
from dynamo_core.clock import Clock
from dynamo_core.discovery import Discovery
from dynamo_core.planes import EventBus, RequestPlane

if TYPE_CHECKING:
    from dynamo_core.telemetry import Metrics
    from dynamo_runtime._settings import RuntimeSettings

_IN_PROCESS = "mem"


@dataclass(frozen=True)
class Planes:
    """Discovery, request plane and event bus of one process."""

    discovery: Discovery
    request_plane: RequestPlane
    event_bus: EventBus

    async def start(self, stack: AsyncExitStack) -> None:
        """Start all three; ``stack`` closes, in reverse, those whose start was begun."""
        for plane in (self.discovery, self.request_plane, self.event_bus):
            stack.push_async_callback(plane.close)
            await plane.start()


def build_planes(settings: RuntimeSettings, clock: Clock, metrics: Metrics | None = None) -> Planes:
    """Make the planes that the settings name; no I/O.

    Args:
        settings: URL of each plane; its query holds the plane's own options.
        clock: Time.
        metrics: Scope in which the planes register their metrics; None keeps them private.

    Raises:
        ConfigurationError: if no installed plug-in serves a URL's scheme.
    """
    discovery = open_discovery(settings.discovery, clock, metrics)
    return Planes(
        discovery,
        open_request_plane(settings.request_plane, clock, metrics),
        plugins.load("event_buses", scheme_of(settings.event_bus))(
            settings.event_bus, discovery=discovery, clock=clock, options=_options(settings.event_bus, metrics)
        ),
    )


def open_discovery(url: str, clock: Clock, metrics: Metrics | None = None) -> Discovery:
    """Make the discovery backend for a URL."""
    return plugins.load("discoveries", scheme_of(url))(url, clock=clock, options=_options(url, metrics))


def open_request_plane(url: str, clock: Clock, metrics: Metrics | None = None) -> RequestPlane:
    """Make the request plane for a URL."""
    return plugins.load("request_planes", scheme_of(url))(url, clock=clock, options=_options(url, metrics))


def _options(url: str, metrics: Metrics | None) -> dict[str, object]:
    # Planes within a process have nothing to count, and refuse options that they do not know.
    return {} if metrics is None or scheme_of(url) == _IN_PROCESS else {"metrics": metrics}


def scheme_of(url: str) -> str:
    """Return a URL's scheme, the name its plug-in is registered under."""
    return urlsplit(url).scheme
