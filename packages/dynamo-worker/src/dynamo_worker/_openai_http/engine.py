"""``OpenAIHttpEngine``: serves what a stock OpenAI-compatible server computes (vLLM, SGLang, llama-server, TGI)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from dynamo_core.cards import ModelRuntimeConfig
from dynamo_core.clock import Clock
from dynamo_core.engine import EngineConfig, EngineContext, KvEventSink
from dynamo_core.enums import ModelInput
from dynamo_core.errors import ConfigurationError, UnavailableError
from dynamo_core.load import ReportedLoad
from dynamo_core.requests import GenerateChunk, GenerateRequest
from dynamo_worker._kv_relay.relay import KvEventRelay, rank_endpoint
from dynamo_worker._openai_http._client import ServerClient
from dynamo_worker._openai_http._probing import probe_server
from dynamo_worker._openai_http._request import completion_body, copies, require_sendable
from dynamo_worker._openai_http._server import OutputForm, Samples, ServerFacts
from dynamo_worker._openai_http._settings import OpenAIHttpSettings
from dynamo_worker._openai_http._wire import Choice, token_logprobs, token_of
from dynamo_worker._output_builder import Delta, OutputBuilder
from dynamo_worker._request_tasks import RequestTasks
from dynamo_worker._stream_engine import StreamEngine


class OpenAIHttpEngine(StreamEngine):
    """An engine over HTTP. The server keeps running when this stops; closing a stream aborts its request there.

    Args:
        settings: Options.
    """

    def __init__(self, settings: OpenAIHttpSettings) -> None:
        super().__init__()
        self._settings = settings
        self._client: ServerClient | None = None
        self._facts = ServerFacts("")
        self._relays: list[KvEventRelay] = []
        self._samples = Samples()
        self._watch: asyncio.Task[None] | None = None
        self._clock: Clock | None = None

    @classmethod
    def from_args(cls, args: Sequence[str]) -> OpenAIHttpEngine:
        """Build an engine from command-line arguments; nothing is opened.

        Raises:
            ConfigurationError: for an unknown flag or a bad value.
        """
        return cls(OpenAIHttpSettings.from_args(args))

    async def start(self, context: EngineContext) -> EngineConfig:
        """Wait for the server and learn what it can do.

        Raises:
            ConfigurationError: if it cannot serve what was asked.
            UnavailableError: if it does not come up in time.
        """
        settings = self._settings
        self._clock = context.clock
        self._client = ServerClient(settings, context.clock)
        self._facts = facts = await probe_server(self._client, settings)
        if settings.kv_events_endpoint and not facts.kv_block_size:
            raise ConfigurationError("the server does not tell its KV block size; give --kv-block-size")
        self._tasks = RequestTasks(self._stream, settings.eos_token_ids)
        self._watch = asyncio.ensure_future(self._watch_load(self._client, context.clock))
        return self._config(facts)

    async def cleanup(self) -> None:
        """Close everything; the server goes on."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        await self._tasks.close()
        for relay in self._relays:
            await relay.close()
        client, self._client, self._relays = self._client, None, []
        if client is not None:
            await client.close()

    def set_kv_event_sink(self, sink: KvEventSink, *, dp_rank: int = 0) -> None:
        """Relay the server's events of a rank to ``sink``."""
        settings, clock = self._settings, self._clock
        if not settings.kv_events_endpoint or clock is None:
            return
        relay = KvEventRelay(
            rank_endpoint(settings.kv_events_endpoint, dp_rank),
            replay_endpoint=rank_endpoint(settings.kv_events_replay_endpoint, dp_rank),
            topic=settings.kv_events_topic,
            block_size=self._facts.kv_block_size,
            sink=sink,
            clock=clock,
        )
        relay.start()
        self._relays.append(relay)

    def load(self, *, dp_rank: int = 0) -> ReportedLoad:
        """Return the load that the server's metrics tell, else the requests that run through this engine."""
        # The server's numbers are sums over its ranks, which it keeps even.
        samples, total, ranks = self._samples, self._facts.total_kv_blocks or 0, self._settings.data_parallel_size
        used = samples.first("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage")
        running = samples.first("vllm:num_requests_running", "sglang:num_running_reqs", "llamacpp:requests_processing")
        waiting = samples.first("vllm:num_requests_waiting", "sglang:num_queue_reqs", "llamacpp:requests_deferred")
        return ReportedLoad(
            kv_used_blocks=min(total, round((used or 0.0) / ranks * total)),
            kv_total_blocks=total,
            active_requests=len(self._tasks) if running is None else round(running / ranks),
            waiting_requests=round((waiting or 0.0) / ranks),
        )

    async def _stream(self, request: GenerateRequest, output: OutputBuilder) -> AsyncIterator[GenerateChunk]:
        if self._client is None:
            raise UnavailableError("the engine is not started", reason="backend.engine_shutdown")
        body = completion_body(request, self._facts, output.end_token_ids)
        headers = {"x-request-id": request.request_id}
        if request.routing.dp_rank is not None:
            headers["x-data-parallel-rank"] = str(request.routing.dp_rank)
        completion, cached, times = None, 0, copies(request)
        async for event in self._client.stream(body, headers):
            for choice in event.choices:
                delta = self._delta(choice, request)
                for index in range(times) if times > 1 else (delta.choice,):
                    chunk = output.take(replace(delta, choice=index))
                    if chunk is not None:
                        yield chunk
            if event.usage is not None:
                completion, cached = times * event.usage.completion_tokens, event.usage.cached_tokens
        last = output.close(completion_tokens=completion, cached_tokens=cached)
        if last is not None:
            yield last

    def _delta(self, choice: Choice, request: GenerateRequest) -> Delta:
        form = self._facts.output
        if form is OutputForm.TEXT:
            return Delta(choice.index, text=choice.text, finish=choice.finish_reason)
        tokens = choice.token_ids
        if tokens is None:
            given = choice.logprobs.tokens if choice.logprobs is not None else []
            tokens = [token for text in given if (token := token_of(text)) is not None]
        wanted = request.output.logprobs is not None
        logprobs = token_logprobs(choice.logprobs) if wanted else ()
        return Delta(choice.index, tokens, logprobs, finish=choice.finish_reason)

    async def _watch_load(self, client: ServerClient, clock: Clock) -> None:
        while text := await client.metrics():
            self._samples = Samples.parse(text)
            await clock.sleep(self._settings.load_interval_s)

    def _config(self, facts: ServerFacts) -> EngineConfig:
        settings = self._settings
        gives_tokens = facts.output is not OutputForm.TEXT
        return EngineConfig(
            model=settings.served_model_name or facts.remote_model,
            model_path=facts.model_path if facts.takes_tokens else "",
            context_length=facts.context_length,
            kv_block_size=facts.kv_block_size if settings.kv_events_endpoint else 0,
            eos_token_ids=tuple(settings.eos_token_ids),
            model_input=ModelInput.TOKENS if facts.takes_tokens else ModelInput.TEXT,
            capabilities=("guided_decoding", "logprobs", "n") if gives_tokens else ("guided_decoding", "n"),
            runtime_config=ModelRuntimeConfig(
                total_kv_blocks=facts.total_kv_blocks,
                max_num_seqs=settings.max_num_seqs,
                data_parallel_size=settings.data_parallel_size,
                runtime_data={"server": settings.url, "output": facts.output.value},
            ),
        )

    def _require_servable(self, request: GenerateRequest) -> None:
        require_sendable(request, self._require_facts())

    def _require_facts(self) -> ServerFacts:
        if self._client is None:
            raise UnavailableError("the engine is not started", reason="backend.engine_shutdown")
        return self._facts
