"""Options of the frontend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, SecretStr

from dynamo_core.settings import DynamoSettings
from dynamo_core.stability import deprecated
from dynamo_frontend._http.limits import HttpLimits
from dynamo_frontend._http.tls import ServerTls

_MIB = 1 << 20


class HttpSettings(DynamoSettings):
    """HTTP server."""

    component: ClassVar[str] = "frontend"

    http_host: str = Field(default="127.0.0.1", description="Address to listen on; 0.0.0.0 for every interface")
    http_port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one")
    http_backlog: int = Field(default=4096, ge=1, description="Connections that may wait to be accepted")
    body_limit_mb: int = Field(default=192, ge=1, description="Largest request body in MiB")
    head_timeout_s: float = Field(default=15.0, gt=0, description="Time for a request's head to arrive")
    body_timeout_s: float = Field(default=30.0, gt=0, description="Longest pause within a request's body")
    idle_timeout_s: float = Field(default=75.0, gt=0, description="Time a connection stays open between requests")
    write_timeout_s: float = Field(
        default=60.0, gt=0, description="Time after which a client that stops reading is cut"
    )

    tls_cert_path: str = Field(default="", description="Certificate with its chain, PEM; empty for plain HTTP")
    tls_key_path: str = Field(default="", description="Key of the certificate, PEM, without a passphrase")
    tls_client_ca_cert_path: str = Field(
        default="", description="Authorities of clients, PEM; with it each client must show a certificate of one"
    )
    api_keys_file: str = Field(
        default="", description="File of `dynamo-frontend keys`; with it every request needs a key. Empty for none"
    )

    def server_tls(self) -> ServerTls | None:
        """Return the server's certificate, if there is one.

        Raises:
            ConfigurationError: naming the file and what is wrong with it.
        """
        if not (self.tls_cert_path or self.tls_key_path or self.tls_client_ca_cert_path):
            return None
        return ServerTls(self.tls_cert_path, self.tls_key_path, self.tls_client_ca_cert_path)

    def http_limits(self) -> HttpLimits:
        """Return the limits of one connection."""
        return HttpLimits(
            body_bytes=self.body_limit_mb * _MIB,
            head_timeout_s=self.head_timeout_s,
            body_timeout_s=self.body_timeout_s,
            idle_timeout_s=self.idle_timeout_s,
            write_timeout_s=self.write_timeout_s,
        )


class FrontendSettings(HttpSettings):
    """OpenAI-compatible HTTP frontend."""

    renamed: ClassVar[Mapping[str, str]] = {
        "active_decode_blocks_threshold": "busy_kv_share",
        "active_prefill_tokens_threshold": "busy_prompt_tokens",
    }

    http_reuse_port: bool = Field(
        default=False, description="Share the port with other frontends of this machine, one process a core"
    )
    router: str = Field(default="kv", description="Router plug-in; round-robin needs nothing but dynamo-core")
    policy: str = Field(default="", description="Routing policy of that router; empty for its default")
    router_options: dict[str, Any] = Field(default_factory=dict, description="Further router options as a JSON object")
    migration_limit: int = Field(
        default=3, ge=0, le=16, description="Times a request may continue on another worker; 0 turns it off"
    )
    request_timeout_s: float | None = Field(
        default=None,
        gt=0,
        description="Most seconds of one generation, over all workers it takes; unset for no limit. The header "
        "x-dynamo-timeout-s asks for less",
    )
    tool_call_parser: str = Field(
        default="",
        description="Tool-call parser in place of the one the worker names or the template shows; `none` for no parser",
    )
    reasoning_parser: str = Field(
        default="",
        description="Reasoning parser in place of the one the worker names or the vocabulary shows; `none` for none",
    )
    tokenizer_cache_mb: int = Field(default=64, ge=0, description="Memory for cached tokenised text; 0 turns it off")
    tokenize_inline_chars: int = Field(
        default=8192, ge=0, description="Longer uncached text is tokenised on a thread, off the event loop"
    )
    max_concurrent_requests: int = Field(
        default=16384,
        ge=1,
        description="Generation requests in work at once; more get the overload status",
    )
    busy_kv_share: float | None = Field(
        default=None, gt=0, le=1, description="Share of a worker's KV blocks above which it is busy; unset: never"
    )
    busy_prompt_tokens: int | None = Field(
        default=None, ge=1, description="Uncomputed prompt tokens above which a worker is busy; unset: never"
    )
    overload_status: int = Field(default=529, ge=400, le=599, description="HTTP status when all workers are busy")
    sse_keep_alive_s: float = Field(
        default=0.0,
        ge=0,
        description="Silence after which a stream sends a comment; 0 for never. It commits status 200",
    )
    kserve_grpc_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="Port of the KServe v2 gRPC server on the HTTP host, 0 for a free one; unset: none. "
        "Needs the extra `kserve`",
    )
    media_urls: Literal["fetch", "pass", "refuse"] = Field(
        default="fetch",
        description="Images, audio and video by URL: `fetch` them (needs the extra `media`), `pass` the URL on to the "
        "worker, which then answers for where it leads, or `refuse` it",
    )
    media_limit_mb: int = Field(default=20, ge=1, description="Largest image, sound or film in MiB")
    media_items: int = Field(default=16, ge=0, description="Most images, sounds and films of one request")
    media_timeout_s: float = Field(default=10.0, gt=0, description="Time for one to be fetched, redirects included")
    media_allowed_hosts: list[str] = Field(
        default_factory=list, description="Hosts that media may be fetched from although their addresses are not public"
    )
    stream_resume: bool = Field(
        default=False,
        description="Let every stream be resumed after a lost connection, not only those whose request asks for it",
    )
    stream_grace_s: float = Field(
        default=15.0, gt=0, description="Time a resumable stream waits for its client, and is kept after its end"
    )
    stream_replay_kb: int = Field(default=1024, ge=1, description="Events kept of one resumable stream, in KiB")
    stream_replay_total_mb: int = Field(default=64, ge=1, description="Events kept of all resumable streams, in MiB")
    request_trace_file: str = Field(
        default="", description="File to which a JSON line is written for each request; empty for none"
    )
    request_trace_payloads: bool = Field(
        default=False, description="Write request bodies to the trace too: they hold what people wrote"
    )
    request_trace_roll_mb: int = Field(
        default=256, ge=1, description="Size in MiB at which the trace's file rolls over"
    )
    request_trace_files: int = Field(default=4, ge=1, description="Files of the trace that are kept")
    request_trace_capacity: int = Field(
        default=1024, ge=1, description="Lines that may wait to be written; more are dropped and counted"
    )
    traffic_interval_s: float = Field(default=5.0, gt=0, description="How often traffic statistics are published")

    @property
    @deprecated(since="0.2.0", removed_in="0.4.0", use="busy_kv_share")
    def active_decode_blocks_threshold(self) -> float | None:
        """The former name of ``busy_kv_share``."""
        return self.busy_kv_share

    @property
    @deprecated(since="0.2.0", removed_in="0.4.0", use="busy_prompt_tokens")
    def active_prefill_tokens_threshold(self) -> int | None:
        """The former name of ``busy_prompt_tokens``."""
        return self.busy_prompt_tokens


class GatewaySettings(HttpSettings):
    """Gateway before OpenAI-compatible engines."""

    upstream: list[str] = Field(description="Base URL of an engine, http://host:port; may be given several times")
    upstream_ca_path: str = Field(
        default="", description="Authorities of engines behind https, PEM; empty for the system's"
    )
    upstream_api_key: SecretStr = Field(
        default=SecretStr(""), description="Key sent to the engines in place of the caller's; empty passes that on"
    )
    kv_events: list[str] = Field(
        default_factory=list,
        description="Where each engine publishes its KV events, tcp://host:port, in the order of --upstream; with it "
        "requests go to the engine that holds their prefix, by a router plug-in (pip install dynamo-router)",
    )
    kv_events_replay: list[str] = Field(
        default_factory=list, description="Replay socket of each engine, tcp://host:port, in the order of --upstream"
    )
    kv_dialect: str = Field(default="", description="Form of the events, vllm or sglang; empty reads both")
    kv_topic: str = Field(default="", description="Topic of the events; empty for all")
    kv_dp_size: int = Field(default=1, ge=1, le=1024, description="Data-parallel ranks of each engine")
    kv_block_size: int = Field(default=16, ge=1, description="Tokens of a KV block of the engines")
    tokenizer: str = Field(
        default="", description="Folder of the model's tokenizer and template; empty asks the engine's /tokenize"
    )
    router: str = Field(default="kv", description="Router plug-in that --kv-events uses")
    policy: str = Field(default="", description="Routing policy of that router; empty for its default")
    router_options: dict[str, Any] = Field(default_factory=dict, description="Further router options as a JSON object")
    workers: int = Field(default=1, ge=1, le=256, description="Processes that share the port")
    worker_index: int = Field(default=-1, ge=-1, description="Which of the workers this is; set by --workers")
    worker_folder: str = Field(default="", description="Where the workers meet; set by --workers")
    retry_limit: int = Field(default=2, ge=0, le=16, description="Further engines tried before the first byte")
    probe_interval_s: float = Field(default=5.0, gt=0, description="How often engines are asked for their models")
    drain_timeout_s: float = Field(default=30.0, ge=0, description="Time for running replies at the end")


class ChatSettings(DynamoSettings):
    """Chat in the terminal."""

    component: ClassVar[str] = "chat"

    base_url: str = Field(default="http://127.0.0.1:8000", description="Server to talk to, http://host:port")
    model: str = Field(default="", description="Model to talk to; empty for the server's first")
    api_key: SecretStr = Field(default=SecretStr(""), description="Key to send; better given as a variable")
    system: str = Field(default="", description="What the model is told first")
    max_tokens: int | None = Field(default=None, ge=1, description="Longest answer, in tokens; unset for no limit")
    temperature: float | None = Field(default=None, ge=0, le=2, description="Unset for the model's default")
