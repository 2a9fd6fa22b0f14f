"""Equal requests give equal bits whatever they are computed with, on machines where the engine says so."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from parts import TINYLM, Answer, CoreRun, build_core, collect, engine_context, generate_request
from threadpoolctl import threadpool_info

from dynamo_core.requests import OutputOptions, SamplingOptions
from dynamo_worker._reference._assembly import load_engine
from dynamo_worker._reference._events import BlockEvents
from dynamo_worker._reference._invariance import is_batch_invariant
from dynamo_worker._reference._linear import Linear
from dynamo_worker._reference._settings import ReferenceSettings
from dynamo_worker._reference.engine import ReferenceEngine

MAX_CONTEXT = 320
PREFIX = list(range(3, 203))
WIDE_KERNELS = {"SkylakeX", "Cooperlake", "SapphireRapids"}


@dataclass(frozen=True)
class Mix:
    block_size: int
    spare_blocks: int
    max_num_batched_tokens: int
    requests: list[tuple[int, list[int]]]


def mixes() -> st.SearchStrategy[Mix]:
    own = st.lists(st.integers(3, 2047), min_size=1, max_size=40)
    shared = st.builds(lambda count, tail: PREFIX[:count] + tail, st.integers(1, 200), own)
    return st.builds(
        Mix,
        block_size=st.sampled_from([1, 3, 8, 16]),
        spare_blocks=st.integers(0, 8),
        max_num_batched_tokens=st.integers(1, 128),
        requests=st.lists(st.tuples(st.integers(0, 8), own | shared), min_size=1, max_size=5),
    )


def core_of(mix: Mix) -> Any:
    return build_core(
        model=str(TINYLM),
        max_model_len=MAX_CONTEXT,
        block_size=mix.block_size,
        num_blocks=-(-MAX_CONTEXT // mix.block_size) + mix.spare_blocks,
        max_num_batched_tokens=mix.max_num_batched_tokens,
    )


def request_of(prompt: list[int], number: int) -> Any:
    # Log-probabilities show every bit of the logits, a token only the largest.
    return generate_request(
        prompt,
        request_id=f"r{number}",
        max_tokens=12,
        sampling=SamplingOptions(temperature=1.0, seed=number),
        output=OutputOptions(logprobs=2),
    )


def bits(found: Answer) -> tuple[list[int], list[Any]]:
    return found.tokens[0], [entry for chunk in found.chunks for entry in chunk.logprobs]


PRESSURE = Mix(16, 0, 64, [(0, [*PREFIX[: 40 + 31 * number], 50 + number]) for number in range(5)])


@pytest.fixture(scope="module")
def exact() -> bool:
    return load_engine(ReferenceSettings(), [BlockEvents()], None).is_batch_invariant


def test_wide_kernels_are_exact(exact: bool) -> None:
    kernels = {str(item.get("architecture")) for item in threadpool_info() if item["user_api"] == "blas"}
    assert exact or not kernels & WIDE_KERNELS


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(mix=mixes())
@example(mix=PRESSURE)
def test_any_mix_gives_the_bits_of_each_request_alone(exact: bool, mix: Mix) -> None:
    run = CoreRun(core_of(mix))
    found: dict[int, Answer] = {}
    pending = sorted(enumerate(mix.requests), key=lambda item: item[1][0])
    step = 0
    while pending or run.core.has_work:
        while pending and (pending[0][1][0] <= step or not run.core.has_work):
            number, (_, prompt) = pending.pop(0)
            found[number] = run.submit(request_of(prompt, number))
        run.step()
        step += 1
    run.finish()
    for number, (_, prompt) in enumerate(mix.requests):
        alone = CoreRun(build_core(model=str(TINYLM), max_model_len=MAX_CONTEXT))
        expected = alone.submit(request_of(prompt, number))
        alone.finish()
        if exact:
            assert bits(found[number]) == bits(expected)
        else:
            assert abs(_first_logprob(found[number]) - _first_logprob(expected)) < 1e-3


def _first_logprob(found: Answer) -> float:
    return found.chunks[0].logprobs[0].top[0].logprob


@pytest.mark.parametrize("rank", [1, 2, 4, 8, 16])
def test_thin_products_are_exact_too(exact: bool, rank: int) -> None:
    random = np.random.default_rng(rank)
    for shape in ((rank, 128), (384, rank)):
        product = Linear(random.standard_normal(shape).astype(np.float32))
        rows = random.standard_normal((130, shape[1])).astype(np.float32)
        whole = product(rows)
        for count in (1, 2, 3, 7, 16, 33, 129):
            assert not exact or np.array_equal(product(rows[:count]), whole[:count])


def test_the_trial_sees_a_product_that_depends_on_the_batch() -> None:
    core = build_core()
    model = core._model
    assert model is not None
    layer = model._layers[1]
    straight = layer.down

    class _Uneven:
        def __call__(self, rows: Any) -> Any:
            return straight(rows) * np.float32(1 + 1e-6 * (len(rows) < 64))

    object.__setattr__(layer, "down", _Uneven())
    assert not is_batch_invariant(model, core.cache.layout, 4096)


async def test_the_card_says_what_was_found(exact: bool) -> None:
    engine = ReferenceEngine.from_args([])
    config = await engine.start(engine_context())
    try:
        assert config.runtime_config.runtime_data == {"batch_invariant": exact}
        assert (await collect(engine, generate_request([5, 6, 7]))).usage is not None
    finally:
        await engine.cleanup()
