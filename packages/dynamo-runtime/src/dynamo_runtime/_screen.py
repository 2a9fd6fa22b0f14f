"""What ``dynamo serve`` shows once it can answer."""

from __future__ import annotations

import asyncio
import json
import shlex
from typing import TYPE_CHECKING

from dynamo_core.clock import Clock, SystemClock
from dynamo_core.errors import UnavailableError

if TYPE_CHECKING:
    import aiohttp

    from dynamo_runtime._settings import ServeSettings

POLL_S = 0.05


class ServeScreen:
    """Waits until a model is served, then prints one screen.

    Args:
        url: Of the frontend.
        settings: Of the command.
        processes: Whether workers are processes of their own.
        clock: Time.
    """

    def __init__(self, url: str, settings: ServeSettings, *, processes: bool, clock: Clock | None = None) -> None:
        self._url = url
        self._settings = settings
        self._processes = processes
        self._clock = clock or SystemClock()

    async def show(self) -> None:
        """Wait for a model and print.

        Raises:
            UnavailableError: if no model is served within the start-up timeout.
        """
        try:
            async with asyncio.timeout(self._settings.startup_timeout_s):
                model = await self._wait_for_model()
        except TimeoutError as error:
            raise UnavailableError(
                f"no model was served within {self._settings.startup_timeout_s:g} s; "
                "look at the workers' output with --log-level info, or raise --startup-timeout-s",
                reason="serve.startup_timeout",
            ) from error
        print(self.text(model), flush=True)  # noqa: T201 - the screen of the command

    def text(self, model: str) -> str:
        """Return the screen."""
        question = {"role": "user", "content": "What is the capital of Japan?"}
        body = {"model": model, "messages": [question], "temperature": 0}
        command = (
            f"curl {self._url}/v1/chat/completions -H 'Content-Type: application/json' "
            f"-d {shlex.quote(json.dumps(body))}"
        )
        where = "processes" if self._processes else "in this process"
        rows = (
            ("URL", f"{self._url}/v1"),
            ("Model", model),
            ("Workers", f"{self._settings.workers} {where}, engine {self._settings.engine}"),
            ("Metrics", f"{self._url}/metrics"),
            ("Try", command),
        )
        lines = [f"  {name:<8} {value}" for name, value in rows]
        return "\n".join(["", "Dynamo is ready.", "", *lines, "", "Ctrl-C to stop.", ""])

    async def _wait_for_model(self) -> str:
        import aiohttp

        async with aiohttp.ClientSession() as session:
            while not (model := await self._served_model(session)):
                await self._clock.sleep(POLL_S)
        return model

    async def _served_model(self, session: aiohttp.ClientSession) -> str:
        try:
            async with session.get(f"{self._url}/v1/models") as response:
                data = (await response.json())["data"] if response.status == 200 else []
        except (OSError, ValueError, KeyError):  # not listening yet, or not yet able to answer
            return ""
        return str(data[0]["id"]) if data else ""
