"""Greedy output equals a plain dense forward pass for any batching, chunking, caching and preemption."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from dense_oracle import NEAR_TIE, DenseModel
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from parts import TINYLM, CoreRun, build_core, generate_request, write_model

from dynamo_worker._reference._attention import QUERY_TILE, Segment

MAX_CONTEXT = 96
PREFIXES = [list(range(3 + 97 * start, 3 + 97 * start + 48)) for start in range(3)]


@dataclass(frozen=True)
class Mix:
    """Options of an engine and the requests it gets, with the step at which each arrives."""

    block_size: int
    spare_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_prefix_caching: bool
    requests: list[tuple[int, list[int], int]]


def prompts() -> st.SearchStrategy[list[int]]:
    own = st.lists(st.integers(3, 2047), min_size=1, max_size=24)
    shared = st.tuples(st.sampled_from(PREFIXES), st.integers(1, 48), st.lists(st.integers(3, 2047), max_size=8))
    return own | shared.map(lambda parts: parts[0][: parts[1]] + parts[2])


def mixes() -> st.SearchStrategy[Mix]:
    request = st.tuples(st.integers(0, 12), prompts(), st.integers(1, 16))
    return st.builds(
        Mix,
        block_size=st.sampled_from([1, 3, 8, 16]),
        spare_blocks=st.integers(0, 6),
        max_num_seqs=st.integers(1, 5),
        max_num_batched_tokens=st.integers(1, 64),
        enable_prefix_caching=st.booleans(),
        requests=st.lists(request, min_size=1, max_size=6),
    )


def run_mix(mix: Mix) -> tuple[CoreRun, list[tuple[list[int], list[int]]]]:
    core = build_core(
        model=str(TINYLM),
        max_model_len=MAX_CONTEXT,
        block_size=mix.block_size,
        num_blocks=-(-MAX_CONTEXT // mix.block_size) + mix.spare_blocks,
        max_num_seqs=mix.max_num_seqs,
        max_num_batched_tokens=mix.max_num_batched_tokens,
        enable_prefix_caching=mix.enable_prefix_caching,
    )
    run = CoreRun(core)
    answers = []
    pending = sorted(mix.requests, key=lambda request: request[0])
    step = 0
    while pending or core.has_work:
        while pending and (pending[0][0] <= step or not core.has_work):
            _, prompt, max_tokens = pending.pop(0)
            answers.append((prompt, run.submit(generate_request(prompt, max_tokens=max_tokens))))
        run.step()
        step += 1
    run.finish()
    for (_, _, max_tokens), (_, found) in zip(sorted(mix.requests, key=lambda r: r[0]), answers, strict=True):
        assert len(found.tokens[0]) == max_tokens
    return run, [(prompt, found.tokens[0]) for prompt, found in answers]


PRESSURE = Mix(16, 0, 5, 64, True, [(0, [*PREFIXES[i % 3][:20], 50 + i], 16) for i in range(6)])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mix=mixes())
@example(mix=PRESSURE)
def test_any_mix_of_requests_is_greedy(oracle: DenseModel, mix: Mix) -> None:
    _, answers = run_mix(mix)
    for prompt, output in answers:
        oracle.assert_greedy(prompt, output)


@pytest.mark.parametrize("caching", [True, False])
def test_memory_pressure_preempts_and_stays_greedy(oracle: DenseModel, caching: bool) -> None:
    mix = Mix(8, 0, 6, 64, caching, [(0, [*PREFIXES[i % 3][:30], 50 + i], 40) for i in range(6)])
    run, answers = run_mix(mix)
    assert run.num_preempted > 0
    for prompt, output in answers:
        oracle.assert_greedy(prompt, output)


def test_a_cached_prefix_is_not_computed_again(oracle: DenseModel) -> None:
    core = build_core(block_size=16)
    run = CoreRun(core)
    prompt = PREFIXES[0] + [500, 501]
    for expected in (0, 48):
        found = run.submit(generate_request(prompt, max_tokens=4))
        run.finish()
        assert found.usage is not None
        assert found.usage.cached_tokens == expected
        oracle.assert_greedy(prompt, found.tokens[0])


def test_the_last_token_of_a_fully_cached_prompt_is_computed(oracle: DenseModel) -> None:
    run = CoreRun(build_core(block_size=16))
    for expected in (0, 32):
        found = run.submit(generate_request(PREFIXES[1], max_tokens=4))
        run.finish()
        assert found.usage is not None
        assert found.usage.cached_tokens == expected
        oracle.assert_greedy(PREFIXES[1], found.tokens[0])


MODELS = {
    "bf16": {"dtype": "BF16"},
    "fp16 in three shards": {"dtype": "F16", "shards": 3},
    "own output head": {"tie_word_embeddings": False},
    "one KV head a head": {"num_key_value_heads": 4},
    "one KV head": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 16},
    "rope theta of old configs": {"rope_theta": 500.0},
    "linear rope": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_every_supported_kind_of_model_is_greedy(tmp_path: Path, changes: dict[str, object]) -> None:
    folder = write_model(tmp_path / "model", **changes)
    oracle = DenseModel(folder)
    run = CoreRun(build_core(model=str(folder), block_size=4, num_blocks=64, max_num_batched_tokens=16))
    requests = [[3, 1, 4, 1, 5], list(range(3, 43)), [99] * 17]
    found = [run.submit(generate_request(prompt, max_tokens=20)) for prompt in requests]
    run.finish()
    for prompt, item in zip(requests, found, strict=True):
        oracle.assert_greedy(prompt, item.tokens[0])


def test_the_oracle_refuses_a_wrong_token(oracle: DenseModel) -> None:
    prompt = PREFIXES[0]
    best = int(oracle.logits(prompt)[-1].argmax())
    with pytest.raises(AssertionError, match="below"):
        oracle.assert_greedy(prompt, [(best + 1) % 2048])


@pytest.mark.parametrize("max_num_batched_tokens", [512, 200])
def test_a_prompt_longer_than_a_query_tile_is_greedy(oracle: DenseModel, max_num_batched_tokens: int) -> None:
    prompt = [3 + (7 * index) % 2000 for index in range(2 * QUERY_TILE + 70)]
    run = CoreRun(build_core(max_num_batched_tokens=max_num_batched_tokens))
    found = run.submit(generate_request(prompt, max_tokens=4))
    run.finish()
    logits = oracle.logits(prompt)[-1]
    oracle.assert_greedy(prompt, found.tokens[0])
    computed = run.core._model.forward([Segment(prompt, 0, list(range(21)))], run.core.cache)
    assert abs(computed[0] - logits).max() < NEAR_TIE
