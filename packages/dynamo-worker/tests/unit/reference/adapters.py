"""Makes random adapters in PEFT's layout, and merges them into the dense oracle."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from dense_oracle import DenseModel, read_safetensors
from parts import write_safetensors

TARGETS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def write_adapter(
    folder: Path,
    model: DenseModel,
    *,
    seed: int,
    rank: int = 4,
    targets: tuple[str, ...] = TARGETS + MLP,
    **config: Any,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for layer in range(model.config["num_hidden_layers"]):
        for target in targets:
            width, height = model.weights[f"model.layers.{layer}.{target}.weight"].shape
            prefix = f"base_model.model.model.layers.{layer}.{target}."
            tensors[f"{prefix}lora_A.weight"] = (random.standard_normal((rank, height)) * height**-0.5).astype(
                np.float32
            )
            tensors[f"{prefix}lora_B.weight"] = (random.standard_normal((width, rank)) * 0.3).astype(np.float32)
    raw = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "bias": "none", "target_modules": list(targets), **config}
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    return folder


def merged(model_folder: Path, adapter: Path) -> DenseModel:
    """The oracle with the adapter's product added to each weight."""
    model = DenseModel(model_folder)
    raw = json.loads((adapter / "adapter_config.json").read_text())
    scale = raw["lora_alpha"] / (raw["r"] ** 0.5 if raw.get("use_rslora") else raw["r"])
    tensors = read_safetensors(adapter / "adapter_model.safetensors")
    for name, down in tensors.items():
        if name.endswith("lora_A.weight"):
            weight = name.removeprefix("base_model.model.").replace("lora_A.", "")
            model.weights[weight] = model.weights[weight] + scale * tensors[name.replace("lora_A", "lora_B")] @ down
    return model
