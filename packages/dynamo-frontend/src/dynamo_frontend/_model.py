"""A model's text side, made from its card: tokenizer, chat template, detokenizer, defaults, parsers."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlsplit

from dynamo_core.cards import ModelCard
from dynamo_core.clock import Clock
from dynamo_core.errors import ConfigurationError
from dynamo_core.parsing import ParserContext, ParserFactory, ParserFamily
from dynamo_core.requests import SamplingOptions
from dynamo_frontend._detokenize import DetokenizerFactory
from dynamo_frontend._media.source import MediaSource
from dynamo_frontend._openai.options import OptionMemo
from dynamo_frontend._parsers.chain import (
    NO_PARSER,
    ParserChain,
    load_family,
    load_reasoning_parser,
    load_tool_parser,
    prompt_leaves_reasoning_open,
)
from dynamo_frontend._parsers.contract import OutputParser, Tools
from dynamo_frontend._parsers.detect import detect_reasoning_parser, detect_tool_parser
from dynamo_frontend._settings import FrontendSettings
from dynamo_frontend._template import ChatTemplate
from dynamo_frontend._tokenize import TextTokenizer, TokenCache, load_tokenizer

_DEFAULT_NAMES = {
    "tokenizer": "tokenizer.json",
    "tokenizer_config": "tokenizer_config.json",
    "chat_template": "chat_template.jinja",
    "generation_config": "generation_config.json",
}
_NO_TOOLS = {said: ParserContext(reasoning_open=said) for said in (None, False, True)}


class ModelText:
    """What turns text into a model's tokens and back.

    Attributes:
        tokenizer: Text to token ids.
        detokenizers: Token ids to text.
        template: Chat template; None for a model without one.
        options: Makes sampling options, from the model's defaults, and stop conditions.
        tool_parser: Name of the tool-call parser, or an empty string.
        reasoning_parser: Name of the reasoning parser, or an empty string.
        media: Brings images, audio and video of requests in.
    """

    def __init__(self, tokenizer: TextTokenizer, template: ChatTemplate | None, sampling: SamplingOptions) -> None:
        self.tokenizer = tokenizer
        self.detokenizers = DetokenizerFactory(tokenizer.tokenizer, tokenizer.spec)
        self.template = template
        self.options = OptionMemo(sampling)
        self.media: MediaSource | None = None
        self.tool_parser = ""
        self.reasoning_parser = ""
        added = tokenizer.spec.get("added_tokens", ())
        self._special_texts = frozenset(str(token["content"]) for token in added if token.get("special"))
        self._tools: ParserFactory | None = None
        self._reasoning: ParserFactory | None = None
        self._reasoning_family = ParserFamily()
        self._tools_special = False
        self._reasoning_special = False

    def use_parsers(self, *, tools: str, reasoning: str) -> None:
        """Choose the parsers by name.

        Raises:
            ConfigurationError: if one is not installed.
        """
        # Looked up here once: finding a plug-in costs as much as a third of a short request.
        self._tools = load_tool_parser(tools) if tools else None
        self._reasoning = load_reasoning_parser(reasoning) if reasoning else None
        self._reasoning_family = load_family(reasoning) if reasoning else ParserFamily()
        self._tools_special = bool(tools) and self._shows_markers_of(load_family(tools))
        self._reasoning_special = self._shows_markers_of(self._reasoning_family)
        self.tool_parser = tools
        self.reasoning_parser = reasoning

    def reasoning_open(self, prompt: str) -> bool | None:
        """Return whether a prompt leaves the reasoning open; None if it does not say."""
        return prompt_leaves_reasoning_open(self._reasoning_family, prompt)

    def parser(self, tools: Tools, *, reasoning_open: bool | None = None) -> OutputParser | None:
        """Return the parsers of one choice, or None if its text needs none.

        Args:
            tools: Tools whose calls to find.
            reasoning_open: What the prompt says of the reasoning.
        """
        with_tools = bool(tools) and self._tools is not None
        if not with_tools:
            if self._reasoning is None:
                return None
            context = _NO_TOOLS[reasoning_open]
            return ParserChain(self._reasoning(context), None, needs_special_tokens=self._reasoning_special)
        functions = [tool["function"] for tool in tools]
        context = ParserContext({item["name"]: item.get("parameters") or {} for item in functions}, reasoning_open)
        tool_parser = self._tools(context) if self._tools is not None else None
        reasoning = self._reasoning(context) if self._reasoning is not None else None
        special = self._reasoning_special or self._tools_special
        return ParserChain(reasoning, tool_parser, needs_special_tokens=special)

    def _shows_markers_of(self, family: ParserFamily) -> bool:
        return not family.markers.isdisjoint(self._special_texts)


async def load_model_text(card: ModelCard, settings: FrontendSettings, cache: TokenCache, clock: Clock) -> ModelText:
    """Read a card's files on a thread.

    Raises:
        ConfigurationError: naming the file that is missing or damaged.
    """
    text, source = await asyncio.to_thread(load_text_files, card, settings.tokenize_inline_chars, cache, clock)
    tools = settings.tool_call_parser or card.runtime_config.tool_call_parser or detect_tool_parser(source)
    reasoning = settings.reasoning_parser or card.runtime_config.reasoning_parser
    if not reasoning:
        added = {str(token["content"]) for token in text.tokenizer.spec.get("added_tokens", ())}
        reasoning = detect_reasoning_parser(source, added)
    text.use_parsers(tools=_unless_none(tools), reasoning=_unless_none(reasoning))
    return text


def _unless_none(name: str) -> str:
    return "" if name == NO_PARSER else name


def load_text_files(card: ModelCard, inline_chars: int, cache: TokenCache, clock: Clock) -> tuple[ModelText, str]:
    """Read a card's files; return the text side without parsers, and the source of its template.

    Raises:
        ConfigurationError: naming the file that is missing or damaged.
    """
    path = model_file(card, "tokenizer")
    if path is None:
        raise ConfigurationError(
            f"model {card.name!r} has no tokenizer: its card names none and {card.model_path!r} holds no tokenizer.json"
        )
    tokenizer = TextTokenizer(load_tokenizer(path), cache, inline_chars=inline_chars)
    config = _read_json(model_file(card, "tokenizer_config"))
    source = _template_source(card, config)
    template = ChatTemplate(source, _special_tokens(config), clock) if source else None
    sampling = _default_sampling(_read_json(model_file(card, "generation_config")))
    return ModelText(tokenizer, template, sampling), source


def model_file(card: ModelCard, name: str) -> Path | None:
    """Return the path of one of a card's files, or None if there is none.

    Raises:
        ConfigurationError: if the card names a file that is not there, or one by a URL that cannot be read here.
    """
    folder = Path(card.model_path) if card.model_path else None
    given = card.files.get(name)
    if given is None:
        path = folder / _DEFAULT_NAMES[name] if folder is not None else None
        return path if path is not None and path.is_file() else None
    parts = urlsplit(given.uri)
    if parts.scheme not in ("", "file"):
        raise ConfigurationError(
            f"model {card.name!r}: file {name} is at {given.uri}; the frontend reads local files, "
            "so mount the model folder on this machine"
        )
    path = Path(unquote(parts.path))
    if not path.is_absolute() and folder is not None:
        path = folder / path
    if not path.is_file():
        raise ConfigurationError(f"model {card.name!r}: file {name} at {path} does not exist on this machine")
    return path


def _read_json(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read as JSON: {error}") from error
    return cast("dict[str, Any]", loaded) if isinstance(loaded, dict) else {}


def _template_source(card: ModelCard, config: dict[str, Any]) -> str:
    path = model_file(card, "chat_template")
    if path is not None:
        return path.read_text(encoding="utf-8")
    source = config.get("chat_template")
    if isinstance(source, list):
        named = {item["name"]: item["template"] for item in cast("list[dict[str, str]]", source)}
        return named.get("default", "")
    return source if isinstance(source, str) else ""


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(name)
        content = cast("dict[str, Any]", value).get("content") if isinstance(value, dict) else value
        found[name] = content if isinstance(content, str) else ""
    return found


def _default_sampling(config: dict[str, Any]) -> SamplingOptions:
    def number(name: str, default: float) -> float:
        value = config.get(name)
        return float(value) if isinstance(value, int | float) else default

    return SamplingOptions(
        temperature=number("temperature", 1.0),
        top_p=number("top_p", 1.0),
        top_k=int(number("top_k", -1)),
        repetition_penalty=number("repetition_penalty", 1.0),
    )
