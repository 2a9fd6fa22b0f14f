"""Token ids of a request's prompt, as the engine behind the gateway will see them."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

import msgspec

from dynamo_core.cards import ModelCard
from dynamo_core.clock import Clock
from dynamo_core.errors import BackendProtocolError, DynamoError, InvalidRequestError
from dynamo_core.tokens import PackedTokens, pack_tokens
from dynamo_frontend._gateway.upstreams import Upstream, ask
from dynamo_frontend._media.parts import MediaCollector
from dynamo_frontend._messages import template_messages
from dynamo_frontend._model import ModelText, load_text_files
from dynamo_frontend._tokenize import TokenCache

CHAT_PATH = "/v1/chat/completions"
COMPLETIONS_PATH = "/v1/completions"
_CACHE_BYTES = 64 << 20
_INLINE_CHARS = 8192
_ASK_TIMEOUT_S = 2.0


class PromptFields(msgspec.Struct, frozen=True):
    """Fields of a body that make up its prompt; all others are the engine's affair."""

    messages: list[dict[str, Any]] | None = None
    prompt: str | list[Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    cache_salt: str | None = None


_FIELDS = msgspec.json.Decoder(PromptFields)


class Prompt(msgspec.Struct, frozen=True):
    """What routing needs to know of a request: its tokens, and the salt of its cached blocks."""

    token_ids: PackedTokens
    cache_salt: str = ""


class PromptSource(Protocol):
    """Finds the token ids of prompts."""

    async def read(self, path: str, body: bytes, upstream: Upstream) -> Prompt | None:
        """Return the prompt of a request; None if it is not one prompt of text or token ids.

        Raises:
            DynamoError: if it cannot be tokenised.
        """
        ...


def read_fields(path: str, body: bytes) -> PromptFields | None:
    """Return the fields of a body that has one prompt of text, else None."""
    if path not in (CHAT_PATH, COMPLETIONS_PATH):
        return None
    try:
        fields = _FIELDS.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        # The engine says what is wrong with it.
        return None
    if path == CHAT_PATH:
        return fields if fields.messages and fields.chat_template is None else None
    return fields if fields.prompt else None


class LocalPrompts:
    """Tokenises here, with the model's own files.

    Args:
        folder: Folder of the model: ``tokenizer.json``, ``tokenizer_config.json``, ``chat_template.jinja``.
        clock: For templates that print the date.
    """

    def __init__(self, folder: str, clock: Clock) -> None:
        self._folder = folder
        self._clock = clock
        self._text: ModelText | None = None

    async def load(self) -> None:
        """Read the files.

        Raises:
            ConfigurationError: naming the file that is missing or damaged.
        """
        card = ModelCard("--tokenizer", model_path=self._folder)
        cache = TokenCache(_CACHE_BYTES)
        loaded = await asyncio.to_thread(load_text_files, card, _INLINE_CHARS, cache, self._clock)
        self._text = loaded[0]

    async def read(self, path: str, body: bytes, upstream: Upstream) -> Prompt | None:
        """Return the prompt of a request."""
        fields = read_fields(path, body)
        assert self._text is not None, "prompts are read after the files"
        if fields is None:
            return None
        tokenizer = self._text.tokenizer
        if fields.messages is not None and path == CHAT_PATH:
            token_ids = await tokenizer.encode(self._render(fields), add_special_tokens=False)
        elif isinstance(fields.prompt, str):
            token_ids = await tokenizer.encode(fields.prompt, add_special_tokens=True)
        else:
            token_ids = _given_ids(fields.prompt)
        return Prompt(token_ids, fields.cache_salt or "") if token_ids else None

    def _render(self, fields: PromptFields) -> str:
        assert self._text is not None
        if self._text.template is None:
            raise InvalidRequestError(f"{self._folder} has no chat template, so chats cannot be read for their prompt")
        going_on = bool(fields.continue_final_message)
        opens = not going_on if fields.add_generation_prompt is None else fields.add_generation_prompt
        return self._text.template.render(
            template_messages(fields.messages or [], MediaCollector((), 0)),
            tools=None if fields.tool_choice == "none" else fields.tools,
            add_generation_prompt=opens,
            continue_final_message=going_on,
            extra=fields.chat_template_kwargs,
        )


_QUESTION = {
    CHAT_PATH: (
        *("model", "messages", "tools", "chat_template_kwargs"),
        *("add_generation_prompt", "continue_final_message"),
    ),
    COMPLETIONS_PATH: ("model", "prompt"),
}


class _Tokens(msgspec.Struct):
    tokens: list[int]


class EnginePrompts:
    """Asks the engine itself, by its ``/tokenize``: one more round trip for each request."""

    async def read(self, path: str, body: bytes, upstream: Upstream) -> Prompt | None:
        """Return the prompt of a request."""
        fields = read_fields(path, body)
        if fields is None:
            return None
        if path == COMPLETIONS_PATH and not isinstance(fields.prompt, str):
            token_ids = _given_ids(fields.prompt)
        else:
            token_ids = await self._ask(path, fields, body, upstream)
        return Prompt(token_ids, fields.cache_salt or "") if token_ids else None

    async def _ask(self, path: str, fields: PromptFields, body: bytes, upstream: Upstream) -> PackedTokens:
        given = msgspec.json.decode(body, type=dict[str, Any])
        question = {name: given[name] for name in _QUESTION[path] if name in given}
        try:
            async with asyncio.timeout(_ASK_TIMEOUT_S):
                status, answer = await ask(upstream, "POST", "/tokenize", msgspec.json.encode(question))
        except TimeoutError:
            raise BackendProtocolError(f"/tokenize of {upstream.url} did not answer in time") from None
        if status != 200:
            raise BackendProtocolError(
                f"{upstream.url} answered /tokenize with status {status}; give --tokenizer, the model's folder"
            )
        try:
            return pack_tokens(msgspec.json.decode(answer, type=_Tokens).tokens)
        except msgspec.MsgspecError as error:
            raise BackendProtocolError(f"/tokenize of {upstream.url} answered no token ids: {error}") from error


def _given_ids(prompt: Any) -> PackedTokens:
    try:
        return pack_tokens(prompt)
    except (DynamoError, TypeError):
        # Several prompts, or none the engine would take.
        return PackedTokens(b"")
