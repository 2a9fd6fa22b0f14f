"""The mock engine behind the host: tokens, time, cache, memory pressure, ranks."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dynamo_core.enums import FinishReason
from dynamo_core.errors import ConfigurationError, InvalidRequestError, UnavailableError
from dynamo_core.events import BlockRemoved, BlockStored
from dynamo_core.ids import WorkerId
from dynamo_core.planes import FORWARD_PASS, KV_EVENTS, LOAD
from dynamo_core.requests import OutputOptions, RoutingHints, SamplingOptions, StopConditions
from dynamo_core.tokens import BlockHasher, pack_tokens, unpack_hashes
from dynamo_core.wire import FORWARD_PASS_METRICS, KV_EVENT_BATCH, WORKER_LOAD
from dynamo_worker import MockEngine, MockSettings
from dynamo_worker._mock._timing import decode_ms, prefill_ms


def mock(**settings: Any) -> MockEngine:
    return MockEngine(MockSettings(**{"kv_block_size": 4, "total_kv_blocks": 1024, **settings}))


async def test_a_request_takes_prefill_and_decode_time(process: Any, kit: Any) -> None:
    await process.worker(mock())
    began = process.clock.monotonic()
    reply = await process.ask(kit.request(prompt=range(100), max_tokens=5))
    assert len(reply.tokens) == 5
    expected = prefill_ms(100) + 4 * decode_ms(26 / 1024)
    assert process.clock.monotonic() - began == pytest.approx(expected / 1000, rel=0.01)
    assert reply.finish is FinishReason.LENGTH
    assert reply.chunks[-1].usage.prompt_tokens == 100


async def test_speed_up_shortens_time_and_changes_no_token(process: Any, kit: Any) -> None:
    await process.worker(mock())
    slow = await process.ask(kit.request(prompt=range(50), max_tokens=40))
    took = process.clock.monotonic()
    await process.workers.pop().stop()
    await process.worker(mock(speedup_ratio=1000))
    fast = await process.ask(kit.request(prompt=range(50), max_tokens=40))
    assert process.clock.monotonic() - took < 0.01
    assert fast.tokens == slow.tokens
    assert len(fast.chunks) < len(slow.chunks)  # steps shorter than a tick are handed out together


class CoarseClock:
    """Wakes at whole milliseconds, as an event loop does."""

    def __init__(self, clock: Any) -> None:
        self._clock = clock
        self.monotonic = clock.monotonic
        self.time = clock.time

    async def sleep(self, delay_s: float) -> None:
        await self._clock.sleep(math.ceil(delay_s * 1000) / 1000)


@pytest.mark.parametrize("speedup", [1.0, 3.0, 25.0])
async def test_the_grain_of_an_event_loop_does_not_add_up(process: Any, kit: Any, speedup: float) -> None:
    """300 steps, each woken late, end within a millisecond of what the model says."""
    process.context = replace(process.context, clock=CoarseClock(process.clock))
    await process.worker(mock(speedup_ratio=speedup))
    began = process.clock.monotonic()
    reply = await process.ask(kit.request(prompt=range(100), max_tokens=300))
    took = process.clock.monotonic() - began
    blocks = [-(-(100 + done) // 4) for done in range(1, 300)]
    expected = (prefill_ms(100) + sum(decode_ms(count / 1024) for count in blocks)) / 1000 / speedup
    assert reply.error is None
    assert expected <= took <= expected + 0.001 + 1e-9


@pytest.mark.parametrize("lost_after", [0, 1, 4, 5, 11, 12])
async def test_a_continuation_elsewhere_gives_the_fault_free_output(process: Any, kit: Any, lost_after: int) -> None:
    await process.worker(mock())
    prompt = list(range(10, 27))
    whole = await process.ask(kit.request("whole", prompt, max_tokens=12))
    await process.workers.pop().stop()
    await process.worker(mock(max_num_batched_tokens=5))
    rest = await process.ask(
        kit.request("rest", [*prompt, *whole.tokens[:lost_after]], max_tokens=12, prompt_tokens=len(prompt), attempt=1)
    )
    assert whole.tokens[:lost_after] + rest.tokens == whole.tokens
    assert rest.chunks[0].first_index == lost_after
    assert (rest.finish, rest.chunks[-1].usage.completion_tokens) == (FinishReason.LENGTH, 12)
    assert rest.chunks[-1].usage.prompt_tokens == len(prompt)


async def test_output_without_a_limit_ends_by_itself_and_continues_alike(process: Any, kit: Any) -> None:
    await process.worker(mock(default_output_tokens=40))
    whole = await process.ask(kit.request("whole", [7, 8, 9], max_tokens=None, eos_token_ids=(2,)))
    assert 1 <= len(whole.tokens) <= 40
    assert (whole.finish, whole.chunks[-1].stop_token_id) == (FinishReason.EOS, 2)
    half = len(whole.tokens) // 2
    rest = await process.ask(
        kit.request("rest", [7, 8, 9, *whole.tokens[:half]], max_tokens=None, prompt_tokens=3, eos_token_ids=(2,))
    )
    assert whole.tokens[:half] + rest.tokens == whole.tokens


async def test_stop_tokens_end_the_output_after_min_tokens(process: Any, kit: Any) -> None:
    await process.worker(mock())
    plain = await process.ask(kit.request("plain", max_tokens=12))
    third = plain.tokens[3]
    stopped = await process.ask(kit.request("stopped", stop=StopConditions(max_tokens=12, stop_token_ids=(third,))))
    assert stopped.tokens == plain.tokens[: plain.tokens.index(third)]
    assert (stopped.finish, stopped.chunks[-1].stop_token_id) == (FinishReason.STOP, third)
    kept = await process.ask(
        kit.request("kept", stop=StopConditions(max_tokens=12, min_tokens=12, stop_token_ids=(third,)))
    )
    assert kept.tokens == plain.tokens


async def test_a_shared_prefix_is_reused_and_reported(process: Any, kit: Any) -> None:
    worker = await process.worker(mock())
    prefix = list(range(1, 41))
    first = await process.ask(kit.request("first", [*prefix, 50], max_tokens=2))
    began = process.clock.monotonic()
    second = await process.ask(kit.request("second", [*prefix, 60], max_tokens=1))
    assert first.chunks[-1].usage.cached_tokens == 0
    assert second.chunks[-1].usage.cached_tokens == 40
    assert process.clock.monotonic() - began == pytest.approx(prefill_ms(1) / 1000, rel=0.01)
    batch = await process.query(WorkerId(worker.instance_id), 1)
    stored = [event for event in batch.events if isinstance(event, BlockStored)]
    expected = BlockHasher(4).hash_tokens(pack_tokens(prefix))
    assert list(unpack_hashes(stored[0].engine_hashes)) == list(unpack_hashes(expected.sequence))
    assert list(unpack_hashes(stored[0].local_hashes)) == list(unpack_hashes(expected.local))
    assert process.metric("dynamo_worker_cached_tokens_total") == 40


async def test_a_fully_cached_prompt_still_computes_its_last_token(process: Any, kit: Any) -> None:
    await process.worker(mock())
    prompt = list(range(1, 9))
    await process.ask(kit.request("first", prompt, max_tokens=1))
    second = await process.ask(kit.request("second", prompt, max_tokens=1))
    assert second.chunks[-1].usage.cached_tokens == 4


async def test_salts_and_adapters_do_not_share_blocks(process: Any, kit: Any) -> None:
    await process.worker(mock())
    prompt = list(range(1, 20))
    for name, hints in (("a", RoutingHints()), ("b", RoutingHints(cache_salt="x")), ("c", RoutingHints(lora="y"))):
        reply = await process.ask(kit.request(name, prompt, max_tokens=1, routing=hints))
        assert reply.chunks[-1].usage.cached_tokens == 0


async def test_without_prefix_caching_nothing_is_reused_or_reported(process: Any, kit: Any) -> None:
    worker = await process.worker(mock(prefix_caching=False))
    for name in ("a", "b"):
        reply = await process.ask(kit.request(name, range(40), max_tokens=1))
        assert reply.chunks[-1].usage.cached_tokens == 0
    assert (await process.query(WorkerId(worker.instance_id), 1)).events == ()


@pytest.mark.parametrize("order", ["lifo", "fifo"])
async def test_memory_pressure_preempts_and_every_output_is_right(process: Any, kit: Any, order: str) -> None:
    await process.worker(mock())
    prompts = {f"r{number}": [number * 7 + i for i in range(9)] for number in range(6)}
    expected = {name: (await process.ask(kit.request(name, p, max_tokens=30))).tokens for name, p in prompts.items()}
    await process.workers.pop().stop()
    engine = mock(total_kv_blocks=24, preemption=order, max_num_batched_tokens=16)
    worker = await process.worker(engine)
    events = await process.subscribe(KV_EVENTS, worker.endpoint)
    replies = {name: await process.open(kit.request(name, p, max_tokens=30)) for name, p in prompts.items()}
    for name, reply in replies.items():
        await process.clock.run(reply.done.wait())
        assert reply.error is None
        assert reply.tokens == expected[name]
    assert sum(rank.scheduler.preemptions for rank in engine._ranks) > 0
    assert engine.load().kv_used_blocks == 0
    seen: list[Any] = []
    while not any(isinstance(event, BlockRemoved) for event in seen):
        seen.extend(KV_EVENT_BATCH.decode((await kit.next_event(events)).payload).events)


async def test_chunked_prefill_lets_others_decode_in_between(process: Any, kit: Any) -> None:
    engine = mock(max_num_batched_tokens=64)
    await process.worker(engine)
    first = await process.open(kit.request("first", range(4), max_tokens=50))
    await process.clock.advance(0.03)
    had = len(first.tokens)
    assert had >= 1
    second = await process.open(kit.request("second", range(630), max_tokens=1))
    await process.clock.run(second.done.wait())
    assert len(first.tokens) >= had + 10  # ten chunks of 63, each beside a decoded token


async def test_without_chunking_a_long_prompt_goes_whole(process: Any, kit: Any) -> None:
    worker = await process.worker(mock(max_num_batched_tokens=64, chunked_prefill=False))
    passes = await process.subscribe(FORWARD_PASS, worker.endpoint)
    await process.ask(kit.request("long", range(300), max_tokens=1))
    while True:
        report = FORWARD_PASS_METRICS.decode((await kit.next_event(passes)).payload)
        if report.scheduled.num_prefill_requests:
            break
    assert report.scheduled.sum_prefill_tokens == 300
    assert report.worker == WorkerId(worker.instance_id, 0)


async def test_ranks_have_their_own_caches_and_events(process: Any, kit: Any) -> None:
    worker = await process.worker(mock(data_parallel_size=2))
    prompt = list(range(1, 18))
    for name, rank, cached in (("a", 0, 0), ("b", 1, 0), ("c", 1, 16)):
        reply = await process.ask(kit.request(name, prompt, max_tokens=1, routing=RoutingHints(dp_rank=rank)))
        assert reply.chunks[-1].usage.cached_tokens == cached
    for rank in (0, 1):
        batch = await process.query(WorkerId(worker.instance_id, rank))
        assert batch.worker.dp_rank == rank
        assert sum(len(event) for event in batch.events if isinstance(event, BlockStored)) == 4
    refused = await process.ask(kit.request("d", prompt, routing=RoutingHints(dp_rank=2)))
    assert isinstance(refused.error, InvalidRequestError)


async def test_requests_without_a_rank_are_spread(process: Any, kit: Any) -> None:
    engine = mock(data_parallel_size=2)
    await process.worker(engine)
    for number in range(4):
        await process.open(kit.request(f"r{number}", [number + 1], max_tokens=50))
    loads = [engine.load(dp_rank=rank) for rank in (0, 1)]
    assert [load.active_requests + load.waiting_requests for load in loads] == [2, 2]


async def test_choices_differ_and_usage_counts_them_all(process: Any, kit: Any) -> None:
    await process.worker(mock())
    reply = await process.ask(kit.request(max_tokens=6, sampling=SamplingOptions(n=3)))
    outputs = [reply.of_choice(choice) for choice in range(3)]
    assert [len(output) for output in outputs] == [6, 6, 6]
    assert outputs[0] != outputs[1]
    assert reply.chunks[-1].usage.completion_tokens == 18


async def test_cancelling_frees_blocks_at_once(process: Any, kit: Any) -> None:
    engine = mock()
    await process.worker(engine)
    reply = await process.open(kit.request(prompt=range(100), max_tokens=500))
    await process.clock.advance(0.1)
    assert engine.load().kv_used_blocks >= 25
    reply.call.cancel()
    await process.clock.settle()
    assert reply.finish is FinishReason.CANCELLED
    assert engine.load().kv_used_blocks == 0
    assert engine.load().active_requests == 0


async def test_load_reports_follow_the_engine(process: Any, kit: Any) -> None:
    worker = await process.worker(mock(max_num_seqs=1), engine_request_limit=10)
    loads = await process.subscribe(LOAD, worker.endpoint)
    for number in range(3):
        await process.open(kit.request(f"r{number}", range(number, number + 20), max_tokens=100))
    await process.clock.advance(0.15)
    while True:
        reported = WORKER_LOAD.decode((await kit.next_event(loads)).payload).reported
        if reported.active_requests:
            break
    assert (reported.active_requests, reported.waiting_requests, reported.waiting_prefill_tokens) == (1, 2, 40)
    assert reported.kv_total_blocks == 1024


async def test_clear_kv_blocks_is_an_admin_route(process: Any, kit: Any) -> None:
    worker = await process.worker(mock())
    await process.ask(kit.request(prompt=range(40), max_tokens=1))
    assert await process.context.admin_routes["clear_kv_blocks"]({}) == {"cleared_blocks": 10}
    batch = await process.query(WorkerId(worker.instance_id))
    assert not any(isinstance(event, BlockStored) for event in batch.events)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": []}, "token_ids"),
        ({"prompt": range(200)}, "token_ids"),
        ({"output": OutputOptions(logprobs=1)}, "logprobs"),
        ({"sampling": SamplingOptions(n=0)}, "n"),
        ({"sampling": SamplingOptions(logit_bias={1: 2.0})}, "logit_bias"),
    ],
)
async def test_what_the_mock_cannot_do_is_refused_by_name(
    process: Any, kit: Any, change: dict[str, Any], param: str
) -> None:
    await process.worker(mock(context_length=128))
    reply = await process.ask(kit.request(**change))
    assert isinstance(reply.error, InvalidRequestError)
    assert reply.error.param == param


async def test_a_request_that_can_never_fit_is_refused(process: Any, kit: Any) -> None:
    await process.worker(mock(total_kv_blocks=8))
    reply = await process.ask(kit.request(prompt=range(20), max_tokens=13))
    assert isinstance(reply.error, InvalidRequestError)
    assert "need 9 KV blocks of 8" in reply.error.message


async def test_drain_finishes_and_refuses(process: Any, kit: Any) -> None:
    engine = mock()
    await process.worker(engine)
    reply = await process.open(kit.request(max_tokens=20))
    draining = asyncio.ensure_future(engine.drain())
    await process.clock.settle()
    with pytest.raises(UnavailableError, match="no requests"):
        engine.submit(kit.request("late"), reply)
    await process.clock.run(draining)
    assert len(reply.tokens) == 20


async def test_start_takes_its_time(process: Any, kit: Any) -> None:
    starting = asyncio.ensure_future(process.worker(mock(startup_time_s=7.0)))
    await process.clock.advance(6.9)
    assert not starting.done()
    assert not process.context.health.ready
    await process.clock.advance(0.2)
    await starting
    assert process.metric("dynamo_worker_model_load_seconds") == pytest.approx(7.0)


async def test_with_a_model_folder_the_output_is_words_of_its_tokenizer(process: Any, kit: Any, tmp_path: Path) -> None:
    vocab = {"<s>": 0, "</s>": 1, "!": 2, "hello": 3, "Ġworld": 4, "12": 5, "Ġyes": 6}
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"added_tokens": [{"id": 0}, {"id": 1}], "model": {"vocab": vocab}})
    )
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 7, "eos_token_id": 1}))
    await process.worker(mock(model=str(tmp_path)))
    (record,) = await process.models()
    assert record.card.eos_token_ids == (1,)
    assert set(record.card.files) == {"config", "tokenizer"}
    reply = await process.ask(kit.request(max_tokens=64))
    assert set(reply.tokens) == {3, 4, 6}


async def test_a_bundled_model_is_found_by_name(process: Any, kit: Any) -> None:
    await process.worker(mock(model="tinylm"))
    (record,) = await process.models()
    assert record.card.name == "tinylm"
    assert {"tokenizer", "tokenizer_config", "chat_template", "config"} <= set(record.card.files)
    assert Path(record.card.model_path, record.card.files["tokenizer"].uri).is_file()


async def test_a_missing_model_names_flag_and_path(process: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"--model: cannot read nowhere/tokenizer\.json"):
        await process.worker(mock(model="nowhere"))
