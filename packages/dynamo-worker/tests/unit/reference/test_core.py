"""One engine core: ends, usage, choices, continuation, isolation of failures."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from dense_oracle import DenseModel
from parts import Answer, CoreRun, answer, build_core, generate_request

from dynamo_core.enums import FinishReason
from dynamo_core.requests import OutputOptions, RoutingHints, SamplingOptions, StopConditions
from dynamo_worker._reference._attention import Segment
from dynamo_worker._reference._core import EngineCore

PROMPT = list(range(40, 70))


@pytest.fixture
def core() -> EngineCore:
    return build_core()


def greedy_tokens(core: EngineCore, count: int) -> list[int]:
    return answer(core, generate_request(PROMPT, max_tokens=count)).tokens[0]


def with_stop(core: EngineCore, **conditions: Any) -> Answer:
    return answer(core, generate_request(PROMPT, stop=StopConditions(**conditions)))


def test_max_tokens_ends_with_length_and_usage(core: EngineCore) -> None:
    found = with_stop(core, max_tokens=5, ignore_eos=True)
    assert (len(found.tokens[0]), found.reasons[0]) == (5, FinishReason.LENGTH)
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (30, 5)
    assert [chunk.first_index for chunk in found.chunks] == [0, 1, 2, 3, 4]


def test_a_stop_token_ends_the_choice_and_is_not_returned(core: EngineCore) -> None:
    tokens = greedy_tokens(core, 8)
    stop = tokens[4]
    found = with_stop(core, max_tokens=8, stop_token_ids=(stop,), ignore_eos=True)
    assert found.tokens[0] == tokens[: tokens.index(stop)]
    assert (found.reasons[0], found.chunks[-1].stop_token_id) == (FinishReason.STOP, stop)
    assert found.usage is not None
    assert found.usage.completion_tokens == tokens.index(stop)


def test_the_models_end_is_eos_unless_ignored(core: EngineCore) -> None:
    tokens = greedy_tokens(core, 8)
    request = generate_request(PROMPT, ignore_eos=False, eos_token_ids=(tokens[2],))
    found = answer(core, request)
    assert (found.tokens[0], found.reasons[0]) == (tokens[: tokens.index(tokens[2])], FinishReason.EOS)
    ignored = answer(core, generate_request(PROMPT, ignore_eos=True, eos_token_ids=(tokens[2],)))
    assert ignored.tokens[0] == tokens


def test_min_tokens_postpones_every_end(core: EngineCore) -> None:
    first = greedy_tokens(core, 1)[0]
    found = with_stop(core, max_tokens=8, min_tokens=3, stop_token_ids=(first,), ignore_eos=True)
    assert len(found.tokens[0]) >= 3
    assert first not in found.tokens[0][:3]


def test_without_max_tokens_the_context_ends_the_output() -> None:
    core = build_core(max_model_len=40)
    found = answer(core, generate_request(PROMPT, max_tokens=None))
    assert (len(found.tokens[0]), found.reasons[0]) == (10, FinishReason.LENGTH)


def test_logprobs_come_with_every_token(core: EngineCore, oracle: DenseModel) -> None:
    found = answer(core, generate_request(PROMPT, output=OutputOptions(logprobs=3)))
    entries = [entry for chunk in found.chunks for entry in chunk.logprobs]
    assert [entry.token_id for entry in entries] == found.tokens[0]
    logits = oracle.logits(PROMPT + found.tokens[0])[len(PROMPT) - 1 : -1].astype(float)
    for entry, row in zip(entries, logits, strict=True):
        expected = row - row.max() - np.log(np.exp(row - row.max()).sum())
        assert len(entry.top) == 3
        assert entry.logprob == pytest.approx(expected[entry.token_id], abs=1e-3)
        assert entry.top[0].logprob == pytest.approx(expected.max(), abs=1e-3)


def test_choices_share_the_prompt_and_draw_apart(core: EngineCore) -> None:
    sampling = SamplingOptions(temperature=1.2, n=3, seed=11)
    found = answer(core, generate_request(PROMPT, sampling=sampling, max_tokens=6))
    assert sorted(found.reasons) == [0, 1, 2]
    assert len({tuple(tokens) for tokens in found.tokens.values()}) == 3
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.cached_tokens) == (30, 18, 0)
    assert sum(chunk.usage is not None for chunk in found.chunks) == 1


def test_one_choice_of_many_equals_itself_in_any_company(core: EngineCore) -> None:
    sampling = SamplingOptions(temperature=1.2, n=3, seed=11, top_p=0.9)
    alone = answer(core, generate_request(PROMPT, sampling=sampling, max_tokens=6))
    run = CoreRun(build_core(max_num_seqs=4, max_num_batched_tokens=7, enable_prefix_caching=False))
    for start in (200, 300, 400):
        run.submit(generate_request(list(range(start, start + 20)), sampling=SamplingOptions(seed=start)))
    busy = run.submit(generate_request(PROMPT, sampling=sampling, max_tokens=6))
    run.finish()
    assert busy.tokens == alone.tokens


@pytest.mark.parametrize("sampling", [SamplingOptions(temperature=0.0), SamplingOptions(temperature=1.3, seed=4)])
@pytest.mark.parametrize("accepted", [0, 1, 5, 11, 12])
def test_a_continuation_gives_the_rest(core: EngineCore, sampling: SamplingOptions, accepted: int) -> None:
    whole = answer(core, generate_request(PROMPT, sampling=sampling, max_tokens=12)).tokens[0]
    request = generate_request(
        PROMPT + whole[:accepted], sampling=sampling, max_tokens=12, attempt=1, prompt_tokens=len(PROMPT)
    )
    found = answer(build_core(), request)
    assert found.tokens.get(0, []) == whole[accepted:]
    assert found.chunks[0].first_index == accepted
    assert all(chunk.attempt == 1 for chunk in found.chunks)
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(PROMPT), 12)
    assert found.reasons[0] is FinishReason.LENGTH


def test_a_continuation_counts_accepted_tokens_for_penalties(core: EngineCore) -> None:
    sampling = SamplingOptions(temperature=0.0, frequency_penalty=1.5, presence_penalty=1.0)
    whole = answer(core, generate_request(PROMPT, sampling=sampling, max_tokens=12)).tokens[0]
    request = generate_request(PROMPT + whole[:6], sampling=sampling, max_tokens=12, prompt_tokens=len(PROMPT))
    assert answer(build_core(), request).tokens[0] == whole[6:]


def test_abort_frees_the_blocks_at_once(core: EngineCore) -> None:
    run = CoreRun(core)
    found = run.submit(generate_request(PROMPT, max_tokens=100, sampling=SamplingOptions(n=2, seed=1)))
    while len(found.chunks) < 5:
        run.step()
    (active,) = run.answers
    core.abort(active)
    assert core.pool.num_used_blocks == 0
    run.finish()
    assert set(found.reasons.values()) == {FinishReason.CANCELLED}
    assert sorted(found.reasons) == [0, 1]
    core.abort(active)
    assert core.take_outputs() == []


def test_abort_of_a_waiting_request(core: EngineCore) -> None:
    run = CoreRun(core)
    found = run.submit(generate_request(PROMPT))
    core.abort(next(iter(run.answers)))
    assert not core.has_work
    run.finish()
    assert found.reasons[0] is FinishReason.CANCELLED


def test_salts_keep_caches_apart(core: EngineCore) -> None:
    def cached(salt: str) -> int:
        found = answer(core, generate_request(PROMPT, routing=RoutingHints(cache_salt=salt)))
        assert found.usage is not None
        return found.usage.cached_tokens

    assert [cached("a"), cached("b"), cached("a"), cached("")] == [0, 0, 16, 0]


def test_a_failing_request_takes_no_other_with_it(
    core: EngineCore, oracle: DenseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = core._model.forward
    poison = 1234

    def poisoned(segments: Sequence[Segment], cache: Any) -> Any:
        if any(poison in segment.token_ids for segment in segments):
            raise FloatingPointError("poisoned")
        return forward(segments, cache)

    monkeypatch.setattr(core._model, "forward", poisoned)
    run = CoreRun(core)
    healthy = run.submit(generate_request(PROMPT))
    broken = run.submit(generate_request([*PROMPT[:10], poison]))
    other = run.submit(generate_request(PROMPT[:20]))
    run.finish()
    assert broken.error is not None
    assert broken.error.reason == "backend.engine_step_failed"
    assert "poisoned" in broken.error.diagnostic
    oracle.assert_greedy(PROMPT, healthy.tokens[0])
    oracle.assert_greedy(PROMPT[:20], other.tokens[0])


def test_step_statistics_tell_prefill_from_decode(core: EngineCore) -> None:
    core.add(core.activate(generate_request(PROMPT, max_tokens=4), 0))
    first, second = core.step(), core.step()
    assert (first.scheduled.num_prefill_requests, first.scheduled.sum_prefill_tokens) == (1, 30)
    assert (second.scheduled.num_decode_requests, second.scheduled.sum_decode_kv_tokens) == (1, 31)


def test_the_queue_is_in_the_statistics() -> None:
    core = build_core(max_num_seqs=1)
    for _ in range(3):
        core.add(core.activate(generate_request(PROMPT, max_tokens=4), 0))
    stats = core.step()
    assert (stats.queued.num_prefill_requests, stats.queued.sum_prefill_tokens) == (2, 60)


def test_requests_are_served_in_order_of_arrival() -> None:
    core = build_core(max_num_seqs=2)
    run = CoreRun(core)
    found = [run.submit(generate_request(PROMPT[i:], max_tokens=3 + i)) for i in range(5)]
    order: list[int] = []
    while core.has_work:
        run.step()
        order += [i for i, item in enumerate(found) if item.chunks and i not in order]
    assert order == [0, 1, 2, 3, 4]
