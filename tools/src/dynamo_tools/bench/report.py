"""Printing figures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from dynamo_tools.bench.figure import Figure
from dynamo_tools.table import table

_HEADER = ("figure", "median", "min … max", "unit", "better", "runs", "rival", "its value", "limit")


def json_lines(figures: Sequence[Figure]) -> str:
    """One JSON object a line."""
    return "\n".join(json.dumps(dataclasses.asdict(figure)) for figure in figures)


def text(figures: Sequence[Figure]) -> str:
    """A table for people."""
    return table(_HEADER, [_row(figure) for figure in figures])


def _row(figure: Figure) -> tuple[str, ...]:
    return (
        figure.figure,
        _number(figure.value),
        f"{_number(figure.min)} … {_number(figure.max)}",
        figure.unit,
        figure.better,
        str(figure.runs),
        figure.rival or "-",
        _number(figure.rival_value),
        _number(figure.limit_value),
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
