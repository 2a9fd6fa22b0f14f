"""The forward pass: a ragged batch of sequences over a paged KV cache.

Every row of the batch is one token. Rows of one sequence are consecutive; a sequence brings one row when it decodes
and many when it prefills.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dynamo_worker._reference._attention import AttentionPlan, Segment
from dynamo_worker._reference._config import ModelConfig
from dynamo_worker._reference._kv_cache import KVCache
from dynamo_worker._reference._linear import Linear
from dynamo_worker._reference._lora import LoraAdapter
from dynamo_worker._reference._rope import rope_tables, rotate
from dynamo_worker._reference._safetensors import SafetensorsFolder

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Layer:
    attention_norm: Floats
    qkv: Linear
    out: Linear
    mlp_norm: Floats
    gate: Linear
    up: Linear
    down: Linear


@dataclass(frozen=True)
class _Products:
    """The linear products of one layer, with the parts that adapters add."""

    layer: int
    adapted: list[tuple[LoraAdapter, Ints]]

    def __call__(self, linear: Linear, name: str, rows: Floats) -> Floats:
        out = linear(rows)
        for adapter, indices in self.adapted:
            adapter.add(self.layer, name, indices, rows, out)
        return out


class LlamaModel:
    """Weights and forward pass.

    Args:
        config: Shape of the model.
        weights: Its tensors.
        max_context: Positions to prepare rotations for.

    Raises:
        ConfigurationError: if a tensor is missing or has another shape than the configuration says.
    """

    def __init__(self, config: ModelConfig, weights: SafetensorsFolder, max_context: int) -> None:
        self.config = config
        self._cos, self._sin = rope_tables(config.rope, config.head_dim, max_context)
        embeddings = (config.vocab_size, config.hidden_size)
        self._embeddings = weights.read("model.embed_tokens.weight", embeddings)
        self.embedding_scale = float(np.sqrt(np.mean(np.square(self._embeddings))))
        head = self._embeddings if config.tied_embeddings else weights.read("lm_head.weight", embeddings)
        self._head = Linear(head)
        self._norm = weights.read("model.norm.weight", (config.hidden_size,))
        self._layers = [_load_layer(config, weights, index) for index in range(config.num_layers)]

    def forward(self, segments: Sequence[Segment], cache: KVCache) -> Floats:
        """Compute all segments, write their KV, and return the logits of each one's last token.

        Returns:
            ``[len(segments), vocab_size]``.
        """
        hidden = self._hidden(segments, cache)
        if len(hidden) > len(segments):
            hidden = hidden[np.cumsum([len(segment.token_ids) for segment in segments]) - 1]
        return self._head(self._normalize(hidden, self._norm))

    def embed(self, segment: Segment, cache: KVCache) -> Floats:
        """Compute one segment and return the mean of its tokens' final states, scaled to length 1.

        Returns:
            ``[hidden_size]``.
        """
        mean = self._normalize(self._hidden([segment], cache), self._norm).mean(axis=0)
        return mean / np.linalg.norm(mean)

    def _hidden(self, segments: Sequence[Segment], cache: KVCache) -> Floats:
        config = self.config
        plan = AttentionPlan(segments, cache, config.num_heads // config.num_kv_heads)
        cos, sin = self._cos[plan.positions], self._sin[plan.positions]
        hidden = self._embeddings[[token for segment in segments for token in segment.token_ids]]
        _add_media(hidden, segments)
        adapted = _adapted_rows(segments)
        with np.errstate(over="ignore"):  # a far negative gate divides by infinity, which is its limit: zero
            for index, layer in enumerate(self._layers):
                product = _Products(index, adapted)
                heads = product(layer.qkv, "qkv", self._normalize(hidden, layer.attention_norm))
                query, key, value = self._split_heads(heads, cos, sin)
                hidden += product(layer.out, "out", plan.attend(index, query, key, value))
                hidden += self._mlp(layer, hidden, product)
        return hidden

    def _split_heads(self, heads: Floats, cos: Floats, sin: Floats) -> tuple[Floats, Floats, Floats]:
        queries, keys = self.config.num_heads, self.config.num_kv_heads
        heads = heads.reshape(len(heads), -1, self.config.head_dim)
        rotated = rotate(heads[:, : queries + keys], cos, sin)
        return rotated[:, :queries], rotated[:, queries:], heads[:, queries + keys :]

    def _mlp(self, layer: _Layer, hidden: Floats, product: _Products) -> Floats:
        normal = self._normalize(hidden, layer.mlp_norm)
        gate, up = product(layer.gate, "gate", normal), product(layer.up, "up", normal)
        weight = np.negative(gate)
        np.exp(weight, out=weight)
        weight += np.float32(1.0)
        np.divide(gate, weight, out=weight)
        weight *= up
        return product(layer.down, "down", weight)

    def _normalize(self, hidden: Floats, weight: Floats) -> Floats:
        mean_square: Floats = np.einsum("rh,rh->r", hidden, hidden)[:, None] / np.float32(hidden.shape[-1])
        norm: Floats = np.sqrt(mean_square + np.float32(self.config.rms_norm_eps))
        out: Floats = hidden / norm
        out *= weight
        return out


def _add_media(hidden: Floats, segments: Sequence[Segment]) -> None:
    first = 0
    for segment in segments:
        count = len(segment.token_ids)
        for position, vector in segment.media:
            if segment.start <= position < segment.start + count:
                hidden[first + position - segment.start] += vector
        first += count


def _adapted_rows(segments: Sequence[Segment]) -> list[tuple[LoraAdapter, Ints]]:
    """Return each adapter of a batch with the rows that use it."""
    rows: dict[LoraAdapter, list[Ints]] = {}
    first = 0
    for segment in segments:
        count = len(segment.token_ids)
        if segment.adapter is not None:
            rows.setdefault(segment.adapter, []).append(np.arange(first, first + count))
        first += count
    return [(adapter, np.concatenate(found)) for adapter, found in rows.items()]


def _load_layer(config: ModelConfig, weights: SafetensorsFolder, index: int) -> _Layer:
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    prefix = f"model.layers.{index}."

    def read(name: str, *shape: int) -> Floats:
        return weights.read(f"{prefix}{name}.weight", shape)

    return _Layer(
        attention_norm=read("input_layernorm", hidden),
        qkv=Linear(
            np.concatenate(
                [
                    read("self_attn.q_proj", queries, hidden),
                    read("self_attn.k_proj", keys, hidden),
                    read("self_attn.v_proj", keys, hidden),
                ]
            )
        ),
        out=Linear(read("self_attn.o_proj", hidden, queries)),
        mlp_norm=read("post_attention_layernorm", hidden),
        gate=Linear(read("mlp.gate_proj", inner, hidden)),
        up=Linear(read("mlp.up_proj", inner, hidden)),
        down=Linear(read("mlp.down_proj", hidden, inner)),
    )
