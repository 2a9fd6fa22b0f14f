"""The command ``dynamo-frontend``: the package alone, with no runtime installed."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
from collections.abc import Sequence

from dynamo_core.clock import SystemClock
from dynamo_core.errors import ConfigurationError
from dynamo_core.settings import resolve_settings
from dynamo_core.telemetry import Metrics
from dynamo_frontend._gateway.gateway import Gateway
from dynamo_frontend._settings import GatewaySettings

_COLLECT_AFTER_OBJECTS = 20_000
_USAGE = """usage: dynamo-frontend serve --upstream http://host:port [--upstream ...] [options]

  serve    a gateway before OpenAI-compatible engines; `dynamo-frontend serve --help` shows the options

The frontend for Dynamo workers runs as `dynamo frontend` (pip install dynamo-runtime)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 2 for anything set up wrongly."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE)  # noqa: T201 - the output of --help
        return 0 if arguments else 2
    if arguments[0] != "serve":
        print(f"dynamo-frontend: unknown command {arguments[0]!r}; there is: serve", file=sys.stderr)  # noqa: T201 - as below
        return 2
    try:
        _run(_settings(arguments[1:]))
    except ConfigurationError as error:
        print(f"dynamo-frontend: {error.message}", file=sys.stderr)  # noqa: T201 - the command's answer
        return 2
    return 0


def _settings(arguments: Sequence[str]) -> GatewaySettings:
    resolved = resolve_settings(
        "dynamo-frontend serve",
        (GatewaySettings,),
        arguments,
        description="Serve the models of OpenAI-compatible engines under one address.",
    )
    return resolved.get(GatewaySettings)


def _run(settings: GatewaySettings) -> None:
    _spare_the_collector()
    if sys.platform == "win32":
        asyncio.run(_serve(settings))
        return
    import uvloop

    uvloop.run(_serve(settings))


def _spare_the_collector() -> None:
    """Let the garbage collector leave modules alone and come rarely: what requests leave behind has no circles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER_OBJECTS, 20, 50)


async def _serve(settings: GatewaySettings) -> None:
    gateway = Gateway(settings, Metrics(), SystemClock())
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    try:
        await gateway.start()
        await stopping.wait()
    finally:
        await gateway.stop()


if __name__ == "__main__":
    sys.exit(main())
