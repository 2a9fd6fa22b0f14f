"""The health board shows every part, whatever one of them does."""

from dynamo_core.component import Health, HealthBoard
from dynamo_core.enums import HealthState


def test_check_that_raises_counts_as_failed() -> None:
    def broken() -> Health:
        raise RuntimeError("boom")

    board = HealthBoard()
    board.register("good", lambda: Health(HealthState.READY))
    board.register("broken", broken)
    report = board.report()
    assert report["good"].ready
    assert report["broken"].state is HealthState.FAILED
    assert "RuntimeError: boom" in report["broken"].reason
    assert not board.ready


def test_health_board_is_ready_when_every_part_is() -> None:
    board = HealthBoard()
    assert not board.ready
    board.register("a", lambda: Health(HealthState.READY))
    board.register("b", lambda: Health(HealthState.DEGRADED, "slow disk"))
    assert board.ready
    board.register("c", lambda: Health(HealthState.DRAINING, "SIGTERM"))
    assert not board.ready
    assert board.report()["c"].reason == "SIGTERM"
    board.unregister("c")
    board.unregister("c")
    assert board.ready
