"""What generations share, and when things happen in one."""

from __future__ import annotations

from dataclasses import dataclass

from dynamo_core.clock import Clock
from dynamo_core.planes import RequestPlane
from dynamo_frontend._catalog import Catalog
from dynamo_frontend._metrics import FrontendMetrics


@dataclass(frozen=True, slots=True)
class GenerationServices:
    """What every generation uses.

    Attributes:
        catalog: Where workers are.
        plane: How they are reached.
        clock: Time.
        metrics: Counts.
        migration_limit: Most continuations.
        timeout_s: Most seconds of one generation, over all its workers; None for no limit.
    """

    catalog: Catalog
    plane: RequestPlane
    clock: Clock
    metrics: FrontendMetrics
    migration_limit: int = 3
    timeout_s: float | None = None


@dataclass(slots=True)
class GenerationTiming:
    """When things happened, in monotonic seconds."""

    started_s: float
    first_token_s: float | None = None
    last_token_s: float | None = None
    ended_s: float | None = None
