"""Conformance of engines that constrain their output."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import pytest

from dynamo_core.enums import FinishReason
from dynamo_core.errors import InvalidRequestError
from dynamo_core.noop.context import LocalRequestContext
from dynamo_core.requests import GenerateChunk, GenerateRequest, GuidedDecoding, SamplingOptions, StopConditions
from dynamo_core.testing._engine import EngineConformance
from dynamo_core.tokens import pack_tokens, unpack_tokens

CHOICES = ("alpha beta", "gamma", "gamma delta")
SCHEMA = {
    "type": "object",
    "properties": {"side": {"enum": ["left", "right"]}, "hard": {"type": "boolean"}},
    "required": ["side", "hard"],
    "additionalProperties": False,
}


class GuidedEngineConformance(EngineConformance, suite=True):
    """Every engine with the capability ``guided_decoding`` must pass this, which includes ``EngineConformance``.

    A constraint holds for each choice alone, from its first token over all attempts, and never ends another request.
    """

    @abstractmethod
    def text(self, token_ids: Sequence[int]) -> str:
        """Return what tokens spell."""
        ...

    def guided_request(self, request_id: str, guided: GuidedDecoding, **options: Any) -> GenerateRequest:
        """Return a constrained request that the model's own end may end; ``options`` are sampling options."""
        chosen: dict[str, Any] = {"temperature": 1.0, "seed": 7, **options}
        sampling = SamplingOptions(guided=guided, **chosen)
        return self.token_request(request_id, sampling=sampling, stop=StopConditions(max_tokens=64))

    async def test_guided_decoding_is_announced(self) -> None:
        async with self.started() as (_, config):
            assert "guided_decoding" in config.capabilities

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    async def test_guided_output_is_one_of_the_choices(self, temperature: float) -> None:
        async with self.started() as (engine, _):
            for seed in range(3):
                request = self.guided_request(
                    "choice", GuidedDecoding(choice=CHOICES), temperature=temperature, seed=seed
                )
                chunks = await self.chunks(engine, request)
                assert self.text(_tokens(chunks)) in CHOICES
                assert chunks[-1].finish_reason in (FinishReason.EOS, FinishReason.STOP)

    async def test_guided_json_has_the_schema(self) -> None:
        async with self.started() as (engine, _):
            chunks = await self.chunks(engine, self.guided_request("json", GuidedDecoding(json=SCHEMA)))
            written = "".join(self.text(_tokens(chunks)).split())
            assert written in {
                f'{{"side":"{side}","hard":{hard}}}' for side in ("left", "right") for hard in ("true", "false")
            }

    @pytest.mark.parametrize(
        "guided",
        [GuidedDecoding(regex="("), GuidedDecoding(json={"type": "nonsense"}), GuidedDecoding(grammar="(((")],
        ids=["regex", "json", "grammar"],
    )
    async def test_a_wrong_constraint_is_refused_before_the_first_chunk(self, guided: GuidedDecoding) -> None:
        async with self.started() as (engine, _):
            stream = engine.generate(self.guided_request("wrong", guided), LocalRequestContext())
            with pytest.raises(InvalidRequestError):
                await self.within(anext(stream))
            await self.chunks(engine, self.token_request("after"))

    async def test_a_guided_continuation_gives_the_rest(self) -> None:
        async with self.started() as (engine, _):
            request = self.guided_request("whole", GuidedDecoding(json=SCHEMA))
            tokens = _tokens(await self.chunks(engine, request))
            for accepted in range(1, len(tokens)):
                rest = self.token_request(
                    f"rest-{accepted}",
                    sampling=request.sampling,
                    stop=request.stop,
                    token_ids=pack_tokens([*self.prompt(), *tokens[:accepted]]),
                    prompt_tokens=len(self.prompt()),
                    attempt=1,
                )
                chunks = await self.chunks(engine, rest)
                assert _tokens(chunks) == tokens[accepted:]


def _tokens(chunks: Sequence[GenerateChunk]) -> list[int]:
    return [token for chunk in chunks for token in unpack_tokens(chunk.token_ids)]
