"""Hugging Face families of Gemma: 1 (arXiv 2403.08295), 2 (2408.00118) and the text models of 3 (2503.19786)."""

from typing import Any

from megagpt.convert.family import ANY, Family, Row
from megagpt.convert.llama_families import (
    LLAMA_REQUIRES,
    NO_BIASES,
    llama_checks,
    llama_rows,
    rope_scaling,
    shared_config,
)
from megagpt.plan.config import ModelConfig


def _sandwich_rows() -> tuple[Row, ...]:
    """Rows of Gemma 2 and 3, which call the norm after attention what Llama calls the one before the MLP."""
    hf, ours = "model.layers.{i}", "layers.{i}"
    norms = {
        "pre_mlp_layernorm": "pre_feedforward_layernorm",
        "post_self_attn_layernorm": "post_attention_layernorm",
        "post_mlp_layernorm": "post_feedforward_layernorm",
    }
    kept = tuple(row for row in llama_rows() if row.canonical != f"{ours}.pre_mlp_layernorm")
    return kept + tuple(Row(f"{ours}.{name}", (f"{hf}.{theirs}",)) for name, theirs in norms.items())


_REQUIRES: dict[str, tuple[Any, ...]] = {
    **LLAMA_REQUIRES,
    **NO_BIASES,
    "activation": ("geglu_tanh",),
    "layernorm_zero_centered_gamma": (True,),
    "scale_embedding": (True,),
}
_WINDOWS_AND_CAPS: dict[str, tuple[Any, ...]] = {
    "post_layernorms": (True,),
    "sliding_window": ANY,
    "window_attn_skip_freq": ANY,
    "query_pre_attn_scalar": ANY,
    "attn_logit_softcapping": ANY,
    "final_logit_softcapping": ANY,
}


def _gemma_config(model: ModelConfig) -> dict[str, Any]:
    config = shared_config(model)
    return config | {"hidden_activation": config["hidden_act"], "attention_bias": False}


def _gemma2_config(model: ModelConfig) -> dict[str, Any]:
    config = _gemma_config(model)
    del config["hidden_act"]
    windows = [model.window_of_layer(i) for i in range(model.num_layers)]
    return config | {
        "query_pre_attn_scalar": model.query_pre_attn_scalar or model.kv_channels,
        "attn_logit_softcapping": model.attn_logit_softcapping,
        "final_logit_softcapping": model.final_logit_softcapping,
        # transformers makes the mask of a window even if no layer has one.
        "sliding_window": model.sliding_window or model.max_position_embeddings,
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
    }


def _gemma3_config(model: ModelConfig) -> dict[str, Any]:
    whole, local = _gemma2_config(model), model.rotary_base_local or model.rotary_base
    rotary = {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": model.rotary_base, **rope_scaling(model)},
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
        "rope_local_base_freq": local,  # transformers 4
    }
    return whole | rotary


def _gemma3_checks(model: ModelConfig) -> list[str]:
    found = llama_checks(model)
    if model.rotary_scaling is not None and model.sliding_window is not None and model.rotary_base_local is None:
        found.append(
            "model.rotary_base_local=null (with rotary_scaling, layers with a window must have their own base)"
        )
    return found


GEMMA = Family("gemma", "GemmaForCausalLM", llama_rows(), _REQUIRES, llama_checks, _gemma_config)
GEMMA2 = Family(
    "gemma2", "Gemma2ForCausalLM", _sandwich_rows(), _REQUIRES | _WINDOWS_AND_CAPS, llama_checks, _gemma2_config
)
GEMMA3 = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    _sandwich_rows(),
    _REQUIRES
    | _WINDOWS_AND_CAPS
    | {"qk_layernorm": (True,), "rotary_base_local": ANY, "attn_logit_softcapping": (None,)},  # transformers ignores it
    _gemma3_checks,
    _gemma3_config,
)
