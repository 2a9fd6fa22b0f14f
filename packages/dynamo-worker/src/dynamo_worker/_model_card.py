"""Makes the model card from what the engine says of itself and from the files of its model folder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from dynamo_core.cards import CheckedFile, ModelCard
from dynamo_core.engine import EngineConfig
from dynamo_core.errors import ConfigurationError

MODEL_FILES = {
    "tokenizer": "tokenizer.json",
    "tokenizer_config": "tokenizer_config.json",
    "config": "config.json",
    "generation_config": "generation_config.json",
    "chat_template": "chat_template.jinja",
}
"""Logical name of each file that a card lists, and its name in the folder."""

_CHUNK_BYTES = 1 << 20


def make_card(
    config: EngineConfig,
    *,
    served_model_name: str = "",
    tool_call_parser: str = "",
    reasoning_parser: str = "",
    kv_queries: bool = False,
    aliases: Sequence[str] = (),
) -> ModelCard:
    """Return the card. Reads and hashes the model's small files, so it belongs on a worker thread.

    Raises:
        ConfigurationError: if the engine names a model folder that is not there.
    """
    runtime = config.runtime_config
    return ModelCard(
        name=served_model_name or config.model,
        model_path=str(Path(config.model_path).resolve()) if config.model_path else "",
        files=checked_files(Path(config.model_path)) if config.model_path else {},
        context_length=config.context_length,
        kv_block_size=config.kv_block_size,
        model_types=config.model_types,
        model_input=config.model_input,
        input_modalities=config.input_modalities,
        output_modalities=config.output_modalities,
        endpoint_types=config.types,
        worker_type=config.worker_type,
        needs=config.needs,
        aliases=tuple(dict.fromkeys((*config.aliases, *aliases))),
        eos_token_ids=config.eos_token_ids,
        capabilities=config.capabilities,
        runtime_config=msgspec.structs.replace(
            runtime,
            tool_call_parser=tool_call_parser or runtime.tool_call_parser,
            reasoning_parser=reasoning_parser or runtime.reasoning_parser,
            enable_local_indexer=kv_queries,
        ),
    )


def checked_files(folder: Path) -> dict[str, CheckedFile]:
    """Return the model files that exist in a folder, with their checksums.

    Raises:
        ConfigurationError: if the folder is not there.
    """
    if not folder.is_dir():
        raise ConfigurationError(f"model folder {folder} does not exist; give the path of a folder with a model")
    return {
        name: CheckedFile(file, _checksum(folder / file))
        for name, file in MODEL_FILES.items()
        if (folder / file).is_file()
    }


def _checksum(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(_CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()
