"""Blocks that left the device come back from a block manager, and the output stays the same."""

import pytest
from dense_oracle import DenseModel
from host_tier import HostTier
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import CoreRun, RecordingSink, answer, build_core, generate_request

from dynamo_core.enums import Tier
from dynamo_worker._reference._core import EngineCore
from dynamo_worker._reference._events import BlockEvents

PROMPT = list(range(100, 150))
OTHERS = [list(range(start, start + 60)) for start in (400, 600, 800)]


def small_core(tier: HostTier, sink: RecordingSink | None = None) -> EngineCore:
    events = BlockEvents()
    events.sink = sink
    return build_core(events, tier, num_blocks=6, max_model_len=96, block_size=16)


def evict_everything(core: EngineCore) -> None:
    for prompt in OTHERS:
        answer(core, generate_request(prompt, max_tokens=2))


@pytest.mark.parametrize("on_evict_only", [False, True])
def test_an_evicted_prefix_is_onboarded(oracle: DenseModel, on_evict_only: bool) -> None:
    tier = HostTier(64, on_evict_only=on_evict_only)
    core = small_core(tier)
    first = answer(core, generate_request(PROMPT))
    evict_everything(core)
    second = answer(core, generate_request(PROMPT))
    assert tier.onboarded == 3
    assert second.usage is not None
    assert second.usage.cached_tokens == 48
    assert second.tokens == first.tokens
    oracle.assert_greedy(PROMPT, second.tokens[0])


def test_onboarding_stops_at_a_damaged_block(oracle: DenseModel) -> None:
    tier = HostTier(64)
    core = small_core(tier)
    answer(core, generate_request(PROMPT))
    evict_everything(core)
    hashes = core.activate(generate_request(PROMPT), 0).sequences[0].descriptors(3)
    tier.damaged = {hashes[1].sequence_hash}
    found = answer(core, generate_request(PROMPT))
    assert found.usage is not None
    assert found.usage.cached_tokens == 16
    oracle.assert_greedy(PROMPT, found.tokens[0])


def test_both_tiers_are_reported() -> None:
    sink = RecordingSink()
    core = small_core(HostTier(4), sink)
    answer(core, generate_request(PROMPT))
    stored = {tier: hashes for name, tier, hashes in sink.events if name == "stored"}
    assert stored[Tier.DEVICE] == stored[Tier.HOST]
    evict_everything(core)
    assert set(stored[Tier.DEVICE]) <= {
        h for name, t, hs in sink.events if (name, t) == ("removed", Tier.HOST) for h in hs
    }


def test_events_replay_to_what_the_device_holds() -> None:
    sink = RecordingSink()
    core = small_core(HostTier(64), sink)
    for prompt in [PROMPT, *OTHERS, PROMPT]:
        answer(core, generate_request(prompt, max_tokens=20))
    present: set[int] = set()
    for name, tier, hashes in sink.events:
        if tier is Tier.DEVICE and name == "stored":
            assert present.isdisjoint(hashes)
            present.update(hashes)
        elif tier is Tier.DEVICE:
            assert present.issuperset(hashes)
            present.difference_update(hashes)
    assert len(present) == core.pool.num_cached_blocks
    assert all(core.pool.get_computed_blocks([value]) for value in present)


@settings(max_examples=30, deadline=None)
@given(
    capacity=st.integers(1, 12),
    on_evict_only=st.booleans(),
    prompts=st.lists(st.sampled_from([PROMPT, PROMPT[:20], [*PROMPT[:33], 7], *OTHERS]), min_size=2, max_size=10),
)
def test_offload_never_changes_the_output(
    oracle: DenseModel, capacity: int, on_evict_only: bool, prompts: list[list[int]]
) -> None:
    run = CoreRun(small_core(HostTier(capacity, on_evict_only=on_evict_only)))
    found = [run.submit(generate_request(prompt, max_tokens=12)) for prompt in prompts]
    run.finish()
    for prompt, item in zip(prompts, found, strict=True):
        oracle.assert_greedy(prompt, item.tokens[0])
