"""Adapters: output equals the model with the adapter merged in, alone or in mixed batches; names, users, refusals."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from adapters import TARGETS, merged, write_adapter
from dense_oracle import DenseModel
from parts import TINYLM, RecordingSink, collect, engine_context, generate_request

from dynamo_core.errors import ConfigurationError, ConflictError, InvalidRequestError, NotFoundError
from dynamo_core.requests import RoutingHints, StopConditions
from dynamo_core.tokens import BlockHasher, pack_tokens, unpack_hashes
from dynamo_worker._reference.engine import ReferenceEngine

PROMPT = [(37 * i) % 2000 + 3 for i in range(40)]


def lora(name: str) -> dict[str, Any]:
    return {"routing": RoutingHints(lora=name)}


@pytest.fixture
async def engine() -> AsyncIterator[ReferenceEngine]:
    made = ReferenceEngine.from_args(["--max-model-len", "256", "--num-blocks", "64"])
    await made.start(engine_context())
    yield made
    await made.cleanup()


@pytest.mark.parametrize(
    "options",
    [{}, {"targets": TARGETS[:2]}, {"use_rslora": True}, {"rank": 1}],
    ids=["all", "q and k", "rslora", "one"],
)
async def test_the_output_is_that_of_the_merged_model(
    engine: ReferenceEngine, oracle: DenseModel, tmp_path: Path, options: dict[str, Any]
) -> None:
    folder = write_adapter(tmp_path / "a", oracle, seed=1, **options)
    await engine.load_lora("a", str(folder))
    answer = await collect(engine, generate_request(PROMPT, max_tokens=24, **lora("a")))
    merged(TINYLM, folder).assert_greedy(PROMPT, answer.tokens[0])
    plain = await collect(engine, generate_request(PROMPT, max_tokens=24))
    assert plain.tokens != answer.tokens
    oracle.assert_greedy(PROMPT, plain.tokens[0])


async def test_adapters_and_base_share_batches_but_not_blocks(
    engine: ReferenceEngine, oracle: DenseModel, tmp_path: Path
) -> None:
    folders = {name: write_adapter(tmp_path / name, oracle, seed=seed) for seed, name in enumerate("ab")}
    for name, folder in folders.items():
        await engine.load_lora(name, str(folder))
    requests = [generate_request(PROMPT, max_tokens=16, request_id=f"r{n}", **lora(n)) for n in ("", "a", "b") * 2]
    answers = await asyncio.gather(*(collect(engine, request) for request in requests))
    models = {"": oracle} | {name: merged(TINYLM, folder) for name, folder in folders.items()}
    for request, answer in zip(requests, answers, strict=True):
        models[request.routing.lora].assert_greedy(PROMPT, answer.tokens[0])
    again = await collect(engine, generate_request(PROMPT, **lora("a")))
    assert again.usage is not None
    assert again.usage.cached_tokens == 32


async def test_blocks_are_hashed_under_the_adapters_name(oracle: DenseModel, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", oracle, seed=1)
    flags = ["--max-model-len", "256", "--num-blocks", "64", "--lora", f"a={folder}"]
    engine = ReferenceEngine.from_args(flags)
    sink = RecordingSink()
    engine.set_kv_event_sink(sink)
    await engine.start(engine_context())
    try:
        await collect(engine, generate_request(PROMPT, max_tokens=1, **lora("a")))
    finally:
        await engine.cleanup()
    hashes = BlockHasher(16, lora="a").hash_tokens(pack_tokens(PROMPT[:32]))
    assert sink.events[0][2] == list(unpack_hashes(hashes.sequence))


async def test_an_adapter_can_be_asked_for_as_a_model(
    engine: ReferenceEngine, oracle: DenseModel, tmp_path: Path
) -> None:
    import msgspec

    await engine.load_lora("a", str(write_adapter(tmp_path / "a", oracle, seed=1)))
    by_hint = await collect(engine, generate_request(PROMPT, **lora("a")))
    by_name = await collect(engine, msgspec.structs.replace(generate_request(PROMPT), model="a"))
    assert by_name.tokens == by_hint.tokens
    assert by_name.usage is not None
    assert by_name.usage.cached_tokens == 32


async def test_unloading_waits_for_its_users_and_refuses_new_ones(
    engine: ReferenceEngine, oracle: DenseModel, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "a", oracle, seed=1)
    await engine.load_lora("a", str(folder))
    stop = StopConditions(max_tokens=200, ignore_eos=True)
    running = asyncio.ensure_future(collect(engine, generate_request(PROMPT, stop=stop, **lora("a"))))
    async with asyncio.timeout(10):
        while not engine.load().active_requests:
            await asyncio.sleep(0)
    unloading = asyncio.ensure_future(engine.unload_lora("a"))
    await asyncio.sleep(0)
    assert await engine.list_loras() == []
    assert not unloading.done()
    with pytest.raises(NotFoundError):
        await collect(engine, generate_request(PROMPT, request_id="late", **lora("a")))
    answer = await running
    assert len(answer.tokens[0]) == 200
    await asyncio.wait_for(unloading, 10)
    await engine.load_lora("a", str(folder))
    assert await engine.list_loras() == ["a"]


async def test_a_name_stands_for_one_content(engine: ReferenceEngine, oracle: DenseModel, tmp_path: Path) -> None:
    await engine.load_lora("a", str(write_adapter(tmp_path / "a", oracle, seed=1)))
    with pytest.raises(ConflictError, match="taken"):
        await engine.load_lora("a", str(tmp_path / "a"))
    await engine.unload_lora("a")
    with pytest.raises(ConflictError, match="other weights"):
        await engine.load_lora("a", str(write_adapter(tmp_path / "b", oracle, seed=2)))


async def test_what_is_not_there_is_named(engine: ReferenceEngine, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="has no LoRA adapter"):
        await engine.load_lora("a", str(tmp_path))
    with pytest.raises(NotFoundError, match="'a'"):
        await engine.unload_lora("a")
    with pytest.raises(NotFoundError, match="'a'"):
        await collect(engine, generate_request(PROMPT, **lora("a")))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"r": 0}, "rank"),
        ({"r": 8}, "does not fit"),
        ({"r": "many"}, "cannot be used"),
    ],
)
async def test_what_is_not_computed_is_refused(
    engine: ReferenceEngine, oracle: DenseModel, tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    folder = write_adapter(tmp_path / "a", oracle, seed=1, **changes)
    with pytest.raises(InvalidRequestError, match=what):
        await engine.load_lora("a", str(folder))
    assert await engine.list_loras() == []


def test_a_start_option_without_a_folder_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="NAME=FOLDER"):
        ReferenceEngine.from_args(["--lora", "a"])
