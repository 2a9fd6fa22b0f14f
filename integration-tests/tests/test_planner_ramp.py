"""The documented command that raises and lowers the load before ``dynamo serve --planner`` and draws what happens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(240)
def test_workers_follow_a_ramp_and_no_request_fails(tmp_path: Path) -> None:
    page = tmp_path / "ramp.html"
    # The load rises in half the documented time, which asks no less of the planner.
    command = [sys.executable, "-m", "dynamo_tools.bench.planner_ramp", "--out", str(page), "--ramp-s", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=220, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert (told["workers"][0], max(told["workers"]), told["workers"][-1]) == (1, 4, 1)
    assert told["failed"] == 0
    assert told["requests"] > 100
    assert page.read_text().count("<svg") == 3
