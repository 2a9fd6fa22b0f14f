"""Model configuration: what is read, and what is refused rather than computed wrongly."""

import json
from pathlib import Path
from typing import Any

import pytest
from parts import BASE_CONFIG, TINYLM

from dynamo_core.errors import ConfigurationError
from dynamo_worker._reference._config import ModelConfig


def write(folder: Path, **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**BASE_CONFIG, **changes}))
    return folder


def test_the_bundled_model() -> None:
    config = ModelConfig.load(TINYLM)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (4, 4, 2, 32)
    assert config.max_context == 4096
    assert config.eos_token_ids == (2, 0)
    assert config.tied_embeddings


def test_defaults_of_older_configurations(tmp_path: Path) -> None:
    folder = write(tmp_path, num_key_value_heads=None, head_dim=None, rope_theta=77.0)
    config = ModelConfig.load(folder)
    assert (config.num_kv_heads, config.head_dim, config.rope.theta, config.rope.kind) == (4, 8, 77.0, "default")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM"),
        ({"architectures": []}, "LlamaForCausalLM only"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
        ({"num_hidden_layers": "many"}, "many"),
        ({"num_key_value_heads": 3}, "multiple of 3"),
        ({"head_dim": 7}, "head_dim 7"),
        ({"vocab_size": 0}, "below 1"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ModelConfig.load(write(tmp_path, **changes))


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_broken_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        ModelConfig.load(tmp_path)


def test_a_missing_file_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="Hugging Face layout"):
        ModelConfig.load(tmp_path)
