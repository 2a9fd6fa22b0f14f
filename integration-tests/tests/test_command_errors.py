"""What goes wrong at the command line is one clear line with the remedy and exit status 2."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest


def run(arguments: Sequence[str], env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dynamo_runtime", *arguments],
        capture_output=True,
        text=True,
        timeout=40,
        stdin=subprocess.DEVNULL,
        env=env,
    )


def assert_one_line(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    output = (result.stdout + result.stderr).strip()
    assert result.returncode == 2, output
    assert "Traceback" not in output
    assert len(output.splitlines()) == 1, output
    for part in parts:
        assert part in output


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["serv"], ["serv", "serve"]),
        (["serve", "--http-prt", "1"], ["--http-prt", "--http-port"]),
        (["serve", "--http-port", "many"], ["--http-port", "many"]),
        (["serve", "/no/such/model"], ["/no/such/model"]),
        (["serve", "--in-process", "/no/such/model"], ["/no/such/model"]),
        (["frontend", "--migration-limit", "-1"], ["--migration-limit", "-1"]),
        (["worker", "--engine", "warp"], ["warp", "reference"]),
        (["worker", "--engine", "reference", "--modle", "x"], ["--modle", "--model"]),
        (["worker", "--engine", "reference", "--model", "/no/such/model"], ["/no/such/model", "--model"]),
        (["planner", "--min-replicas", "9", "--max-replicas", "2"], ["9", "2"]),
        (["up", "/no/such/graph.yaml"], ["/no/such/graph.yaml"]),
        (["worker", "--discovery", "carrier-pigeon://x"], ["carrier-pigeon"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_one_line(arguments: list[str], parts: list[str]) -> None:
    assert_one_line(run(arguments), *parts)


def test_a_busy_port_names_the_port_and_the_flag() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        assert_one_line(run(["serve", "--http-port", port]), port, "--http-port")
        assert_one_line(run(["serve", "--in-process", "--http-port", port]), port, "--http-port")


def test_an_unknown_configuration_key_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "dynamo.yaml"
    path.write_text("http-prot: 8000\n")
    assert_one_line(run(["serve", "--config", str(path)]), "http_prot", "http_port", str(path))


def test_a_graph_error_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "graph.yaml"
    path.write_text("services:\n  web:\n    component: frontend\n    replicass: 2\n")
    assert_one_line(run(["up", str(path)]), f"{path}:4", "replicass", "replicas")
