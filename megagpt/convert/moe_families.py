"""Hugging Face families with experts: Mixtral (arXiv 2401.04088), Qwen2-MoE and Qwen3-MoE (2505.09388)."""

from typing import Any

from megagpt.convert.family import ANY, GATE_UP, Family, Row, odd_rotary
from megagpt.convert.llama_families import LLAMA_REQUIRES, NO_BIASES, llama_rows, qwen_config, shared_config
from megagpt.plan.config import ModelConfig


def _expert_rows(router: str, expert: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    ours, theirs = "layers.{i}.mlp", "model.layers.{i}"
    return (
        *llama_rows(),
        Row(f"{ours}.router", (f"{theirs}.{router}",)),
        Row(f"{ours}.experts.{{e}}.linear_fc1", (f"{theirs}.{expert}.{gate}", f"{theirs}.{expert}.{up}"), GATE_UP),
        Row(f"{ours}.experts.{{e}}.linear_fc2", (f"{theirs}.{expert}.{down}",)),
    )


_QWEN_EXPERTS = _expert_rows("mlp.gate", "mlp.experts.{e}", "gate_proj", "up_proj", "down_proj")
_SHARED_EXPERT = (
    Row(
        "layers.{i}.mlp.shared_experts.linear_fc1",
        ("model.layers.{i}.mlp.shared_expert.gate_proj", "model.layers.{i}.mlp.shared_expert.up_proj"),
        GATE_UP,
    ),
    Row("layers.{i}.mlp.shared_experts.linear_fc2", ("model.layers.{i}.mlp.shared_expert.down_proj",)),
    Row("layers.{i}.mlp.shared_experts.gate_weight", ("model.layers.{i}.mlp.shared_expert_gate",)),
)
_REQUIRES: dict[str, tuple[Any, ...]] = LLAMA_REQUIRES | {"num_experts": ANY, "add_bias_linear": (False,)}


def _some_experts(model: ModelConfig) -> list[str]:
    return ["model.num_experts=null (must be a number)"] if model.num_experts is None else []


def _dense_layers(model: ModelConfig) -> list[int]:
    return [layer for layer in range(model.num_layers) if not model.has_experts(layer)]


# ---------------------------------------------------------------------------------------------------------- mixtral


def _mixtral_checks(model: ModelConfig) -> list[str]:
    found = _some_experts(model) + odd_rotary(model)
    if model.num_experts is not None and _dense_layers(model):
        found.append(f"model.moe_layer_freq={model.moe_layer_freq} (can be 1: all layers have experts)")
    return found


def _mixtral_config(model: ModelConfig) -> dict[str, Any]:
    return shared_config(model) | {
        "intermediate_size": model.moe_ffn_hidden_size,
        "num_local_experts": model.num_experts,
        "num_experts_per_tok": model.moe_router_topk,
        "router_aux_loss_coef": model.moe_aux_loss_coeff,
        "sliding_window": model.sliding_window,
    }


# ------------------------------------------------------------------------------------------------- qwen2, qwen3 moe


def _qwen_moe_config(model: ModelConfig) -> dict[str, Any]:
    return qwen_config(model) | {
        "num_experts": model.num_experts,
        "num_experts_per_tok": model.moe_router_topk,
        "moe_intermediate_size": model.moe_ffn_hidden_size,
        "norm_topk_prob": not model.moe_router_pre_softmax,
        "router_aux_loss_coef": model.moe_aux_loss_coeff,
        "decoder_sparse_step": 1,
        "mlp_only_layers": _dense_layers(model),
    }


def _qwen2_moe_config(model: ModelConfig) -> dict[str, Any]:
    return _qwen_moe_config(model) | {
        "qkv_bias": model.add_qkv_bias,
        "shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
    }


def _qwen3_moe_config(model: ModelConfig) -> dict[str, Any]:
    return _qwen_moe_config(model) | {"attention_bias": False}


def _qwen2_moe_checks(model: ModelConfig) -> list[str]:
    found = _some_experts(model) + odd_rotary(model)
    if model.num_experts is not None and model.moe_shared_expert_intermediate_size is None:
        found.append("model.moe_shared_expert_intermediate_size=null (must be a number)")
    if model.moe_shared_expert_intermediate_size is not None and not model.moe_shared_expert_gate:
        found.append("model.moe_shared_expert_gate=False (can be True)")
    return found


def _qwen3_moe_checks(model: ModelConfig) -> list[str]:
    return _some_experts(model) + odd_rotary(model)


MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    _expert_rows("block_sparse_moe.gate", "block_sparse_moe.experts.{e}", "w1", "w3", "w2"),
    _REQUIRES | NO_BIASES | {"sliding_window": ANY, "moe_router_pre_softmax": (False,)},
    _mixtral_checks,
    _mixtral_config,
)
QWEN2_MOE = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    _QWEN_EXPERTS + _SHARED_EXPERT,
    _REQUIRES | {"moe_shared_expert_intermediate_size": ANY},
    _qwen2_moe_checks,
    _qwen2_moe_config,
)
QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    _QWEN_EXPERTS,
    _REQUIRES | NO_BIASES | {"qk_layernorm": (True,), "sliding_window": ANY},
    _qwen3_moe_checks,
    _qwen3_moe_config,
)
