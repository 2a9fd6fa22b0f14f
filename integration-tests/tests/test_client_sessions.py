"""Scripted sessions of stock clients against `dynamo serve`: the versions installed here, and earlier ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import dynamo_integration_tests.sessions
from dynamo_integration_tests.sessions import anthropic_session, openai_session

MODEL = "tinylm"
FOLDER = Path(dynamo_integration_tests.sessions.__file__).parent
STEPS = {"openai": openai_session.STEPS, "anthropic": anthropic_session.STEPS}


def run(client: str, url: str, *command: str, timeout_s: float) -> None:
    script = str(FOLDER / f"{client}_session.py")
    found = subprocess.run(
        [*command, script, url, MODEL], capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    version, *steps = found.stdout.splitlines()
    print(version)
    assert steps == [f"passed {step}" for step in STEPS[client]]


@pytest.mark.parametrize("client", STEPS)
def test_the_installed_client(client: str, serve_url: str) -> None:
    run(client, serve_url, sys.executable, timeout_s=50)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("version", ["openai<3", "openai<2", "anthropic<2", "anthropic<1", "anthropic<0.60"])
def test_earlier_versions(version: str, serve_url: str) -> None:
    """Each in an environment of its own, which uv makes from the package index."""
    uv = ["uv", "run", "--isolated", "--no-project", "--quiet", "--with", version, "--with", "pydantic", "python"]
    run(version.partition("<")[0], serve_url, *uv, timeout_s=300)
