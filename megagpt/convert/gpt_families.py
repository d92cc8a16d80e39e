"""Hugging Face families with LayerNorm and biases: GPT-2 and GPT-NeoX (Pythia)."""

from typing import Any

from megagpt.convert.family import ANY, CONV1D, CONV1D_QKV, Family, Row, odd_rotary
from megagpt.plan.config import ModelConfig

_HF_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}

_REQUIRES: dict[str, tuple[Any, ...]] = {
    "normalization": ("LayerNorm",),
    "activation": tuple(_HF_ACTIVATIONS),
    "add_bias_linear": (True,),
}

# ------------------------------------------------------------------------------------------------------------ gpt2


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


GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    _gpt2_rows(),
    _REQUIRES | {"position_embedding_type": ("learned_absolute",)},
    _plain_heads,
    _gpt2_config,
)
GPT_NEOX = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    _gpt_neox_rows(),
    _REQUIRES | {"position_embedding_type": ("rope",), "rotary_percent": ANY, "parallel_residual": ANY},
    lambda model: _plain_heads(model) + odd_rotary(model),
    _gpt_neox_config,
)
