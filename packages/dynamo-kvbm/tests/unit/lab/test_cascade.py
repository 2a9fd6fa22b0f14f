from __future__ import annotations

from pathlib import Path

import pytest

from dynamo_kvbm._lab.cascade import CascadeOutcome, SimulatedTier, simulate_cascade
from dynamo_kvbm._lab.simulator import simulate
from dynamo_kvbm._lab.trace import TraceRequest, read_trace

TRACE = Path(__file__).parents[2] / "data" / "mooncake_conversation_1500.jsonl.gz"


def test_one_tier_is_the_plain_simulation() -> None:
    trace = read_trace(TRACE, limit=500)
    alone = simulate_cascade(trace, "lru", [SimulatedTier("host", 1000)])
    assert alone.hits == (simulate(trace, "lru", 1000).hit_blocks,)


def test_what_the_host_evicts_is_found_below() -> None:
    trace = [TraceRequest(float(i), path, 100) for i, path in enumerate([(1, 2), (3, 4), (1, 2)])]
    tiers = [SimulatedTier("host", 2), SimulatedTier("disk", 2, fetch_ms=50)]
    found = simulate_cascade(trace, "lru", tiers)
    assert found == CascadeOutcome(tuple(tiers), (0, 2), 6, 200, 3)
    assert found.mean_wait_s(1000) == pytest.approx((0.1 + 0.2) / 3)


@pytest.mark.parametrize("policy", ["lru", "arc", "s3fifo"])
def test_a_cascade_finds_more_than_its_nearest_tier(policy: str) -> None:
    trace = read_trace(TRACE, limit=800)
    two = simulate_cascade(trace, policy, [SimulatedTier("host", 500), SimulatedTier("disk", 5000)])
    assert sum(two.hits) > simulate(trace, policy, 500).hit_blocks
    assert all(two.hits)
