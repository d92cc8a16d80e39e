"""Megatron-Core's TransformerConfig and layer spec from the Plan: the only place that knows its spelling."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec

from megagpt.model.activation import GATES
from megagpt.model.attention import SDPAttention
from megagpt.model.experts import use_own_parts
from megagpt.model.norm import HeadNorm, Norm
from megagpt.plan import Plan
from megagpt.plan.config import ModelConfig

_ACTIVATIONS: dict[str, Callable] = {
    **{name: activation for name, (activation, _) in GATES.items()},
    "gelu": F.gelu,
    "gelu_tanh": GATES["geglu_tanh"][0],
    "relu": F.relu,
}


def transformer_config(plan: Plan) -> TransformerConfig:
    """The config handed to Megatron-Core's layers.

    Pipeline stages are DeepSpeed's business and the positions of context-parallel ranks are ours (`SDPAttention`), so
    Megatron-Core's layers are told of one each. `initialize_weights` fills the weights.
    """
    model = plan.model
    config = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        ffn_hidden_size=model.ffn_hidden_size,
        tensor_model_parallel_size=plan.tensor_parallel_size,
        pipeline_model_parallel_size=1,
        context_parallel_size=1,
        sequence_parallel=plan.run.parallel.sequence_parallel,
        params_dtype=torch.float32,
        bf16=plan.precision == "bf16",
        fp16=plan.precision == "fp16",
        normalization=model.normalization,
        layernorm_epsilon=model.layernorm_epsilon,
        gated_linear_unit=model.is_gated,
        activation_func=_ACTIVATIONS[model.activation],
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.has_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        softmax_scale=softmax_scale(model),
        layernorm_zero_centered_gamma=model.layernorm_zero_centered_gamma,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        perform_initialization=False,
        # Fusions need Apex or CUDA kernels.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **_expert_options(plan),
    )
    # The MLP hands both halves of a gated activation to a module: ours, see `Layer`. Set after the constructor, which
    # knows Transformer Engine's modules only and refuses activations that those lack.
    config.use_te_activation_func = model.is_gated
    return config


def softmax_scale(model: ModelConfig) -> float:
    """Factor of the attention's scores."""
    return (model.query_pre_attn_scalar or model.kv_channels) ** -0.5


def _expert_options(plan: Plan) -> dict[str, Any]:
    model, parallel = plan.model, plan.run.parallel
    if model.num_experts is None:
        return {}
    return {
        "num_moe_experts": model.num_experts,
        "moe_router_topk": model.moe_router_topk,
        "moe_ffn_hidden_size": model.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
        "moe_shared_expert_gate": model.moe_shared_expert_gate,
        "moe_router_pre_softmax": model.moe_router_pre_softmax,
        "moe_router_load_balancing_type": "aux_loss" if model.moe_aux_loss_coeff > 0 else "none",
        "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        "moe_z_loss_coeff": model.moe_z_loss_coeff or None,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": parallel.moe_token_dispatcher_type,
        "expert_model_parallel_size": plan.expert_parallel_size,
        "expert_tensor_parallel_size": plan.tensor_parallel_size,
    }


def layer_spec(config: TransformerConfig, plan: Plan, index: int) -> ModuleSpec:
    """Megatron-Core's local layer spec with our norms, attention core, router and experts.

    Args:
        config: Megatron-Core's config.
        plan: gives recomputation, and which layers have experts.
        index: 0 ... num_layers - 1.
    """
    model = plan.model
    has_experts = model.has_experts(index)
    num_experts = config.num_moe_experts if has_experts else None
    spec = get_gpt_layer_local_spec(num_experts=num_experts, normalization=config.normalization)
    if has_experts:
        use_own_parts(spec.submodules.mlp)
    recompute = plan.run.training.recompute_granularity == "selective"
    attention = dataclasses.replace(
        spec.submodules.self_attention.submodules,
        core_attention=partial(
            SDPAttention,
            recompute=recompute,
            window=model.window_of_layer(index),
            softcap=model.attn_logit_softcapping,
        ),
        q_layernorm=HeadNorm if model.qk_layernorm else None,
        k_layernorm=HeadNorm if model.qk_layernorm else None,
    )
    spec.submodules = dataclasses.replace(
        spec.submodules,
        input_layernorm=Norm,
        pre_mlp_layernorm=Norm,
        self_attention=dataclasses.replace(spec.submodules.self_attention, submodules=attention),
    )
    return spec
