"""The bundled model as a GGUF file, written with llama.cpp's own package for that."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from dynamo_worker._reference._safetensors import SafetensorsFile
from dynamo_worker._reference._settings import BUNDLED_MODELS

MODEL = BUNDLED_MODELS / "tinylm"
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(path: Path) -> Path:
    """Write the model to a file and return its path."""
    config, writer = _json("config.json"), gguf.GGUFWriter(path, "llama")
    writer.add_name("tinylm")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, config["vocab_size"])
    for name, tensor in _tensors(config):
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: Any, vocab_size: int) -> None:
    spec = _json("tokenizer.json")
    tokens, types = [f"[PAD{index}]" for index in range(vocab_size)], [gguf.TokenType.UNUSED] * vocab_size
    for token, index in spec["model"]["vocab"].items():
        tokens[index], types[index] = token, gguf.TokenType.NORMAL
    for added in spec["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in spec["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(_json("tokenizer_config.json")["chat_template"])


def _tensors(config: dict[str, Any]) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    file = SafetensorsFile(MODEL / "model.safetensors")
    heads = {"self_attn.q_proj": config["num_attention_heads"], "self_attn.k_proj": config["num_key_value_heads"]}
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for name in file:
        tensor = file.read(name, tuple(file._header[name]["shape"]))
        if name in whole:
            yield whole[name], tensor
            continue
        _, _, layer, rest = name.split(".", 3)
        part = rest.removesuffix(".weight")
        if part in heads:  # llama.cpp turns neighbours, the checkpoint turns halves
            tensor = tensor.reshape(heads[part], 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        yield f"blk.{layer}.{_LAYER_NAMES[part]}.weight", tensor


def _json(name: str) -> dict[str, Any]:
    return json.loads((MODEL / name).read_text())
