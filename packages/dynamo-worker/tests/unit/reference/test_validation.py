"""Requests that cannot be served are refused by field, before they are queued."""

from typing import Any

import pytest
from parts import generate_request

from dynamo_core.content import ContentPart
from dynamo_core.enums import Modality, PartKind
from dynamo_core.errors import InvalidRequestError
from dynamo_core.requests import (
    GenerateRequest,
    GuidedDecoding,
    OutputOptions,
    PrefillResult,
    SamplingOptions,
    StopConditions,
)
from dynamo_worker._reference._validation import require_servable


def check(request: GenerateRequest) -> None:
    require_servable(request, vocab_size=100, max_context=32, eos=(2,))


def sampling(**options: Any) -> GenerateRequest:
    return generate_request([5], sampling=SamplingOptions(**options))


REFUSED = {
    "modality": generate_request([5], modality=Modality.IMAGE),
    "parts": generate_request([5], parts=(ContentPart(PartKind.TEXT),)),
    "guided": sampling(guided=GuidedDecoding(structural_tag={})),
    "prompt_logprobs": generate_request([5], output=OutputOptions(prompt_logprobs=1)),
    "max_thinking_tokens": generate_request([5], stop=StopConditions(max_thinking_tokens=3)),
    "handoff": generate_request([5], handoff=PrefillResult()),
    "extra": generate_request([5], extra={"x": 1}),
    "token_ids": generate_request([5, 100]),
    "prompt_tokens": generate_request([5], prompt_tokens=2),
    "max_tokens": generate_request([5] * 30, max_tokens=3),
    "min_tokens": generate_request([5], stop=StopConditions(max_tokens=3, min_tokens=4)),
    "temperature": sampling(temperature=-0.1),
    "top_p": sampling(top_p=0.0),
    "top_k": sampling(top_k=-2),
    "min_p": sampling(min_p=1.5),
    "presence_penalty": sampling(presence_penalty=3.0),
    "frequency_penalty": sampling(frequency_penalty=float("nan")),
    "repetition_penalty": sampling(repetition_penalty=0.0),
    "n": sampling(n=0),
    "logit_bias": sampling(logit_bias={100: 1.0}),
    "allowed_token_ids": sampling(allowed_token_ids=(1, 200)),
    "stop_token_ids": generate_request([5], stop=StopConditions(max_tokens=3, stop_token_ids=(500,))),
    "logprobs": generate_request([5], output=OutputOptions(logprobs=65)),
}


@pytest.mark.parametrize("field", REFUSED)
def test_the_refusal_names_the_field(field: str) -> None:
    with pytest.raises(InvalidRequestError, match=field) as caught:
        check(REFUSED[field])
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (generate_request([]), "token_ids is empty"),
        (generate_request([5] * 32, max_tokens=None), "the context holds 32"),
        (generate_request([5], max_tokens=0), "max_tokens is 0"),
        (generate_request([5, 6], prompt_tokens=1, sampling=SamplingOptions(n=2)), "n is 2, but a continuation"),
        (
            generate_request(
                [5],
                sampling=SamplingOptions(allowed_token_ids=(2,)),
                stop=StopConditions(max_tokens=4, min_tokens=1),
            ),
            "end tokens only",
        ),
    ],
)
def test_other_refusals(request_: GenerateRequest, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        check(request_)


def test_what_fits_exactly_is_accepted() -> None:
    check(generate_request([5] * 30, max_tokens=2))
    check(generate_request([5] * 31, max_tokens=None))
    check(generate_request([5, 6, 7], prompt_tokens=2, max_tokens=4))
    check(sampling(n=2, logit_bias={99: -100.0}, allowed_token_ids=(0, 99)))
