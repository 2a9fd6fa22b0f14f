"""HTTP to the server: questions at start, completion streams, and errors in our terms."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import msgspec

from dynamo_core.clock import Clock
from dynamo_core.errors import (
    BackendProtocolError,
    CapacityExhaustedError,
    ConfigurationError,
    DynamoError,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    UnavailableError,
)
from dynamo_worker._openai_http._settings import OpenAIHttpSettings
from dynamo_worker._openai_http._wire import MODEL_LIST, Completion, ServedModel, SseDecoder, decode_completion

_DONE = b"[DONE]"
_POLL_S = 0.5
_MAX_ERROR_CHARS = 500
_JSON = {"content-type": "application/json"}


class ServerClient:
    """Connections to one server.

    Args:
        settings: Where it is.
        clock: Time.
    """

    def __init__(self, settings: OpenAIHttpSettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        key = settings.api_key.get_secret_value()
        self._session = aiohttp.ClientSession(
            base_url=settings.url.rstrip("/") + "/",
            headers={"authorization": f"Bearer {key}"} if key else {},
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=settings.connect_timeout_s),
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def wait_for_model(self) -> ServedModel:
        """Wait until the server lists the model, and return its entry.

        Raises:
            ConfigurationError: if it lists others but not this one.
            UnavailableError: if it does not come up in time.
        """
        deadline = self._clock.monotonic() + self._settings.startup_timeout_s
        problem = "it lists no model"
        while self._clock.monotonic() < deadline:
            try:
                models = await self.models()
            except UnavailableError as error:
                problem = error.message
            else:
                if models:
                    return self._choose(models)
            await self._clock.sleep(_POLL_S)
        raise UnavailableError(
            f"the server at {self._settings.url} did not come up within {self._settings.startup_timeout_s} s: {problem}"
        )

    async def models(self) -> list[ServedModel]:
        """Return what ``/v1/models`` lists.

        Raises:
            UnavailableError: if the server cannot be asked, or is not ready.
        """
        try:
            async with self._session.get("v1/models") as response:
                body = await response.read()
                if response.status != 200:
                    raise UnavailableError(f"/v1/models answered with status {response.status}")
                return MODEL_LIST.decode(body).data
        except (aiohttp.ClientError, TimeoutError) as error:
            raise UnavailableError(f"it cannot be reached: {error}", reason="backend.cannot_connect") from error
        except msgspec.MsgspecError as error:
            raise UnavailableError(f"/v1/models cannot be read: {error}") from error

    async def try_completion(self, body: dict[str, Any]) -> Completion | None:
        """Return a whole completion; None if the server refuses the body."""
        try:
            async with self._session.post("v1/completions", data=msgspec.json.encode(body), headers=_JSON) as response:
                answer = await response.read()
                return decode_completion(answer) if response.status == 200 else None
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _lost(error) from error
        except BackendProtocolError:
            return None

    async def metrics(self) -> str:
        """Return the Prometheus text of the server; empty if it has none."""
        try:
            async with self._session.get("metrics") as response:
                return await response.text() if response.status == 200 else ""
        except (aiohttp.ClientError, TimeoutError, UnicodeDecodeError):
            return ""

    async def stream(self, body: bytes, headers: dict[str, str]) -> AsyncIterator[Completion]:
        """Yield the events of a completion; closing it closes the connection, which aborts the request there.

        Raises:
            DynamoError: typed by what the server answered, or by how the connection ended.
        """
        try:
            async with self._session.post("v1/completions", data=body, headers={**_JSON, **headers}) as response:
                if response.status != 200:
                    raise _refusal(response.status, await response.text(errors="replace"))
                async for event in _events(response):
                    yield event
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _lost(error) from error

    def _choose(self, models: list[ServedModel]) -> ServedModel:
        wanted = self._settings.remote_model
        for model in models:
            if not wanted or model.id == wanted:
                return model
        raise ConfigurationError(
            f"option --remote-model has the value {wanted!r}; the server at {self._settings.url} "
            f"has {', '.join(model.id for model in models)}"
        )


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[Completion]:
    decoder = SseDecoder()
    async for piece in response.content.iter_any():
        for data in decoder.feed(piece):
            if data == _DONE:
                return
            event = decode_completion(data)
            if event.error:
                raise InternalError(
                    "The server failed on this request.", reason="backend.unknown", diagnostic=str(event.error)
                )
            yield event


def _lost(error: Exception) -> UnavailableError:
    connected = not isinstance(error, aiohttp.ClientConnectorError | TimeoutError)
    reason = "backend.disconnected" if connected else "backend.cannot_connect"
    return UnavailableError("The connection to the engine's server failed.", reason=reason, diagnostic=repr(error))


def _refusal(status: int, text: str) -> DynamoError:
    said = _message(text)[:_MAX_ERROR_CHARS]
    if status == 404:
        return NotFoundError(f"the engine's server answered: {said}", param="model")
    if status in (429, 503, 529):
        return CapacityExhaustedError(f"the engine's server is busy: {said}", reason="capacity.worker_overloaded")
    if 400 <= status < 500 and status not in (401, 403):
        return InvalidRequestError(f"the engine's server refused the request: {said}")
    return InternalError(
        "The engine's server failed on this request.", reason="backend.unknown", diagnostic=f"{status}: {said}"
    )


def _message(text: str) -> str:
    try:
        answer = msgspec.json.decode(text)
    except msgspec.MsgspecError:
        return text
    if isinstance(answer, dict):
        error: Any = answer.get("error", answer)
        if isinstance(error, dict) and "message" in error:
            return str(error["message"])
    return text
