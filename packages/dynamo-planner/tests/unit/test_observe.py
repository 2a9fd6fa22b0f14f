"""Counting arrivals from what ended and what is in flight."""

from __future__ import annotations

from dynamo_core.load import ReportedLoad
from dynamo_core.planning import Observation, PoolState, TrafficStats
from dynamo_planner._observe import Arrivals

ENDED = TrafficStats("m", 10.0, requests=100, prompt_tokens=1000, output_tokens=200)


def counted(
    arrivals: Arrivals, in_flight: dict[str, int], *, draining: int = 0, stale: tuple[str, ...] = ()
) -> TrafficStats:
    loads = {worker: ReportedLoad(active_requests=count) for worker, count in in_flight.items()}
    pools = {"worker": PoolState(ready=len(loads), draining=draining, desired=len(loads))}
    return arrivals.counted(ENDED, Observation(0.0, (ENDED,), pools, loads, stale=stale), pools)


def test_growth_in_flight_is_what_arrived_and_did_not_end() -> None:
    arrivals = Arrivals()
    counted(arrivals, {"a": 50})
    grown = counted(arrivals, {"a": 80, "b": 20})
    assert (grown.requests, grown.prompt_tokens, grown.output_tokens) == (150, 1500, 300)
    assert counted(arrivals, {"a": 60, "b": 10}).requests == 70


def test_what_ended_counts_while_workers_leave_or_reports_are_missing() -> None:
    for in_flight, changes in (
        ({"a": 90}, {"draining": 1}),
        ({"b": 90}, {}),
        ({"a": 90}, {"stale": ("loads",)}),
        ({}, {}),
    ):
        arrivals = Arrivals()
        counted(arrivals, {"a": 50})
        assert counted(arrivals, in_flight, **changes) is ENDED  # type: ignore[arg-type] # keywords of one helper
