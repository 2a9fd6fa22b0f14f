"""The oracle: a Llama forward pass as a textbook has it. No cache, no batch, no blocks, no fused weights.

It shares no code with the engine, its file reader included.
"""

import json
import math
from pathlib import Path

import numpy as np

NEAR_TIE = 1e-3
"""Two sums of the same terms in another order differ by about 1e-5 in a logit. Where the best two logits of the
oracle are closer than this, either is a correct greedy choice."""


class DenseModel:
    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.weights: dict[str, np.ndarray] = {}
        for path in sorted(folder.glob("*.safetensors")):
            self.weights |= read_safetensors(path)

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Logits after each token, ``[tokens, vocab]``."""
        config, weights = self.config, self.weights
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        dim = config["head_dim"]
        x = weights["model.embed_tokens.weight"][tokens]
        causal = np.triu(np.full((len(tokens), len(tokens)), -np.inf, dtype=np.float32), 1)
        for layer in range(config["num_hidden_layers"]):
            name = f"model.layers.{layer}."
            h = self.norm(x, weights[name + "input_layernorm.weight"])
            q = (h @ weights[name + "self_attn.q_proj.weight"].T).reshape(len(tokens), heads, dim)
            k = (h @ weights[name + "self_attn.k_proj.weight"].T).reshape(len(tokens), kv_heads, dim)
            v = (h @ weights[name + "self_attn.v_proj.weight"].T).reshape(len(tokens), kv_heads, dim)
            q, k = self.rope(q), self.rope(k)
            mixed = []
            for head in range(heads):
                source = head // (heads // kv_heads)
                scores = q[:, head] @ k[:, source].T / math.sqrt(dim) + causal
                scores = np.exp(scores - scores.max(-1, keepdims=True))
                mixed.append(scores / scores.sum(-1, keepdims=True) @ v[:, source])
            x = x + np.concatenate(mixed, -1) @ weights[name + "self_attn.o_proj.weight"].T
            h = self.norm(x, weights[name + "post_attention_layernorm.weight"])
            gate = h @ weights[name + "mlp.gate_proj.weight"].T
            up = h @ weights[name + "mlp.up_proj.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ weights[name + "mlp.down_proj.weight"].T
        x = self.norm(x, weights["model.norm.weight"])
        head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
        return x @ weights[head].T

    def norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(self.config["rms_norm_eps"])) * weight

    def rope(self, x: np.ndarray) -> np.ndarray:
        half = x.shape[-1] // 2
        angles = np.arange(len(x))[:, None] * self.frequencies(half)
        cos, sin = (f(angles).astype(np.float32)[:, None, :] for f in (np.cos, np.sin))
        return np.concatenate(
            [x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], -1
        )

    def frequencies(self, half: int) -> np.ndarray:
        rope = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        theta = rope.get("rope_theta") or self.config.get("rope_theta") or 10000.0
        plain = np.array([theta ** (-i / half) for i in range(half)])
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind == "linear":
            return plain / rope["factor"]
        if kind == "llama3":
            return np.array([self.llama3(frequency, rope) for frequency in plain])
        return plain

    @staticmethod
    def llama3(frequency: float, rope: dict) -> float:
        wavelength = 2 * math.pi / frequency
        original, low, high = (
            rope["original_max_position_embeddings"],
            rope["low_freq_factor"],
            rope["high_freq_factor"],
        )
        if wavelength < original / high:
            return frequency
        if wavelength > original / low:
            return frequency / rope["factor"]
        smooth = (original / wavelength - low) / (high - low)
        return (1 - smooth) * frequency / rope["factor"] + smooth * frequency

    def assert_greedy(self, prompt: list[int], output: list[int]) -> None:
        """Assert that each output token is the greedy choice after all tokens before it."""
        logits = self.logits(prompt + output)[len(prompt) - 1 :]
        for position, token in enumerate(output):
            best = int(logits[position].argmax())
            gap = float(logits[position][best] - logits[position][token])
            assert token == best or gap < NEAR_TIE, f"output {position}: {token} is {gap} below {best}"


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    tensors: dict[str, np.ndarray] = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        raw = data[8 + length + begin : 8 + length + end]
        if entry["dtype"] == "BF16":
            halves = np.frombuffer(raw, dtype="<u2")
            flat = np.stack([np.zeros_like(halves), halves], -1).ravel().view("<f4")
        else:
            flat = np.frombuffer(raw, dtype={"F32": "<f4", "F16": "<f2"}[entry["dtype"]]).astype(np.float32)
        tensors[name] = flat.reshape(entry["shape"])
    return tensors
