"""Chat templates: a model's own Jinja template, rendered as its training code did."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import minijinja

from dynamo_core.clock import Clock
from dynamo_core.errors import ConfigurationError, InvalidRequestError

MAX_TEMPLATE_FUEL = 50_000_000
_GENERATION_TAG = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
_LOOP_OVER_PARTS = re.compile(r"\bin\s+\w+(?:\.content\b|\[\s*['\"]content['\"]\s*\])")
_RESERVED = frozenset(
    {"messages", "tools", "add_generation_prompt", "continue_final_message", "bos_token", "eos_token"}
)


class _RaisedByTemplateError(Exception):
    """The template itself refused the conversation."""


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja source.
        special_tokens: ``bos_token``, ``eos_token`` and the like by name.
        clock: For ``strftime_now``.

    Attributes:
        takes_parts: Whether it reads contents that are lists of parts.

    Raises:
        ConfigurationError: if the source does not parse.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], clock: Clock) -> None:
        self._clock = clock
        self._special = dict(special_tokens)
        # Markers for training frameworks; they print nothing.
        cleaned = _GENERATION_TAG.sub("", source)
        self.takes_parts = _LOOP_OVER_PARTS.search(source) is not None
        environment = minijinja.Environment(
            trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=False, undefined_behavior="chainable"
        )
        environment.debug = False
        environment.fuel = MAX_TEMPLATE_FUEL
        environment.auto_escape_callback = lambda name: False
        environment.add_filter("tojson", _to_json)
        environment.add_global("raise_exception", _raise_exception)
        environment.add_global("strftime_now", self._strftime_now)
        try:
            environment.add_template("chat", cleaned)
        except minijinja.TemplateError as error:
            raise ConfigurationError(f"the model's chat template does not parse: {error.message}") from error
        self._environment = environment

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt text.

        Args:
            messages: Conversation, contents as text.
            tools: Tool specifications, if the model may call them.
            add_generation_prompt: End with the head of the assistant's turn.
            continue_final_message: Leave the last message open, so that the model goes on with it.
            extra: Further template variables of the caller.

        Raises:
            InvalidRequestError: if the template refuses the conversation.
        """
        taken = sorted(_RESERVED & set(extra or {}))
        if taken:
            raise InvalidRequestError(
                f"chat_template_kwargs may not set {taken[0]!r}; use the request's own field.",
                param="chat_template_kwargs",
            )
        try:
            text = self._environment.render_template(
                "chat",
                **{
                    **self._special,
                    **(extra or {}),
                    "messages": list(messages),
                    "tools": list(tools) if tools else None,
                    "add_generation_prompt": add_generation_prompt,
                },
            )
        except _RaisedByTemplateError as error:
            raise InvalidRequestError(
                f"The model's chat template refuses the messages: {error}", param="messages"
            ) from None
        except minijinja.TemplateError as error:
            # Only the kind of failure: the long form quotes the conversation.
            raise InvalidRequestError(
                f"The model's chat template cannot render the messages: {error.message}", param="messages"
            ) from None
        return _leave_open(text, messages) if continue_final_message else text

    def _strftime_now(self, pattern: str) -> str:
        now = datetime.datetime.fromtimestamp(self._clock.time(), tz=datetime.UTC).astimezone()
        return now.strftime(pattern)


def _leave_open(text: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """Cut the text after the last message's content, so that no end-of-turn marker follows it."""
    content = messages[-1].get("content") if messages else None
    last = content.strip() if isinstance(content, str) else ""
    place = text.rfind(last) if last else -1
    if place < 0:
        raise InvalidRequestError(
            "continue_final_message needs a last message with text that the template keeps.",
            param="continue_final_message",
        )
    return text[: place + len(last)]


def _raise_exception(message: str) -> None:
    raise _RaisedByTemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
