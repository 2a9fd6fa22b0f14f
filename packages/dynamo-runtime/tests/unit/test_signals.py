from __future__ import annotations

import signal

import pytest

from dynamo_core.errors import ConfigurationError
from dynamo_core.testing import FakeClock
from dynamo_runtime._signals import ECHO_S, StopRequest, die_with_parent


async def test_the_first_signal_drains_and_a_later_one_aborts() -> None:
    clock = FakeClock()
    stop = StopRequest(clock)
    stop.on_signal(signal.SIGTERM)
    assert (stop.drain.is_set(), stop.abort.is_set(), stop.reason) == (True, False, "signal SIGTERM")
    await clock.advance(ECHO_S)
    stop.on_signal(signal.SIGINT)
    assert (stop.abort.is_set(), stop.reason) == (True, "signal SIGTERM")


async def test_an_echo_of_the_first_signal_does_not_abort() -> None:
    clock = FakeClock()
    stop = StopRequest(clock)
    stop.on_signal(signal.SIGINT)
    await clock.advance(ECHO_S / 2)
    stop.on_signal(signal.SIGINT)
    assert not stop.abort.is_set()


async def test_a_signal_after_a_request_to_stop_still_lets_it_drain() -> None:
    stop = StopRequest(FakeClock())
    stop.request("all done")
    stop.on_signal(signal.SIGTERM)
    assert (stop.abort.is_set(), stop.reason) == (False, "all done")


def test_a_wrong_parent_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="--parent-pid has the value 1"):
        die_with_parent(1)
