"""Options of ``dynamo worker``; flags this class does not know belong to the engine."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from dynamo_core.settings import DynamoSettings

_NEEDS: dict[str, tuple[str, str]] = {
    "kv_event_ring_events": ("kv_events", "--kv-events"),
    "kv_index_blocks": ("kv_events", "--kv-events"),
    "kv_connector_options": ("kv_connector", "--kv-connector NAME"),
    "encode_component": ("remote_encode", "--remote-encode"),
    "encode_timeout_s": ("remote_encode", "--remote-encode"),
    "local_encode": ("remote_encode", "--remote-encode"),
    "request_queue_timeout_ms": ("request_queue_limit", "--request-queue-limit COUNT"),
}
"""Options that have an effect only if another one is set: name, and how to set it."""


_ROLES: dict[str, tuple[str, ...]] = {
    "remote_encode": ("agg", "prefill", "decode"),
    "prefill_component": ("decode",),
    "remote_prefill_threshold_tokens": ("decode",),
    "prefill_timeout_s": ("decode",),
    "local_prefill": ("decode",),
    "kv_handoff": ("decode",),
    "kv_lease_s": ("prefill",),
    "kv_transfer_timeout_s": ("prefill", "decode"),
    "kv_shared_memory": ("prefill", "decode"),
    "kv_nixl": ("prefill", "decode"),
}
"""Options that have an effect in some roles only."""


class WorkerSettings(DynamoSettings):
    """Engine host: what to run, how to register it, and the limits around it."""

    component: ClassVar[str] = "worker"

    engine: str = Field(default="reference", min_length=1, description="engine plug-in to host")
    num_workers: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="workers that this process plays, each with an engine, an instance id and events of its own",
    )
    role: Literal["agg", "prefill", "decode", "encode"] = Field(
        default="agg", description="part in serving a model: agg, prefill, decode or encode"
    )
    worker_component: str = Field(
        default="",
        pattern=r"^[A-Za-z0-9_-]{0,128}$",
        description="component part of the endpoint; the role's name for prefill and encode, else backend, if empty",
    )
    worker_endpoint: str = Field(
        default="generate",
        pattern=r"^[A-Za-z0-9_-]{1,128}$",
        description="last part of the endpoint",
    )
    served_model_name: str = Field(default="", description="model name clients use; the engine's own if empty")
    model_aliases: list[str] = Field(default_factory=list[str], description="further names under which it is served")
    lease_ttl_s: float = Field(
        default=10.0, gt=0, le=3600, description="seconds a dead worker stays in discovery at most"
    )
    engine_request_limit: int | None = Field(
        default=None, ge=1, description="requests inside the engine at once; 1.5 x max_num_seqs x dp size if unset"
    )
    request_queue_limit: int = Field(
        default=1024, ge=0, description="requests that may wait for the engine; 0 refuses at once"
    )
    request_queue_timeout_ms: float = Field(
        default=5000.0, gt=0, description="milliseconds a request waits before refusal"
    )
    response_buffer_bytes: int = Field(
        default=1 << 20, ge=1024, description="output held per request for a reader that does not keep up"
    )
    stall_timeout_s: float = Field(
        default=120.0,
        ge=0,
        description="seconds without output until a request fails and the engine is probed; 0 never",
    )
    cancel_timeout_s: float = Field(default=5.0, gt=0, description="seconds the engine gets to end a cancelled request")
    kv_events: bool = Field(default=True, description="publish KV cache events and answer queries for them")
    kv_event_ring_events: int = Field(
        default=16384, ge=16, description="KV events kept per dp rank to fill gaps of readers"
    )
    kv_index_blocks: int = Field(default=1 << 20, ge=1, description="blocks per dp rank that are advertised at most")
    load_interval_s: float = Field(default=0.1, gt=0, le=60, description="least seconds between two load reports")
    load_heartbeat_s: float = Field(default=1.0, gt=0, le=60, description="most seconds between two load reports")
    kv_connector: str = Field(default="", description="block manager plug-in behind the engine; empty for none")
    kv_connector_options: dict[str, Any] = Field(
        default_factory=dict[str, Any], description="options of the block manager, as JSON"
    )
    prefill_component: str = Field(
        default="prefill",
        pattern=r"^[A-Za-z0-9_-]{1,128}$",
        description="component of the prefill workers that a decode worker asks",
    )
    remote_prefill_threshold_tokens: int | None = Field(
        default=None,
        ge=0,
        description="uncached prompt tokens from which a decode worker asks a prefill worker itself; never if unset",
    )
    prefill_timeout_s: float = Field(
        default=30.0, gt=0, description="seconds a decode worker waits for a prompt from elsewhere, transfer included"
    )
    local_prefill: bool = Field(
        default=True, description="compute the prompt on the decode worker if it cannot come from elsewhere"
    )
    remote_encode: bool = Field(default=False, description="have encode workers turn media into tensors")
    encode_component: str = Field(
        default="encode",
        pattern=r"^[A-Za-z0-9_-]{1,128}$",
        description="component of the encode workers that a worker asks",
    )
    encode_timeout_s: float = Field(default=10.0, gt=0, description="seconds a worker waits for encoded media")
    local_encode: bool = Field(default=True, description="encode media on the worker if no encode worker does")
    kv_handoff: Literal["pull", "bootstrap"] = Field(
        default="pull",
        description="fetch a prompt's blocks after a prefill worker has computed it (pull), or meanwhile (bootstrap)",
    )
    kv_lease_s: float = Field(
        default=30.0, gt=0, le=3600, description="seconds a prefill worker keeps a prompt's blocks for a decode worker"
    )
    kv_transfer_timeout_s: float = Field(default=10.0, gt=0, description="seconds a transfer of one prompt may take")
    kv_shared_memory: bool = Field(
        default=True, description="move KV through shared memory between workers of one host"
    )
    kv_nixl: bool = Field(
        default=False, description="move KV through NIXL to workers that have it too; NIXL must be installed"
    )
    tool_call_parser: str = Field(default="", description="parser of tool calls that frontends use for this model")
    reasoning_parser: str = Field(default="", description="parser of reasoning that frontends use for this model")
    canary_idle_s: float = Field(
        default=10.0, ge=0, description="seconds without traffic after which a probe is sent; 0 never"
    )
    probe_timeout_s: float = Field(default=3.0, gt=0, description="seconds in which a probe must be answered")

    @property
    def component_name(self) -> str:
        """Component part of the endpoint."""
        return self.worker_component or (self.role if self.role in ("prefill", "encode") else "backend")

    @model_validator(mode="after")
    def _refuse_ignored_options(self) -> Self:
        for name, (owner, remedy) in _NEEDS.items():
            if name in self.model_fields_set and not getattr(self, owner):
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} has no effect here; give {remedy} too, or leave {flag} out")
        for name, roles in _ROLES.items():
            if name in self.model_fields_set and self.role not in roles:
                flag = "--" + name.replace("_", "-")
                raise ValueError(
                    f"{flag} has no effect in role {self.role}; use --role {' or '.join(roles)}, or leave it out"
                )
        if self.load_heartbeat_s < self.load_interval_s:
            raise ValueError(
                f"--load-heartbeat-s {self.load_heartbeat_s} is less than --load-interval-s {self.load_interval_s}; "
                "raise the first or lower the second"
            )
        return self
