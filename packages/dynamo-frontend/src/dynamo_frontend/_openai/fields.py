"""Request bodies as typed structs: a field that is not listed is refused by name."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from dynamo_core.errors import InvalidRequestError
from dynamo_frontend._openai.given import given_value
from dynamo_frontend._openai.hints import NvExt

T = TypeVar("T")

REFUSED_FIELDS: dict[str, str] = {
    "audio": "audio output is not offered",
    "function_call": "use tool_choice",
    "functions": "use tools",
    "length_penalty": "beam search is not offered",
    "logits_processors": "custom code is not run",
    "modalities": "only text output is offered",
    "moderation": "moderation is not offered",
    "prediction": "predicted outputs are not offered",
    "prompt_embeds": "only text and token ids are taken",
    "suffix": "insertion is not offered",
    "use_beam_search": "beam search is not offered",
    "verbosity": "say it in the prompt",
    "web_search_options": "web search is not offered",
}
"""Known fields that are refused, each with what to do instead."""

IGNORED_FIELDS: dict[str, str] = {
    "metadata": "labels of the caller; nothing is stored",
    "safety_identifier": "an abuse label of the caller; nothing is stored",
    "service_tier": "there is one tier",
    "user": "an abuse label of the caller; nothing is stored",
    "prompt_cache_retention": "caches are kept by use, not by time",
}
"""Fields that are accepted and have no effect, each with the reason."""

_UNKNOWN = re.compile(r"unknown field `(?P<field>[^`]*)`")
_PATH = re.compile(r" - at `(?P<path>[^`]*)`")
_MISSING = re.compile(r"missing required field `(?P<field>[^`]*)`")


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a stream carries besides text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class SamplingFields(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How tokens are drawn and when a choice ends, in every form of request."""

    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None


class CommonFields(SamplingFields, frozen=True, kw_only=True):
    """Fields that chat and text completions share."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str | int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    cache_salt: str | None = None
    priority: int | None = None
    prompt_cache_key: str | None = None
    nvext: NvExt | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    guided_decoding_backend: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    user: str | None = None
    prompt_cache_retention: str | None = None
    store: bool | None = None


class FunctionSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A function the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tool; only functions exist."""

    type: str
    function: FunctionSpec


class ResponseFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Form of the answer."""

    type: str
    json_schema: dict[str, Any] | None = None


class ChatRequest(CommonFields, frozen=True, kw_only=True):
    """Body of ``/v1/chat/completions``."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[ToolSpec] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template_args: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class CompletionRequest(CommonFields, frozen=True, kw_only=True):
    """Body of ``/v1/completions``."""

    prompt: str | list[Any]
    echo: bool | None = None
    best_of: int | None = None
    logprobs: int | None = None


class BodyDecoder:
    """Reads one kind of body, and explains what is wrong with it."""

    def __init__(self, kind: type[T]) -> None:
        self._decoder = msgspec.json.Decoder(kind)

    def decode(self, body: bytes) -> Any:
        """Return the struct.

        Raises:
            InvalidRequestError: naming the field that is missing, unknown, refused or of the wrong type.
        """
        try:
            return self._decoder.decode(body)
        except msgspec.ValidationError as error:
            raise explain(str(error), body) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidRequestError(
                f"The body is not valid JSON: {error}. Send one JSON object in UTF-8.", reason="request.invalid"
            ) from None
        except RecursionError:
            raise InvalidRequestError("The body is nested too deeply; flatten it.", reason="request.invalid") from None


def explain(text: str, body: bytes = b"") -> InvalidRequestError:
    """Turn a decoder's message into an error that names the field, the value in the body and the remedy."""
    path_match = _PATH.search(text)
    path = path_match["path"].removeprefix("$").removeprefix(".") if path_match else ""
    unknown = _UNKNOWN.search(text)
    if unknown:
        name = f"{path}.{unknown['field']}" if path else unknown["field"]
        known = REFUSED_FIELDS.get(name)
        if known:
            return InvalidRequestError(f"Field '{name}' is not supported: {known}. Remove it.", param=name)
        return InvalidRequestError(f"Unknown field '{name}'. Remove it or correct its name.", param=name)
    missing = _MISSING.search(text)
    if missing:
        name = f"{path}.{missing['field']}" if path else missing["field"]
        return InvalidRequestError(f"Field '{name}' is missing. Add it.", param=name)
    message = text[: path_match.start()] if path_match else text
    where = f"Field '{path}'" if path else "The body"
    given = given_value(body, path_match["path"].removeprefix("$")) if path_match and "got" in message else ""
    return InvalidRequestError(f"{where} is wrong: {message}{given and f' {given}'}.", param=path or None)
