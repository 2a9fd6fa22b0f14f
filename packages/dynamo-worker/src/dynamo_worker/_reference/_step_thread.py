"""The one thread that owns an ``EngineCore``: it runs commands between steps, and steps while there is work.

The event loop never waits for a forward pass: it posts commands, and hears of all results of a step in one callback.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

from dynamo_core.errors import DynamoError, UnavailableError
from dynamo_worker._reference._core import EngineCore, Output, StepStats

T = TypeVar("T")
Deliver = Callable[[list[Output], "StepStats | None", float], None]


class StepThread:
    """Runs an engine core.

    Args:
        core: The core; nobody else may touch it once the thread runs.
        deliver: Called on the event loop with the outputs, statistics and seconds of each step.
        now: Monotonic time in seconds.
        on_exit: Called on the thread after its last step.
    """

    def __init__(
        self, core: EngineCore, deliver: Deliver, now: Callable[[], float], on_exit: Callable[[], None]
    ) -> None:
        self._core = core
        self._deliver = deliver
        self._now = now
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        self._wake = threading.Condition()
        self._commands: list[Callable[[], None]] = []
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="reference-engine-step", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def post(self, command: Callable[[], None]) -> bool:
        """Run a command before the next step; False, and nothing done, if the thread has ended."""
        with self._wake:
            if self._is_closed:
                return False
            self._commands.append(command)
            self._wake.notify()
            return True

    async def call(self, function: Callable[[], T]) -> T:
        """Run a function before the next step and return its result. Cancelling ends the wait, not the function.

        Raises:
            UnavailableError: if the thread has ended.
        """
        future: asyncio.Future[T] = self._loop.create_future()
        if not self.post(lambda: self._answer(future, function)):
            raise UnavailableError("the engine has stopped", reason="backend.engine_shutdown")
        return await future

    async def close(self) -> None:
        """End the thread after the present step. Idempotent."""
        if self._thread.is_alive():
            self.post(self._close)
            await asyncio.to_thread(self._thread.join)

    def _close(self) -> None:
        self._is_closed = True

    def _answer(self, future: asyncio.Future[T], function: Callable[[], T]) -> None:
        try:
            result = function()
        except Exception as error:  # noqa: BLE001 - whoever awaits the call gets it
            self._on_loop(lambda error=error: None if future.done() else future.set_exception(error))
        else:
            self._on_loop(lambda: None if future.done() else future.set_result(result))

    def _run(self) -> None:
        while not self._is_closed:
            for command in self._next_commands():
                command()
            try:
                self._step()
            except Exception as error:  # noqa: BLE001 - a broken core must not hang its callers: all of them fail
                failure = UnavailableError(
                    "The engine met an unexpected condition and stopped.",
                    reason="backend.engine_shutdown",
                    diagnostic=f"{type(error).__name__}: {error}",
                )
                failure.__cause__ = error
                self._end(failure)
        self._end(UnavailableError("The engine was shut down.", reason="backend.engine_shutdown"))
        self._on_exit()

    def _step(self) -> None:
        began = self._now()
        stats = self._core.step() if self._core.has_work and not self._is_closed else None
        outputs = self._core.take_outputs()
        if outputs or stats is not None:
            wall_time_s = self._now() - began
            self._on_loop(lambda: self._deliver(outputs, stats, wall_time_s))

    def _end(self, failure: DynamoError) -> None:
        with self._wake:
            self._is_closed = True
            commands, self._commands = self._commands, []
        for command in commands:  # a request that arrived last is failed with the others, not forgotten
            command()
        self._core.fail_all(failure)
        outputs = self._core.take_outputs()
        if outputs:
            self._on_loop(lambda: self._deliver(outputs, None, 0.0))

    def _next_commands(self) -> list[Callable[[], None]]:
        with self._wake:
            while not (self._commands or self._core.has_work):
                self._wake.wait()
            commands, self._commands = self._commands, []
            return commands

    def _on_loop(self, callback: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:  # the event loop is closed: nobody is left to hear
            self._is_closed = True
