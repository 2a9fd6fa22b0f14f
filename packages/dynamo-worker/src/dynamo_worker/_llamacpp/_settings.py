"""Options of the llama.cpp engine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from dynamo_core.errors import ConfigurationError
from dynamo_core.settings import DynamoSettings, resolve_settings


class LlamaCppSettings(DynamoSettings):
    """Options of the llama.cpp engine."""

    component: ClassVar[str] = "llamacpp"

    model: str = Field(min_length=1, description="path of a GGUF file")
    served_model_name: str = Field("", description="name that clients use; the file's name without .gguf if empty")
    tokenizer: str = Field("", description="folder with tokenizer.json, instead of the tokenizer inside the GGUF file")
    max_model_len: int = Field(0, ge=0, description="most tokens of prompt and output; the model's own if 0")
    max_num_seqs: int = Field(4, ge=1, le=256, description="most sequences that run at once; they share the KV cache")
    kv_cache_tokens: int = Field(
        0, ge=0, description="tokens that the KV cache holds; enough for max-num-seqs of full length if 0"
    )
    max_num_batched_tokens: int = Field(
        2048, ge=32, description="most tokens one step computes; longer prompts are cut"
    )
    num_threads: int = Field(0, ge=0, description="threads of one step; llama.cpp's choice if 0")
    num_gpu_layers: int = Field(-1, ge=-1, description="layers on the GPU, with a GPU build of xllamacpp; all if -1")
    kv_block_size: int = Field(32, ge=1, le=1024, description="tokens of a block in KV events")
    prompt_cache_mib: int = Field(0, ge=0, description="host memory for the KV of earlier prompts, in MiB")

    @classmethod
    def from_args(cls, args: Sequence[str], environ: Mapping[str, str] | None = None) -> LlamaCppSettings:
        """Read flags and ``DYN_LLAMACPP_*`` variables.

        Raises:
            ConfigurationError: for an unknown flag, a bad value, or a file that is not there.
        """
        source = os.environ if environ is None else environ
        mine = {name: value for name, value in source.items() if name.startswith(cls.env_name(""))}
        settings = resolve_settings("--engine llamacpp", [cls], args, environ=mine).get(cls)
        settings.require_files()
        return settings

    @property
    def model_name(self) -> str:
        """Name that clients use."""
        return self.served_model_name or Path(self.model).name.removesuffix(".gguf")

    def keeps_slots_whole(self, context_length: int) -> bool:
        """Whether a slot keeps its last request's tokens until its next one, so that KV events can tell of them.

        A cache that is smaller than all slots together takes tokens from idle ones, and a prompt cache brings others
        back; neither is told.
        """
        needed = context_length * self.max_num_seqs
        return not self.prompt_cache_mib and (not self.kv_cache_tokens or self.kv_cache_tokens >= needed)

    def require_files(self) -> None:
        """Check that the files are there.

        Raises:
            ConfigurationError: naming flag, path and remedy.
        """
        if not Path(self.model).is_file():
            raise ConfigurationError(f"option --model has the value {self.model!r}, no file; give a GGUF file")
        if self.tokenizer and not (Path(self.tokenizer) / "tokenizer.json").is_file():
            raise ConfigurationError(
                f"option --tokenizer has the value {self.tokenizer!r}, which has no tokenizer.json; give its folder"
            )
