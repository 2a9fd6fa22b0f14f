"""The cluster driver, with every process of this environment."""

import sys
from pathlib import Path

import pytest

from dynamo_tools.compat import cluster

HERE = Path(sys.executable)


@pytest.mark.timeout(180)
def test_a_stream_survives_its_worker():
    assert cluster.served(HERE, [HERE, HERE]) is None


@pytest.mark.timeout(180)
def test_a_planner_scales_another_process_s_supervisor():
    assert cluster.planned(HERE, HERE) is None


@pytest.mark.timeout(180)
def test_without_a_second_worker_the_loss_is_reported():
    problem = cluster.served(HERE, [HERE])
    assert problem is not None
    assert "--- frontend.log" in problem


def test_a_process_that_does_not_start_is_reported(tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such release\n")
    broken.chmod(0o755)
    problem = cluster.served(broken, [broken])
    assert problem is not None
    assert "is not ready" in problem
    assert "no such release" in problem
