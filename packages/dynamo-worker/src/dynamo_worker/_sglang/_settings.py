"""Options of the SGLang engine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from dynamo_core.settings import DynamoSettings, resolve_settings


class SglangSettings(DynamoSettings):
    """Options of the SGLang engine; everything else of SGLang goes through ``--sglang-args``."""

    component: ClassVar[str] = "sglang"

    model: str = Field(min_length=1, description="model folder or name, as SGLang takes it")
    served_model_name: str = Field("", description="name that clients use; the model's if empty")
    sglang_args: dict[str, Any] = Field(default_factory=dict[str, Any], description="fields of ServerArgs, as JSON")
    kv_events: bool = Field(True, description="have SGLang publish KV events, for routing")
    kv_events_endpoint: str = Field("", description="ZMQ address for them, of the first rank; a private one if empty")
    kv_events_replay_endpoint: str = Field("", description="ZMQ address of their replay; a private one if empty")

    @classmethod
    def from_args(cls, args: Sequence[str], environ: Mapping[str, str] | None = None) -> SglangSettings:
        """Read flags and ``DYN_SGLANG_*`` variables.

        Raises:
            ConfigurationError: for an unknown flag or a bad value.
        """
        source = os.environ if environ is None else environ
        mine = {name: value for name, value in source.items() if name.startswith(cls.env_name(""))}
        return resolve_settings("--engine sglang", [cls], args, environ=mine).get(cls)
