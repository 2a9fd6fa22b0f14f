"""What requests say of their blocks reaches a block manager that listens, at the moment it is true."""

from collections.abc import Sequence

from host_tier import HostTier
from parts import CoreRun, answer, build_core, generate_request

from dynamo_core.kv import BlockHints
from dynamo_core.requests import RoutingHints
from dynamo_worker._reference import _block_hints
from dynamo_worker._reference._core import EngineCore

BLOCK_TOKENS = 16
PROMPT = list(range(100, 150))
WHOLE_SESSION = BlockHints(next_turn_s=9.0, priority=3, tenant="a")


class ListeningTier(HostTier):
    """A host tier that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(64)
        self.hinted: list[tuple[list[int], BlockHints]] = []
        self.prefetched: list[list[int]] = []

    def hint(self, sequence_hashes: Sequence[int], hints: BlockHints) -> None:
        self.hinted.append((list(sequence_hashes), hints))

    def prefetch(self, sequence_hashes: Sequence[int]) -> None:
        self.prefetched.append(list(sequence_hashes))


def small_core(tier: HostTier, **options: object) -> EngineCore:
    return build_core(None, tier, num_blocks=6, max_model_len=96, block_size=BLOCK_TOKENS, **options)


def hashes(core: EngineCore, tokens: Sequence[int]) -> list[int]:
    sequence = core.activate(generate_request(tokens), 0).sequences[0]
    return [block.sequence_hash for block in sequence.descriptors(len(tokens) // BLOCK_TOKENS)]


def test_worth_and_tenant_are_told_on_arrival_and_the_future_at_the_end() -> None:
    tier = ListeningTier()
    core = small_core(tier)
    found = answer(core, generate_request(PROMPT, max_tokens=20, block_hints=WHOLE_SESSION))
    (before, on_arrival), (path, at_end) = tier.hinted
    assert before == hashes(core, PROMPT)
    assert on_arrival == BlockHints(priority=3, tenant="a")
    assert path == hashes(core, [*PROMPT, *found.tokens[0]])
    assert len(path) > len(before), "the answer's blocks belong to the session too"
    assert at_end == WHOLE_SESSION


def test_a_session_is_not_ended_before_its_last_request_is() -> None:
    tier = ListeningTier()
    answer(small_core(tier), generate_request(PROMPT, block_hints=BlockHints(session_ended=True)))
    assert [hints for _, hints in tier.hinted] == [BlockHints(session_ended=True)]


def test_an_aborted_request_tells_its_end_too() -> None:
    tier = ListeningTier()
    core = small_core(tier)
    active = core.activate(generate_request(PROMPT, block_hints=BlockHints(session_ended=True)), 0)
    core.add(active)
    core.abort(active)
    assert [path for path, _ in tier.hinted] == [hashes(core, PROMPT)]


def test_blocks_count_to_the_tenant_of_the_route_unless_the_hints_name_one() -> None:
    tier = ListeningTier()
    core = small_core(tier)
    routed = RoutingHints(tenant="routed")
    answer(core, generate_request(PROMPT, routing=routed))
    answer(core, generate_request(PROMPT, routing=routed, block_hints=BlockHints(priority=1)))
    answer(core, generate_request(PROMPT, routing=routed, block_hints=BlockHints(tenant="named")))
    assert [hints.tenant for _, hints in tier.hinted] == ["routed"] * 4 + ["named"] * 2


def test_without_hints_nothing_is_told() -> None:
    tier = ListeningTier()
    core = small_core(tier)
    answer(core, generate_request(PROMPT))
    answer(core, generate_request(PROMPT[:8], max_tokens=4, block_hints=WHOLE_SESSION))
    assert tier.hinted == [], "a request without a full block has none to speak of"


def test_what_waits_is_prefetched_once_beyond_what_the_device_holds() -> None:
    tier = ListeningTier()
    core = small_core(tier, max_num_seqs=1)
    shared, other = PROMPT[:BLOCK_TOKENS], list(range(400, 440))
    answer(core, generate_request(shared))
    run = CoreRun(core)
    run.submit(generate_request(list(range(800, 820))))
    run.submit(generate_request([*shared, *other]))
    run.finish()
    assert tier.prefetched == [hashes(core, [*shared, *other[:32]])[1:]]


def test_the_queue_is_looked_ahead_as_far_as_its_bound() -> None:
    tier = ListeningTier()
    core = small_core(tier, max_num_seqs=1)
    run = CoreRun(core)
    count = _block_hints.LOOKAHEAD_SEQUENCES
    prompts = [list(range(start, start + 20)) for start in range(100, 100 + 20 * (count + 2), 20)]
    for prompt in prompts:
        run.submit(generate_request(prompt))
    run.step()
    assert tier.prefetched == [hashes(core, prompt) for prompt in prompts[1 : count + 1]]
    run.finish()


def test_a_manager_that_does_not_listen_is_spared() -> None:
    core = small_core(HostTier(64))
    assert answer(core, generate_request(PROMPT, block_hints=WHOLE_SESSION)).error is None


def test_without_prefix_caching_no_tier_is_asked() -> None:
    tier = ListeningTier()
    core = small_core(tier, enable_prefix_caching=False)
    answer(core, generate_request(PROMPT, block_hints=WHOLE_SESSION))
    assert (tier.hinted, tier.onboarded) == ([], 0)
