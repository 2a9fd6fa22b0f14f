"""Flags of the mock engine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from dynamo_core.settings import DynamoSettings, resolve_settings


class MockSettings(DynamoSettings):
    """Mock engine: a timing model and the scheduler of a real engine, with made-up tokens."""

    component: ClassVar[str] = "mock"

    model_name: str = Field(default="mock", min_length=1, description="model name to serve")
    model_path: str = Field(default="", description="folder with a tokenizer; output then is words of its vocabulary")
    vocab_size: int = Field(default=2112, ge=8, description="token ids to draw from when there is no --model-path")
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
    startup_time_s: float = Field(default=0.0, ge=0, description="seconds that start takes")
    data_parallel_size: int = Field(default=1, ge=1, le=1024, description="dp ranks")

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        if self.model_path and "vocab_size" in self.model_fields_set:
            raise ValueError("--vocab-size has no effect with --model-path; leave one of them out")
        return self

    @classmethod
    def from_args(cls, args: Sequence[str]) -> MockSettings:
        """Read flags and the environment.

        Raises:
            ConfigurationError: for an unknown flag or a bad value.
        """
        # The process's --config file belongs to its component; only the engine's own variables are looked at.
        own = {name: value for name, value in os.environ.items() if name.startswith(cls.env_name(""))}
        return resolve_settings("mock engine", [cls], list(args), environ=own).get(cls)
