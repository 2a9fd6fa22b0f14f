"""The door: who a request is from, whether that caller may come in now, and what it has used."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import structlog

from dynamo_core.clock import Clock
from dynamo_core.errors import ConfigurationError, RateLimitedError, UnauthenticatedError
from dynamo_core.telemetry import Metrics
from dynamo_frontend._access.buckets import RateBucket
from dynamo_frontend._access.keys import ApiKey, KeyRing, KeyTable, read_keys
from dynamo_frontend._http.request import HttpRequest
from dynamo_frontend._metrics import AccessMetrics
from dynamo_frontend._settings import HttpSettings

_log = structlog.get_logger(__name__)
RELOAD_EVERY_S = 1.0


class Caller:
    """One key's standing while the process runs.

    Args:
        key: Its record.
        cache_salt: What separates its tenant's cached blocks.
        clock: Time.
        share: Part of the limits that this process may grant: others share its port.
    """

    def __init__(self, key: ApiKey, cache_salt: str, clock: Clock, share: float) -> None:
        self.key = key
        self.cache_salt = cache_salt
        self._requests = _bucket(key.requests_per_minute, clock, share)
        self._tokens = _bucket(key.tokens_per_minute, clock, share)

    @property
    def key_id(self) -> str:
        """Public name of the key."""
        return self.key.key_id

    @property
    def counts_tokens(self) -> bool:
        """Whether its tokens are limited."""
        return self._tokens is not None

    def enter(self) -> None:
        """Count a request.

        Raises:
            RateLimitedError: if the key's requests of this minute are used up.
        """
        if self._requests is not None and (wait_s := self._requests.take(1)):
            raise _limited("requests", self.key, wait_s)

    def reserve(self, tokens: int) -> None:
        """Set tokens aside for a request.

        Raises:
            RateLimitedError: if so many are not left in this minute.
        """
        if self._tokens is not None and (wait_s := self._tokens.take(tokens)):
            raise _limited("tokens", self.key, wait_s)

    def settle(self, reserved: int, used: int) -> None:
        """Replace reserved tokens by those that were used."""
        if self._tokens is not None:
            self._tokens.settle(reserved, used)

    def headers(self) -> dict[str, str]:
        """Return the headers that show the limits."""
        found: dict[str, str] = {}
        for name, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                found[f"x-ratelimit-limit-{name}"] = str(int(bucket.per_minute))
                found[f"x-ratelimit-remaining-{name}"] = str(bucket.remaining)
                found[f"x-ratelimit-reset-{name}"] = f"{bucket.full_in_s:.3f}s"
        return found


class Access:
    """Knows callers by the keys of a file, and reads the file again when it changes.

    Args:
        path: Key file.
        clock: Time.
        metrics: Counts who is turned away.
        share: Part of each limit that this process may grant.
    """

    def __init__(self, path: Path, clock: Clock, metrics: AccessMetrics, *, share: float = 1.0) -> None:
        self._metrics = metrics
        self._path = path
        self._clock = clock
        self._share = share
        self._stamp = (0, 0, 0)
        self._ring = KeyRing(KeyTable(""))
        self._callers: dict[str, Caller] = {}

    def load(self) -> None:
        """Read the file for the first time.

        Raises:
            ConfigurationError: if it cannot be read.
        """
        self._stamp = _stamp(self._path)
        self._ring = KeyRing(read_keys(self._path))

    def admit(self, request: HttpRequest) -> Caller:
        """Return the caller of a request, and put its tenant's cache salt in place of any the request names.

        Raises:
            UnauthenticatedError: if the request has no valid key.
            RateLimitedError: if the key's requests of this minute are used up.
        """
        headers = request.headers
        kind, _, bearer = headers.pop("authorization", "").partition(" ")
        text = bearer.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
        headers.pop("x-api-key", None)
        key = self._ring.find(text)
        if key is None:
            self._metrics.denied("invalid_api_key")
            raise UnauthenticatedError(
                "The request has no valid API key; send one as 'authorization: Bearer KEY'.",
                reason="invalid_api_key",
            )
        caller = self._callers.get(key.key_id)
        if caller is None:
            caller = Caller(key, self._ring.cache_salt(key), self._clock, self._share)
            self._callers[key.key_id] = caller
        headers["x-tenant-id"] = caller.cache_salt
        request.caller = caller
        try:
            caller.enter()
        except RateLimitedError:
            self._metrics.denied("requests_per_minute")
            raise
        return caller

    async def watch(self) -> None:
        """Read the file again whenever it changes, until cancelled. A damaged file leaves the old keys in place."""
        while True:
            await self._clock.sleep(RELOAD_EVERY_S)
            await self.reload()

    async def reload(self) -> None:
        """Read the file again if it has changed."""
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            table = await asyncio.to_thread(read_keys, self._path)
        except ConfigurationError as error:
            _log.error("the old API keys stay in place", reason=error.message)
            return
        self._ring = KeyRing(table)
        same = {key.key_id: key for key in table.keys}
        # Who is unchanged keeps what it has used.
        self._callers = {name: found for name, found in self._callers.items() if same.get(name) == found.key}
        _log.info("API keys read", keys=len(table.keys))


def open_door(settings: HttpSettings, clock: Clock, metrics: Metrics, *, share: float = 1.0) -> Access | None:
    """Return the door that the settings ask for; None if everyone may come in. No I/O."""
    if not settings.api_keys_file:
        return None
    return Access(Path(settings.api_keys_file), clock, AccessMetrics(metrics), share=share)


def _bucket(per_minute: int, clock: Clock, share: float) -> RateBucket | None:
    return RateBucket(max(1.0, per_minute * share), clock) if per_minute else None


def _limited(what: str, key: ApiKey, wait_s: float) -> RateLimitedError:
    limit = key.requests_per_minute if what == "requests" else key.tokens_per_minute
    return RateLimitedError(
        f"This key may use {limit} {what} a minute, and they are used up; try again in {wait_s:.1f} s.",
        reason="rate_limit_exceeded",
        retry_after_s=wait_s,
    )


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return (0, 0, 0)
    return (found.st_mtime_ns, found.st_size, found.st_ino)
