"""File discovery keeps the contract."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynamo_core import plugins
from dynamo_core.clock import SystemClock
from dynamo_core.discovery import Discovery
from dynamo_core.testing import DiscoveryConformance


class FileSuite:
    @pytest.fixture(autouse=True)
    def _root(self, tmp_path: Path) -> None:
        self._path = tmp_path / "discovery"

    async def make_discovery(self) -> Discovery:
        factory = plugins.load("discoveries", "file")
        return factory(f"file://{self._path}", clock=SystemClock(), options={})


class TestFile(FileSuite, DiscoveryConformance):
    pass
