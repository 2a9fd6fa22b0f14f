"""Autoscaler: observation in, decision with its reason out.

``create_planner`` builds the pure planner from ``PlannerSettings``; ``SlaPlanner`` is what it returns. ``RateCapacity``
and ``ConstantPredictor`` are the simplest capacity model and forecaster; the others are found by entry point, and so is
the component that ticks in a process.
"""

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
