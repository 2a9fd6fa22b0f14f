from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_core.errors import ConfigurationError
from dynamo_kvbm._lab.future import NEVER, next_turns, next_uses
from dynamo_kvbm._lab.simulator import Outcome, simulate
from dynamo_kvbm._lab.trace import TraceRequest, read_trace

TRACE = Path(__file__).parents[2] / "data" / "mooncake_conversation_1500.jsonl.gz"
POLICIES = ["lru", "arc", "s3fifo", "multi-lru", "lineage", "priority", "hinted", "oracle"]


def requests(*paths: tuple[int, ...]) -> list[TraceRequest]:
    return [TraceRequest(float(i), path, 10 * len(path)) for i, path in enumerate(paths)]


@pytest.fixture(scope="module")
def trace() -> list[TraceRequest]:
    return read_trace(TRACE)


def test_lru_by_hand() -> None:
    trace = requests((1, 2, 3), (1, 2, 4), (5, 6), (1, 2, 3))
    # 1 2 3 | hit 1 2, evict 3 for 4 | evict 4 for 5 6, and 2 | hit 1
    assert simulate(trace, "lru", 3) == Outcome("lru", 3, 3, 11, 80, 4)


def naive_lru(trace: list[TraceRequest], capacity: int) -> int:
    """Ages in a dictionary, last block of a path first, the oldest block out."""
    ages: dict[int, int] = {}
    hits = tick = 0
    for request in trace:
        hit = 0
        while hit < len(request.path) and request.path[hit] in ages:
            hit += 1
        hits += hit
        for block in reversed(request.path):
            tick += 1
            ages[block] = tick
        for block in sorted(ages, key=ages.__getitem__)[: max(0, len(ages) - capacity)]:
            del ages[block]
    return hits


def test_lru_equals_a_naive_one(trace: list[TraceRequest]) -> None:
    some = trace[:400]
    longest = max(len(request.path) for request in some)
    for capacity in (longest, 2 * longest):
        assert simulate(some, "lru", capacity).hit_blocks == naive_lru(some, capacity)


def test_a_cache_that_holds_all_hits_all_that_came_before(trace: list[TraceRequest]) -> None:
    seen: set[int] = set()
    hits = 0
    for request in trace:
        hits += sum(block in seen for block in request.path)
        seen |= set(request.path)
    assert {simulate(trace, policy, len(seen)).hit_blocks for policy in ("lru", "arc", "oracle")} == {hits}


@pytest.mark.parametrize(
    ("policy", "percent"),
    [("lru", 3.94), ("arc", 4.15), ("s3fifo", 4.92), ("multi-lru", 6.65), ("hinted", 13.43), ("oracle", 17.38)],
)
def test_hit_rates_of_the_recorded_trace_stay(trace: list[TraceRequest], policy: str, percent: float) -> None:
    assert simulate(trace, policy, 1000).hit_percent == pytest.approx(percent, abs=0.005)


def test_hints_close_a_third_of_the_gap_to_the_oracle(trace: list[TraceRequest]) -> None:
    lru, hinted, oracle = (simulate(trace, policy, 1000).hit_percent for policy in ("lru", "hinted", "oracle"))
    assert hinted - lru >= (oracle - lru) / 3


@given(
    paths=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=30),
    blocks=st.integers(1, 8),
)
def test_no_policy_beats_the_oracle_or_holds_more_than_it_may(paths: list[list[int]], blocks: int) -> None:
    # A block id stands for the whole prefix.
    trace = requests(*(tuple(hash(tuple(path[: i + 1])) for i in range(len(path))) for path in paths))
    best = simulate(trace, "oracle", len(paths) * 5).hit_blocks
    assert all(simulate(trace, policy, blocks).hit_blocks <= best for policy in POLICIES)


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(ConfigurationError, match="clairvoyant"):
        simulate(requests((1,)), "clairvoyant", 3)


def test_progress_is_told(trace: list[TraceRequest]) -> None:
    told: list[tuple[int, int]] = []
    simulate(trace, "lru", 10, progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 1500), (500, 1500), (1000, 1500)]


def test_the_future_of_blocks_and_sessions() -> None:
    trace = requests((1, 2, 3), (1, 9), (1, 2, 4, 5), (1, 2, 4, 5, 6))
    assert next_uses(trace) == [[1, 2, NEVER], [2, NEVER], [3, 3, 3, 3], [NEVER] * 5]
    # The second request shares the first block only, which is no session.
    assert next_turns(trace) == [2.0, None, 3.0, None]
