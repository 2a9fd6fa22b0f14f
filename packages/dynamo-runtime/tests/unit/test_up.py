"""``dynamo up`` with real processes, running components that a distribution on the path provides."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dynamo_core.errors import ConfigurationError
from dynamo_runtime._graph import GraphFile
from dynamo_runtime._settings import RuntimeSettings
from dynamo_runtime._up import graph_specs

LIMIT_S = 40.0

TOY = """
from dynamo_core.errors import ConfigurationError
from dynamo_core.settings import DynamoSettings

class ToySettings(DynamoSettings):
    component = "toy"
    sound: str = "beep"

class Toy:
    name = "toy"
    def __init__(self, sound): self.sound = sound
    async def start(self):
        if self.sound == "none":
            raise ConfigurationError("option --sound has the value 'none': a toy makes a sound")
        print("started", self.sound, flush=True)
    async def drain(self, timeout_s): print("drained", flush=True)
    async def stop(self): pass

class Plugin:
    settings_types = (ToySettings,)
    takes_extra_args = False
    def create(self, context, settings, extra_args): return Toy(settings[0].sound)

plugin = Plugin()
"""

GRAPH = """
services:
  left: {component: toy, replicas: 2, args: {sound: boing}}
  right: {component: toy, env: {DYN_TOY_SOUND: clack}}
"""


@pytest.fixture
def toys(tmp_path: Path) -> dict[str, str]:
    """Environment in which a distribution provides the component ``toy``."""
    info = tmp_path / "site" / "dynamo_toys-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dynamo-toys\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[dynamo_core.components]\ntoy = dynamo_toys:plugin\n", encoding="utf-8")
    (info.parent / "dynamo_toys.py").write_text(TOY, encoding="utf-8")
    return {**os.environ, "PYTHONPATH": str(info.parent)}


@contextmanager
def up(graph: Path, env: dict[str, str], *flags: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "dynamo_runtime", "up", str(graph), "--log-level", "error", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read_until(process: subprocess.Popen[str], part: str) -> list[str]:
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if part in line:
            return lines
    raise AssertionError(f"{part!r} did not appear: {lines}")


def test_a_graph_starts_is_scaled_from_outside_and_drains_in_order(toys: dict[str, str], tmp_path: Path) -> None:
    graph = tmp_path / "graph.yaml"
    graph.write_text(GRAPH, encoding="utf-8")
    discovery = f"file://{tmp_path}/d"
    with up(graph, toys, "--discovery", discovery) as process:
        started = read_until(process, "Ctrl-C to stop.")
        assert {"left-1 | started boing", "left-2 | started boing", "right-1 | started clack"} <= set(started)

        request = ("dynamo.supervisor.scale", '{"replicas": {"right": 2}}')
        answer = subprocess.run(
            [sys.executable, "-m", "dynamo_runtime", "call", *request, "--discovery", discovery],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        assert '"desired":2' in answer.stdout, answer.stderr
        read_until(process, "right-2 | started clack")

        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0
        ended = [line for line in output.splitlines() if "drained" in line]
        assert [line.split("-")[0] for line in ended] == ["right", "right", "left", "left"]


def test_a_child_that_cannot_work_is_one_line_and_status_2(toys: dict[str, str], tmp_path: Path) -> None:
    graph = tmp_path / "graph.yaml"
    graph.write_text("services:\n  mute: {component: toy, args: {sound: none}}\n", encoding="utf-8")
    with up(graph, toys) as process:
        output, _ = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 2
        assert output == "dynamo: error: mute-1: option --sound has the value 'none': a toy makes a sound\n"


def test_a_component_that_is_not_installed_is_named_with_its_line(tmp_path: Path) -> None:
    graph = tmp_path / "graph.yaml"
    graph.write_text("services:\n  a:\n    component: warp-drive\n", encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"graph\.yaml:3: services\.a\.component: .*'warp-drive'"):
        graph_specs(GraphFile.read(graph), RuntimeSettings())
