"""Metric names of this package, and the registry of a process."""

from __future__ import annotations

from prometheus_client import CollectorRegistry
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from dynamo_core.telemetry import Metrics

DRAIN_SECONDS = "dynamo_runtime_drain_seconds"
DISCOVERY_CONNECTED = "dynamo_runtime_discovery_connected"
REPLICAS = "dynamo_supervisor_replicas"
RESTARTS = "dynamo_supervisor_restarts_total"
KILLS = "dynamo_supervisor_kills_total"
STARTUP_SECONDS = "dynamo_supervisor_startup_seconds"


def process_metrics(namespace: str) -> Metrics:
    """Return the root scope of a process; its scopes carry ``dynamo_namespace`` and ``dynamo_component``."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return Metrics(registry, {"dynamo_namespace": namespace, "dynamo_component": "runtime"})
