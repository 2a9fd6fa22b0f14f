"""Constrained output: what comes is what the constraint allows, however it is batched, cut, continued or aborted."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from parts import TINYLM, Answer, CallContext, collect, engine_context, generate_request, write_model
from tokenizers import Tokenizer

from dynamo_core.enums import FinishReason
from dynamo_core.errors import InvalidRequestError, UnavailableError
from dynamo_core.requests import GenerateRequest, GuidedDecoding, SamplingOptions, StopConditions
from dynamo_core.tokens import pack_tokens
from dynamo_worker._reference._grammar import MAX_KEPT_GRAMMARS
from dynamo_worker._reference.engine import ReferenceEngine

TOKENIZER = Tokenizer.from_file(str(TINYLM / "tokenizer.json"))
PROMPT = "In the beginning God created"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["king", "prophet"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


@pytest.fixture
async def engine() -> AsyncIterator[ReferenceEngine]:
    engine = ReferenceEngine.from_args([])
    await engine.start(engine_context())
    yield engine
    await engine.cleanup()


def guided(request_id: str = "g", *, max_tokens: int = 80, sampling: dict[str, Any] | None = None, **constraint: Any):
    options = {"temperature": 0.0, "seed": 3, **(sampling or {})}
    return generate_request(
        TOKENIZER.encode(PROMPT).ids,
        request_id=request_id,
        sampling=SamplingOptions(guided=GuidedDecoding(**constraint), **options),
        stop=StopConditions(max_tokens=max_tokens),
    )


def text(answer: Answer, choice: int = 0) -> str:
    return TOKENIZER.decode(answer.tokens[choice], skip_special_tokens=False)


def require_person(document: str) -> None:
    person = json.loads(document)
    assert list(person) == ["name", "age", "kind"]
    assert len(person["name"]) <= 12
    assert 0 <= person["age"] <= 120
    assert person["kind"] in ("king", "prophet")


async def test_the_capability_is_announced() -> None:
    engine = ReferenceEngine.from_args([])
    config = await engine.start(engine_context())
    await engine.cleanup()
    assert "guided_decoding" in config.capabilities


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
async def test_a_schema_gives_a_document_that_satisfies_it(engine: ReferenceEngine, temperature: float) -> None:
    for seed in range(4):
        answer = await collect(engine, guided(json=PERSON, sampling={"temperature": temperature, "seed": seed}))
        assert answer.reasons == {0: FinishReason.STOP}
        require_person(text(answer))


async def test_a_schema_may_be_given_as_text(engine: ReferenceEngine) -> None:
    require_person(text(await collect(engine, guided(json=json.dumps(PERSON)))))


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"regex": "[a-f]{3,5}-[0-9]{2}"}, "[a-f]{3,5}-[0-9]{2}"),
        ({"choice": ('"quoted"', "naïve", "line\nbreak")}, '"quoted"|naïve|line\nbreak'),
        ({"grammar": 'root ::= "<" [a-z]+ ">" | "none"'}, "<[a-z]+>|none"),
        ({"grammar": 'start: "x" INT\nINT: /[0-9]{2}/'}, "x[0-9]{2}"),
    ],
)
async def test_every_kind_of_constraint_is_followed(
    engine: ReferenceEngine, constraint: dict[str, Any], pattern: str
) -> None:
    answer = await collect(engine, guided(sampling={"temperature": 1.0}, **constraint))
    assert re.fullmatch(pattern, text(answer))


async def test_an_open_constraint_ends_by_eos_or_budget(engine: ReferenceEngine) -> None:
    answer = await collect(engine, guided(regex="[a-z ]+", max_tokens=24))
    assert answer.reasons[0] in (FinishReason.EOS, FinishReason.LENGTH)
    assert re.fullmatch("[a-z ]+", text(answer))


async def test_a_complete_output_ends_although_eos_is_ignored(engine: ReferenceEngine) -> None:
    request = guided(choice=("alpha", "beta"))
    stop = StopConditions(max_tokens=40, ignore_eos=True, min_tokens=30)
    answer = await collect(engine, _with(request, stop=stop))
    assert text(answer) in ("alpha", "beta")
    assert answer.reasons == {0: FinishReason.STOP}


async def test_choices_follow_the_constraint_each_alone(engine: ReferenceEngine) -> None:
    answer = await collect(engine, guided(json=PERSON, sampling={"n": 4, "temperature": 1.0}))
    for choice in range(4):
        require_person(text(answer, choice))
    assert len({text(answer, choice) for choice in range(4)}) > 1


async def test_a_batch_mixes_constraints_with_free_requests(engine: ReferenceEngine) -> None:
    free = generate_request(TOKENIZER.encode(PROMPT).ids, request_id="free", max_tokens=24)
    alone = await collect(engine, free)
    requests = [guided(f"g{i}", json=PERSON, sampling={"temperature": 1.0, "seed": i}) for i in range(6)]
    together = await asyncio.gather(*(collect(engine, request) for request in [*requests, free]))
    for answer in together[:-1]:
        require_person(text(answer))
    assert together[-1].tokens == alone.tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_a_continuation_at_every_position_gives_the_rest(engine: ReferenceEngine, temperature: float) -> None:
    request = guided(json=PERSON, sampling={"temperature": temperature})
    whole = (await collect(engine, request)).tokens[0]
    for accepted in range(1, len(whole) + 1):
        rest = await collect(engine, _continued(request, whole[:accepted]))
        assert rest.tokens[0] == whole[accepted:]
        assert rest.reasons == {0: FinishReason.STOP}
        assert rest.usage is not None
        assert rest.usage.completion_tokens == len(whole)


async def test_an_output_that_breaks_the_constraint_is_not_continued(engine: ReferenceEngine) -> None:
    request = _continued(guided(json=PERSON), TOKENIZER.encode("no document").ids)
    with pytest.raises(InvalidRequestError, match="does not allow") as caught:
        await collect(engine, request)
    assert caught.value.param == "token_ids"


@pytest.mark.parametrize(
    ("constraint", "problem"),
    [
        ({"regex": "("}, "unclosed|cannot be used"),
        ({"regex": ""}, "empty text only"),
        ({"json": {"type": "nonsense"}}, "nonsense"),
        ({"json": {"type": "object", "unevaluatedProperties": False}}, "unevaluatedProperties"),
        ({"json": "{"}, "cannot be used"),
        ({"json": [1]}, "not an object"),
        ({"json": {"x-guidance": {"lenient": True}, "type": "object", "unevaluatedProperties": False}}, "unevaluated"),
        ({"grammar": "((("}, "cannot be used"),
        ({"grammar": 'start: "a" nowhere'}, "nowhere"),
        ({"choice": ("a", "")}, "empty choice"),
        ({"structural_tag": {"structures": []}}, "structural_tag"),
        ({"whitespace_pattern": " "}, "whitespace_pattern"),
        ({"regex": "a", "backend": "outlines"}, "outlines"),
        ({}, "no constraint"),
    ],
)
async def test_a_wrong_constraint_is_refused_before_the_first_chunk(
    engine: ReferenceEngine, constraint: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InvalidRequestError, match=problem) as caught:
        await collect(engine, guided(**constraint))
    assert caught.value.param == "guided"
    assert (await collect(engine, guided(choice=("fine",)))).usage is not None


async def test_two_limits_of_the_tokens_are_refused(engine: ReferenceEngine) -> None:
    with pytest.raises(InvalidRequestError, match="keep one"):
        await collect(engine, guided(regex="a", sampling={"allowed_token_ids": (5,)}))


async def test_a_constraint_that_leaves_no_token_fails_alone(engine: ReferenceEngine) -> None:
    free = generate_request(TOKENIZER.encode(PROMPT).ids, request_id="free", max_tokens=40)
    expected = (await collect(engine, free)).tokens
    [letter] = TOKENIZER.encode("x").ids
    stop = StopConditions(max_tokens=40, min_tokens=20, stop_token_ids=(letter,))
    impossible = _with(guided(regex="xxx", sampling={"n": 3}), stop=stop)
    failed, unharmed = await asyncio.gather(collect(engine, impossible), collect(engine, free), return_exceptions=True)
    assert isinstance(failed, InvalidRequestError)
    assert failed.param == "guided"
    assert isinstance(unharmed, Answer)
    assert unharmed.tokens == expected
    assert engine.load().active_requests == 0


async def test_stopping_before_the_grammar_is_ready_ends_as_cancelled(engine: ReferenceEngine) -> None:
    context = CallContext()
    context.stop()
    answer = await collect(engine, guided(json=PERSON), context)
    assert answer.reasons == {0: FinishReason.CANCELLED}
    assert engine.load().active_requests == 0


async def test_cleanup_fails_requests_whose_grammar_is_not_ready() -> None:
    engine = ReferenceEngine.from_args([])
    await engine.start(engine_context())
    sink = _Sink()
    engine.submit(guided(json=PERSON), sink)
    await engine.cleanup()
    assert isinstance(sink.error, UnavailableError)
    assert sink.error.reason == "backend.engine_shutdown"


async def test_drain_waits_for_requests_whose_grammar_is_not_ready(engine: ReferenceEngine) -> None:
    sink = _Sink()
    engine.submit(guided(json=PERSON), sink)
    await engine.drain()
    assert sink.reason is FinishReason.STOP


async def test_kept_grammars_are_bounded(engine: ReferenceEngine) -> None:
    for number in range(MAX_KEPT_GRAMMARS + 8):
        await collect(engine, guided(choice=(f"a{number}",)))
    ranks = engine._ranks
    assert ranks is not None
    assert len(ranks.constraints) == MAX_KEPT_GRAMMARS


async def test_a_model_without_a_tokenizer_offers_no_constraints(tmp_path: Path) -> None:
    engine = ReferenceEngine.from_args(["--model", str(write_model(tmp_path / "bare"))])
    config = await engine.start(engine_context())
    try:
        assert "guided_decoding" not in config.capabilities
        request = generate_request([5, 6], sampling=SamplingOptions(guided=GuidedDecoding(regex="a")))
        with pytest.raises(InvalidRequestError, match=re.escape("tokenizer.json")):
            await collect(engine, request)
    finally:
        await engine.cleanup()


class _Sink:
    def __init__(self) -> None:
        self.error: Exception | None = None
        self.reason: FinishReason | None = None

    def push(self, chunk: Any) -> None:
        self.reason = chunk.finish_reason

    def fail(self, error: Exception) -> None:
        self.error = error


def _with(request: GenerateRequest, **changes: Any) -> GenerateRequest:
    return msgspec.structs.replace(request, **changes)


def _continued(request: GenerateRequest, accepted: list[int]) -> GenerateRequest:
    prompt = TOKENIZER.encode(PROMPT).ids
    return _with(request, token_ids=pack_tokens([*prompt, *accepted]), prompt_tokens=len(prompt), attempt=1)
