from dynamo_core.enums import FinishReason
from dynamo_core.requests import GenerateRequest, SamplingOptions, StopConditions
from dynamo_core.tokens import pack_tokens, unpack_tokens
from dynamo_worker._output_builder import Delta, OutputBuilder


def build(n: int = 1, eos: tuple[int, ...] = (2,), **stop: object) -> OutputBuilder:
    request = GenerateRequest("r", "m", pack_tokens([5, 6]), sampling=SamplingOptions(n=n), stop=StopConditions(**stop))
    return OutputBuilder(request, eos)


def test_the_last_chunk_waits_for_usage() -> None:
    output = build()
    first = output.take(Delta(token_ids=[7, 8]))
    assert first is not None
    assert (list(unpack_tokens(first.token_ids)), first.first_index) == ([7, 8], 0)
    assert output.close() is None
    assert output.take(Delta(token_ids=[9], finish="length")) is None
    last = output.close(cached_tokens=1)
    assert last is not None
    assert (list(unpack_tokens(last.token_ids)), last.first_index, last.finish_reason) == ([9], 2, FinishReason.LENGTH)
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.cached_tokens) == (2, 3, 1)


def test_end_tokens_are_left_out_and_named() -> None:
    for stop, token, reason in (({"stop_token_ids": (4,)}, 4, FinishReason.STOP), ({}, 2, FinishReason.EOS)):
        output = build(**stop)
        output.take(Delta(token_ids=[7, token], finish="stop"))
        last = output.close()
        assert (list(unpack_tokens(last.token_ids)), last.finish_reason, last.stop_token_id) == ([7], reason, token)
        assert last.usage.completion_tokens == 1


def test_ignored_eos_is_output() -> None:
    output = build(ignore_eos=True)
    output.take(Delta(token_ids=[2], finish="length"))
    assert list(unpack_tokens(output.close().token_ids)) == [2]


def test_only_the_last_choice_carries_usage() -> None:
    output = build(n=2)
    ended = output.take(Delta(1, [7], finish="length"))
    assert (ended.finish_reason, ended.usage) == (FinishReason.LENGTH, None)
    assert output.take(Delta(1, [8])) is None, "a choice that ended says no more"
    output.take(Delta(0, [7], finish="length"))
    assert output.close().usage.completion_tokens == 2


def test_cancelling_ends_the_open_choices() -> None:
    output = build(n=3)
    output.take(Delta(1, [7], finish="length"))
    output.take(Delta(0, [7]))
    ends = output.cancelled()
    assert [(chunk.choice, chunk.first_index, chunk.finish_reason) for chunk in ends] == [
        (0, 1, FinishReason.CANCELLED),
        (2, 0, FinishReason.CANCELLED),
    ]
    assert [chunk.usage is not None for chunk in ends] == [False, True]


def test_cancelling_after_the_end_gives_the_end() -> None:
    output = build()
    output.take(Delta(0, [7], finish="length"))
    (end,) = output.cancelled()
    assert (end.finish_reason, end.usage.completion_tokens) == (FinishReason.LENGTH, 1)


def test_an_unknown_reason_is_left_for_the_guard() -> None:
    output = build()
    output.take(Delta(token_ids=[7], finish="went home"))
    assert output.close().finish_reason is FinishReason.UNKNOWN
