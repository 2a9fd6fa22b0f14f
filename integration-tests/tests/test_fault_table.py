"""The table of faults names metrics that a process has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dynamo_core.telemetry import Metrics
from dynamo_runtime import Runtime, RuntimeSettings

PAGES = Path(__file__).parents[2] / "docs" / "operations"
NAME = re.compile(r"`(dynamo_runtime_[a-z_]+)")


@pytest.mark.parametrize("page", ["faults.md", "sizing.md"])
async def test_metrics_of_the_page_exist(page: str, tmp_path: Path) -> None:
    settings = RuntimeSettings(
        discovery=f"file://{tmp_path}", request_plane="tcp://127.0.0.1:0", event_bus="zmq://127.0.0.1:0"
    )
    metrics = Metrics()
    async with Runtime(settings, metrics=metrics):
        families = {family.name for family in metrics.registry.collect()}
    named = set(NAME.findall((PAGES / page).read_text(encoding="utf-8")))
    assert named
    assert {name.removesuffix("_total") for name in named} <= families
