"""Models as transformers initialises them, read into ours: the same logits, family by family."""

import tempfile

import pytest
import torch
import transformers
from ranks import run_ranks
from safetensors.torch import load_file

from megagpt.convert.canonical import canonical_shapes
from megagpt.convert.tables import FAMILIES, family_for
from megagpt.plan import deepspeed_config_from_dict, make_plan, run_config_from_dict

pytestmark = pytest.mark.usefixtures("libraries")

POSITIONS = 48
SIZES = dict(num_layers=3, hidden_size=48, num_attention_heads=4, vocab_size=149, max_position_embeddings=POSITIONS)
HF_SIZES = dict(
    num_hidden_layers=3,
    hidden_size=48,
    num_attention_heads=4,
    vocab_size=149,
    max_position_embeddings=POSITIONS,
    intermediate_size=80,
    initializer_range=0.2,
)
LLAMA3_ROPE = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
RMS = dict(ffn_hidden_size=80, layernorm_epsilon=1e-6)
GEMMA = RMS | dict(
    activation="geglu_tanh",
    layernorm_zero_centered_gamma=True,
    scale_embedding=True,
    untie_embeddings_and_output_weights=False,
)

# name -> (family, transformers' config as its users write it, the keys of our model that mean the same)
CASES: dict[str, tuple[str, dict, dict]] = {
    "llama 2": ("llama", dict(num_key_value_heads=4), RMS),
    "llama 3.2": (
        "llama",
        dict(
            num_key_value_heads=2,
            tie_word_embeddings=True,
            rope_parameters=dict(rope_type="llama3", rope_theta=100.0, **LLAMA3_ROPE),
        ),
        RMS
        | dict(
            num_query_groups=2,
            untie_embeddings_and_output_weights=False,
            rotary_base=100.0,
            rotary_scaling=dict(type="llama3", **LLAMA3_ROPE),
        ),
    ),
    "mistral": (
        "mistral",
        dict(num_key_value_heads=2, sliding_window=11, rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
        RMS | dict(num_query_groups=2, sliding_window=11),
    ),
    "qwen2": (
        "qwen2",
        dict(num_key_value_heads=2, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
        RMS | dict(num_query_groups=2, add_qkv_bias=True, rotary_base=1e6),
    ),
    "qwen3": (
        "qwen3",
        dict(num_key_value_heads=2, head_dim=16, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
        RMS | dict(num_query_groups=2, kv_channels=16, qk_layernorm=True, rotary_base=1e6),
    ),
    "mixtral": (
        "mixtral",
        dict(num_key_value_heads=2, num_local_experts=6, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
        dict(ffn_hidden_size=80, num_query_groups=2, num_experts=6, rotary_base=1e6),
    ),
    "qwen 1.5 moe": (
        "qwen2_moe",
        dict(num_key_value_heads=4, num_experts=8, moe_intermediate_size=24, shared_expert_intermediate_size=56)
        | dict(rope_parameters=dict(rope_type="default", rope_theta=1e6)),
        RMS
        | dict(num_experts=8, moe_ffn_hidden_size=24, moe_shared_expert_intermediate_size=56, rotary_base=1e6)
        | dict(moe_router_topk=4, moe_shared_expert_gate=True, moe_router_pre_softmax=True, add_qkv_bias=True),
    ),
    "qwen3 moe": (
        "qwen3_moe",
        dict(num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=3, norm_topk_prob=True)
        | dict(
            mlp_only_layers=[1], moe_intermediate_size=24, rope_parameters=dict(rope_type="default", rope_theta=1e6)
        ),
        RMS
        | dict(num_query_groups=2, kv_channels=16, num_experts=8, moe_router_topk=3, moe_ffn_hidden_size=24)
        | dict(moe_layer_freq=[1, 0, 1], qk_layernorm=True, rotary_base=1e6),
    ),
    "gemma": (
        "gemma",
        dict(num_key_value_heads=1, head_dim=16),
        GEMMA | dict(num_query_groups=1, kv_channels=16),
    ),
    "gemma 2": (
        "gemma2",
        dict(num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=20, sliding_window=11)
        | dict(attn_logit_softcapping=5.0, final_logit_softcapping=20.0),
        GEMMA
        | dict(num_query_groups=2, kv_channels=16, query_pre_attn_scalar=20, sliding_window=11)
        | dict(attn_logit_softcapping=5.0, final_logit_softcapping=20.0, window_attn_skip_freq=2, post_layernorms=True),
    ),
    "gemma 3": (
        "gemma3_text",
        dict(num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=20, sliding_window=11, sliding_window_pattern=3)
        | dict(rope_theta=1000.0, rope_local_base_freq=100.0, rope_scaling=dict(rope_type="linear", factor=8.0)),
        GEMMA
        | dict(num_query_groups=2, kv_channels=16, query_pre_attn_scalar=20, sliding_window=11, rotary_base=1000.0)
        | dict(rotary_base_local=100.0, rotary_scaling=dict(type="linear", factor=8.0), qk_layernorm=True)
        | dict(window_attn_skip_freq=3, post_layernorms=True),
    ),
    "gpt2": (
        "gpt2",
        dict(n_positions=POSITIONS, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
        dict(
            ffn_hidden_size=192,
            position_embedding_type="learned_absolute",
            normalization="LayerNorm",
            activation="gelu_tanh",
            add_bias_linear=True,
            untie_embeddings_and_output_weights=False,
        ),
    ),
    "pythia": (
        "gpt_neox",
        dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5)),
        dict(
            ffn_hidden_size=80,
            normalization="LayerNorm",
            activation="gelu",
            add_bias_linear=True,
            parallel_residual=True,
            rotary_percent=0.5,
        ),
    ),
}


def saved_tensors(hf_model) -> dict[str, torch.Tensor]:
    """All tensors under the names that they have in files, which for experts are not those of the modules."""
    with tempfile.TemporaryDirectory() as folder:
        hf_model.save_pretrained(folder)
        return load_file(f"{folder}/model.safetensors")


def difference_of_logits(name: str) -> tuple[float, float]:
    """Largest difference between transformers' logits and ours, and largest logit, for the same weights."""
    from megagpt.engine.engine import named_parameters
    from megagpt.model import GPT
    from megagpt.parallel.ranks import start_single_process

    family_name, hf_keys, keys = CASES[name]
    torch.manual_seed(3)
    hf_config = transformers.AutoConfig.for_model(family_name, **(HF_SIZES | hf_keys), attn_implementation="eager")
    hf_model = transformers.AutoModelForCausalLM.from_config(hf_config).eval()
    with torch.no_grad():
        for parameter in hf_model.parameters():  # also norms and biases, which start as constants
            parameter.add_(0.2 * torch.randn_like(parameter))
    start_single_process()
    run = run_config_from_dict({"model": SIZES | keys, "training": {"steps": 1}})
    plan = make_plan(run, deepspeed_config_from_dict({"train_batch_size": 2}), 1)
    family = family_for(run.model)
    assert family.name == family_name
    theirs = saved_tensors(hf_model)
    family.check_hf(theirs, theirs.__getitem__, run.model, name)
    gpt = GPT(plan).eval()
    assert {n for n, _ in named_parameters(gpt, plan)} == set(canonical_shapes(run.model))
    tokens_BS = torch.randint(0, 149, (2, POSITIONS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for canonical, parameter in named_parameters(gpt, plan):
            whole = family.from_hf(canonical, theirs.__getitem__, run.model)
            parameter.zero_()[: whole.shape[0]].copy_(whole)
        logits_BSV = gpt(tokens_BS).transpose(0, 1)[..., :149]
        expected_BSV = hf_model(tokens_BS).logits
    return float((logits_BSV - expected_BSV).abs().max()), float(expected_BSV.abs().max())


def all_differences() -> dict[str, tuple[float, float]]:
    return {name: difference_of_logits(name) for name in CASES}


def test_models_of_transformers_compute_the_same_here():
    [differences] = run_ranks(all_differences, 1)
    for name, (difference, largest) in differences.items():
        assert largest > 1, f"{name}: too small to tell anything"
        assert difference <= 1e-5 * max(1, largest / 4), f"{name}: {difference}, largest logit {largest}"


def test_every_family_is_compared():
    assert {family for family, *_ in CASES.values()} == {family.name for family in FAMILIES}
