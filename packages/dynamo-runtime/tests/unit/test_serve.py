from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from aiohttp import web

from dynamo_core import plugins
from dynamo_core.errors import ConfigurationError, UnavailableError
from dynamo_runtime._screen import ServeScreen
from dynamo_runtime._serve import STOP_MARGIN_S, ServePlan, make_plan, process_specs, supervising_settings
from dynamo_runtime._settings import ServeSettings


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    """An open stack, on a machine that has the components installed."""
    monkeypatch.setattr(plugins, "available", lambda kind: dict.fromkeys(("frontend", "planner", "worker")))
    with ExitStack() as stack:
        yield stack


def plan_of(stack: ExitStack, *argv: str) -> ServePlan:
    return make_plan([*argv, "--http-port", "0"], stack)


def flag(command: tuple[str, ...], name: str) -> str:
    return command[command.index(name) + 1]


def test_without_configuration_it_is_a_frontend_and_two_workers_on_private_planes(stack: ExitStack) -> None:
    plan = plan_of(stack)
    worker, frontend = process_specs(plan)
    assert (worker.role, worker.replicas, frontend.role, frontend.replicas) == ("worker", 2, "frontend", 1)
    assert "--model" not in worker.command
    assert flag(worker.command, "--engine") == "reference"
    assert flag(frontend.command, "--router") == "kv"
    assert int(flag(frontend.command, "--http-port")) == plan.http_port > 0
    folder = Path(plan.runtime.discovery.removeprefix("file://")).parent
    for spec in (worker, frontend):
        assert flag(spec.command, "--discovery") == plan.runtime.discovery
        assert flag(spec.command, "--request-plane") == f"unix://{folder}/sockets"
    assert folder.stat().st_mode & 0o077 == 0
    stack.close()
    assert not folder.exists()


def test_the_model_and_unknown_flags_go_to_the_engine(stack: ExitStack) -> None:
    plan = plan_of(stack, "tinylm", "--kv-blocks", "512", "--workers", "3")
    worker = process_specs(plan)[0]
    assert flag(worker.command, "--model") == "tinylm"
    assert worker.command[-2:] == ("--kv-blocks", "512")
    assert worker.replicas == 3


def test_the_router_keeps_its_own_policy_unless_another_is_named(stack: ExitStack) -> None:
    frontend = process_specs(plan_of(stack, "--router", "round-robin"))[1]
    assert flag(frontend.command, "--router") == "round-robin"
    assert "--policy" not in frontend.command
    frontend = process_specs(plan_of(stack, "--policy", "lmetric"))[1]
    assert flag(frontend.command, "--policy") == "lmetric"


def test_a_planner_scales_the_workers_through_the_supervisor(stack: ExitStack) -> None:
    planner = process_specs(plan_of(stack, "--planner"))[-1]
    assert planner.role == "planner"
    assert (flag(planner.command, "--role"), flag(planner.command, "--target")) == ("worker", "supervisor")


def test_every_role_has_its_own_time_to_drain(stack: ExitStack) -> None:
    plan = plan_of(stack, "--drain-timeout-s", "20", "--grace-period-s", "3")
    specs = process_specs(plan)
    assert flag(specs[0].command, "--drain-timeout-s") == "20.0"
    supervising = supervising_settings(plan.runtime, specs)
    assert supervising.drain_timeout_s == 2 * (3 + 20 + STOP_MARGIN_S)
    assert supervising.grace_period_s == 0


def test_planes_that_were_asked_for_are_kept(stack: ExitStack) -> None:
    plan = plan_of(stack, "--discovery", "mem://", "--status-port", "-1")
    assert (plan.runtime.discovery, plan.runtime.status_port) == ("mem://", -1)


def test_in_process_uses_memory_planes(stack: ExitStack) -> None:
    runtime = plan_of(stack, "--in-process").runtime
    assert (runtime.discovery, runtime.request_plane, runtime.event_bus) == ("mem://", "mem://", "mem://")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--in-process", "--planner"], ["--planner", "--in-process"]),
        (["--workers", "2", "tinylm", "--seed", "1"], ["'tinylm'", "the model comes first"]),
        (["--worker", "3"], ["'--worker'", "did you mean --workers?"]),
        (["./nothing-here"], ["'./nothing-here'", "no such folder"]),
        (["--http-host", "192.0.2.1"], ["--http-port", "192.0.2.1", "listened on"]),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    argv: list[str], parts: list[str], stack: ExitStack
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        plan_of(stack, *argv)
    for part in parts:
        assert part in caught.value.message


def test_a_busy_port_is_refused_with_a_remedy(stack: ExitStack) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"--http-port has the value {port}.*give another port"):
            make_plan(["--http-port", str(port)], stack)


async def test_the_screen_waits_for_a_model_and_shows_a_command_that_works(
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers = iter([{"data": []}, {"data": [{"id": "it's-a-model"}]}])

    async def models(request: web.Request) -> web.Response:
        return web.json_response(next(answers))

    application = web.Application()
    application.router.add_get("/v1/models", models)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        await ServeScreen(url, ServeSettings(), processes=True).show()
    finally:
        await runner.cleanup()
    text = capsys.readouterr().out
    assert f"{url}/v1/chat/completions" in text
    assert f"{url}/metrics" in text
    assert "Ctrl-C to stop" in text
    assert "it's-a-model" in text


async def test_without_a_model_it_gives_up_after_its_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        screen = ServeScreen(url, ServeSettings(startup_timeout_s=0.05), processes=True)
        with pytest.raises(UnavailableError, match="--startup-timeout-s"):
            await screen.show()
