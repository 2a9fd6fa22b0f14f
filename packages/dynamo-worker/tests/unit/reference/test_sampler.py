"""Sampling: each option does what its name says, and a draw depends on (seed, choice, position) alone."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from parts import generate_request

from dynamo_core.requests import OutputOptions, SamplingOptions, StopConditions
from dynamo_worker._reference._sampler import SampledToken, sample, uniforms
from dynamo_worker._reference._sequence import Sequence

LOGITS = np.array([0.0, 1.0, 4.0, 3.5, -2.0, 3.0, 0.5, 2.0], dtype=np.float32)
BEST = 2


def sequence(
    sampling: SamplingOptions, *, output: tuple[int, ...] = (), seed: int = 1, choice: int = 0, **fields: Any
) -> Sequence:
    request = generate_request([6, 7], sampling=sampling, max_tokens=20, **fields)
    found = Sequence(request, choice=choice, seed=seed, max_context=64, block_size=4)
    found.tokens.extend(output)
    return found


def draw(sampling: SamplingOptions, **fields: Any) -> SampledToken:
    return sample(LOGITS[None].copy(), [sequence(sampling, **fields)], [()])[0]


def draws(sampling: SamplingOptions, count: int = 2000) -> Counter[int]:
    rows = np.repeat(LOGITS[None], count, axis=0)
    sequences = [sequence(sampling, seed=seed) for seed in range(count)]
    return Counter(token.token_id for token in sample(rows, sequences, [()] * count))


def softmax(values: np.ndarray) -> np.ndarray:
    weights = np.exp(values - values.max())
    return weights / weights.sum()


def test_temperature_zero_is_greedy() -> None:
    assert draw(SamplingOptions(temperature=0.0)).token_id == BEST


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    found = draws(SamplingOptions(temperature=temperature), 8000)
    for token, probability in enumerate(softmax(LOGITS / temperature)):
        assert found[token] / 8000 == pytest.approx(probability, abs=5 * math.sqrt(probability / 8000) + 1e-3)


def test_top_k_keeps_the_k_best() -> None:
    assert set(draws(SamplingOptions(temperature=2.0, top_k=3))) == {2, 3, 5}


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    ranked = np.sort(softmax(LOGITS))[::-1]
    assert set(draws(SamplingOptions(top_p=float(ranked[:2].sum()) - 0.01))) == {2, 3}
    assert set(draws(SamplingOptions(top_p=float(ranked[:2].sum()) + 0.01))) == {2, 3, 5}
    assert set(draws(SamplingOptions(top_p=1e-6))) == {BEST}


def test_min_p_drops_what_is_far_below_the_best() -> None:
    ratio = math.exp(3.0 - 4.0)
    assert set(draws(SamplingOptions(min_p=ratio - 0.01))) == {2, 3, 5}
    assert set(draws(SamplingOptions(min_p=ratio + 0.01))) == {2, 3}


def test_a_batch_mixes_options_without_mixing_results() -> None:
    options = [
        SamplingOptions(top_k=1),
        SamplingOptions(temperature=0.0),
        SamplingOptions(top_p=0.5),
        SamplingOptions(),
    ]
    together = sample(np.repeat(LOGITS[None], 4, axis=0), [sequence(item) for item in options], [()] * 4)
    assert [token.token_id for token in together] == [draw(item).token_id for item in options]


def test_a_draw_depends_on_seed_choice_and_position_only() -> None:
    options = SamplingOptions(temperature=1.5)
    same = draw(options, seed=5, choice=1, output=(1, 2))
    assert draw(options, seed=5, choice=1, output=(3, 3)) == same
    changed = [
        [draw(options, seed=seed).token_id for seed in range(30)],
        [draw(options, choice=choice).token_id for choice in range(30)],
        [draw(options, output=(1,) * count).token_id for count in range(18)],
    ]
    assert all(len(set(tokens)) > 1 for tokens in changed)


def test_uniforms_are_uniform_along_every_key() -> None:
    grid = np.arange(4096, dtype=np.uint64)
    zero = np.zeros_like(grid)
    for found in (uniforms(grid, zero, zero), uniforms(zero, grid, zero), uniforms(zero, zero, grid)):
        assert 0.0 <= found.min() < found.max() < 1.0
        counts = np.histogram(found, bins=16, range=(0.0, 1.0))[0]
        assert ((counts - 256.0) ** 2 / 256.0).sum() < 45.0  # chi-square with 15 degrees of freedom, p < 1e-4
        assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.08


def test_repetition_penalty_counts_prompt_and_output() -> None:
    logits = np.array([[1.0, 1.1, 1.2, 0.0, 0.0, 0.0, 1.3, 1.25]], dtype=np.float32)  # the prompt is 6, 7
    options = SamplingOptions(temperature=0.0, repetition_penalty=1.5)
    assert sample(logits.copy(), [sequence(options)], [()])[0].token_id == 2
    assert sample(logits.copy(), [sequence(options, output=(2,))], [()])[0].token_id == 1


def test_repetition_penalty_lowers_negative_logits_too() -> None:
    logits = np.array([[-1.1, -2.0, -2.0, -2.0, -2.0, -2.0, -1.0, -2.0]], dtype=np.float32)
    options = SamplingOptions(temperature=0.0, repetition_penalty=1.5)
    assert sample(logits, [sequence(options)], [()])[0].token_id == 0


def test_presence_and_frequency_penalties_count_output_only() -> None:
    presence = SamplingOptions(temperature=0.0, presence_penalty=0.7)
    assert draw(presence, output=(BEST,)).token_id == 3
    frequency = SamplingOptions(temperature=0.0, frequency_penalty=0.3)
    assert draw(frequency, output=(BEST,)).token_id == BEST
    assert draw(frequency, output=(BEST, BEST)).token_id == 3
    prompt_only = sample(np.array([[0, 0, 0, 0, 0, 0, 1.0, 0]], dtype=np.float32), [sequence(presence)], [()])
    assert prompt_only[0].token_id == 6


def test_logit_bias_and_allowed_tokens() -> None:
    assert draw(SamplingOptions(temperature=0.0, logit_bias={4: 10.0})).token_id == 4
    assert draw(SamplingOptions(temperature=0.0, logit_bias={BEST: -1.0})).token_id == 3
    assert set(draws(SamplingOptions(allowed_token_ids=(0, 4)))) == {0, 4}


def test_end_tokens_are_banned_below_the_minimum() -> None:
    stop = StopConditions(max_tokens=20, min_tokens=2)
    for count, expected in ((0, 3), (1, 3), (2, BEST)):
        found = sequence(SamplingOptions(temperature=0.0), output=(1,) * count, stop=stop)
        assert sample(LOGITS[None].copy(), [found], [(BEST,)])[0].token_id == expected


def test_logprobs_are_of_the_raw_distribution() -> None:
    options = SamplingOptions(temperature=0.0, logit_bias={4: 10.0})
    request = generate_request([6, 7], sampling=options, output=OutputOptions(logprobs=2))
    item = Sequence(request, choice=0, seed=0, max_context=64, block_size=4)
    found = sample(LOGITS[None].copy(), [item], [()])[0]
    expected = np.log(softmax(LOGITS.astype(np.float64)))
    assert found.logprob is not None
    assert (found.token_id, found.logprob.token_id) == (4, 4)
    assert found.logprob.logprob == pytest.approx(expected[4])
    assert [top.token_id for top in found.logprob.top] == [2, 3]
    assert [top.logprob for top in found.logprob.top] == pytest.approx([expected[2], expected[3]])
    assert draw(options).logprob is None
