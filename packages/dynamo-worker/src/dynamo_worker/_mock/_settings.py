"""Flags of the mock engine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from dynamo_core.settings import DynamoSettings, resolve_settings

BUNDLED_MODELS = Path(__file__).parents[1] / "models"


class MockSettings(DynamoSettings):
    """Mock engine: a timing model and the scheduler of a real engine, with made-up tokens."""

    component: ClassVar[str] = "mock"

    model: str = Field(
        default="", description="model folder, or name of a bundled one, whose words the output is made of"
    )
    model_name: str = Field(default="", description="name that clients use; the folder's name, or mock, if empty")
    vocab_size: int = Field(default=2112, ge=8, description="token ids to draw from when there is no --model")
    context_length: int = Field(default=32768, ge=2, description="most tokens of prompt and output together")
    default_output_tokens: int = Field(
        default=128, ge=1, description="longest output of a request that sets no max_tokens"
    )
    total_kv_blocks: int = Field(default=16384, ge=2, description="KV blocks of each dp rank")
    kv_block_size: int = Field(default=64, ge=1, le=1024, description="tokens of one KV block")
    prefix_caching: bool = Field(default=True, description="keep full blocks and reuse them")
    chunked_prefill: bool = Field(default=True, description="split prompts over steps")
    max_num_seqs: int = Field(default=256, ge=1, description="sequences that run at once on each dp rank")
    max_num_batched_tokens: int = Field(default=8192, ge=1, description="tokens of one step")
    preemption: Literal["lifo", "fifo"] = Field(default="lifo", description="which running sequence gives way first")
    watermark: float = Field(
        default=0.01, ge=0, lt=1, description="share of blocks kept free when a prompt is admitted"
    )
    speedup_ratio: float = Field(default=1.0, gt=0, description="how many times faster than the modelled hardware")
    decode_speedup_ratio: float = Field(default=1.0, gt=0, description="further speed-up of decoding alone")
    timing_profile: str = Field(
        default="", description=".npz or JSON file of measured step times; built-in fits of a mid-size model if empty"
    )
    kv_transfer_bandwidth_gb_s: float = Field(
        default=64.0, ge=0, description="GB/s at which KV blocks come from a prefill worker; 0 takes no time"
    )
    kv_bytes_per_token: int = Field(
        default=131072, ge=1, description="bytes of a token's KV: layers x 2 x KV heads x head size x element bytes"
    )
    startup_time_s: float = Field(default=0.0, ge=0, description="seconds that start takes")
    data_parallel_size: int = Field(default=1, ge=1, le=1024, description="dp ranks")

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        if self.model and "vocab_size" in self.model_fields_set:
            raise ValueError("--vocab-size has no effect with --model; leave one of them out")
        return self

    @property
    def folder(self) -> Path | None:
        """Folder of the model; None without one."""
        if not self.model:
            return None
        bundled = BUNDLED_MODELS / self.model
        return bundled if bundled.is_dir() else Path(self.model)

    @property
    def served_name(self) -> str:
        """Name that clients use."""
        return self.model_name or (self.folder.name if self.folder is not None else "mock")

    @classmethod
    def from_args(cls, args: Sequence[str]) -> MockSettings:
        """Read flags and the environment.

        Raises:
            ConfigurationError: for an unknown flag or a bad value.
        """
        # The process's --config file belongs to its component; only the engine's own variables are looked at.
        own = {name: value for name, value in os.environ.items() if name.startswith(cls.env_name(""))}
        return resolve_settings("mock engine", [cls], list(args), environ=own).get(cls)
