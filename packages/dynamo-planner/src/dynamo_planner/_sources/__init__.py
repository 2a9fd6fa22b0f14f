"""Where observations come from, one source a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from dynamo_core.planning import Observation, PoolState


class Source(Protocol):
    """Something that knows the traffic."""

    @property
    def lost_reports(self) -> int:
        """Reports that were lost or could not be read since the start."""
        ...

    async def run(self) -> None:
        """Collect until closed or cancelled."""
        ...

    async def observe(self, pools: Mapping[str, PoolState]) -> Observation:
        """Return what was seen since the last call, with the given pools. What is missing is absent or stale."""
        ...

    async def close(self) -> None:
        """Stop collecting. Idempotent."""
        ...
