"""KV-cache-aware request routing: an index of who holds which prefix, projected load, policies, and receipts.

``KvRouter`` is the library: tell it workers and KV events, ask it for decisions. ``create_router`` makes one that
finds workers, events and loads by itself through the planes of a process. ``EngineEventSource`` feeds a router with the
events of a bare vLLM or SGLang engine. ``Policy`` is what a routing policy must do.
"""

from dynamo_router._engine_events import EngineEventSource
from dynamo_router._hosted import create_router
from dynamo_router._policy import Candidate, Policy, Query
from dynamo_router._router import KvRouter
from dynamo_router._settings import RouterSettings

__all__ = ["Candidate", "EngineEventSource", "KvRouter", "Policy", "Query", "RouterSettings", "create_router"]
