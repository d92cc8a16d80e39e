"""Which Hugging Face family expresses a model: one table per family.

A row joins one of our modules to the Hugging Face modules that hold the same numbers, together with the reshaping; it
counts for `.weight` and `.bias` alike. Shape letters: see `canonical.py`.
"""

from typing import Any

from megagpt.convert.family import CONV1D, CONV1D_QKV, GATE_UP, QKV, Dtype, Family, Read, Row, TokenIds
from megagpt.errors import ConversionError
from megagpt.plan.config import ModelConfig

__all__ = ["FAMILIES", "Dtype", "Family", "Read", "TokenIds", "family_for"]

# ------------------------------------------------------------------------------------------------- llama and qwen2


def _llama_rows() -> tuple[Row, ...]:
    hf, ours = "model.layers.{i}", "layers.{i}"
    attention = tuple(f"{hf}.self_attn.{part}_proj" for part in "qkv")
    return (
        Row("embedding.word_embeddings", ("model.embed_tokens",)),
        Row(f"{ours}.input_layernorm", (f"{hf}.input_layernorm",)),
        Row(f"{ours}.self_attention.linear_qkv", attention, QKV),
        Row(f"{ours}.self_attention.linear_proj", (f"{hf}.self_attn.o_proj",)),
        Row(f"{ours}.pre_mlp_layernorm", (f"{hf}.post_attention_layernorm",)),
        Row(f"{ours}.mlp.linear_fc1", (f"{hf}.mlp.gate_proj", f"{hf}.mlp.up_proj"), GATE_UP),
        Row(f"{ours}.mlp.linear_fc2", (f"{hf}.mlp.down_proj",)),
        Row("final_norm", ("model.norm",)),
        Row("head", ("lm_head",)),
    )


_LLAMA_REQUIRES: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "position_embedding_type": ("rope",),
    "rotary_percent": (1.0,),
    "activation": ("swiglu", "geglu"),
    "parallel_residual": (False,),
}


def _even_rotary(model: ModelConfig) -> list[str]:
    rotated = int(model.kv_channels * model.rotary_percent)
    return [] if rotated % 2 == 0 and rotated else [f"{rotated} rotated channels per head (must be even, not zero)"]


def _llama_checks(model: ModelConfig) -> list[str]:
    found = _even_rotary(model)
    if model.hidden_size % model.num_attention_heads:
        found.append(f"model.hidden_size={model.hidden_size} (must be a multiple of num_attention_heads)")
    return found


def _llama_zeros(model: ModelConfig) -> tuple[str, ...]:
    """Llama's attention has biases in all four projections or in none."""
    only_qkv = model.add_qkv_bias and not model.add_bias_linear
    return ("model.layers.{i}.self_attn.o_proj",) if only_qkv else ()


def _llama_config(model: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "hidden_act": "silu" if model.activation == "swiglu" else "gelu",
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.layernorm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_base},
        "rope_theta": model.rotary_base,  # transformers 4
        "attention_dropout": model.attention_dropout,
        "attention_bias": model.has_qkv_bias,
        "mlp_bias": model.add_bias_linear,
    }


def _qwen2_config(model: ModelConfig) -> dict[str, Any]:
    config = _llama_config(model)
    for fixed_by_the_family in ("attention_bias", "mlp_bias"):
        del config[fixed_by_the_family]
    return config | {"use_sliding_window": False}


# ------------------------------------------------------------------------------------------------------------ gpt2

_HF_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}


def _gpt2_rows() -> tuple[Row, ...]:
    hf, ours = "transformer.h.{i}", "layers.{i}"
    return (
        Row("embedding.word_embeddings", ("transformer.wte",)),
        Row("embedding.position_embeddings", ("transformer.wpe",)),
        Row(f"{ours}.input_layernorm", (f"{hf}.ln_1",)),
        Row(f"{ours}.self_attention.linear_qkv", (f"{hf}.attn.c_attn",), CONV1D_QKV),
        Row(f"{ours}.self_attention.linear_proj", (f"{hf}.attn.c_proj",), CONV1D),
        Row(f"{ours}.pre_mlp_layernorm", (f"{hf}.ln_2",)),
        Row(f"{ours}.mlp.linear_fc1", (f"{hf}.mlp.c_fc",), CONV1D),
        Row(f"{ours}.mlp.linear_fc2", (f"{hf}.mlp.c_proj",), CONV1D),
        Row("final_norm", ("transformer.ln_f",)),
        Row("head", ("lm_head",)),
    )


def _plain_heads(model: ModelConfig) -> list[str]:
    """GPT-2 and GPT-NeoX have one key/value head per query head, and heads that fill the hidden size."""
    found = []
    if model.num_query_groups != model.num_attention_heads:
        found.append(
            f"model.num_query_groups={model.num_query_groups} (must be num_attention_heads={model.num_attention_heads})"
        )
    if model.num_attention_heads * model.kv_channels != model.hidden_size:
        found.append(
            f"model.kv_channels={model.kv_channels} (times num_attention_heads={model.num_attention_heads} must give "
            f"hidden_size={model.hidden_size})"
        )
    return found


def _gpt2_config(model: ModelConfig) -> dict[str, Any]:
    return {
        "n_embd": model.hidden_size,
        "n_inner": model.ffn_hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_attention_heads,
        "n_positions": model.max_position_embeddings,
        "activation_function": _HF_ACTIVATIONS[model.activation],
        "layer_norm_epsilon": model.layernorm_epsilon,
        "embd_pdrop": model.hidden_dropout,
        "resid_pdrop": model.hidden_dropout,
        "attn_pdrop": model.attention_dropout,
    }


# -------------------------------------------------------------------------------------------------------- gpt_neox


def _gpt_neox_rows() -> tuple[Row, ...]:
    hf, ours = "gpt_neox.layers.{i}", "layers.{i}"
    return (
        Row("embedding.word_embeddings", ("gpt_neox.embed_in",)),
        Row(f"{ours}.input_layernorm", (f"{hf}.input_layernorm",)),
        # With as many groups as heads, Megatron's order is NeoX's: query, key and value head by head.
        Row(f"{ours}.self_attention.linear_qkv", (f"{hf}.attention.query_key_value",)),
        Row(f"{ours}.self_attention.linear_proj", (f"{hf}.attention.dense",)),
        Row(f"{ours}.pre_mlp_layernorm", (f"{hf}.post_attention_layernorm",)),
        Row(f"{ours}.mlp.linear_fc1", (f"{hf}.mlp.dense_h_to_4h",)),
        Row(f"{ours}.mlp.linear_fc2", (f"{hf}.mlp.dense_4h_to_h",)),
        Row("final_norm", ("gpt_neox.final_layer_norm",)),
        Row("head", ("embed_out",)),
    )


def _gpt_neox_config(model: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "hidden_act": _HF_ACTIVATIONS[model.activation],
        "max_position_embeddings": model.max_position_embeddings,
        "layer_norm_eps": model.layernorm_epsilon,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": model.rotary_base,
            "partial_rotary_factor": model.rotary_percent,
        },
        "rotary_emb_base": model.rotary_base,  # transformers 4
        "rotary_pct": model.rotary_percent,  # transformers 4
        "use_parallel_residual": model.parallel_residual,
        "attention_bias": True,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
    }


# -------------------------------------------------------------------------------------------------- the four tables

_BIASED_LAYERNORM: dict[str, tuple[Any, ...]] = {
    "normalization": ("LayerNorm",),
    "activation": tuple(_HF_ACTIVATIONS),
    "add_bias_linear": (True,),
}

FAMILIES: tuple[Family, ...] = (
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        _llama_rows(),
        _LLAMA_REQUIRES | {"add_qkv_bias": (True,), "add_bias_linear": (False,)},
        _even_rotary,
        _qwen2_config,
        brings_tokenizer=True,
    ),
    Family("llama", "LlamaForCausalLM", _llama_rows(), _LLAMA_REQUIRES, _llama_checks, _llama_config, _llama_zeros),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        _gpt2_rows(),
        _BIASED_LAYERNORM | {"position_embedding_type": ("learned_absolute",), "parallel_residual": (False,)},
        _plain_heads,
        _gpt2_config,
    ),
    Family(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        _gpt_neox_rows(),
        _BIASED_LAYERNORM | {"position_embedding_type": ("rope",)},
        lambda model: _plain_heads(model) + _even_rotary(model),
        _gpt_neox_config,
    ),
)


def family_for(model: ModelConfig, own_tokenizer: bool = False) -> Family:
    """The first family that expresses the model exactly.

    Args:
        own_tokenizer: the folder will hold our tokenizer, so families that bring their own are passed over.

    Raises:
        ConversionError: none does; the message lists per family the keys that stand in the way.
    """
    obstacles = {}
    for family in FAMILIES:
        found = family.obstacles(model)
        if own_tokenizer and family.brings_tokenizer:
            found.append("transformers replaces the tokenizer of this family by another one")
        if not found:
            return family
        obstacles[family.name] = found
    lines = [f"  {name}: {'; '.join(found)}" for name, found in obstacles.items()]
    raise ConversionError(
        "no Hugging Face family expresses this model exactly; to export, train with keys that one of them allows:\n"
        + "\n".join(lines)
    )
