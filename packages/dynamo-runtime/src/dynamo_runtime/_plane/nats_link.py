"""One connection to NATS: how a URL becomes it, what it says when it is lost, and an ordered way to publish."""

from __future__ import annotations

import asyncio
import contextlib
import urllib.parse
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import msgspec
import nats.errors
import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.aio.transport import TcpTransport

from dynamo_core.clock import Clock
from dynamo_core.errors import ConfigurationError, UnavailableError
from dynamo_runtime._options import checked_options, merged_options, require_above_zero
from dynamo_runtime._plane.timers import cancelled_within, result_within, wait_within
from dynamo_runtime._tls import TlsFiles

if TYPE_CHECKING:
    from dynamo_core.telemetry import Metrics

logger = structlog.get_logger(__name__)

DEFAULT_PORT = 4222
HIGH_WATER_BYTES = 8 << 20
"""Bytes that wait for NATS before whoever publishes is asked to pause."""

LOW_WATER_BYTES = 1 << 20
CLOSE_TIMEOUT_S = 2.0
"""Time that each step of closing gets: a server that has been stopped takes nothing and says nothing."""

_PENDING_MESSAGES = 65536
_PENDING_BYTES = 64 << 20

Handler = Callable[[Msg], Awaitable[None]]


class NatsOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Times, credentials and trust of one connection; the rest of a URL's options are the plane's or the bus's own.

    Attributes:
        username: User; the URL may give it too.
        password: Password; the URL may give it too.
        token: Token, in place of a user.
        credentials_file: File of a user's JWT and key.
        tls_ca: Certificates of trusted authorities, PEM; given, TLS is used.
        tls_cert: Own certificate, PEM.
        tls_key: Key of ``tls_cert``.
        tls_server_name: Name the servers' certificates must have, if it is not the one dialled.
        startup_timeout_s: How long ``start`` tries to reach a server.
        reconnect_interval_s: Pause between attempts to come back.
        ping_interval_s: Silence after which NATS is asked for a sign of life; the second missing one is a loss.
    """

    username: str = ""
    password: str = ""
    token: str = ""
    credentials_file: str = ""
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    tls_server_name: str = ""
    startup_timeout_s: float = 120.0
    reconnect_interval_s: float = 0.25
    ping_interval_s: float = 5.0

    def __post_init__(self) -> None:
        require_above_zero(self, ("startup_timeout_s", "reconnect_interval_s", "ping_interval_s"))
        self.files.check()

    @property
    def files(self) -> TlsFiles:
        """The TLS files."""
        return TlsFiles(self.tls_ca, self.tls_cert, self.tls_key, self.tls_server_name)


class NatsTarget(msgspec.Struct, frozen=True):
    """Servers and how to talk to them."""

    servers: tuple[str, ...]
    options: NatsOptions


def nats_target(url: str, options: Mapping[str, object]) -> tuple[NatsTarget, dict[str, object], Metrics | None]:
    """Read ``nats://[user:password@]host[:port][,host...][?option=value]``; return what is not the connection's too.

    Raises:
        ConfigurationError: if the URL names no server, or an option of the connection is out of range.
    """
    parts = urllib.parse.urlsplit(url)
    credentials, _, hosts = parts.netloc.rpartition("@")
    if parts.scheme != "nats" or not hosts or not all(hosts.split(",")):
        raise ConfigurationError("a NATS URL must be nats://host:port[,host:port]")
    user, _, password = credentials.partition(":")
    fields, metrics = merged_options(url, options)
    if user:
        given = {"username": urllib.parse.unquote(user), "password": urllib.parse.unquote(password)}
        fields = {**fields, **given, **{name: options[name] for name in given if name in options}}
    own = {name: fields.pop(name) for name in NatsOptions.__struct_fields__ if name in fields}
    parsed = checked_options(NatsOptions, own, f"NATS at {hosts}")
    scheme = "tls" if parsed.files.on else "nats"
    servers = tuple(f"{scheme}://{host if ':' in host else f'{host}:{DEFAULT_PORT}'}" for host in hosts.split(","))
    return NatsTarget(servers, parsed), fields, metrics


class _AbortableTransport(TcpTransport):
    def abort(self) -> None:
        if self._io_writer is not None:
            self._io_writer.transport.abort()


class AbortableClient(Client):
    """A client whose connection can be dropped with what cannot be sent; its own ``close`` waits for that."""

    def __init__(self) -> None:
        super().__init__()
        self._abortable = _AbortableTransport()
        self._transport = self._abortable

    def abort(self) -> None:
        """Drop the connection at once."""
        self._abortable.abort()


class NatsLink:
    """A connection that comes back by itself.

    Args:
        target: Servers and options.
        clock: Time.
        on_lost: Called when the connection is lost: what was on its way may be gone.
        on_back: Called when it is there again, subscriptions included.
    """

    def __init__(
        self, target: NatsTarget, clock: Clock, on_lost: Callable[[], None], on_back: Callable[[], None]
    ) -> None:
        self._target = target
        self._clock = clock
        self._on_lost = on_lost
        self._on_back = on_back
        self._client = AbortableClient()
        self._out: deque[tuple[str, bytes, str]] = deque()
        self._out_bytes = 0
        self._due = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._drained: list[Callable[[], None]] = []
        self._pump: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        """Whether a server is there now."""
        return bool(self._client.is_connected)

    @property
    def place(self) -> str:
        """Host and port of the first server."""
        return self._target.servers[0].partition("://")[2]

    @property
    def max_payload_bytes(self) -> int:
        """Largest message that the server takes."""
        return int(self._client.max_payload)

    async def start(self) -> None:
        """Connect.

        Raises:
            UnavailableError: if no server can be reached within the start-up limit, or none takes the credentials.
        """
        options = self._target.options
        secure: dict[str, Any] = {}
        if options.files.on:
            secure = {"tls": options.files.client_context(), "tls_hostname": options.tls_server_name or None}
        connecting = self._client.connect(
            list(self._target.servers),
            error_cb=self._note,
            disconnected_cb=self._lost,
            reconnected_cb=self._back,
            max_reconnect_attempts=-1,
            reconnect_time_wait=cast("int", options.reconnect_interval_s),
            ping_interval=cast("int", options.ping_interval_s),
            user=options.username or None,
            password=options.password or None,
            token=options.token or None,
            user_credentials=options.credentials_file or None,
            **secure,
        )
        try:
            await result_within(self._clock, options.startup_timeout_s, connecting)
        except (nats.errors.Error, OSError, TimeoutError) as error:
            await self._client.close()
            raise UnavailableError(
                f"NATS at {', '.join(self._target.servers)} cannot be reached: {error}",
                reason="transport.cannot_connect",
            ) from error
        self._pump = asyncio.get_running_loop().create_task(self._publish_all(), name="nats-publish")

    async def close(self) -> None:
        """Send what is due and disconnect, within a few seconds also if the server takes nothing. Idempotent."""
        if self._pump is None:
            return
        pump, self._pump = self._pump, None
        if self.connected:
            await wait_within(self._clock, CLOSE_TIMEOUT_S, self._empty.wait())
        await cancelled_within(self._clock, CLOSE_TIMEOUT_S, [pump])
        if not await wait_within(self._clock, CLOSE_TIMEOUT_S, self._disconnect()):
            self._client.abort()
            logger.warning("nats.connection_aborted", server=self.place)

    async def _disconnect(self) -> None:
        with contextlib.suppress(nats.errors.Error):
            await self._client.close()

    async def subscribe(self, subject: str, handler: Handler) -> Subscription:
        """Hand messages of a subject to a handler, in order."""
        return await self._client.subscribe(
            subject, cb=handler, pending_msgs_limit=_PENDING_MESSAGES, pending_bytes_limit=_PENDING_BYTES
        )

    async def unsubscribe(self, subscription: Subscription) -> None:
        """End a subscription, whatever the state of the connection."""
        with contextlib.suppress(nats.errors.Error):
            await subscription.unsubscribe()

    async def settle(self) -> None:
        """Return once the server has seen everything that was asked of it so far.

        Raises:
            UnavailableError: if it does not answer.
        """
        try:
            # The client writes a flush's ping ahead of commands that wait in its buffer; the second one is behind them.
            await self._client.flush()
            await self._client.flush()
        except (nats.errors.Error, TimeoutError) as error:
            raise UnavailableError(f"NATS does not answer: {error}", reason="transport.disconnected") from error

    async def request(self, subject: str, payload: bytes, timeout_s: float) -> bytes:
        """Return the answer to a message.

        Raises:
            UnavailableError: if nobody listens or answers in time.
        """
        try:
            answer = await self._client.request(subject, payload, timeout=timeout_s)
        except (nats.errors.Error, TimeoutError) as error:
            raise UnavailableError(
                "The worker cannot be reached over NATS.",
                reason="transport.cannot_connect",
                diagnostic=f"{subject}: {type(error).__name__}: {error}",
            ) from error
        return answer.data

    def publish(self, subject: str, payload: bytes, reply: str = "") -> bool:
        """Queue a message; messages leave in order. Return whether the queue is still short."""
        self._out.append((subject, payload, reply))
        self._out_bytes += len(payload)
        self._due.set()
        self._empty.clear()
        return self._out_bytes < HIGH_WATER_BYTES

    def when_drained(self, callback: Callable[[], None]) -> None:
        """Call back once when the queue is short again."""
        self._drained.append(callback)

    async def _publish_all(self) -> None:
        while True:
            await self._due.wait()
            self._due.clear()
            while self._out:
                subject, payload, reply = self._out.popleft()
                self._out_bytes -= len(payload)
                # While the server is away little is kept; what is dropped shows as a gap at the other end.
                with contextlib.suppress(nats.errors.Error):
                    await self._client.publish(subject, payload, reply)
                _end_if_cancelled()
                if self._drained and self._out_bytes <= LOW_WATER_BYTES:
                    drained, self._drained = self._drained, []
                    for callback in drained:
                        callback()
            self._empty.set()

    async def _note(self, error: Exception) -> None:
        logger.warning("nats.error", error=f"{type(error).__name__}: {error}")

    async def _lost(self) -> None:
        if self._pump is not None:
            logger.warning("nats.disconnected", servers=list(self._target.servers))
            self._on_lost()

    async def _back(self) -> None:
        logger.info("nats.reconnected", servers=list(self._target.servers))
        self._on_back()


def _end_if_cancelled() -> None:
    """Raise the cancellation that the client swallows while it waits for room in its queue of flushes."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
