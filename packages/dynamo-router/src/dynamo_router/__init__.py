"""KV-cache-aware request routing: an index of who holds which prefix, projected load, policies, and receipts.

``KvRouter`` is the library: tell it workers and KV events, ask it for decisions. ``create_router`` makes one that
finds workers, events and loads by itself through the planes of a process. ``EngineEventSource`` feeds a router with the
events of a bare vLLM or SGLang engine. ``Policy`` is what a routing policy must do.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynamo_router._engine_events import EngineEventSource
    from dynamo_router._hosted import create_router
    from dynamo_router._outlook import OverlapScore
    from dynamo_router._policy import Candidate, Policy, Query
    from dynamo_router._router import KvRouter
    from dynamo_router._settings import RouterSettings

__all__ = [
    "Candidate",
    "EngineEventSource",
    "KvRouter",
    "OverlapScore",
    "Policy",
    "Query",
    "RouterSettings",
    "create_router",
]

_HOMES = {
    "Candidate": "dynamo_router._policy",
    "EngineEventSource": "dynamo_router._engine_events",
    "KvRouter": "dynamo_router._router",
    "OverlapScore": "dynamo_router._outlook",
    "Policy": "dynamo_router._policy",
    "Query": "dynamo_router._policy",
    "RouterSettings": "dynamo_router._settings",
    "create_router": "dynamo_router._hosted",
}


def __getattr__(name: str) -> Any:
    # Settings, logs, metrics and ZMQ take half a second, which a plug-in that only brings a policy need not wait for.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
