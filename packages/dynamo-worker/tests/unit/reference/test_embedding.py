import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from adapters import merged, write_adapter
from dense_oracle import DenseModel
from parts import TINYLM, collect, engine_context, generate_request

from dynamo_core.content import text_part, tokens_part
from dynamo_core.enums import FinishReason, Modality
from dynamo_core.errors import InvalidRequestError, UnavailableError
from dynamo_core.requests import GenerateChunk, GenerateRequest, RoutingHints
from dynamo_core.tokens import pack_tokens
from dynamo_worker._reference.engine import ReferenceEngine

TEXTS = [[5, 9, 300], list(range(40, 80))]


@pytest.fixture
async def engine() -> AsyncIterator[ReferenceEngine]:
    made = ReferenceEngine.from_args(["--max-model-len", "256", "--num-blocks", "64"])
    await made.start(engine_context())
    yield made
    await made.cleanup()


def embedding(*texts: list[int], **fields: object) -> GenerateRequest:
    parts = tuple(tokens_part(pack_tokens(text)) for text in texts)
    return GenerateRequest("e", "tinylm", parts=parts, modality=Modality.EMBEDDING, **fields)


def vectors(chunk: GenerateChunk) -> list[np.ndarray]:
    return [np.frombuffer(part.data, dtype="<f4") for part in chunk.parts]


def expected(model: DenseModel, tokens: list[int]) -> np.ndarray:
    """Final states by way of the head: with tied weights the logits are states times the embeddings."""
    states = np.linalg.lstsq(model.weights["model.embed_tokens.weight"], model.logits(tokens).T, rcond=None)[0].T
    mean = states.mean(0)
    return mean / np.linalg.norm(mean)


async def test_each_input_gives_the_mean_of_its_states(engine: ReferenceEngine, oracle: DenseModel) -> None:
    (chunk,) = (await collect(engine, embedding(*TEXTS))).chunks
    assert (chunk.finish_reason, chunk.token_ids) == (FinishReason.STOP, b"")
    assert (chunk.usage.prompt_tokens, chunk.usage.completion_tokens) == (43, 0)
    for index, (found, part) in enumerate(zip(vectors(chunk), chunk.parts, strict=True)):
        assert (part.index, part.shape, part.dtype) == (index, (128,), "f32")
        assert abs(np.linalg.norm(found) - 1) < 1e-5
        assert np.abs(found - expected(oracle, TEXTS[index])).max() < 1e-4


async def test_a_prompt_is_one_input_and_nothing_is_cached(engine: ReferenceEngine) -> None:
    by_part = (await collect(engine, embedding(TEXTS[1]))).chunks[0]
    request = msgspec.structs.replace(embedding(), token_ids=pack_tokens(TEXTS[1]))
    by_prompt = (await collect(engine, request)).chunks[0]
    assert (vectors(by_part)[0] == vectors(by_prompt)[0]).all()
    assert engine.load().kv_used_blocks == 0
    plain = await collect(engine, generate_request(TEXTS[1]))
    assert plain.usage.cached_tokens == 0


async def test_adapters_apply(engine: ReferenceEngine, oracle: DenseModel, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", oracle, seed=1)
    await engine.load_lora("a", str(folder))
    chunk = (await collect(engine, embedding(TEXTS[0], routing=RoutingHints(lora="a")))).chunks[0]
    assert np.abs(vectors(chunk)[0] - expected(merged(TINYLM, folder), TEXTS[0])).max() < 1e-4
    await asyncio.wait_for(engine.unload_lora("a"), 10)


@pytest.mark.parametrize("texts", [[[]], [[5] * 257], [[2112]]])
async def test_bad_inputs_are_refused(engine: ReferenceEngine, texts: list[list[int]]) -> None:
    with pytest.raises(InvalidRequestError, match="token_ids"):
        await collect(engine, embedding(*texts))


async def test_text_parts_are_refused(engine: ReferenceEngine) -> None:
    request = msgspec.structs.replace(embedding(), parts=(text_part("hello"),))
    with pytest.raises(InvalidRequestError, match="'tokens'"):
        await collect(engine, request)


async def test_a_draining_engine_takes_no_embeddings(engine: ReferenceEngine) -> None:
    await engine.drain()
    with pytest.raises(UnavailableError):
        await collect(engine, embedding(TEXTS[0]))
