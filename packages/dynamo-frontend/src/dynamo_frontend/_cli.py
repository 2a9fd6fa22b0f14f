"""The command ``dynamo-frontend``: the package alone, with no runtime installed."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from dynamo_core.clock import SystemClock
from dynamo_core.errors import ConfigurationError, DynamoError
from dynamo_core.settings import resolve_settings
from dynamo_core.telemetry import Metrics
from dynamo_frontend._access.command import keys_command
from dynamo_frontend._chat import chat
from dynamo_frontend._gateway.gateway import Gateway
from dynamo_frontend._gateway.workers import WorkerProcesses, reserve_port
from dynamo_frontend._settings import GatewaySettings

_COLLECT_AFTER_OBJECTS = 20_000
_USAGE = """usage: dynamo-frontend COMMAND [options]; dynamo-frontend COMMAND --help shows the options

  serve --upstream http://host:port [--upstream ...]   a gateway before OpenAI-compatible engines
  chat [--base-url http://host:port]                   a chat in the terminal
  keys new|list|revoke --file FILE                     API keys of a gateway or frontend

The frontend for Dynamo workers runs as `dynamo frontend` (pip install dynamo-runtime)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 2 for anything set up wrongly."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE)  # noqa: T201 - the output of --help
        return 0 if arguments else 2
    command = _COMMANDS.get(arguments[0])
    if command is None:
        known = ", ".join(_COMMANDS)
        print(f"dynamo-frontend: unknown command {arguments[0]!r}; there are: {known}", file=sys.stderr)  # noqa: T201 - as below
        return 2
    try:
        return command(arguments[1:])
    except DynamoError as error:
        print(f"dynamo-frontend: {error.message}", file=sys.stderr)  # noqa: T201 - the command's answer
        return 2 if isinstance(error, ConfigurationError) else 1


def _keys(arguments: list[str]) -> int:
    for line in keys_command(arguments):
        print(line)  # noqa: T201 - the command's answer
    return 0


def _serve(arguments: list[str]) -> int:
    settings = _settings(arguments)
    if settings.workers > 1 and settings.worker_index < 0:
        holder, port = reserve_port(settings.http_host, settings.http_port)
        with holder:
            return _run(_run_workers([*arguments, "--http-port", str(port)], settings))
    _spare_the_collector()
    return _run(_run_gateway(settings))


_COMMANDS: dict[str, Callable[[list[str]], int]] = {"serve": _serve, "chat": chat, "keys": _keys}


def _settings(arguments: Sequence[str]) -> GatewaySettings:
    resolved = resolve_settings(
        "dynamo-frontend serve",
        (GatewaySettings,),
        arguments,
        description="Serve the models of OpenAI-compatible engines under one address.",
    )
    return resolved.get(GatewaySettings)


def _run(work: Coroutine[Any, Any, int]) -> int:
    if sys.platform == "win32":
        return asyncio.run(work)
    import uvloop

    return uvloop.run(work)


def _spare_the_collector() -> None:
    """Let the garbage collector leave modules alone and come rarely: what requests leave behind has no circles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER_OBJECTS, 20, 50)


def _stop_signals() -> asyncio.Event:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    return stopping


async def _run_workers(arguments: list[str], settings: GatewaySettings) -> int:
    workers = WorkerProcesses(arguments, settings.workers, SystemClock(), settings.drain_timeout_s)
    return await workers.run(_stop_signals())


async def _run_gateway(settings: GatewaySettings) -> int:
    fixed = {"worker": str(settings.worker_index)} if settings.worker_index >= 0 else {}
    gateway = Gateway(settings, Metrics(labels=fixed), SystemClock())
    stopping = _stop_signals()
    if settings.worker_index >= 0:
        _end_with_parent(stopping)
    try:
        await gateway.start()
        await stopping.wait()
    finally:
        await gateway.stop()
    return 0


def _end_with_parent(stopping: asyncio.Event) -> None:
    """Stop once the input ends, which the starting process holds open as long as it lives."""
    loop = asyncio.get_running_loop()

    def ended() -> None:
        if not os.read(0, 1024):
            loop.remove_reader(0)
            stopping.set()

    loop.add_reader(0, ended)


if __name__ == "__main__":
    sys.exit(main())
