"""What a benchmark reports: one figure with its spread and what it is compared with."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Figure:
    """One measured figure; ``--json`` prints exactly these fields.

    Attributes:
        figure: Its name.
        value: Median of the runs.
        unit: Unit of every value.
        better: Which direction is better.
        rival: What it is compared with, or None.
        rival_value: The rival's median on the same machine; None if the rival could not be installed or run.
        limit_value: What the hardware or the simplest possible program reaches, or None if that is not measured.
        runs: Number of runs.
        min: Lowest run.
        max: Highest run.
    """

    figure: str
    value: float
    unit: str
    better: Literal["lower", "higher"]
    rival: str | None
    rival_value: float | None
    limit_value: float | None
    runs: int
    min: float
    max: float

    @classmethod
    def of(  # noqa: PLR0913 - one keyword for each field that is not computed
        cls,
        figure: str,
        runs: Sequence[float],
        *,
        unit: str,
        better: Literal["lower", "higher"],
        rival: str | None = None,
        rival_value: float | None = None,
        limit_value: float | None = None,
    ) -> Figure:
        """Summarise runs."""
        low, high, middle = min(runs), max(runs), statistics.median(runs)
        return cls(figure, middle, unit, better, rival, rival_value, limit_value, len(runs), low, high)
