"""A scripted session of the stock Triton client against `dynamo serve`: the installed version, and an earlier one."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dynamo_integration_tests.sessions
from dynamo_integration_tests.stack import DynamoProcess

SCRIPT = Path(dynamo_integration_tests.sessions.__file__).parent / "triton_session.py"
STEPS = ("health", "metadata", "infer", "stream", "errors")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with DynamoProcess(["serve", "--http-port", "0"], {"DYN_FRONTEND_KSERVE_GRPC_PORT": str(port)}) as serve:
        serve.wait_for_url()
        yield f"127.0.0.1:{port}"
        assert serve.interrupt() == 0, serve.output


def run(address: str, *python: str, timeout_s: float) -> None:
    command = [*python, str(SCRIPT), address, "tinylm"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    version, *steps = found.stdout.splitlines()
    print(version)
    assert steps == [f"passed {step}" for step in STEPS]


def test_the_installed_client(address: str) -> None:
    run(address, sys.executable, timeout_s=50)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_an_earlier_version(address: str) -> None:
    """It has had one major version for years, so an early one of that; in an environment of its own."""
    uv = ["uv", "run", "--isolated", "--no-project", "--quiet", "--with", "tritonclient[grpc]<2.50", "python"]
    run(address, *uv, timeout_s=300)
