import asyncio
from collections.abc import AsyncIterator

import pytest
from parts import RecordingSink, collect, engine_context, generate_request

from dynamo_core.errors import ConflictError, InvalidRequestError, UnavailableError
from dynamo_core.requests import StopConditions
from dynamo_worker._reference.engine import ReferenceEngine

PROMPT = list(range(50, 90))


@pytest.fixture
async def engine() -> AsyncIterator[ReferenceEngine]:
    made = ReferenceEngine.from_args(["--max-model-len", "256", "--num-blocks", "64"])
    await made.start(engine_context())
    yield made
    await made.cleanup()


@pytest.mark.parametrize("level", [1, 2])
async def test_sleep_gives_memory_back_and_wake_computes_the_same(engine: ReferenceEngine, level: int) -> None:
    sink = RecordingSink()
    engine.set_kv_event_sink(sink)
    before = await collect(engine, generate_request(PROMPT))
    stored = [value for kind, _, hashes in sink.events if kind == "stored" for value in hashes]
    await engine.sleep(level)
    assert sorted(sink.events[-1][2]) == sorted(stored)
    assert engine.block_access().data.nbytes == 0
    with pytest.raises(UnavailableError, match="sleeps"):
        await collect(engine, generate_request(PROMPT))
    await engine.wake()
    await engine.wake()
    after = await collect(engine, generate_request(PROMPT))
    assert after.tokens == before.tokens
    assert after.usage.cached_tokens == 0


async def test_a_busy_engine_does_not_sleep(engine: ReferenceEngine) -> None:
    stop = StopConditions(max_tokens=200, ignore_eos=True)
    running = asyncio.ensure_future(collect(engine, generate_request(PROMPT, stop=stop)))
    async with asyncio.timeout(10):
        while not engine.load().active_requests:
            await asyncio.sleep(0)
    with pytest.raises(ConflictError, match="drain"):
        await engine.sleep()
    assert len((await running).tokens[0]) == 200


async def test_held_blocks_keep_it_awake(engine: ReferenceEngine) -> None:
    sink = RecordingSink()
    engine.set_kv_event_sink(sink)
    await collect(engine, generate_request(PROMPT, max_tokens=1))
    hashes = sink.events[0][2]
    assert await engine.hold_blocks([*hashes, 1]) == len(hashes)
    with pytest.raises(ConflictError, match="in use"):
        await engine.sleep()
    await engine.release_blocks(hashes)
    await engine.sleep()
    with pytest.raises(ConflictError, match="already"):
        await engine.sleep()


async def test_unknown_levels_are_refused(engine: ReferenceEngine) -> None:
    with pytest.raises(InvalidRequestError, match="level"):
        await engine.sleep(3)
