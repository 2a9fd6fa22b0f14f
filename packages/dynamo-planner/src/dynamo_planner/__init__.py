"""Autoscaler: observation in, decision with its reason out.

``RatePlanner`` is the pure decision maker, ``create_planner`` builds it from ``PlannerSettings``, and
``ConstantPredictor`` is the simplest forecaster. The component that ticks in a process is found by entry point.
"""

from dynamo_planner._capacity import RateCapacity
from dynamo_planner._component import create_planner
from dynamo_planner._predict.constant import ConstantPredictor
from dynamo_planner._settings import PlannerSettings
from dynamo_planner._state import Limits, RatePlanner, Reason

__all__ = [
    "ConstantPredictor",
    "Limits",
    "PlannerSettings",
    "RateCapacity",
    "RatePlanner",
    "Reason",
    "create_planner",
]
