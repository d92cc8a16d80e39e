"""Models of some 100,000 parameters, one per kind of layer, and plans for them; no torch here."""

from megagpt.plan import Plan, deepspeed_config_from_dict, make_plan, run_config_from_dict

GLOBAL_BATCH, MICRO_BATCH, SEQUENCE = 8, 2, 32

LLAMA: dict = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 96,
    "vocab_size": 250,
}
GPT2: dict = {
    "num_layers": 3,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "vocab_size": 131,
    "position_embedding_type": "learned_absolute",
    "normalization": "LayerNorm",
    "activation": "gelu_tanh",
    "add_bias_linear": True,
    "untie_embeddings_and_output_weights": False,
}
NEOX: dict = dict(GPT2, position_embedding_type="rope", rotary_percent=0.5, parallel_residual=True, activation="gelu")
QWEN3: dict = dict(
    LLAMA,
    qk_layernorm=True,
    sliding_window=11,
    init_method_std=0.1,  # queries and keys must matter, or errors in their norms would not show
    rotary_base=100.0,
    rotary_scaling={"type": "llama3", "factor": 4.0, "original_max_position_embeddings": 16},
)
GEMMA: dict = dict(
    LLAMA,
    sliding_window=11,
    window_attn_skip_freq=2,
    rotary_base_local=100.0,
    qk_layernorm=True,
    query_pre_attn_scalar=20,
    attn_logit_softcapping=5.0,
    final_logit_softcapping=20.0,
    layernorm_zero_centered_gamma=True,
    post_layernorms=True,
    scale_embedding=True,
    activation="geglu_tanh",
    untie_embeddings_and_output_weights=False,
)
"""Everything of Gemma 2 and 3 at once."""
MIXTRAL: dict = dict(LLAMA, num_layers=2, num_experts=4, moe_ffn_hidden_size=48, moe_aux_loss_coeff=0.5)
SHARED_EXPERT: dict = dict(
    MIXTRAL,
    num_layers=3,
    moe_router_topk=3,
    moe_layer_freq=[0, 1, 1],
    moe_shared_expert_intermediate_size=32,
    moe_shared_expert_gate=True,
    moe_router_pre_softmax=True,
    moe_z_loss_coeff=0.1,
)
MODELS: dict[str, dict] = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "neox": NEOX,
    "qwen3": QWEN3,
    "gemma": GEMMA,
    "mixtral": MIXTRAL,
    "shared_expert": SHARED_EXPERT,
}
"""One model per family."""
TIED: dict = {"untie_embeddings_and_output_weights": False}
ODD: dict = dict(LLAMA, num_layers=7, num_attention_heads=3, num_query_groups=3, kv_channels=16, vocab_size=257)
SHAPES: dict[str, dict] = {
    "llama-tied": dict(LLAMA, **TIED),
    "gpt2-untied": dict(GPT2, untie_embeddings_and_output_weights=True),
    # layers, heads and vocabulary that are odd
    "odd": ODD,
    "odd-tied": dict(ODD, num_attention_heads=5, num_query_groups=1, **TIED),
    "9-heads": dict(LLAMA, num_layers=3, num_attention_heads=9, num_query_groups=3, kv_channels=16),
    "vocabulary-50257": dict(LLAMA, num_layers=2, vocab_size=50257),
    "vocabulary-50257-tied": dict(LLAMA, num_layers=2, vocab_size=50257, **TIED),
    # key/value heads that several tensor-parallel ranks share
    "one-group": dict(LLAMA, num_query_groups=1, add_qkv_bias=True),
    "two-groups": dict(LLAMA, num_attention_heads=8, num_query_groups=2, **TIED),
    "5-layers": dict(LLAMA, num_layers=5),
    "5-layers-tied": dict(GPT2, num_layers=5),
}
"""Models with shapes that do not fit at first sight."""

ADAM = {"name": "adamw", "lr": 1e-3, "min_lr": 1e-3}
SGD = {"name": "sgd", "lr": 0.5, "min_lr": 0.5, "weight_decay": 0.0}
"""Adam hides errors in the scale of gradients; SGD with clipping does not."""


def small_plan(
    model: str = "llama",
    optimizer: dict = ADAM,
    *,
    tp: int = 1,
    cp: int = 1,
    pp: int = 1,
    dp: int = 1,
    ep: int = 1,
    zero: int = 1,
    precision: str = "fp32",
    sp: bool = False,
    steps: int = 20,
    dropout: float = 0.0,
    recompute: dict | None = None,
    sections: dict | None = None,
    deepspeed: dict | None = None,
) -> Plan:
    """The Plan of a small model; `recompute` holds keys of `training`, `sections` are merged into the run config and
    `deepspeed` into the DeepSpeed config."""
    tree: dict = {
        "model": {
            **(MODELS | SHAPES)[model],
            "max_position_embeddings": SEQUENCE,
            "hidden_dropout": dropout,
            "attention_dropout": dropout,
        },
        "parallel": {
            "tensor_model_parallel_size": tp,
            "context_parallel_size": cp,
            "pipeline_model_parallel_size": pp,
            "expert_model_parallel_size": ep,
            "sequence_parallel": sp,
            "make_vocab_size_divisible_by": 16,
        },
        "optimizer": optimizer,
        "training": {"steps": steps, **(recompute or {})},
    }
    for name, section in (sections or {}).items():
        tree[name] = {**tree.get(name, {}), **section}
    config: dict = {
        "train_batch_size": GLOBAL_BATCH,
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": zero},
    }
    if precision != "fp32":
        config |= {precision: {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    for name, section in (deepspeed or {}).items():
        config[name] = {**config.get(name, {}), **section} if isinstance(section, dict) else section
    return make_plan(run_config_from_dict(tree), deepspeed_config_from_dict(config), tp * cp * pp * dp)
