"""Hugging Face families with RMSNorm and a gated MLP: Llama, Mistral, Qwen2 and Qwen3."""

from typing import Any

from megagpt.convert.family import ANY, GATE_UP, QKV, Family, Row, odd_rotary
from megagpt.plan.config import ModelConfig


def llama_rows() -> tuple[Row, ...]:
    """Rows of Llama, and of the many families with its names."""
    hf, ours = "model.layers.{i}", "layers.{i}"
    attention = tuple(f"{hf}.self_attn.{part}_proj" for part in "qkv")
    return (
        Row("embedding.word_embeddings", ("model.embed_tokens",)),
        Row(f"{ours}.input_layernorm", (f"{hf}.input_layernorm",)),
        Row(f"{ours}.self_attention.linear_qkv", attention, QKV),
        Row(f"{ours}.self_attention.linear_proj", (f"{hf}.self_attn.o_proj",)),
        Row(f"{ours}.self_attention.q_layernorm", (f"{hf}.self_attn.q_norm",)),
        Row(f"{ours}.self_attention.k_layernorm", (f"{hf}.self_attn.k_norm",)),
        Row(f"{ours}.pre_mlp_layernorm", (f"{hf}.post_attention_layernorm",)),
        Row(f"{ours}.mlp.linear_fc1", (f"{hf}.mlp.gate_proj", f"{hf}.mlp.up_proj"), GATE_UP),
        Row(f"{ours}.mlp.linear_fc2", (f"{hf}.mlp.down_proj",)),
        Row("final_norm", ("model.norm",)),
        Row("head", ("lm_head",)),
    )


_ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_pytorch_tanh"}

LLAMA_REQUIRES: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "position_embedding_type": ("rope",),
    "activation": tuple(_ACTIVATIONS),
    "rotary_scaling": ANY,
}
NO_BIASES: dict[str, tuple[Any, ...]] = {"add_bias_linear": (False,), "add_qkv_bias": (False,)}


def llama_checks(model: ModelConfig) -> list[str]:
    """Sizes that transformers refuses."""
    found = odd_rotary(model)
    if model.hidden_size % model.num_attention_heads:
        found.append(f"model.hidden_size={model.hidden_size} (must be a multiple of num_attention_heads)")
    return found


def _only_qkv_biased(model: ModelConfig) -> tuple[str, ...]:
    """Llama's and Qwen3's attention has biases in all four projections or in none."""
    only_qkv = model.add_qkv_bias and not model.add_bias_linear
    return ("model.layers.{i}.self_attn.o_proj",) if only_qkv else ()


def shared_config(model: ModelConfig) -> dict[str, Any]:
    """Keys that Llama and its kin have."""
    return {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "hidden_act": _ACTIVATIONS[model.activation],
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.layernorm_epsilon,
        **_rotary_config(model),
        "attention_dropout": model.attention_dropout,
    }


def _rotary_config(model: ModelConfig) -> dict[str, Any]:
    scaling = rope_scaling(model)
    config = {
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_base, **scaling},
        "rope_theta": model.rotary_base,  # transformers 4
    }
    return config | ({"rope_scaling": scaling} if scaling else {})  # transformers 4


def rope_scaling(model: ModelConfig) -> dict[str, Any]:
    """The scaling of rotary frequencies in transformers' words; empty without one."""
    if model.rotary_scaling is None:
        return {}
    keys = model.rotary_scaling.model_dump(exclude_none=True)
    return {"rope_type": keys.pop("type"), **keys}


def _llama_config(model: ModelConfig) -> dict[str, Any]:
    return shared_config(model) | {"attention_bias": model.has_qkv_bias, "mlp_bias": model.add_bias_linear}


def _mistral_config(model: ModelConfig) -> dict[str, Any]:
    return shared_config(model) | {"sliding_window": model.sliding_window}


def qwen_config(model: ModelConfig) -> dict[str, Any]:
    """Keys that all families of Qwen have."""
    if model.sliding_window is None:
        return shared_config(model) | {"use_sliding_window": False}
    # Layers from `max_window_layers` on have the window.
    window = {"use_sliding_window": True, "sliding_window": model.sliding_window, "max_window_layers": 0}
    return shared_config(model) | window


def _qwen3_config(model: ModelConfig) -> dict[str, Any]:
    return qwen_config(model) | {"attention_bias": model.has_qkv_bias}


LLAMA = Family("llama", "LlamaForCausalLM", llama_rows(), LLAMA_REQUIRES, llama_checks, _llama_config, _only_qkv_biased)
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    llama_rows(),
    LLAMA_REQUIRES | NO_BIASES | {"sliding_window": ANY},
    odd_rotary,
    _mistral_config,
)
QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    llama_rows(),
    LLAMA_REQUIRES | {"add_qkv_bias": (True,), "add_bias_linear": (False,), "sliding_window": ANY},
    odd_rotary,
    qwen_config,
    brings_tokenizer=True,
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    llama_rows(),
    LLAMA_REQUIRES | {"qk_layernorm": (True,), "add_bias_linear": (False,), "sliding_window": ANY},
    odd_rotary,
    _qwen3_config,
    _only_qkv_biased,
)
