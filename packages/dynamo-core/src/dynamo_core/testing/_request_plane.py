"""Conformance of request planes."""

from __future__ import annotations

from dynamo_core.testing._plane_calls import PlaneCalls
from dynamo_core.testing._plane_ends import PlaneEnds


class RequestPlaneConformance(PlaneCalls, PlaneEnds, suite=True):
    """Every ``RequestPlane`` must pass this.

    Attributes:
        max_payload_bytes: The plane's limit for one payload, if it has one.
    """
