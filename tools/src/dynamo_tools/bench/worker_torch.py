"""The same model as a straightforward PyTorch program on one CPU thread, for the reference engine to stand beside."""

from __future__ import annotations

from pathlib import Path

from dynamo_tools.bench.rivals import Rival, measure
from dynamo_tools.process import clean_environment

# The CPU build alone: the index's own build brings gigabytes for GPUs.
_REQUIREMENTS = ("numpy==2.3.5", "safetensors==0.8.0", "torch==2.13.0+cpu")

_PROGRAM = """
import json, sys, time
import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu
from safetensors.torch import load_file

folder, batch, prompt, output, runs = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(1)
torch.set_grad_enabled(False)
config = json.load(open(f"{folder}/config.json"))
weights = {name: tensor.float() for name, tensor in load_file(f"{folder}/model.safetensors").items()}
heads, kv_heads, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
layers, eps, vocabulary = config["num_hidden_layers"], config["rms_norm_eps"], config["vocab_size"]
angles = torch.outer(torch.arange(prompt + output).float(), 10000.0 ** (-torch.arange(0, dim, 2) / dim))
cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)


def rotate(x, start, stop):
    turned = torch.cat((-x[..., dim // 2 :], x[..., : dim // 2]), dim=-1)
    return x * cos[start:stop] + turned * sin[start:stop]


def forward(ids, cache, start):
    stop = start + ids.shape[1]
    hidden = weights["model.embed_tokens.weight"][ids]
    for index in range(layers):
        w = lambda name: weights[f"model.layers.{index}.{name}.weight"]
        x = rms_norm(hidden, hidden.shape[-1:], w("input_layernorm"), eps)
        q, k, v = (
            (x @ w(f"self_attn.{name}_proj").T).view(*ids.shape, count, dim).transpose(1, 2)
            for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        keys, values = cache[index]
        keys[:, :, start:stop], values[:, :, start:stop] = rotate(k, start, stop), v
        seen = scaled_dot_product_attention(
            rotate(q, start, stop), keys[:, :, :stop], values[:, :, :stop], is_causal=start == 0, enable_gqa=True
        )
        hidden = hidden + seen.transpose(1, 2).reshape(*ids.shape, -1) @ w("self_attn.o_proj").T
        x = rms_norm(hidden, hidden.shape[-1:], w("post_attention_layernorm"), eps)
        hidden = hidden + (silu(x @ w("mlp.gate_proj").T) * (x @ w("mlp.up_proj").T)) @ w("mlp.down_proj").T
    last = rms_norm(hidden[:, -1], hidden.shape[-1:], weights["model.norm.weight"], eps)
    return (last @ weights["model.embed_tokens.weight"].T).argmax(dim=-1, keepdim=True)


def run():
    cache = [torch.zeros(2, batch, kv_heads, prompt + output, dim) for _ in range(layers)]
    started = time.process_time()
    token = forward(torch.randint(3, vocabulary - 64, (batch, prompt)), cache, 0)
    for position in range(prompt, prompt + output - 1):
        token = forward(token, cache, position)
    return batch * output / (time.process_time() - started)


run()
for _ in range(runs):
    print(run())
"""


def torch_rate(
    cache: Path, model: Path, *, batch: int, prompt_tokens: int, output_tokens: int, runs: int
) -> float | None:
    """Return the program's tokens per CPU second; None if PyTorch's CPU build is not to be had.

    Args:
        cache: Folder of the rivals' environments.
        model: Folder of the model.
        batch: Sequences computed together.
        prompt_tokens: Length of each prompt.
        output_tokens: Tokens generated for each.
        runs: Runs whose median counts.
    """
    links = clean_environment().get("PIP_FIND_LINKS")
    where = ("--find-links", links) if links else ()
    rival = Rival("torch-cpu", (*where, *_REQUIREMENTS))
    numbers = [str(number) for number in (batch, prompt_tokens, output_tokens, runs)]
    return measure(rival, cache, _PROGRAM, [str(model), *numbers])
