"""The block manager behind real vLLM on a CPU: what vLLM's own cache forgot comes back, and the text is the same.

``dyn slow vllm`` runs this file.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from importlib import resources
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MODEL = str(resources.files("dynamo_worker") / "models" / "tinylm")
BLOCK_SIZE = 32
DEVICE_BLOCKS = 40
PROMPTS = [[3 + (7 * index + 131 * group) % 900 for index in range(300)] for group in range(6)]


@pytest.fixture(scope="module")
async def llm() -> AsyncIterator[Any]:
    """VLLM with room for four of the prompts, and host memory for all."""
    transfer = KVTransferConfig(
        kv_connector="DynamoKvConnector",
        kv_connector_module_path="dynamo_kvbm._vllm_connector.connector",
        kv_role="kv_both",
        kv_connector_extra_config={"host_blocks": 256},
    )
    arguments = AsyncEngineArgs(
        model=MODEL,
        dtype="float32",
        enforce_eager=True,
        block_size=BLOCK_SIZE,
        num_gpu_blocks_override=DEVICE_BLOCKS,
        max_model_len=512,
        max_num_seqs=4,
        kv_transfer_config=transfer,
    )
    made = AsyncLLM.from_engine_args(arguments)
    yield made
    made.shutdown()


async def ask(llm: Any, name: str, prompt: Sequence[int]) -> tuple[list[int], int]:
    """Return the greedy output, and how many prompt tokens were not computed."""
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, detokenize=False)
    last: Any = None
    async for output in llm.generate({"prompt_token_ids": list(prompt)}, params, name):
        last = output
    return list(last.outputs[0].token_ids), last.num_cached_tokens


async def test_blocks_come_back_after_a_reset(llm: Any) -> None:
    first = await ask(llm, "first", PROMPTS[0])
    assert first[1] == 0
    assert await llm.reset_prefix_cache()
    again = await ask(llm, "again", PROMPTS[0])
    assert again == (first[0], len(PROMPTS[0]) // BLOCK_SIZE * BLOCK_SIZE)


async def test_a_working_set_beyond_the_device(llm: Any) -> None:
    first = [await ask(llm, f"first-{index}", prompt) for index, prompt in enumerate(PROMPTS)]
    again = [await ask(llm, f"again-{index}", prompt) for index, prompt in enumerate(PROMPTS)]
    assert [output for output, _ in again] == [output for output, _ in first]
    assert [cached for _, cached in again] == [288] * len(PROMPTS)


Answer = tuple[list[int], list[float], int]


async def test_concurrent_requests_with_one_prefix(llm: Any) -> None:
    prompts = [[*PROMPTS[1][:256], *([9 + index] * 40)] for index in range(4)]

    async def together(name: str) -> list[Answer]:
        return await asyncio.gather(*(answer(llm, f"{name}-{index}", item) for index, item in enumerate(prompts)))

    # Compared with a run whose prefix was in the device.
    await ask(llm, "prefix", PROMPTS[1][:257])
    warm = await together("warm")
    assert await llm.reset_prefix_cache(reset_connector=True)
    await ask(llm, "prefix-again", PROMPTS[1][:257])
    assert await llm.reset_prefix_cache()
    loaded = await together("loaded")
    for one, other in zip(loaded, warm, strict=True):
        assert_same_but_for_near_ties(one, other)
    assert [cached for *_, cached in loaded] == [256] * len(prompts)


async def answer(llm: Any, name: str, prompt: Sequence[int]) -> Answer:
    """Return the greedy output, how far each token was ahead of the next best, and how much was not computed."""
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, detokenize=False, logprobs=2)
    last: Any = None
    async for output in llm.generate({"prompt_token_ids": list(prompt)}, params, name):
        last = output
    best = [sorted((entry.logprob for entry in item.values()), reverse=True) for item in last.outputs[0].logprobs]
    return list(last.outputs[0].token_ids), [first - second for first, second, *_ in best], last.num_cached_tokens


def assert_same_but_for_near_ties(one: Answer, other: Answer) -> None:
    """Sums differ with the size of a batch, which is what requests happen to share a step: that may turn a near-tie."""
    for ours, theirs, margin in zip(one[0], other[0], one[1], strict=True):
        if ours != theirs:
            assert margin < 0.01, (one, other)
            return


async def test_emptied_with_the_tiers(llm: Any) -> None:
    first = await ask(llm, "kept", PROMPTS[2])
    assert await llm.reset_prefix_cache(reset_connector=True)
    assert await ask(llm, "emptied", PROMPTS[2]) == (first[0], 0)
