"""What the HTTP services share: JSON answers, errors as JSON, and running until told to stop."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web

from dynamo_core.errors import ConfigurationError, DynamoError, InternalError
from dynamo_router._service_bodies import error_body

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        message = f"{request.method} {request.path}: {error.reason}"
        return json_answer(
            {"error": {"message": message, "type": "http", "code": str(error.status)}}, status=error.status
        )
    except DynamoError as error:
        status = error.http_status if not isinstance(error, InternalError) else 500
        return json_answer(error_body(error), status=status)


def json_answer(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(value), status=status, content_type="application/json", headers=headers
    )


async def serve_until_stopped(
    application: web.Application, host: str, port: int, announce: Callable[[str], None]
) -> None:
    """Serve until SIGINT or SIGTERM; ``announce`` is told the URL.

    Raises:
        ConfigurationError: if the address cannot be listened on.
    """
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise ConfigurationError(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another --port"
            ) from error
        stopped = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stopped.set)
        where, number = runner.addresses[0][:2]
        announce(f"http://{where}:{number}")
        await stopped.wait()
    finally:
        await runner.cleanup()
