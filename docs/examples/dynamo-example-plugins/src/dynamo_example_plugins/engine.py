"""An engine: it answers with the prompt's tokens in order, again and again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from dynamo_core import FinishReason, GenerateChunk, GenerateRequest, Usage, pack_tokens, unpack_tokens
from dynamo_core.engine import EngineConfig, EngineContext
from dynamo_core.errors import ConfigurationError, InvalidRequestError
from dynamo_core.planes import RequestContext

CONTEXT_LENGTH = 4096
TOKEN_S = 0.001


class SpellingEngine:
    """A token a millisecond, any number of requests at once."""

    def __init__(self) -> None:
        self._aborted: dict[str, bool] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    @classmethod
    def from_args(cls, args: Sequence[str]) -> SpellingEngine:
        """Take no flags."""
        if args:
            raise ConfigurationError(f"flag {args[0]!r} is not known to the spelling engine; it takes none")
        return cls()

    async def start(self, context: EngineContext) -> EngineConfig:
        """Say what is served; there is nothing to load."""
        self._clock = context.clock
        return EngineConfig("spelling", context_length=CONTEXT_LENGTH)

    async def generate(self, request: GenerateRequest, context: RequestContext) -> AsyncGenerator[GenerateChunk, None]:
        """Answer one request. Closing the generator ends it at once."""
        tokens = unpack_tokens(request.token_ids)
        if not 0 < len(tokens) <= CONTEXT_LENGTH:
            raise InvalidRequestError(f"give 1 to {CONTEXT_LENGTH} prompt tokens, not {len(tokens)}", param="token_ids")
        if request.sampling.n != 1:
            raise InvalidRequestError("the spelling engine gives one choice; leave n out", param="n")
        self._aborted[request.request_id] = False
        self._idle.clear()
        try:
            async for chunk in self._spell(request, context, tokens[: request.prompt_tokens or len(tokens)]):
                yield chunk
        finally:
            del self._aborted[request.request_id]
            if not self._aborted:
                self._idle.set()

    async def _spell(
        self, request: GenerateRequest, context: RequestContext, prompt: Sequence[int]
    ) -> AsyncGenerator[GenerateChunk, None]:
        # A request may continue one that another worker lost: it then begins where the client's tokens end.
        stop, index = request.stop, request.accepted_tokens
        limit = min(stop.max_tokens or CONTEXT_LENGTH, CONTEXT_LENGTH - len(prompt))
        eos = () if stop.ignore_eos else request.eos_token_ids
        finish, ended_by = FinishReason.LENGTH, None
        while index < limit:
            await self._clock.sleep(TOKEN_S)
            token = prompt[index % len(prompt)]
            if context.stopped or self._aborted[request.request_id]:
                finish = FinishReason.CANCELLED
                break
            if index >= stop.min_tokens and (token in stop.stop_token_ids or token in eos):
                finish, ended_by = (FinishReason.EOS if token in eos else FinishReason.STOP), token
                break
            yield GenerateChunk(pack_tokens([token]), index, attempt=request.attempt)
            index += 1
        yield GenerateChunk(
            first_index=index,
            attempt=request.attempt,
            finish_reason=finish,
            stop_token_id=ended_by,
            usage=Usage(len(prompt), index),
        )

    async def abort(self, request_id: str) -> None:
        """Let a request end with its next token; one that is unknown is fine."""
        if request_id in self._aborted:
            self._aborted[request_id] = True

    async def drain(self) -> None:
        """Wait until nothing runs."""
        await self._idle.wait()

    async def cleanup(self) -> None:
        """Forget everything; may be called twice."""
        self._aborted.clear()
        self._idle.set()
