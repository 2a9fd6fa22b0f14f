"""Requests made from the OpenAPI document, right and wrong ones: no answer is undocumented, none is a 5xx."""

import asyncio
import random

import hypothesis
import msgspec
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode, checks

from dynamo_core.enums import ModelType
from dynamo_frontend._openapi import document

FIXED_SEED = 20_260
_CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]


@pytest.fixture
async def served(stack):
    stack.say("The capital of Japan is Tokyo.")
    kinds = (ModelType.CHAT, ModelType.COMPLETIONS)
    stack.card = msgspec.structs.replace(stack.card, model_types=kinds, capabilities=("guided_decoding",))
    await stack.start(workers=2)
    return stack


def operations():
    schema = schemathesis.openapi.from_dict(document())
    return [result.ok() for result in schema.get_all_operations()]


def fuzz(base_url, operation, examples, seed):
    """Send generated requests; most name the model that is served, so that they get beyond its look-up."""

    @hypothesis.seed(seed)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data(), mode=st.sampled_from([GenerationMode.POSITIVE, GenerationMode.NEGATIVE]))
    def run(data, mode):
        case = data.draw(operation.as_strategy(generation_mode=mode))
        if data.draw(st.integers(0, 9)):
            if isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = "tiny"
            if case.path_parameters:
                case.path_parameters["model"] = "tiny"
        case.call_and_validate(base_url=base_url, checks=_CHECKS, timeout=20)

    run()


async def run_all(stack, examples, seed):
    print(f"seed {seed}")
    for operation in operations():
        # The client is a blocking one.
        await asyncio.to_thread(fuzz, stack.frontend.url, operation, examples, seed)
    assert (await stack.chat()).status == 200, "the server still answers"
    shown = (await stack.get("/metrics")).body.decode()
    assert 'dynamo_frontend_active_requests{model="tiny"} 0.0' in shown


async def test_documented_answers_to_generated_requests(served):
    await run_all(served, 8, FIXED_SEED)


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_documented_answers_to_many_generated_requests(served):
    await run_all(served, 300, random.SystemRandom().getrandbits(32))
