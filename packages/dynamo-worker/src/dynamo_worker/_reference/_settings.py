"""Options of the reference engine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from dynamo_core.errors import ConfigurationError
from dynamo_core.settings import DynamoSettings, resolve_settings

BUNDLED_MODELS = Path(__file__).parent.parent / "models"


class ReferenceSettings(DynamoSettings):
    """Options of the reference engine."""

    component: ClassVar[str] = "reference"

    model: str = Field("tinylm", description="folder of a Llama-architecture model, or the name of a bundled one")
    served_model_name: str = Field("", description="name that clients use; the folder's name if empty")
    block_size: int = Field(16, ge=1, le=1024, description="tokens a KV block")
    num_blocks: int = Field(1024, ge=1, description="KV blocks; they must hold one request of full length")
    max_num_seqs: int = Field(64, ge=1, description="most sequences that run at once")
    max_num_batched_tokens: int = Field(512, ge=1, description="most tokens one step computes; longer prompts are cut")
    max_model_len: int | None = Field(None, ge=2, description="most tokens of prompt and output; the model's if unset")
    max_waiting_requests: int = Field(1024, ge=1, description="requests that may wait before new ones are refused")
    enable_prefix_caching: bool = Field(True, description="reuse the KV blocks of equal prefixes")
    kv_cache_dtype: Literal["f32", "f16"] = Field("f32", description="element type of the KV cache: f32 or f16")
    seed: int | None = Field(None, ge=0, lt=2**63, description="seed of unseeded requests; the worker's if unset")
    data_parallel_size: int = Field(1, ge=1, le=64, description="dp ranks, each with KV blocks and a thread of its own")
    lora: list[str] = Field(default_factory=list[str], description="adapters to load at start, as NAME=FOLDER")
    image_encoder: bool = Field(
        False, description="take images, with a small untrained encoder of fixed weights: to try encode workers"
    )
    num_threads: int = Field(1, ge=1, description="threads of one matrix product")

    @classmethod
    def from_args(cls, args: Sequence[str], environ: Mapping[str, str] | None = None) -> ReferenceSettings:
        """Read flags and ``DYN_REFERENCE_*`` variables; the worker's own configuration file is not the engine's.

        Raises:
            ConfigurationError: for an unknown flag, a bad value, or a model folder that is not there.
        """
        source = os.environ if environ is None else environ
        mine = {name: value for name, value in source.items() if name.startswith(cls.env_name(""))}
        settings = resolve_settings("--engine reference", [cls], args, environ=mine).get(cls)
        settings.require_model()
        _ = settings.adapters
        return settings

    @property
    def model_folder(self) -> Path:
        """Folder of the model."""
        bundled = BUNDLED_MODELS / self.model
        return bundled if "/" not in self.model and bundled.is_dir() else Path(self.model)

    @property
    def model_name(self) -> str:
        """Name that clients use."""
        return self.served_model_name or self.model_folder.resolve().name

    @property
    def adapters(self) -> dict[str, Path]:
        """Adapters to load at start: name to folder.

        Raises:
            ConfigurationError: for an entry that is not NAME=FOLDER.
        """
        pairs = [entry.partition("=") for entry in self.lora]
        for entry, (name, _, folder) in zip(self.lora, pairs, strict=True):
            if not name or not folder:
                raise ConfigurationError(f"option --lora has the value {entry!r}; give NAME=FOLDER")
        return {name: Path(folder) for name, _, folder in pairs}

    def require_model(self) -> None:
        """Check that the model folder is there.

        Raises:
            ConfigurationError: naming the flag, the path and the remedy.
        """
        if not (self.model_folder / "config.json").is_file():
            problem = "has no config.json" if self.model_folder.is_dir() else "is not a folder"
            raise ConfigurationError(
                f"option --model has the value {self.model!r}, which {problem}; give a folder in Hugging Face layout "
                f"(config.json and safetensors) or a bundled model: {', '.join(bundled_models())}"
            )


def bundled_models() -> list[str]:
    """Return the names of the models that come with this package."""
    return sorted(path.name for path in BUNDLED_MODELS.iterdir() if (path / "config.json").is_file())
