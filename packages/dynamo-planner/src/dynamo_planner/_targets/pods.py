"""What the pods of a role say about it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from dynamo_core.planning import PoolState

FAILING = frozenset(
    {"CrashLoopBackOff", "CreateContainerConfigError", "ErrImagePull", "ImagePullBackOff", "InvalidImageName"}
)
STARTS_KEPT = 16

Pod = Mapping[str, Any]


def pool_of(pods: Sequence[Pod], desired: int) -> tuple[PoolState, str]:
    """Return the pool that these pods make, and in words what keeps some from getting ready.

    A pod that finds no node is starting, however long: the planner's patience decides when that is no progress. One
    whose container does not run is failed. Replicas that have no pod yet are starting too.
    """
    leaving = [pod for pod in pods if pod["metadata"].get("deletionTimestamp")]
    staying = [pod for pod in pods if not pod["metadata"].get("deletionTimestamp")]
    ready = [pod for pod in staying if _condition(pod, "Ready").get("status") == "True"]
    failed = [pod for pod in staying if pod not in ready and _failing(pod)]
    state = PoolState(
        ready=len(ready),
        starting=max(0, max(len(staying), desired) - len(ready) - len(failed)),
        draining=len(leaving),
        desired=desired,
        failed=len(failed),
        startup_s=_startup_s(ready),
    )
    return state, _trouble(staying)


def _condition(pod: Pod, kind: str) -> Mapping[str, Any]:
    conditions = pod.get("status", {}).get("conditions") or []
    return next((item for item in conditions if item.get("type") == kind), {})


def _failing(pod: Pod) -> str:
    """Return why a pod does not run on its own account; empty if it may still start."""
    status = pod.get("status", {})
    if status.get("phase") == "Failed":
        return status.get("reason") or "Failed"
    waits = [(item.get("state") or {}).get("waiting") or {} for item in status.get("containerStatuses") or []]
    return next((wait["reason"] for wait in waits if wait.get("reason") in FAILING), "")


def _trouble(pods: Sequence[Pod]) -> str:
    found: list[str] = []
    for pod in pods:
        scheduled = _condition(pod, "PodScheduled")
        if scheduled.get("status") == "False":
            found.append(f"{scheduled.get('reason', 'Unschedulable')}: {scheduled.get('message', '')}".strip())
        elif reason := _failing(pod):
            found.append(reason)
    return "; ".join(f"{found.count(text)} x {text}" for text in sorted(set(found)))


def _startup_s(ready: Sequence[Pod]) -> float | None:
    """Return the median time from creation to readiness of the newest pods; None without any."""
    spans: list[tuple[float, float]] = []
    for pod in ready:
        created, since = pod["metadata"].get("creationTimestamp"), _condition(pod, "Ready").get("lastTransitionTime")
        if created and since:
            started, served = _seconds(created), _seconds(since)
            spans.append((started, max(0.0, served - started)))
    newest = [span for _, span in sorted(spans)[-STARTS_KEPT:]]
    return statistics.median(newest) if newest else None


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
