"""Finds out at start what a server can do, with requests of one token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynamo_core.errors import ConfigurationError
from dynamo_worker._openai_http._client import ServerClient
from dynamo_worker._openai_http._server import OutputForm, Samples, ServerFacts
from dynamo_worker._openai_http._settings import OpenAIHttpSettings
from dynamo_worker._openai_http._wire import Completion, ServedModel, token_of

_EXTENSIONS = {"return_token_ids": True, "return_tokens_as_token_ids": True, "logprobs": 0}


async def probe_server(client: ServerClient, settings: OpenAIHttpSettings) -> ServerFacts:
    """Wait for the server and learn its abilities.

    Token prompts are used if the server takes them and the model's folder is known, since somebody must tokenise.

    Raises:
        ConfigurationError: if ``--input tokens`` is asked of a server or set-up that cannot.
    """
    model = await client.wait_for_model()
    folder = _model_folder(settings, model)
    form = None if settings.input == "text" else await _token_form(client, model)
    takes_tokens = form is not None and (bool(folder) or settings.input == "tokens")
    if settings.input == "tokens" and form is None:
        raise ConfigurationError(
            f"option --input has the value 'tokens', but the server at {settings.url} refuses token prompts; "
            "use --input text"
        )
    samples = Samples.parse(await client.metrics())
    cache = samples.labels.get("vllm:cache_config_info", {})
    return ServerFacts(
        remote_model=model.id,
        takes_tokens=takes_tokens,
        output=form if form is not None and takes_tokens else OutputForm.TEXT,
        context_length=settings.context_length or model.max_model_len or 0,
        model_path=folder,
        kv_block_size=settings.kv_block_size or _number(cache, "block_size"),
        total_kv_blocks=_number(cache, "num_gpu_blocks") or None,
    )


async def _token_form(client: ServerClient, model: ServedModel) -> OutputForm | None:
    plain: dict[str, Any] = {"model": model.id, "prompt": [1], "max_tokens": 1, "temperature": 0}
    answer = await client.try_completion({**plain, **_EXTENSIONS})
    if answer is None:
        return None if await client.try_completion(plain) is None else OutputForm.TEXT
    return _form_of(answer)


def _form_of(answer: Completion) -> OutputForm:
    for choice in answer.choices:
        if choice.token_ids is not None:
            return OutputForm.TOKEN_IDS
        if choice.logprobs is not None and any(token_of(text) is not None for text in choice.logprobs.tokens):
            return OutputForm.LOGPROBS
    return OutputForm.TEXT


def _model_folder(settings: OpenAIHttpSettings, model: ServedModel) -> str:
    if settings.model_path:
        return settings.model_path
    root = model.root or ""
    return root if root and (Path(root) / "tokenizer.json").is_file() else ""


def _number(labels: dict[str, str], name: str) -> int:
    text = labels.get(name, "")
    return int(text) if text.isdecimal() else 0
