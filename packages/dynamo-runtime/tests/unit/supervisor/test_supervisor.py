from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from dynamo_core.clock import Clock, SystemClock
from dynamo_core.errors import (
    ConfigurationError,
    DynamoError,
    InvalidRequestError,
    NotFoundError,
    UnavailableError,
)
from dynamo_core.telemetry import Metrics
from dynamo_core.testing import FakeClock
from dynamo_runtime._settings import SupervisorSettings
from dynamo_runtime._supervisor.pool import Phase
from dynamo_runtime._supervisor.spec import ProcessSpec
from dynamo_runtime._supervisor.supervisor import Supervisor

Script = Callable[[str], tuple[str, ...]]
Eventually = Callable[[Callable[[], object]], Awaitable[None]]

STEADY = "ready(); wait()"
QUICK = SupervisorSettings(restart_initial_s=0.001, restart_max_s=0.001, restart_limit=3, max_replicas=8)


@asynccontextmanager
async def supervising(
    *specs: ProcessSpec, output: Any, settings: SupervisorSettings = QUICK, clock: Clock | None = None
) -> AsyncIterator[Supervisor]:
    async with asyncio.TaskGroup() as group:

        def spawn(work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
            return group.create_task(work, name=name)

        metrics = Metrics(labels={"dynamo_namespace": "test"})
        supervisor = Supervisor(
            specs, settings, clock=clock or SystemClock(), spawn=spawn, metrics=metrics, write=output
        )
        await supervisor.start()
        try:
            yield supervisor
        finally:
            await supervisor.stop()


async def test_replicas_become_ready_and_their_start_is_measured(
    script: Script, output: Any, eventually: Eventually
) -> None:
    async with supervising(ProcessSpec("worker", script(STEADY), 2), output=output) as supervisor:
        await eventually(lambda: supervisor.pools()["worker"].ready == 2)
        pool = supervisor.pools()["worker"]
        assert (pool.desired, pool.starting) == (2, 0)
        assert pool.startup_s is not None and pool.startup_s > 0
        assert supervisor.settled("worker")


async def test_scaling_up_starts_and_scaling_down_drains_real_processes(
    script: Script, output: Any, eventually: Eventually
) -> None:
    body = """
    def leave(*_): print("bye", flush=True); sys.exit(0)
    signal.signal(signal.SIGTERM, leave)
    ready(); wait()
    """
    async with supervising(ProcessSpec("worker", script(body), 1), output=output) as supervisor:
        await eventually(lambda: supervisor.pools()["worker"].ready == 1)
        await supervisor.scale({"worker": 3})
        await eventually(lambda: supervisor.pools()["worker"].ready == 3)
        names = [replica.name for replica in supervisor.replicas["worker"]]
        assert names == ["worker-1", "worker-2", "worker-3"]

        await supervisor.scale({"worker": 1})
        await eventually(lambda: len(supervisor.replicas["worker"]) == 1)
        assert sorted(output.lines) == ["worker-2 | bye", "worker-3 | bye"]
        assert supervisor.pools()["worker"].ready == 1


async def test_a_killed_process_is_replaced(script: Script, output: Any, eventually: Eventually) -> None:
    async with supervising(ProcessSpec("worker", script(STEADY), 1), output=output) as supervisor:
        await eventually(lambda: supervisor.pools()["worker"].ready == 1)
        replica = supervisor.replicas["worker"][0]
        first = replica.pid
        os.kill(first, signal.SIGKILL)
        await eventually(lambda: replica.phase is Phase.READY and replica.pid not in (0, first))


async def test_a_process_that_ignores_sigterm_is_killed_after_its_time(
    script: Script, output: Any, eventually: Eventually
) -> None:
    body = "signal.signal(signal.SIGTERM, signal.SIG_IGN); ready(); [wait() for _ in iter(int, 1)]"
    spec = ProcessSpec("worker", script(body), 1, drain_timeout_s=0.05)
    async with supervising(spec, output=output) as supervisor:
        await eventually(lambda: supervisor.pools()["worker"].ready == 1)
        await supervisor.scale({"worker": 0})
        await eventually(lambda: not supervisor.replicas["worker"])


async def test_a_crash_loop_waits_longer_each_time_and_ends(
    script: Script, output: Any, eventually: Eventually
) -> None:
    clock = FakeClock()
    settings = SupervisorSettings(restart_initial_s=1.0, restart_max_s=100.0, restart_limit=3)
    starts: list[float] = []

    def note(line: str, is_error: bool) -> None:
        starts.append(clock.monotonic())

    spec = ProcessSpec("worker", script("print('here', flush=True); sys.exit(7)"), 1)
    with pytest.raises(ExceptionGroup) as caught:
        async with supervising(spec, output=note, settings=settings, clock=clock):
            for delay_s in (1.0, 2.0, 4.0):
                await eventually(lambda: clock.sleepers)
                await clock.advance(delay_s - 0.25)
                assert clock.sleepers
                await clock.advance(0.25)
            await asyncio.Event().wait()
    error = caught.value.exceptions[0]
    assert isinstance(error, UnavailableError)
    assert error.reason == "supervisor.crash_loop"
    assert "worker-1 ended with status 7, 4 times" in error.message
    assert starts == [0.0, 1.0, 3.0, 7.0]


async def test_a_crash_loop_after_a_good_start_fails_the_replica_alone(
    script: Script, output: Any, eventually: Eventually, tmp_path: Any
) -> None:
    flag = tmp_path / "bad"
    body = f"""
    if os.path.exists({str(flag)!r}): sys.exit(1)
    ready(); wait()
    """
    async with supervising(ProcessSpec("worker", script(body), 2), output=output) as supervisor:
        await eventually(lambda: supervisor.pools()["worker"].ready == 2)
        flag.touch()
        os.kill(supervisor.replicas["worker"][0].pid, signal.SIGKILL)
        await eventually(lambda: supervisor.pools()["worker"].failed == 1)
        assert supervisor.pools()["worker"].ready == 1

        await supervisor.scale({"worker": 1})
        await eventually(lambda: len(supervisor.replicas["worker"]) == 1)
        assert supervisor.pools()["worker"].failed == 0


async def test_wrong_configuration_is_not_tried_again(script: Script, output: Any) -> None:
    body = "print('dynamo: error: no such model', file=sys.stderr); sys.exit(2)"
    with pytest.raises(ExceptionGroup) as caught:
        async with supervising(ProcessSpec("worker", script(body), 2), output=output):
            await asyncio.Event().wait()
    error = caught.value.exceptions[0]
    assert isinstance(error, ConfigurationError)
    assert error.message in ("worker-1: no such model", "worker-2: no such model")
    assert output.lines == []


async def test_a_program_that_cannot_run_is_wrong_configuration(output: Any) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with supervising(ProcessSpec("worker", ("/nowhere/program",)), output=output):
            await asyncio.Event().wait()
    assert isinstance(caught.value.exceptions[0], ConfigurationError)


@pytest.mark.parametrize(
    ("replicas", "kind"),
    [({"wroker": 1}, NotFoundError), ({"worker": -1}, InvalidRequestError), ({"worker": 9}, InvalidRequestError)],
)
async def test_a_refused_scaling_changes_nothing(
    replicas: dict[str, int], kind: type[DynamoError], script: Script, output: Any
) -> None:
    specs = ProcessSpec("frontend", script(STEADY), 0), ProcessSpec("worker", script(STEADY), 0)
    async with supervising(*specs, output=output) as supervisor:
        with pytest.raises(kind):
            await supervisor.scale({"frontend": 1, **replicas})
        assert supervisor.pools()["frontend"].desired == 0


async def test_repeated_and_older_decisions_are_ignored(script: Script, output: Any) -> None:
    async with supervising(ProcessSpec("worker", script(STEADY), 0), output=output) as supervisor:
        await supervisor.scale({"worker": 2}, decision_id=7)
        await supervisor.scale({"worker": 5}, decision_id=7)
        await supervisor.scale({"worker": 5}, decision_id=6)
        assert supervisor.pools()["worker"].desired == 2
        await supervisor.scale({"worker": 1})
        assert supervisor.pools()["worker"].desired == 1


async def test_drain_ends_the_last_role_first_and_starts_nothing_more(
    script: Script, output: Any, eventually: Eventually
) -> None:
    body = """
    def leave(*_): print("bye", flush=True); sys.exit(0)
    signal.signal(signal.SIGTERM, leave)
    ready(); wait()
    """
    specs = ProcessSpec("worker", script(body), 2), ProcessSpec("frontend", script(body), 1)
    async with supervising(*specs, output=output) as supervisor:
        await eventually(lambda: all(pool.ready == pool.desired for pool in supervisor.pools().values()))
        await supervisor.drain(20.0)
        assert output.lines[0] == "frontend-1 | bye"
        assert sorted(output.lines[1:]) == ["worker-1 | bye", "worker-2 | bye"]
        with pytest.raises(UnavailableError):
            await supervisor.scale({"worker": 1})


async def test_each_replica_gets_devices_of_its_own(script: Script, output: Any, eventually: Eventually) -> None:
    body = "print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); ready(); wait()"
    async with supervising(ProcessSpec("worker", script(body), 2, gpus=2), output=output) as supervisor:
        await eventually(lambda: supervisor.pools()["worker"].ready == 2)
        assert sorted(output.lines) == ["worker-1 | 0,1", "worker-2 | 2,3"]
