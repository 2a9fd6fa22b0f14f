"""Options of the OpenAI-HTTP engine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

from pydantic import Field, SecretStr, model_validator

from dynamo_core.settings import DynamoSettings, resolve_settings


class OpenAIHttpSettings(DynamoSettings):
    """Options of the OpenAI-HTTP engine."""

    component: ClassVar[str] = "openai_http"

    url: str = Field("http://127.0.0.1:8000", pattern=r"^https?://", description="base URL of the server, without /v1")
    api_key: SecretStr = Field(SecretStr(""), description="bearer token for the server")
    remote_model: str = Field("", description="model of the server to serve; the first it lists if empty")
    served_model_name: str = Field("", description="name that clients use; the server's name if empty")
    model_path: str = Field(
        "", description="folder with tokenizer and template; the server's own model root if it is a local folder"
    )
    input: Literal["auto", "tokens", "text"] = Field("auto", description="how prompts are sent: auto, tokens or text")
    context_length: int | None = Field(None, ge=1, description="most tokens of prompt and output; asked if unset")
    max_num_seqs: int | None = Field(None, ge=1, description="requests that the server runs at once, if known")
    eos_token_ids: list[int] = Field(default_factory=list[int], description="end tokens of the model")
    startup_timeout_s: float = Field(300.0, gt=0, description="seconds to wait for the server to come up")
    connect_timeout_s: float = Field(5.0, gt=0, description="seconds to connect for one request")
    load_interval_s: float = Field(1.0, gt=0, description="seconds between two looks at the server's metrics")
    kv_events_endpoint: str = Field("", description="ZMQ address of the server's KV events, of its first rank")
    kv_events_replay_endpoint: str = Field("", description="ZMQ address of its replay socket, of its first rank")
    kv_events_topic: str = Field("", description="topic of the KV events; all if empty")
    kv_block_size: int | None = Field(None, ge=1, description="tokens a KV block; read from its metrics if unset")
    data_parallel_size: int = Field(1, ge=1, le=1024, description="data-parallel ranks of the server")

    @classmethod
    def from_args(cls, args: Sequence[str], environ: Mapping[str, str] | None = None) -> OpenAIHttpSettings:
        """Read flags and ``DYN_OPENAI_HTTP_*`` variables.

        Raises:
            ConfigurationError: for an unknown flag or a bad value.
        """
        source = os.environ if environ is None else environ
        mine = {name: value for name, value in source.items() if name.startswith(cls.env_name(""))}
        return resolve_settings("--engine openai-http", [cls], args, environ=mine).get(cls)

    @model_validator(mode="after")
    def _refuse_ignored_options(self) -> Self:
        for name in ("kv_events_replay_endpoint", "kv_events_topic"):
            if name in self.model_fields_set and not self.kv_events_endpoint:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} has no effect here; give --kv-events-endpoint too, or leave {flag} out")
        return self
