"""A session of the stock ``anthropic`` client: ``python anthropic_session.py URL MODEL`` prints what passed."""

from __future__ import annotations

import sys
from typing import Any

import anthropic

# Named in no signature of the newest client, which leaves it to models; the API takes it.
GREEDY: dict[str, Any] = {"extra_body": {"temperature": 0}}
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of Japan?"}]
WEATHER: Any = {
    "name": "get_weather",
    "input_schema": {
        "type": "object",
        "properties": {"unit": {"enum": ["C", "F"]}},
        "required": ["unit"],
        "additionalProperties": False,
    },
}


class Session:
    """The steps, in order.

    Args:
        client: The client.
        model: Model name.
    """

    def __init__(self, client: anthropic.Anthropic, model: str) -> None:
        self._client = client
        self._model = model

    def messages(self) -> None:
        """A whole message."""
        message: Any = self._client.messages.create(model=self._model, max_tokens=40, messages=QUESTION, **GREEDY)
        assert "Tokyo" in message.content[0].text
        assert message.stop_reason == "end_turn"
        assert message.usage.output_tokens > 0

    def stream(self) -> None:
        """The API's events, read by the client's own accumulator."""
        with self._client.messages.stream(model=self._model, max_tokens=40, messages=QUESTION, **GREEDY) as stream:
            text = "".join(stream.text_stream)
            final: Any = stream.get_final_message()
        assert text == final.content[0].text
        assert "Tokyo" in text

    def tools(self) -> None:
        """A forced tool use, whole and streamed, and an answer to its result."""
        options: dict[str, Any] = {
            "model": self._model,
            "max_tokens": 60,
            "messages": QUESTION,
            "tools": [WEATHER],
            "tool_choice": {"type": "tool", "name": "get_weather"},
            **GREEDY,
        }
        message: Any = self._client.messages.create(**options)
        (use,) = [block for block in message.content if block.type == "tool_use"]
        assert use.input["unit"] in ("C", "F")
        assert message.stop_reason == "tool_use"
        with self._client.messages.stream(**options) as stream:
            streamed: Any = stream.get_final_message()
        assert [block.input for block in streamed.content if block.type == "tool_use"] == [use.input]
        result = {"type": "tool_result", "tool_use_id": use.id, "content": "rain"}
        again: Any = [
            *QUESTION,
            {"role": "assistant", "content": [block.model_dump() for block in message.content]},
            {"role": "user", "content": [result]},
        ]
        self._client.messages.create(model=self._model, max_tokens=4, messages=again)

    def count(self) -> None:
        """Count tokens."""
        assert self._client.messages.count_tokens(model=self._model, messages=QUESTION).input_tokens > 5

    def errors(self) -> None:
        """Typed errors."""
        try:
            self._client.messages.create(model="nobody", max_tokens=4, messages=QUESTION)
        except anthropic.NotFoundError:
            return
        raise AssertionError("NotFoundError was not raised")


STEPS = ("messages", "stream", "tools", "count", "errors")


def main(url: str, model: str) -> None:
    """Run the session."""
    print(f"anthropic {anthropic.__version__}")
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
        session = Session(client, model)
        for step in STEPS:
            getattr(session, step)()
            print(f"passed {step}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
