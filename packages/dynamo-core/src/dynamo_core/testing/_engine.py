"""Conformance of engines that give tokens: budgets, stops, usage, positions and continuations."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from dynamo_core.engine import Engine, SupportsLoad, SupportsSubmit
from dynamo_core.enums import FinishReason
from dynamo_core.errors import DynamoError, InvalidRequestError
from dynamo_core.noop.context import LocalRequestContext
from dynamo_core.requests import GenerateChunk, GenerateRequest, SamplingOptions, StopConditions, Usage
from dynamo_core.testing._engine_lifecycle import EngineLifecycleConformance, by_choice, outputs
from dynamo_core.tokens import pack_tokens, token_count, unpack_tokens

PROMPT = (11, 7, 23, 5, 42, 3, 19, 2)


class EngineConformance(EngineLifecycleConformance, suite=True):
    """Every engine that takes and gives tokens must pass this.

    Greedy and seeded requests must be reproducible: the draw is a function of seed, choice and output position.
    """

    @abstractmethod
    def make_engine(self) -> Engine:
        """Return a new engine, not started."""
        ...

    def prompt(self) -> Sequence[int]:
        """Return eight or more token ids that the engine takes."""
        return PROMPT

    def token_request(self, request_id: str, *, max_tokens: int = 8, **changes: Any) -> GenerateRequest:
        """Return a greedy request that ignores the model's own end; ``changes`` replace its fields."""
        request = GenerateRequest(
            request_id=request_id,
            model="",
            token_ids=pack_tokens(self.prompt()),
            sampling=SamplingOptions(temperature=0.0, seed=0),
            stop=StopConditions(max_tokens=max_tokens, ignore_eos=True),
        )
        return msgspec.structs.replace(request, **changes)

    def make_request(self, request_id: str) -> GenerateRequest:
        """Return a short request that ends on its own."""
        return self.token_request(request_id)

    def make_long_request(self, request_id: str) -> GenerateRequest:
        """Return a request that can be stopped on the way."""
        return self.token_request(request_id, max_tokens=400)

    async def test_first_index_counts_without_holes(self) -> None:
        async with self.started() as (engine, _):
            for group in by_choice(await self.chunks(engine, self.token_request("index"))).values():
                expected = 0
                for chunk in group:
                    assert chunk.first_index == expected
                    expected += token_count(chunk.token_ids)

    async def test_usage_comes_with_the_last_chunk_only(self) -> None:
        async with self.started() as (engine, _):
            chunks = await self.chunks(engine, self.token_request("usage"))
            assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
            usage = _usage_of(chunks)
            assert usage.prompt_tokens == len(self.prompt())
            assert usage.completion_tokens == len(_tokens(chunks)) == 8
            assert 0 <= usage.cached_tokens <= usage.prompt_tokens

    @pytest.mark.parametrize("max_tokens", [1, 2, 17])
    async def test_max_tokens_is_honoured(self, max_tokens: int) -> None:
        async with self.started() as (engine, _):
            chunks = await self.chunks(engine, self.token_request("max", max_tokens=max_tokens))
            assert len(_tokens(chunks)) == max_tokens
            assert chunks[-1].finish_reason is FinishReason.LENGTH

    async def test_several_choices_are_all_given_or_refused(self) -> None:
        async with self.started() as (engine, config):
            request = self.token_request("n", sampling=SamplingOptions(temperature=0.0, seed=0, n=3))
            if "n" not in config.capabilities:
                with pytest.raises(InvalidRequestError):
                    await self.chunks(engine, request)
                return
            chunks = await self.chunks(engine, request)
            found = by_choice(chunks)
            assert sorted(found) == [0, 1, 2]
            assert [len(_tokens(group)) for group in found.values()] == [8, 8, 8]
            assert sum(chunk.usage is not None for chunk in chunks) == 1
            assert _usage_of(chunks).completion_tokens == 24

    async def test_stop_token_ends_and_is_left_out(self) -> None:
        async with self.started() as (engine, _):
            free = _tokens(await self.chunks(engine, self.token_request("free")))
            stop = StopConditions(max_tokens=8, ignore_eos=True, stop_token_ids=(free[2],))
            chunks = await self.chunks(engine, self.token_request("stop", stop=stop))
            assert _tokens(chunks) == free[: free.index(free[2])]
            assert chunks[-1].finish_reason is FinishReason.STOP
            assert chunks[-1].stop_token_id == free[2]

    async def test_eos_ends_unless_ignored(self) -> None:
        async with self.started() as (engine, _):
            free = _tokens(await self.chunks(engine, self.token_request("free")))
            eos = (free[2],)
            chunks = await self.chunks(
                engine, self.token_request("eos", eos_token_ids=eos, stop=StopConditions(max_tokens=8))
            )
            assert _tokens(chunks) == free[: free.index(free[2])]
            assert chunks[-1].finish_reason is FinishReason.EOS
            ignored = await self.chunks(engine, self.token_request("ignored", eos_token_ids=eos))
            assert _tokens(ignored) == free

    async def test_min_tokens_holds_ends_back(self) -> None:
        async with self.started() as (engine, _):
            free = _tokens(await self.chunks(engine, self.token_request("free")))
            stop = StopConditions(max_tokens=8, min_tokens=5, ignore_eos=True, stop_token_ids=tuple(free))
            chunks = await self.chunks(engine, self.token_request("min", stop=stop))
            assert len(_tokens(chunks)) >= 5

    async def test_greedy_output_repeats(self) -> None:
        async with self.started() as (engine, _):
            one = await self.chunks(engine, self.token_request("one", max_tokens=16))
            two = await self.chunks(engine, self.token_request("two", max_tokens=16))
            assert outputs(one) == outputs(two)

    async def test_seeded_output_repeats(self) -> None:
        async with self.started() as (engine, _):
            sampling = SamplingOptions(temperature=1.0, seed=7)
            one = await self.chunks(engine, self.token_request("one", sampling=sampling))
            two = await self.chunks(engine, self.token_request("two", sampling=sampling))
            assert outputs(one) == outputs(two)

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    @pytest.mark.parametrize("accepted", [1, 3, 7])
    async def test_continuation_gives_the_rest(self, accepted: int, temperature: float) -> None:
        async with self.started() as (engine, _):
            sampling = SamplingOptions(temperature=temperature, seed=7)
            whole = await self.chunks(engine, self.token_request("whole", sampling=sampling))
            tokens = _tokens(whole)
            request = self.token_request(
                "rest",
                sampling=sampling,
                token_ids=pack_tokens([*self.prompt(), *tokens[:accepted]]),
                prompt_tokens=len(self.prompt()),
                attempt=1,
            )
            chunks = await self.chunks(engine, request)
            assert _tokens(chunks) == tokens[accepted:]
            assert chunks[0].first_index == accepted
            assert {chunk.attempt for chunk in chunks} == {1}
            usage, fault_free = _usage_of(chunks), _usage_of(whole)
            assert (usage.prompt_tokens, usage.completion_tokens) == (
                fault_free.prompt_tokens,
                fault_free.completion_tokens,
            )

    async def test_empty_prompt_is_refused_before_the_first_chunk(self) -> None:
        async with self.started() as (engine, _):
            stream = engine.generate(self.token_request("empty", token_ids=pack_tokens(())), LocalRequestContext())
            with pytest.raises(InvalidRequestError):
                await self.within(anext(stream))

    async def test_prompt_beyond_the_context_is_refused_before_the_first_chunk(self) -> None:
        async with self.started() as (engine, config):
            length = config.context_length
            if not length:
                return
            prompt = pack_tokens([self.prompt()[0]] * (length + 1))
            stream = engine.generate(self.token_request("long", token_ids=prompt), LocalRequestContext())
            with pytest.raises(InvalidRequestError):
                await self.within(anext(stream))

    async def test_submit_equals_generate(self) -> None:
        async with self.started() as (engine, _):
            if not isinstance(engine, SupportsSubmit):
                return
            request = self.token_request("submit")
            sink = _Sink()
            engine.submit(request, sink)
            await self.until(lambda: sink.done)
            assert sink.error is None
            assert outputs(sink.chunks) == outputs(await self.chunks(engine, self.token_request("generate")))

    async def test_load_falls_back_to_nothing(self) -> None:
        async with self.started() as (engine, _):
            await self.chunks(engine, self.token_request("load"))
            if not isinstance(engine, SupportsLoad):
                return
            load = engine.load()
            assert (load.active_requests, load.waiting_requests, load.waiting_prefill_tokens) == (0, 0, 0)
            assert 0 <= load.kv_used_blocks <= load.kv_total_blocks


class _Sink:
    """Keeps the chunks of a submitted request."""

    def __init__(self) -> None:
        self.chunks: list[GenerateChunk] = []
        self.error: DynamoError | None = None
        self.done = False

    def push(self, chunk: GenerateChunk) -> None:
        self.chunks.append(chunk)
        self.done = chunk.usage is not None

    def fail(self, error: DynamoError) -> None:
        self.error = error
        self.done = True


def _tokens(chunks: Sequence[GenerateChunk]) -> list[int]:
    return [token for chunk in chunks for token in unpack_tokens(chunk.token_ids)]


def _usage_of(chunks: Sequence[GenerateChunk]) -> Usage:
    usage = chunks[-1].usage
    assert usage is not None
    return usage
