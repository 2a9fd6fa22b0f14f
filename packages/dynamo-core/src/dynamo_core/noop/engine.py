"""An engine without a model: its output is its prompt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from dynamo_core.cards import ModelRuntimeConfig
from dynamo_core.clock import Clock, SystemClock
from dynamo_core.engine import EngineConfig, EngineContext
from dynamo_core.enums import FinishReason
from dynamo_core.errors import ConfigurationError, InvalidRequestError, UnavailableError
from dynamo_core.planes import RequestContext
from dynamo_core.requests import GenerateChunk, GenerateRequest, Usage
from dynamo_core.tokens import pack_tokens, unpack_tokens

DEFAULT_CONTEXT_LENGTH = 1 << 20


class EchoEngine:
    """Echoes the prompt token by token, for every choice, then says ``EOS``.

    With ``ignore_eos`` or ``min_tokens`` it starts the prompt over. Sampling options that cannot change a copy
    (temperature and the like) are honoured trivially; options that ask for more than tokens are refused by name.

    Args:
        model: Served model name.
        token_s: Seconds a token, on the context's clock; 0 gives up the event loop only.
        context_length: Most tokens of prompt and output together.
    """

    def __init__(
        self, model: str = "echo", *, token_s: float = 0.0, context_length: int = DEFAULT_CONTEXT_LENGTH
    ) -> None:
        if token_s < 0:
            raise ConfigurationError(f"token_s {token_s} must be at least 0")
        if context_length < 2:
            raise ConfigurationError(f"context_length {context_length} must be at least 2")
        self._model = model
        self._token_s = token_s
        self._context_length = context_length
        self._clock: Clock = SystemClock()
        self._running: dict[str, int] = {}
        self._aborted: set[str] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False

    @classmethod
    def from_args(cls, args: Sequence[str]) -> EchoEngine:
        """Build one from ``--model``, ``--token-s`` and ``--context-length``.

        Raises:
            ConfigurationError: for an unknown flag or a bad value.
        """
        from pydantic import Field

        from dynamo_core.settings import DynamoSettings, resolve_settings

        class EchoSettings(DynamoSettings):
            """Options of the echo engine."""

            component = "echo"
            model: str = Field("echo", description="served model name")
            token_s: float = Field(0.0, ge=0, description="seconds a token")
            context_length: int = Field(DEFAULT_CONTEXT_LENGTH, ge=2, description="most tokens of prompt and output")

        options = resolve_settings("echo engine", (EchoSettings,), args, environ={}).get(EchoSettings)
        return cls(options.model, token_s=options.token_s, context_length=options.context_length)

    async def start(self, context: EngineContext) -> EngineConfig:
        """Take the clock; there is nothing to load."""
        self._clock = context.clock
        return EngineConfig(
            model=self._model,
            context_length=self._context_length,
            capabilities=("n",),
            runtime_config=ModelRuntimeConfig(enable_local_indexer=False),
        )

    async def generate(self, request: GenerateRequest, context: RequestContext) -> AsyncIterator[GenerateChunk]:
        """Yield the prompt's tokens, one a chunk and round-robin over the choices.

        Raises:
            InvalidRequestError: for an empty or too long prompt, or an option that a copy cannot honour.
            UnavailableError: while draining.
        """
        if self._draining:
            raise UnavailableError("the engine is draining", reason="backend.draining")
        echo = _Echo(request, self._context_length)
        self._enter(request.request_id)
        try:
            while not echo.done:
                await self._pause()
                cancelled = context.stopped or request.request_id in self._aborted
                for chunk in echo.step(cancelled=cancelled):
                    yield chunk
        finally:
            self._leave(request.request_id)

    async def abort(self, request_id: str) -> None:
        """End a request at its next token; unknown ids are ignored."""
        if request_id in self._running:
            self._aborted.add(request_id)

    async def drain(self) -> None:
        """Refuse new requests and wait for the running ones."""
        self._draining = True
        await self._idle.wait()

    async def cleanup(self) -> None:
        """End what runs at its next token. Idempotent."""
        self._draining = True
        self._aborted.update(self._running)

    async def _pause(self) -> None:
        if self._token_s:
            await self._clock.sleep(self._token_s)
        else:
            await asyncio.sleep(0)

    def _enter(self, request_id: str) -> None:
        self._running[request_id] = self._running.get(request_id, 0) + 1
        self._idle.clear()

    def _leave(self, request_id: str) -> None:
        self._running[request_id] -= 1
        if not self._running[request_id]:
            del self._running[request_id]
            self._aborted.discard(request_id)
        if not self._running:
            self._idle.set()


class _Echo:
    """State of one request: the next output position of every choice."""

    def __init__(self, request: GenerateRequest, context_length: int) -> None:
        _require_plain(request)
        tokens = unpack_tokens(request.token_ids)
        self._request = request
        self._prompt = tokens[: request.prompt_tokens] if request.prompt_tokens else tokens
        room = context_length - len(self._prompt)
        if not self._prompt or room < 1:
            raise InvalidRequestError(
                f"a prompt of {len(self._prompt)} tokens does not fit: give 1 to {context_length - 1} tokens",
                param="token_ids",
            )
        wanted = request.stop.max_tokens
        self._limit = room if wanted is None else min(wanted, room)
        self._stops = frozenset(request.stop.stop_token_ids)
        self._eos = frozenset() if request.stop.ignore_eos else frozenset(request.eos_token_ids)
        self._next = dict.fromkeys(range(request.sampling.n), request.accepted_tokens)
        self._generated = 0

    @property
    def done(self) -> bool:
        """Whether every choice has ended."""
        return not self._next

    def step(self, *, cancelled: bool) -> list[GenerateChunk]:
        """Return the next chunk of every choice that has not ended."""
        return [self._advance(choice, cancelled=cancelled) for choice in list(self._next)]

    def _advance(self, choice: int, *, cancelled: bool) -> GenerateChunk:
        position = self._next[choice]
        token = self._prompt[position % len(self._prompt)]
        if cancelled:
            return self._last(choice, FinishReason.CANCELLED)
        if position >= self._limit:
            return self._last(choice, FinishReason.LENGTH)
        if position >= self._request.stop.min_tokens:
            if token in self._stops:
                return self._last(choice, FinishReason.STOP, token)
            if token in self._eos:
                return self._last(choice, FinishReason.EOS, token)
            if position >= len(self._prompt) and not self._request.stop.ignore_eos:
                return self._last(choice, FinishReason.EOS)
        self._next[choice] = position + 1
        return self._chunk(choice, position, token)

    def _chunk(self, choice: int, position: int, token: int) -> GenerateChunk:
        return GenerateChunk(
            token_ids=pack_tokens((token,)), first_index=position, choice=choice, attempt=self._request.attempt
        )

    def _last(self, choice: int, reason: FinishReason, stop_token_id: int | None = None) -> GenerateChunk:
        position = self._next.pop(choice)
        self._generated += position
        usage = None if self._next else Usage(len(self._prompt), self._generated)
        return GenerateChunk(
            first_index=position,
            choice=choice,
            attempt=self._request.attempt,
            finish_reason=reason,
            stop_token_id=stop_token_id,
            usage=usage,
        )


def _require_plain(request: GenerateRequest) -> None:
    refused = {
        "parts": bool(request.parts),
        "handoff": request.handoff is not None,
        "sampling.guided": request.sampling.guided is not None,
        "sampling.logit_bias": bool(request.sampling.logit_bias),
        "sampling.allowed_token_ids": bool(request.sampling.allowed_token_ids),
        "output.logprobs": request.output.logprobs is not None,
        "output.prompt_logprobs": request.output.prompt_logprobs is not None,
    }
    for name, given in refused.items():
        if given:
            raise InvalidRequestError(f"the echo engine cannot honour {name}; leave it out", param=name)
    if request.sampling.n < 1:
        raise InvalidRequestError(f"n {request.sampling.n} must be at least 1", param="sampling.n")
    if request.stop.max_tokens is not None and request.stop.max_tokens < 1:
        raise InvalidRequestError(f"max_tokens {request.stop.max_tokens} must be at least 1", param="stop.max_tokens")
