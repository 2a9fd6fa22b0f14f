"""Autoscaler: observation in, decision with its reason out.

``create_planner`` builds the pure planner from ``PlannerSettings``; ``SlaPlanner`` is what it returns. ``RateCapacity``
and ``ConstantPredictor`` are the simplest capacity model and forecaster; the others are found by entry point, and so is
the component that ticks in a process.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynamo_planner._build import create_planner
    from dynamo_planner._capacity import RateCapacity
    from dynamo_planner._predict.constant import ConstantPredictor
    from dynamo_planner._reasons import Reason
    from dynamo_planner._settings import PlannerSettings
    from dynamo_planner._state import SlaPlanner

__all__ = [
    "ConstantPredictor",
    "PlannerSettings",
    "RateCapacity",
    "Reason",
    "SlaPlanner",
    "create_planner",
]

_HOMES = {
    "ConstantPredictor": "dynamo_planner._predict.constant",
    "PlannerSettings": "dynamo_planner._settings",
    "RateCapacity": "dynamo_planner._capacity",
    "Reason": "dynamo_planner._reasons",
    "SlaPlanner": "dynamo_planner._state",
    "create_planner": "dynamo_planner._build",
}


def __getattr__(name: str) -> Any:
    # NumPy and the settings take half a second, which a plug-in that only brings a forecaster need not wait for.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
