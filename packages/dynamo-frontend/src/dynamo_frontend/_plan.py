"""From a request body to what will be generated: prompts, limits and output form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import msgspec

from dynamo_core.content import ContentPart
from dynamo_core.errors import InvalidRequestError
from dynamo_core.requests import GenerateRequest, GuidedDecoding, OutputOptions, RoutingHints
from dynamo_core.tokens import PackedTokens, pack_tokens, token_count
from dynamo_frontend._catalog import ServedModel
from dynamo_frontend._media.parts import MediaCollector
from dynamo_frontend._media.source import place_parts
from dynamo_frontend._messages import template_messages
from dynamo_frontend._openai.fields import ChatRequest, CommonFields, CompletionRequest
from dynamo_frontend._openai.hints import block_hints, routing_hints
from dynamo_frontend._openai.options import guided_decoding
from dynamo_frontend._parsers.contract import OutputParser
from dynamo_frontend._tools import chosen_tools, response_constraint

MAX_PROMPTS = 128
MAX_CHOICES = 128


@dataclass(slots=True)
class GeneratePlan:
    """A request ready to run.

    Attributes:
        fields: The request.
        model: What serves it.
        prompts: Token ids of each prompt.
        max_tokens: Most tokens of a choice that the request asks for; None if it does not say.
        logprobs: Alternatives to show for each token; None without log-probabilities.
        guided: Constraint on the output.
        chat: Whether output is parsed for reasoning.
        tools: Tools whose calls the output is parsed for.
        reasoning_open: Whether the prompt leaves the reasoning open; None if it does not say.
        forced_parser: Makes the parser of an output that is constrained to calls.
        single_call: Whether a choice ends after its first tool call.
        echoes: For each choice the prompt text it begins with; empty without ``echo``.
        prompt_param: Field that the prompt came in.
        parts: Images, audio and video, placed in the only prompt.
    """

    fields: CommonFields
    model: ServedModel
    prompts: list[PackedTokens]
    max_tokens: int | None
    logprobs: int | None = None
    guided: GuidedDecoding | None = None
    chat: bool = False
    tools: Sequence[Mapping[str, Any]] = ()
    reasoning_open: bool | None = None
    forced_parser: Callable[[], OutputParser] | None = None
    single_call: bool = False
    echoes: Sequence[str] = ()
    prompt_param: str = "prompt"
    parts: tuple[ContentPart, ...] = ()

    @property
    def choices_per_prompt(self) -> int:
        """Choices of each prompt."""
        return self.fields.n or 1

    def requests(self, request_id: str, headers: dict[str, str], limit_s: float | None = None) -> list[GenerateRequest]:
        """Return the worker requests, one a prompt.

        Args:
            request_id: The request.
            headers: Its headers.
            limit_s: Most seconds that it may take; None for no limit.

        Raises:
            InvalidRequestError: if a prompt does not fit the model's context, or an option is out of its limits.
        """
        fields = self.fields
        sampling = self.model.text.options.sampling(fields, self.guided)
        output = OutputOptions(
            logprobs=self.logprobs,
            skip_special_tokens=True if fields.skip_special_tokens is None else fields.skip_special_tokens,
        )
        routing = adapter_hints(routing_hints(fields, headers), self.model)
        future = block_hints(fields, headers, routing)
        several = len(self.prompts) > 1
        return [
            GenerateRequest(
                request_id=f"{request_id}-{index}" if several else request_id,
                model=self.model.name,
                token_ids=prompt,
                parts=self.parts,
                sampling=sampling,
                stop=self.model.text.options.stop(fields, self._budget(token_count(prompt))),
                output=output,
                routing=routing,
                eos_token_ids=self.model.card.eos_token_ids,
                deadline_s=limit_s,
                block_hints=future,
            )
            for index, prompt in enumerate(self.prompts)
        ]

    def _budget(self, prompt_tokens: int) -> int | None:
        """Return the most tokens a choice may have, so that prompt and output fit the context."""
        context = self.model.card.context_length
        if not prompt_tokens:
            raise InvalidRequestError("The prompt is empty; send at least one token.", param=self.prompt_param)
        if not context:
            return self.max_tokens
        room = context - prompt_tokens
        asked = self.max_tokens
        if room < 1 or (asked is not None and asked > room):
            wanted = f" and asks for {asked} more" if asked is not None else ""
            raise InvalidRequestError(
                f"The prompt has {prompt_tokens} tokens{wanted}, but this model's context holds {context} in all. "
                "Shorten the prompt or lower max_tokens.",
                reason="context_length_exceeded",
                param=self.prompt_param,
            )
        return room if asked is None else asked


async def plan_chat(fields: ChatRequest, model: ServedModel, *, load_media: bool = True) -> GeneratePlan:
    """Render and tokenise a chat, and bring its media in, if it is to run.

    Raises:
        InvalidRequestError: naming the field that is wrong.
    """
    if model.text.template is None:
        raise InvalidRequestError(f"The model '{model.name}' has no chat template; use /v1/completions.", param="model")
    if fields.max_tokens is not None and fields.max_completion_tokens is not None:
        raise InvalidRequestError("Give max_tokens or max_completion_tokens, not both.", param="max_tokens")
    if fields.top_logprobs is not None and not fields.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs to be true.", param="top_logprobs")
    capabilities = model.card.capabilities
    plan = chosen_tools(fields, model)
    guided = response_constraint(fields, guided_decoding(fields, capabilities), capabilities)
    if guided is not None and plan.guided is not None:
        raise InvalidRequestError("tool_choice and another constraint contradict each other.", param="tool_choice")
    media = collector(model)
    text = render_chat(fields, model, plan.tools, media)
    prompt = await model.text.tokenizer.encode(text, add_special_tokens=False)
    return GeneratePlan(
        fields,
        model,
        [prompt],
        fields.max_completion_tokens or fields.max_tokens,
        logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
        guided=guided or plan.guided,
        chat=True,
        tools=plan.tools,
        reasoning_open=model.text.reasoning_open(text),
        forced_parser=plan.parser,
        single_call=fields.parallel_tool_calls is False,
        prompt_param="messages",
        parts=await _parts(media, prompt, model) if load_media else (),
    )


async def plan_completion(fields: CompletionRequest, model: ServedModel) -> GeneratePlan:
    """Tokenise the prompts of a completion.

    Raises:
        InvalidRequestError: naming the field that is wrong.
    """
    if fields.best_of is not None and fields.best_of != (fields.n or 1):
        raise InvalidRequestError("best_of other than n is not offered; remove it.", param="best_of")
    if fields.echo and fields.logprobs is not None:
        raise InvalidRequestError("echo together with logprobs is not offered; leave one out.", param="echo")
    given = _prompt_list(fields.prompt, "prompt", MAX_PROMPTS)
    if len(given) * (fields.n or 1) > MAX_CHOICES:
        raise InvalidRequestError(
            f"{len(given)} prompts with n={fields.n or 1} make more than {MAX_CHOICES} choices; send fewer.",
            param="prompt",
        )
    prompts = [await _encode(prompt, model, f"prompt[{index}]") for index, prompt in enumerate(given)]
    echoes: list[str] = []
    if fields.echo:
        for prompt, packed in zip(given, prompts, strict=True):
            echoes.extend([_echo(prompt, packed, model)] * (fields.n or 1))
    return GeneratePlan(
        fields,
        model,
        prompts,
        fields.max_tokens if fields.max_tokens is not None else 16,
        logprobs=fields.logprobs,
        guided=guided_decoding(fields, model.card.capabilities),
        echoes=echoes,
    )


def adapter_hints(hints: RoutingHints, model: ServedModel) -> RoutingHints:
    """Return the hints of a request for a LoRA adapter: its name, which is part of the KV key, and who has it loaded.

    Workers without the adapter share the endpoint with those that have it, so the router must be told.
    """
    if model.card.lora is None:
        return hints
    loaded = {record.instance_id for record in model.records.values() if record.endpoint == model.endpoint}
    return msgspec.structs.replace(hints, lora=model.card.lora.name, allowed_instance_ids=tuple(sorted(loaded)))


def collector(model: ServedModel) -> MediaCollector:
    """Return what gathers the media that a model takes."""
    source = model.text.media
    return MediaCollector(model.card.input_modalities, source.limits.max_items if source is not None else 0)


async def _parts(media: MediaCollector, prompt: PackedTokens, model: ServedModel) -> tuple[ContentPart, ...]:
    source = model.text.media
    if not media.refs or source is None:
        return ()
    return place_parts(await source.load(media.refs), prompt, model.card.runtime_config.runtime_data)


def render_chat(fields: ChatRequest, model: ServedModel, tools: Sequence[dict[str, Any]], media: MediaCollector) -> str:
    """Return the text that the model's template makes of a chat; its media go to the collector.

    Raises:
        InvalidRequestError: naming the field that is wrong.
    """
    if model.text.template is None:
        raise InvalidRequestError(f"The model '{model.name}' has no chat template; use /v1/completions.", param="model")
    if fields.chat_template_kwargs is not None and fields.chat_template_args is not None:
        raise InvalidRequestError(
            "chat_template_args is another name of chat_template_kwargs; give one.", param="chat_template_args"
        )
    extra = dict(fields.chat_template_kwargs or fields.chat_template_args or {})
    if fields.reasoning_effort is not None:
        extra.setdefault("reasoning_effort", fields.reasoning_effort)
    going_on = bool(fields.continue_final_message)
    opens = not going_on if fields.add_generation_prompt is None else fields.add_generation_prompt
    if going_on and opens:
        raise InvalidRequestError(
            "continue_final_message needs add_generation_prompt to be false.", param="continue_final_message"
        )
    return model.text.template.render(
        template_messages(fields.messages, media, as_parts=model.text.template.takes_parts),
        tools=tools,
        add_generation_prompt=opens,
        continue_final_message=going_on,
        extra=extra,
    )


async def encode_prompts(given: str | list[Any], model: ServedModel, *, param: str, limit: int) -> list[PackedTokens]:
    """Return the token ids of a field that takes text, token ids, or a list of either.

    Raises:
        InvalidRequestError: naming the field, if it is empty, too long, or of another form.
    """
    prompts = _prompt_list(given, param, limit)
    return [await _encode(prompt, model, f"{param}[{index}]") for index, prompt in enumerate(prompts)]


def _prompt_list(prompt: str | list[Any], param: str, limit: int) -> list[str | list[int]]:
    """Return the prompts of the four forms that the field takes."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidRequestError(f"{param} is empty; send text or token ids.", param=param)
    if all(isinstance(item, int) and not isinstance(item, bool) for item in prompt):
        return [cast("list[int]", prompt)]
    if len(prompt) > limit:
        raise InvalidRequestError(f"{param} has {len(prompt)} entries; send at most {limit}.", param=param)
    if all(isinstance(item, str) for item in prompt) or all(_is_token_list(item) for item in prompt):
        return cast("list[str | list[int]]", prompt)
    raise InvalidRequestError(
        f"{param} must be text, a list of texts, a list of token ids, or a list of such lists.", param=param
    )


def _is_token_list(item: Any) -> bool:
    return isinstance(item, list) and all(
        isinstance(token, int) and not isinstance(token, bool) for token in cast("list[Any]", item)
    )


async def _encode(prompt: str | list[int], model: ServedModel, where: str) -> PackedTokens:
    if isinstance(prompt, str):
        return await model.text.tokenizer.encode(prompt, add_special_tokens=True)
    check_token_ids(prompt, model, where)
    return pack_tokens(prompt)


def check_token_ids(token_ids: Sequence[int], model: ServedModel, where: str) -> None:
    """Refuse ids that the model does not know.

    Raises:
        InvalidRequestError: naming the field and the id.
    """
    size = model.text.tokenizer.tokenizer.get_vocab_size(with_added_tokens=True)
    for token in token_ids:
        if not 0 <= token < size:
            raise InvalidRequestError(
                f"{where} has token id {token}; this model's are 0 to {size - 1}.", param=where.partition("[")[0]
            )


def _echo(prompt: str | list[int], packed: PackedTokens, model: ServedModel) -> str:
    if isinstance(prompt, str):
        return prompt
    return model.text.tokenizer.tokenizer.decode(prompt, skip_special_tokens=False)
