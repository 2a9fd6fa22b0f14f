"""Whole processes: exit status, messages and signals, as a shell sees them."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dynamo_runtime._bus import _metrics as _bus_metrics
from dynamo_runtime._discovery import _metrics as _discovery_metrics
from dynamo_runtime._plane import _metrics as _plane_metrics

LIMIT_S = 30.0

PROGRAM = """
import asyncio, gc, os, sys, time
from dynamo_core.errors import ConfigurationError, UnavailableError
from dynamo_runtime import HostedComponent, RuntimeSettings, run_components
from dynamo_runtime._signals import ECHO_S

MODE = sys.argv[1]

class Part:
    name = "part"
    def __init__(self, context): self.context = context
    async def start(self):
        if MODE == "misconfigured":
            raise ConfigurationError("no such model\\ngive another")
        if MODE == "crash":
            async def fail(): raise UnavailableError("engine is gone", reason="backend.disconnected")
            self.context.spawn(fail(), name="fail")
    async def drain(self, timeout_s):
        print("drain", flush=True)
        if MODE == "stuck":
            heard_at_s = time.monotonic()
            while time.monotonic() - heard_at_s <= ECHO_S:
                await asyncio.sleep(0.01)
            print("no echo any more", flush=True)
            await asyncio.Event().wait()
    async def stop(self): print("stop", flush=True)

class Plugin:
    settings_types = ()
    takes_extra_args = False
    def create(self, context, settings, extra_args): return Part(context)

async def ready():
    collector = (gc.get_threshold()[0], gc.get_freeze_count() > 0) if MODE == "gc" else ()
    print("ready", *collector, flush=True)

in_process = {"discovery": "mem://", "request_plane": "mem://", "event_bus": "mem://"}
settings = RuntimeSettings(**{**in_process, "log_level": "error", **eval(sys.argv[2])})
sys.exit(run_components([HostedComponent("part", Plugin())], settings, on_ready=ready))
"""


@contextmanager
def program(mode: str, settings: str = "{}", pass_fds: tuple[int, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PROGRAM, mode, settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=pass_fds,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("options", ["{}", "{'uvloop': False}"])
def test_a_signal_drains_and_exits_0(number: signal.Signals, options: str) -> None:
    with program("well", options) as process:
        assert next_line(process) == "ready"
        process.send_signal(number)
        output, errors = process.communicate(timeout=LIMIT_S)
        assert (process.returncode, output, errors) == (0, "drain\nstop\n", "")


def test_a_second_signal_stops_a_drain_that_hangs() -> None:
    with program("stuck") as process:
        assert next_line(process) == "ready"
        process.send_signal(signal.SIGTERM)
        assert next_line(process) == "drain"
        # One that comes at once counts as an echo of the first; the program says when that time is over.
        assert next_line(process) == "no echo any more"
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=LIMIT_S)
        assert (process.returncode, output) == (0, "stop\n")


def test_wrong_configuration_is_one_line_and_status_2() -> None:
    with program("misconfigured") as process:
        _, errors = process.communicate(timeout=LIMIT_S)
        assert (process.returncode, errors) == (2, "dynamo: error: no such model; give another\n")


def test_a_crash_is_status_1_with_its_reason() -> None:
    with program("crash") as process:
        _, errors = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 1
        assert errors == "dynamo: error: engine is gone (backend.disconnected)\n"


def test_a_process_refuses_a_parent_that_is_not_its_own() -> None:
    with program("well", "{'parent_pid': 1}") as process:
        _, errors = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 2
        assert "--parent-pid" in errors


def test_a_child_dies_with_a_killed_parent() -> None:
    parent_code = (
        "import subprocess, sys, os\n"
        "child = subprocess.Popen([sys.executable, '-c', sys.argv[1], 'well', "
        "repr({'parent_pid': os.getpid()})], stdout=subprocess.PIPE, text=True)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", parent_code, PROGRAM], stdout=subprocess.PIPE, text=True)
    child_pid = int(next_line(parent))
    descriptor = os.pidfd_open(child_pid)
    try:
        parent.kill()
        parent.communicate()
        ended, _, _ = select.select([descriptor], [], [], LIMIT_S)
        assert ended
    finally:
        os.close(descriptor)


def test_the_garbage_collector_spares_what_stays() -> None:
    with program("gc") as process:
        assert next_line(process) == "ready 50000 True"


def test_the_metrics_of_the_planes_are_those_of_the_process(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    planes = {"discovery": f"file://{tmp_path}", "request_plane": "tcp://127.0.0.1:0", "event_bus": "zmq://127.0.0.1:0"}
    with program("well", repr({**planes, "status_port": 0, "ready_fd": writing}), pass_fds=(writing,)) as process:
        assert next_line(process) == "ready"
        status_url = json.loads(os.read(reading, 4096))["status_url"]
        text = urllib.request.urlopen(f"{status_url}/metrics", timeout=LIMIT_S).read().decode()
    os.close(reading)
    os.close(writing)
    names = {
        value
        for module in (_bus_metrics, _discovery_metrics, _plane_metrics)
        for value in vars(module).values()
        if isinstance(value, str) and value.startswith("dynamo_runtime_") and value != _bus_metrics.BROKERED
    }
    assert len(names) >= 18
    found = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    assert names <= found
    assert 'dynamo_runtime_discovery_connected{dynamo_component="runtime",dynamo_namespace="dynamo"} 1.0' in text
