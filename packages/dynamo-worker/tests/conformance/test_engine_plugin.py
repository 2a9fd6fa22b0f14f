"""An engine is certified from the command line, without test code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BROKEN = '''
from dynamo_worker import MockEngine


class Forgetful(MockEngine):
    """Never says how it ended."""

    async def generate(self, request, context):
        async for chunk in super().generate(request, context):
            if chunk.finish_reason is None:
                yield chunk
'''


def certify(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "dynamo_core.testing.engine_plugin", "-q", *flags]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=50, check=False)


def test_an_installed_engine_passes(tmp_path: Path) -> None:
    done = certify(tmp_path, "--engine", "mock", "--engine-args=--speedup-ratio 4", "-k", "greedy or ends_once")
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def test_a_broken_engine_fails(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    done = certify(tmp_path, "--engine", "broken:Forgetful", "-k", "ends_once")
    assert done.returncode == 1, done.stdout
    assert "test_every_choice_ends_once_and_last" in done.stdout


@pytest.mark.parametrize("name", ["no_such_module:Engine", "dynamo_worker:NoSuchEngine", "no-such-engine"])
def test_an_engine_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    done = certify(tmp_path, "--engine", name)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert name in done.stderr
