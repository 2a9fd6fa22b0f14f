"""Options of the process host and of the commands around it."""

from __future__ import annotations

import getpass
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from dynamo_core.settings import DynamoSettings

ANY_PORT = 0
NO_PORT = -1


def default_discovery_url() -> str:
    """Return the URL of this user's file store, so that commands in two terminals find each other."""
    return f"file://{Path(tempfile.gettempdir()) / f'dynamo-{getpass.getuser()}'}"


class RuntimeSettings(DynamoSettings):
    """Process host: planes, status server, lifecycle, logs and traces."""

    component: ClassVar[str] = "runtime"

    namespace: str = Field(
        default="dynamo", pattern=r"^[A-Za-z0-9_-]{1,128}$", description="Namespace of the deployment"
    )
    discovery: str = Field(
        default_factory=default_discovery_url, description="Discovery plane: mem://, file:///dir or another scheme"
    )
    request_plane: str = Field(
        default="tcp://127.0.0.1:0", description="Request plane: mem://, tcp://host:port, unix:///dir or another scheme"
    )
    event_bus: str = Field(
        default="zmq://127.0.0.1:0", description="Event bus: mem://, zmq://host:port or another scheme"
    )
    status_host: str = Field(default="127.0.0.1", description="Address of the status server")
    status_port: int = Field(default=NO_PORT, ge=-1, le=65535, description="Port of the status server; 0 any, -1 off")
    drain_timeout_s: float = Field(
        default=30.0, ge=0, description="Time that running work gets to finish after a stop signal"
    )
    grace_period_s: float = Field(
        default=0.0,
        ge=0,
        description="Wait between leaving discovery and refusing work, so that work already routed lands",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Lowest level that is logged"
    )
    log_format: Literal["auto", "console", "json"] = Field(
        default="auto",
        description="Key-value lines (console), JSON lines (json), or by whether stderr is a terminal (auto)",
    )
    otlp_endpoint: str = Field(
        default="", description="OTLP/HTTP traces endpoint, for example http://127.0.0.1:4318/v1/traces"
    )
    trace_sample_ratio: float = Field(default=1.0, ge=0, le=1, description="Share of new traces that are recorded")
    seed: int = Field(default=0, ge=0, description="Seed of everything random")
    uvloop: bool = Field(default=True, description="Run on uvloop where it is installed")
    ready_fd: int = Field(
        default=-1,
        ge=-1,
        description="File descriptor that gets one JSON line once the process is ready; for supervisors",
    )
    parent_pid: int = Field(default=0, ge=0, description="End at once when this parent process dies; 0 for no parent")

    @field_validator("discovery", "request_plane", "event_bus")
    @classmethod
    def _has_scheme(cls, value: str) -> str:
        return _checked_url(value)


class BrokerSettings(DynamoSettings):
    """Event broker: where publishers and subscribers of ``zmq://...?broker=host:port`` buses meet."""

    component: ClassVar[str] = "broker"

    host: str = Field(default="127.0.0.1", description="Address to listen on")
    port: int = Field(
        default=5557, ge=0, le=65534, description="Port of publishers; subscribers have the one after it. 0 for any two"
    )
    max_event_bytes: int = Field(
        default=32 << 20, ge=1, description="Largest payload of an event; a publisher that sends more is disconnected"
    )


class SupervisorSettings(DynamoSettings):
    """Local supervisor: limits and restarts of the processes it keeps."""

    component: ClassVar[str] = "supervisor"

    max_replicas: int = Field(default=64, ge=1, le=4096, description="Most replicas of one role")
    restart_initial_s: float = Field(default=0.5, gt=0, description="Wait before the first restart; doubles with each")
    restart_max_s: float = Field(default=30.0, gt=0, description="Longest wait before a restart")
    restart_limit: int = Field(default=5, ge=0, description="Restarts in a row, without a stable run, before giving up")
    stable_after_s: float = Field(
        default=30.0, ge=0, description="Ready time after which earlier failures are forgotten"
    )

    @model_validator(mode="after")
    def _waits_are_ordered(self) -> Self:
        if self.restart_initial_s > self.restart_max_s:
            raise ValueError("--restart-initial-s must not exceed --restart-max-s")
        return self


class ServeSettings(DynamoSettings):
    """Whole stack on this machine."""

    component: ClassVar[str] = "serve"

    model: str = Field(
        default="", description="Model folder or name; also the first argument. Empty: the engine's own default"
    )
    http_host: str = Field(default="127.0.0.1", description="Address of the HTTP frontend")
    http_port: int = Field(default=8000, ge=0, le=65535, description="Port of the HTTP frontend; 0 for any")
    workers: int = Field(default=2, ge=1, le=64, description="Worker processes")
    engine: str = Field(default="reference", description="Engine plug-in of the workers")
    router: str = Field(default="kv", description="Router plug-in of the frontend")
    policy: str = Field(default="", description="Routing policy of that router; empty for its default")
    planner: bool = Field(default=False, description="Add a planner that scales the workers")
    in_process: bool = Field(default=False, description="Run everything in one process on mem:// planes")
    startup_timeout_s: float = Field(default=120.0, gt=0, description="Time until a model must be served")


def _process_discovery_url() -> str:
    # A shell in a pod or beside a deployment has what its processes have.
    return os.environ.get("DYN_RUNTIME_DISCOVERY") or default_discovery_url()


class OperatorSettings(DynamoSettings):
    """Commands for operators."""

    component: ClassVar[str] = "operator"

    namespace: str = Field(default="", description="Show only this namespace; all if empty")
    discovery: str = Field(
        default_factory=_process_discovery_url,
        description="Discovery plane to look at; without it that of DYN_RUNTIME_DISCOVERY",
    )
    request_plane: str = Field(
        default="", description="Request plane for calls; follows the instance's address if empty"
    )
    timeout_s: float = Field(default=30.0, gt=0, description="Deadline of a call")
    json_lines: bool = Field(default=False, description="Print JSON lines instead of columns")

    @field_validator("discovery", "request_plane")
    @classmethod
    def _has_scheme(cls, value: str) -> str:
        return _checked_url(value) if value else value


def _checked_url(value: str) -> str:
    if "://" not in value:
        raise ValueError("is no URL; give scheme://..., for example mem://")
    return value


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment with changes, for a child process."""
    return {**os.environ, **extra}


def process_environment() -> Mapping[str, str]:
    """Return this process's environment, for what a cluster tells its pods there."""
    return dict(os.environ)
