from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from dynamo_core.errors import (
    CancelledRequestError,
    CapacityExhaustedError,
    ConfigurationError,
    DeadlineExceededError,
    DynamoError,
    InternalError,
    UnavailableError,
)
from dynamo_kvbm._transfer.engine import TransferEngine

DEADLINE_S = 30.0


class Gate:
    """Work that tells when it starts and waits to be let through."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self.opened = threading.Event()

    def __call__(self, cancelled: Callable[[], bool]) -> str:
        self.started.set()
        assert self.opened.wait(DEADLINE_S)
        if cancelled():
            raise CancelledRequestError("asked to end")
        return "done"


@pytest.fixture
def engine() -> Iterator[TransferEngine]:
    engine = TransferEngine(workers=1, queue_blocks=4)
    yield engine
    engine.close()


def held(engine: TransferEngine) -> Gate:
    gate = Gate()
    engine.submit(gate, blocks=1)
    assert gate.started.wait(DEADLINE_S)
    return gate


def test_a_result_comes_back(engine: TransferEngine) -> None:
    assert engine.submit(lambda cancelled: 7, blocks=1).result(DEADLINE_S) == 7
    assert engine.drain(DEADLINE_S)


def test_the_urgent_run_first_and_equals_in_order(engine: TransferEngine) -> None:
    gate, order = held(engine), list[str]()
    for name, priority in (("b1", 1), ("a", 0), ("b2", 1)):
        engine.submit(lambda _, name=name: order.append(name), blocks=1, priority=priority)
    gate.opened.set()
    assert engine.drain(DEADLINE_S)
    assert order == ["a", "b1", "b2"]


def test_a_full_queue_refuses_or_makes_wait(engine: TransferEngine) -> None:
    gate = held(engine)
    engine.submit(lambda _: None, blocks=4)
    assert engine.queued_blocks == 4
    with pytest.raises(CapacityExhaustedError, match="4 of 4 blocks wait"):
        engine.submit(lambda _: None, blocks=1)
    waiting = threading.Thread(target=lambda: engine.submit(lambda _: None, blocks=4, timeout_s=None))
    waiting.start()
    gate.opened.set()
    waiting.join(DEADLINE_S)
    assert not waiting.is_alive()
    assert engine.drain(DEADLINE_S)


def test_a_transfer_larger_than_the_queue_may_wait_alone(engine: TransferEngine) -> None:
    gate = held(engine)
    large = engine.submit(lambda _: "large", blocks=100)
    gate.opened.set()
    assert large.result(DEADLINE_S) == "large"


def test_a_waiting_transfer_that_is_cancelled_never_starts(engine: TransferEngine) -> None:
    gate, ran = held(engine), threading.Event()
    transfer = engine.submit(lambda _: ran.set(), blocks=1)
    transfer.cancel()
    gate.opened.set()
    with pytest.raises(CancelledRequestError):
        transfer.result(DEADLINE_S)
    assert not ran.is_set()


def test_a_running_transfer_ends_where_it_asks(engine: TransferEngine) -> None:
    gate = Gate()
    transfer = engine.submit(gate, blocks=1)
    assert gate.started.wait(DEADLINE_S)
    with pytest.raises(DeadlineExceededError):
        transfer.result(0.0)
    transfer.cancel()
    gate.opened.set()
    with pytest.raises(CancelledRequestError):
        transfer.result(DEADLINE_S)
    assert transfer.done


def test_a_failure_goes_to_who_waits_and_the_engine_goes_on(engine: TransferEngine) -> None:
    def fail(cancelled: Callable[[], bool]) -> None:
        raise UnavailableError("no disk")

    def break_down(cancelled: Callable[[], bool]) -> None:
        raise ZeroDivisionError

    with pytest.raises(UnavailableError, match="no disk"):
        engine.submit(fail, blocks=1).result(DEADLINE_S)
    with pytest.raises(DynamoError):
        engine.submit(break_down, blocks=1).result(DEADLINE_S)
    assert engine.submit(lambda _: 1, blocks=1).result(DEADLINE_S) == 1


def test_close_cancels_what_waits_and_refuses_more() -> None:
    engine = TransferEngine(workers=1)
    gate = held(engine)
    waiting = engine.submit(lambda _: None, blocks=1)
    closing = threading.Thread(target=engine.close)
    closing.start()
    gate.opened.set()
    closing.join(DEADLINE_S)
    with pytest.raises(CancelledRequestError):
        waiting.result(DEADLINE_S)
    engine.close()
    with pytest.raises(InternalError, match="closed"):
        engine.submit(lambda _: None, blocks=1)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="at least 1"):
        TransferEngine(workers=0)
