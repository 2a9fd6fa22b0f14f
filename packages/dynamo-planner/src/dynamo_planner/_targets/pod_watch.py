"""The pods of one role, followed by a watch.

A watch costs the API server nothing while nothing changes, where a list of all pods every few seconds does. It is not
trusted blindly: whenever it has ended in a way that could have lost a change, and once in a while anyway, the pods are
listed anew. Nothing retries by itself: whoever asks for the pods next lists them, and follows again from there.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Protocol

import msgspec
import structlog

from dynamo_core.clock import Clock
from dynamo_core.errors import BackendProtocolError, DynamoError, PermissionDeniedError
from dynamo_planner._targets.pods import Pod

MAX_EVENT_BYTES = 4 * 1024 * 1024
"""No object in a cluster is larger than its store allows, which is less than half of this."""

_log = structlog.get_logger(__name__)


class PodCalls(Protocol):
    """Calls to the API server, whose errors are typed."""

    async def list_pods(self, selector: str) -> tuple[Sequence[Pod], str]:
        """Return the pods that a selector finds, and the version they are of."""
        ...

    def follow_pods(self, selector: str, version: str) -> contextlib.AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Open a watch of the changes after a version; what it yields are parts of lines."""
        ...


class PodWatch:
    """Follows the pods of one selector.

    Args:
        calls: The API server.
        selector: Label selector.
        clock: Time.
        resync_s: Seconds after which the pods are listed anew although the watch stands.
    """

    def __init__(self, calls: PodCalls, selector: str, clock: Clock, resync_s: float) -> None:
        self.selector = selector
        self._calls = calls
        self._clock = clock
        self._resync_s = resync_s
        self._pods: dict[str, Pod] = {}
        self._version = ""
        self._listed_s = 0.0
        self._allowed = True
        self._task: asyncio.Task[None] | None = None

    @property
    def following(self) -> bool:
        """Whether what is known is kept up to date."""
        return self._task is not None and not self._task.done()

    async def pods(self) -> Sequence[Pod]:
        """Return the pods as they are now.

        Raises:
            DynamoError: if they have to be listed and cannot be.
        """
        if not self.following or self._clock.monotonic() - self._listed_s >= self._resync_s:
            await self.close()
            found, self._version = await self._calls.list_pods(self.selector)
            self._pods = {pod["metadata"]["name"]: pod for pod in found}
            self._listed_s = self._clock.monotonic()
            if self._allowed:
                self._task = asyncio.create_task(self._follow(), name="planner-pods")
        return list(self._pods.values())

    async def close(self) -> None:
        """Stop following. Idempotent."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _follow(self) -> None:
        """Take changes until one may have been lost."""
        try:
            # The server ends a watch after its time; the next one goes on where it was, unless it brought nothing.
            while await self._one_watch():
                pass
        except PermissionDeniedError as error:
            self._allowed = False
            _log.warning("pods are listed every time; allow the planner's account to watch them", error=error.message)
        except DynamoError as error:
            _log.info("watch of pods ended; they are listed anew", error=error.message)

    async def _one_watch(self) -> bool:
        """Follow one watch to its end; return whether another may go on from there."""
        told = False
        async with self._calls.follow_pods(self.selector, self._version) as parts:
            async for line in _lines(parts):
                event = _decoded(line)
                if not self._take(event.get("type"), event.get("object") or {}):
                    return False
                told = True
        return told

    def _take(self, kind: Any, found: Pod) -> bool:
        """Apply one event; return whether it can be: an error, such as a version too old, cannot."""
        metadata = found.get("metadata") or {}
        version, name = metadata.get("resourceVersion"), metadata.get("name", "")
        if kind not in ("ADDED", "MODIFIED", "DELETED", "BOOKMARK") or not version:
            return False
        if kind == "DELETED":
            self._pods.pop(name, None)
        elif kind != "BOOKMARK":
            self._pods[name] = found
        self._version = version
        return True


def _decoded(text: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise BackendProtocolError(f"the server is no Kubernetes API: {error}") from error


async def _lines(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield whole lines; one that is half there at the end was cut off and is left to the next list."""
    rest = b""
    async for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.strip():
                yield line
        if len(rest) > MAX_EVENT_BYTES:
            return


Called = Callable[[str, Callable[[], Awaitable[Any]]], Awaitable[Any]]
"""Runs a call that is named for its errors, and translates what it raises."""

Refusal = Callable[[str, int, str], Exception]
"""Returns the error of what was refused, with which status and why."""


class LibraryPods:
    """The calls through kubernetes-asyncio.

    Args:
        api: Its ``CoreV1Api``.
        namespace: Namespace of the pods.
        called: Runs a call with typed errors.
        refusal: Makes the error of an answer.
        timeout_s: Limit of a list, and of the start of a watch.
        watch_s: Seconds after which the server is asked to end a watch.
    """

    def __init__(
        self, api: Any, namespace: str, called: Called, refusal: Refusal, *, timeout_s: float, watch_s: float
    ) -> None:
        self._api = api
        self._namespace = namespace
        self._called = called
        self._refusal = refusal
        self._timeout_s = timeout_s
        self._watch_s = watch_s

    async def list_pods(self, selector: str) -> tuple[Sequence[Pod], str]:
        """Return the pods that a selector finds, and the version they are of."""
        what = f"pods of {selector}"

        async def listed() -> bytes:
            async with await self._opened(what, label_selector=selector, _request_timeout=self._timeout_s) as response:
                return await response.read()

        found = _decoded(await self._called(what, listed))
        return found.get("items") or [], (found.get("metadata") or {}).get("resourceVersion", "")

    @contextlib.asynccontextmanager
    async def follow_pods(self, selector: str, version: str) -> AsyncGenerator[AsyncIterator[bytes], None]:
        """Open a watch of the changes after a version."""
        what = f"watch of pods of {selector}"

        def opened() -> Awaitable[Any]:
            return self._opened(
                what,
                label_selector=selector,
                resource_version=version,
                watch=True,
                allow_watch_bookmarks=True,
                timeout_seconds=int(self._watch_s),
                # A server that says nothing for longer than a watch lasts is gone.
                _request_timeout=(self._timeout_s, self._watch_s + self._timeout_s),
            )

        async with await self._called(what, opened) as response:
            yield self._parts(what, response)

    async def _opened(self, what: str, **options: Any) -> Any:
        response = await self._api.list_namespaced_pod(self._namespace, _preload_content=False, **options)
        if response.status >= 300:
            response.release()
            raise self._refusal(what, response.status, response.reason or "")
        return response

    async def _parts(self, what: str, response: Any) -> AsyncIterator[bytes]:
        chunks = response.content.iter_any().__aiter__()
        while True:
            part = await self._called(what, lambda: anext(chunks, None))
            if part is None:
                return
            yield part
