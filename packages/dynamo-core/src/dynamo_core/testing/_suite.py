"""What every conformance suite is: tests that an implementation inherits and cannot quietly drop."""

from __future__ import annotations

import asyncio
import inspect
from abc import ABC
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, ClassVar, Protocol, TypeVar

import pytest

T = TypeVar("T")


class Closable(Protocol):
    """Anything with the life of a plane."""

    async def start(self) -> None:
        """Begin."""
        ...

    async def close(self) -> None:
        """End."""
        ...


C = TypeVar("C", bound=Closable)


class ConformanceSuite(ABC):  # noqa: B024 - each suite adds factories of its own
    """Base of the suites. Subclass one, name the class ``Test...``, and supply its ``make_...`` factories.

    Tests of a suite are the contract: a subclass that removes or replaces one fails at import. The one way out is an
    override that calls the original under ``pytest.mark.xfail(reason=...)``, which keeps the gap on the record::

        class TestMyBus(EventBusConformance):
            @pytest.mark.xfail(reason="the broker keeps no ring")
            async def test_replay_returns_a_range(self) -> None:
                await super().test_replay_returns_a_range()

    pytest makes a new object for each test, so factories may keep state on ``self``; a subclass gets at fixtures with
    an ``autouse`` fixture that stores them there.

    Attributes:
        patience_s: Seconds of real time after which an awaited event counts as missing.
    """

    patience_s: ClassVar[float] = 10.0
    _contract: ClassVar[dict[str, Callable[..., Any]]] = {}

    def __init_subclass__(cls, *, suite: bool = False, **options: Any) -> None:
        """Mark asynchronous tests; take the tests of a suite into the contract, else hold the subclass to it."""
        super().__init_subclass__(**options)
        for value in vars(cls).values():
            if inspect.iscoroutinefunction(value) and value.__name__.startswith("test_"):
                pytest.mark.asyncio(value)
        inherited = [base._contract for base in reversed(cls.__mro__[1:]) if issubclass(base, ConformanceSuite)]
        cls._contract = {name: test for contract in inherited for name, test in contract.items()}
        if suite:
            cls._contract |= {name: value for name, value in vars(cls).items() if name.startswith("test_")}
            return
        for name, original in cls._contract.items():
            found = getattr(cls, name, None)
            if found is not original and not _is_reasoned_xfail(found):
                raise TypeError(
                    f"{cls.__name__}.{name} replaces a test of the contract; "
                    "remove it, or mark it with pytest.mark.xfail(reason=...) and call the original"
                )

    def within(self, awaitable: Awaitable[T]) -> Awaitable[T]:
        """Await with this suite's patience; too long is a ``TimeoutError``."""
        return asyncio.wait_for(awaitable, self.patience_s)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Give the event loop turns until the condition holds; too long is a ``TimeoutError``."""
        async with asyncio.timeout(self.patience_s):
            while not condition():  # noqa: ASYNC110 - the condition is the implementation's, it has no event to await
                await asyncio.sleep(0.001)

    def running(self, *parts: C) -> AbstractAsyncContextManager[tuple[C, ...]]:
        """Start parts, and close them at the end in reverse order."""
        return _running(parts)


@asynccontextmanager
async def _running(parts: tuple[C, ...]) -> AsyncGenerator[tuple[C, ...]]:
    started: list[C] = []
    try:
        for part in parts:
            started.append(part)
            await part.start()
        yield parts
    finally:
        for part in reversed(started):
            await part.close()


def _is_reasoned_xfail(found: Any) -> bool:
    marks = getattr(found, "pytestmark", [])
    return any(mark.name == "xfail" and mark.kwargs.get("reason") for mark in marks)
