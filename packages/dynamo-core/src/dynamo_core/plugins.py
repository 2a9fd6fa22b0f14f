"""Plug-ins: how packages that do not know each other meet.

A distribution registers a factory under an entry-point group ``dynamo_core.<kind>``. Names load lazily: asking for
one imports only that one. A miss is an error that names what is installed and what to install; there is no fallback.
"""

from __future__ import annotations

import functools
from importlib import metadata
from typing import Any

from dynamo_core.errors import ConfigurationError

GROUP_PREFIX = "dynamo_core."

KINDS: dict[str, str] = {
    "components": "a part that `dynamo <name>` runs: dynamo_core.component.ComponentPlugin",
    "commands": "what `dynamo <name>` runs beside components: takes the arguments, returns the exit status",
    "engines": "an inference engine: dynamo_core.engine.EngineFactory",
    "routers": "a router: dynamo_core.routing.RouterFactory",
    "policies": "a routing policy of dynamo-router",
    "kv_connectors": "a block manager behind an engine: dynamo_core.kv.KvConnectorFactory",
    "kv_tiers": "storage of KV blocks: dynamo_core.kv.BlockStore",
    "kv_eviction": "an eviction policy of dynamo-kvbm",
    "discoveries": "a discovery backend by URL scheme: dynamo_core.discovery.DiscoveryFactory",
    "request_planes": "a request plane by URL scheme: dynamo_core.planes.RequestPlaneFactory",
    "event_buses": "an event bus by URL scheme: dynamo_core.planes.EventBusFactory",
    "scaling_targets": "something a planner scales: dynamo_core.planning.ScalingTargetFactory",
    "load_predictors": "a forecaster: dynamo_core.planning.LoadPredictor",
    "parsers": "tool-call and reasoning parsers of a model family: dynamo_core.parsing.ParserFamily",
}
"""Entry-point kinds and what an entry of each must be."""

_HOME: dict[tuple[str, str], str] = {
    ("components", "broker"): "dynamo-runtime",
    ("components", "frontend"): "dynamo-frontend",
    ("components", "router"): "dynamo-router",
    ("components", "worker"): "dynamo-worker",
    ("components", "planner"): "dynamo-planner",
    ("engines", "reference"): "dynamo-worker",
    ("engines", "mock"): "dynamo-worker",
    ("routers", "kv"): "dynamo-router",
    ("kv_connectors", "kvbm"): "dynamo-kvbm",
    ("commands", "chat"): "dynamo-frontend",
    ("discoveries", "file"): "dynamo-runtime",
    ("discoveries", "etcd"): "dynamo-runtime",
    ("discoveries", "k8s"): "dynamo-runtime",
    ("request_planes", "nats"): "dynamo-runtime[nats]",
    ("request_planes", "tcp"): "dynamo-runtime",
    ("request_planes", "unix"): "dynamo-runtime",
    ("event_buses", "nats"): "dynamo-runtime[nats]",
    ("event_buses", "zmq"): "dynamo-runtime",
    ("scaling_targets", "supervisor"): "dynamo-runtime",
    ("load_predictors", "constant"): "dynamo-planner",
}


def available(kind: str) -> dict[str, metadata.EntryPoint]:
    """Return the installed entry points of a kind by name, without importing any.

    Raises:
        ConfigurationError: if there is no such kind, or two distributions claim one name.
    """
    if kind not in KINDS:
        raise ConfigurationError(f"plug-in kind {kind!r} is not one of {', '.join(sorted(KINDS))}")
    found: dict[str, metadata.EntryPoint] = {}
    for entry in _entry_points(GROUP_PREFIX + kind):
        other = found.setdefault(entry.name, entry)
        if other.value != entry.value:
            raise ConfigurationError(
                f"{kind} {entry.name!r} is claimed by {_owner(other)} and {_owner(entry)}; uninstall one"
            )
    return found


def load(kind: str, name: str) -> Any:
    """Import and return one plug-in.

    Raises:
        ConfigurationError: if the name is not installed (with the names that are, and the distribution to install),
            or its import fails (with the reason).
    """
    entries = available(kind)
    entry = entries.get(name)
    if entry is None:
        raise ConfigurationError(_miss(kind, name, entries))
    try:
        return entry.load()
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(
            f"{kind} {name!r} of {_owner(entry)} cannot be imported: {error}; install its extra or repair it"
        ) from error


def _miss(kind: str, name: str, entries: dict[str, metadata.EntryPoint]) -> str:
    installed = ", ".join(sorted(entries)) or "none"
    home = _HOME.get((kind, name))
    remedy = f"; install it with: pip install '{home}'" if home else "; install the distribution that provides it"
    return f"no {kind} plug-in is named {name!r} (installed: {installed}){remedy}"


def _owner(entry: metadata.EntryPoint) -> str:
    return entry.dist.name if entry.dist else entry.value


@functools.cache
def _entry_points(group: str) -> tuple[metadata.EntryPoint, ...]:
    # Reading metadata walks sys.path; distributions do not appear while a process runs.
    return tuple(metadata.entry_points(group=group))
