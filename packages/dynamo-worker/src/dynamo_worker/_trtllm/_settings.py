"""Options of the TensorRT-LLM engine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from dynamo_core.settings import DynamoSettings, resolve_settings


class TrtllmSettings(DynamoSettings):
    """Options of the TensorRT-LLM engine; everything else of it goes through ``--trtllm-args``."""

    component: ClassVar[str] = "trtllm"

    model: str = Field(min_length=1, description="model folder or name, as TensorRT-LLM takes it")
    served_model_name: str = Field("", description="name that clients use; the model's if empty")
    trtllm_args: dict[str, Any] = Field(default_factory=dict[str, Any], description="arguments of LLM, as JSON")
    kv_events: bool = Field(True, description="have TensorRT-LLM report KV events, for routing")
    kv_event_buffer_events: int = Field(16_384, ge=1, description="KV events that are kept until they are read")
    poll_timeout_s: float = Field(
        0.5, gt=0, description="seconds that one wait for TensorRT-LLM's events and statistics lasts at most"
    )

    @classmethod
    def from_args(cls, args: Sequence[str], environ: Mapping[str, str] | None = None) -> TrtllmSettings:
        """Read flags and ``DYN_TRTLLM_*`` variables.

        Raises:
            ConfigurationError: for an unknown flag or a bad value.
        """
        source = os.environ if environ is None else environ
        mine = {name: value for name, value in source.items() if name.startswith(cls.env_name(""))}
        return resolve_settings("--engine trtllm", [cls], args, environ=mine).get(cls)
