"""``dynamo-planner profile`` measures a live ``dynamo serve``, and a planner plans with what it wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dynamo_integration_tests.stack import DynamoProcess


@pytest.mark.timeout(120)
def test_a_served_model_is_profiled(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "dynamo-planner"), "profile", "--model", "tinylm"]
    sizes = ["--isl", "32,128", "--concurrency", "1,4", "--osl", "8", "--out", str(tmp_path / "profile")]
    with DynamoProcess(["serve", "--engine", "mock", "--model", "tinylm", "--http-port", "0"]) as serve:
        url = serve.wait_for_url()
        done = subprocess.run([*command, "--url", url, *sizes], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert serve.interrupt() == 0, serve.output
    profile = json.loads((tmp_path / "profile" / "profile.json").read_text())
    assert [(point["isl"], point["concurrency"]) for point in profile["points"]] == [
        (32, 1),
        (32, 4),
        (128, 1),
        (128, 4),
    ]
    assert all(point["ttft_ms"] > 0 and point["itl_ms"] > 0 for point in profile["points"])
    assert "4/4" in done.stderr
