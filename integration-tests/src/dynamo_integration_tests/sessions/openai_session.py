"""A session of the stock ``openai`` client: ``python openai_session.py URL MODEL`` prints the steps that passed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import openai
from pydantic import BaseModel

QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of Japan?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"unit": {"enum": ["C", "F"]}},
            "required": ["unit"],
            "additionalProperties": False,
        },
    },
}


class Verdict(BaseModel):
    """What ``parse`` is to fill in."""

    yes: bool


class Session:
    """The steps, in order.

    Args:
        client: The client.
        model: Model name.
    """

    def __init__(self, client: openai.OpenAI, model: str) -> None:
        self._client = client
        self._model = model

    def models(self) -> None:
        """List and retrieve."""
        assert self._model in [model.id for model in self._client.models.list()]
        assert self._client.models.retrieve(self._model).id == self._model

    def chat(self) -> None:
        """A whole answer with usage and log-probabilities."""
        answer = self._client.chat.completions.create(
            model=self._model, messages=QUESTION, temperature=0, logprobs=True, top_logprobs=2
        )
        assert "Tokyo" in (answer.choices[0].message.content or "")
        assert answer.usage is not None and answer.usage.completion_tokens > 0
        assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.content

    def stream(self) -> None:
        """A streamed answer with usage at its end."""
        chunks = list(
            self._client.chat.completions.create(
                model=self._model,
                messages=QUESTION,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert "Tokyo" in text
        assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens > 0

    def tools(self) -> None:
        """A forced call, whole and streamed, and an answer to its result."""
        options: dict[str, Any] = {
            "model": self._model,
            "messages": QUESTION,
            "tools": [WEATHER],
            "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
            "temperature": 0,
            "max_tokens": 60,
        }
        message = self._client.chat.completions.create(**options).choices[0].message
        assert message.tool_calls
        call: Any = message.tool_calls[0]
        assert json.loads(call.function.arguments)["unit"] in ("C", "F")
        pieces: list[Any] = [
            piece
            for chunk in self._client.chat.completions.create(**options, stream=True)
            for piece in (chunk.choices[0].delta.tool_calls or [])
        ]
        assert "".join(piece.function.arguments or "" for piece in pieces) == call.function.arguments
        result: Any = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
        again = [*QUESTION, message.model_dump(exclude_none=True), result]
        self._client.chat.completions.create(model=self._model, messages=again, max_tokens=4)

    def parse(self) -> None:
        """An answer in the form of a class."""
        chat: Any = self._client.chat.completions
        home = chat if hasattr(chat, "parse") else self._client.beta.chat.completions
        answer: Any = home.parse(
            model=self._model, messages=QUESTION, response_format=Verdict, temperature=0, max_tokens=60
        )
        assert isinstance(answer.choices[0].message.parsed, Verdict)

    def completions(self) -> None:
        """Text and token ids, several at once."""
        answer = self._client.completions.create(
            model=self._model, prompt=["In the beginning God", "The"], temperature=0, max_tokens=3
        )
        assert [choice.index for choice in answer.choices] == [0, 1]
        ids = self._client.completions.create(model=self._model, prompt=[5, 6, 7], max_tokens=2)
        assert ids.usage is not None and ids.usage.prompt_tokens == 3

    def responses(self) -> None:
        """A response, whole and as events."""
        question = "What is the capital of Japan?"
        answer = self._client.responses.create(model=self._model, input=question, temperature=0)
        assert "Tokyo" in answer.output_text
        events: Any = self._client.responses.create(model=self._model, input=question, temperature=0, stream=True)
        kinds = [event.type for event in events]
        assert kinds[0] == "response.created"
        assert kinds[-1] == "response.completed"

    def embeddings(self) -> None:
        """Vectors; the client asks for base64 and decodes it."""
        answer = self._client.embeddings.create(model=self._model, input=["Tokyo", "Oslo"])
        first, second = (item.embedding for item in answer.data)
        assert len(first) == len(second) > 1
        assert first != second

    def errors(self) -> None:
        """Typed errors."""
        for attempt, kind in (
            (lambda: self._client.chat.completions.create(model="nobody", messages=QUESTION), openai.NotFoundError),
            (
                lambda: self._client.chat.completions.create(model=self._model, messages=QUESTION, temperature=9),
                openai.BadRequestError,
            ),
            (
                lambda: self._client.embeddings.create(model=self._model, input="x", dimensions=3),
                openai.BadRequestError,
            ),
        ):
            _must_raise(attempt, kind)


def _must_raise(attempt: Callable[[], Any], kind: type[openai.APIStatusError]) -> None:
    try:
        attempt()
    except kind as error:
        assert error.code, error
        return
    raise AssertionError(f"{kind.__name__} was not raised")


STEPS = ("models", "chat", "stream", "tools", "parse", "completions", "responses", "embeddings", "errors")


def main(url: str, model: str) -> None:
    """Run the session."""
    print(f"openai {openai.__version__}")
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        session = Session(client, model)
        for step in STEPS:
            getattr(session, step)()
            print(f"passed {step}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
