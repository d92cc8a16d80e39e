"""Models as transformers initialises and saves them, read into ours on several layouts: the same logits, family by
family, and the same bytes when they go back."""

from pathlib import Path

import pytest
import torch
import transformers
from ranks import run_ranks
from safetensors.torch import load_file

from megagpt.convert.hf_weights import HfWeights
from megagpt.convert.tables import FAMILIES
from megagpt.convert.writer import write_hf_folder
from megagpt.plan import deepspeed_config_from_dict, make_plan, run_config_from_dict

pytestmark = pytest.mark.usefixtures("libraries")

POSITIONS = 48
SIZES = dict(num_layers=3, hidden_size=48, num_attention_heads=6, vocab_size=149, max_position_embeddings=POSITIONS)
HF_SIZES = dict(
    num_hidden_layers=3,
    hidden_size=48,
    num_attention_heads=6,
    vocab_size=149,
    max_position_embeddings=POSITIONS,
    intermediate_size=80,
    initializer_range=0.1,
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
    "llama 2": ("llama", dict(num_key_value_heads=6), RMS),
    "llama 3.2": (
        "llama",
        dict(
            num_key_value_heads=2,
            vocab_size=50257,
            tie_word_embeddings=True,
            rope_parameters=dict(rope_type="llama3", rope_theta=100.0, **LLAMA3_ROPE),
        ),
        RMS
        | dict(
            num_query_groups=2,
            vocab_size=50257,
            untie_embeddings_and_output_weights=False,
            rotary_base=100.0,
            rotary_scaling=dict(type="llama3", **LLAMA3_ROPE),
        ),
    ),
    "five heads of ten channels": (
        "llama",
        dict(num_key_value_heads=1, hidden_size=50, num_attention_heads=5, vocab_size=131, attention_bias=True)
        | dict(mlp_bias=True),
        RMS
        | dict(num_query_groups=1, hidden_size=50, num_attention_heads=5, vocab_size=131, add_bias_linear=True)
        | dict(kv_channels=10),
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
        dict(num_key_value_heads=6, num_experts=8, moe_intermediate_size=24, shared_expert_intermediate_size=56)
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


ONE_PROCESS_ONLY = {"five heads of ten channels"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def folders(libraries, tmp_path_factory) -> dict[str, Path]:
    """Random models, saved in turn as fp32, bf16 and fp16, in one file and in many."""
    made = {}
    for number, (name, (family, hf_keys, _)) in enumerate(CASES.items()):
        torch.manual_seed(3)
        hf_config = transformers.AutoConfig.for_model(family, **(HF_SIZES | hf_keys))
        hf_model = transformers.AutoModelForCausalLM.from_config(hf_config)
        with torch.no_grad():
            for parameter in hf_model.parameters():  # also norms and biases, which start as constants
                parameter.add_(0.1 * torch.randn_like(parameter))
        made[name] = tmp_path_factory.mktemp("hf")
        hf_model.to(DTYPES[number % 3]).save_pretrained(made[name], max_shard_size="30KB" if number % 2 else "1GB")
    return made


def tokens_of(vocab_size: int) -> torch.Tensor:
    return torch.randint(0, vocab_size, (1, POSITIONS), generator=torch.Generator().manual_seed(1)).repeat(2, 1)


def their_logits(folder: Path) -> torch.Tensor:
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return hf_model.eval()(tokens_of(hf_model.config.vocab_size)[:1]).logits


def our_logits(folders: dict[str, Path], layout: dict) -> dict[str, torch.Tensor | None]:
    """What this rank's engine computes from each folder."""
    from megagpt.engine import build_engine
    from megagpt.parallel.console import Console
    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.ranks import start_ranks
    from megagpt.pretrained import load_pretrained

    ranks, logits = None, {}
    launch = detect_launch()
    for name, folder in folders.items():
        run = run_config_from_dict({"model": {"init_from": str(folder)}, "parallel": layout, "training": {"steps": 1}})
        keys = CASES[name][2]
        expected = run_config_from_dict({"model": SIZES | keys, "training": {"steps": 1}}).model
        differing = {key for key, value in expected if value != getattr(run.model, key)}
        assert differing <= {"init_from", "init_method_std", "hidden_dropout", "attention_dropout", *MOE_LOSSES}, name
        config = {"train_batch_size": 2, "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}
        plan = make_plan(run, deepspeed_config_from_dict(config), launch.world_size)
        ranks = ranks or start_ranks(plan, launch)
        engine = build_engine(plan, ranks)
        load_pretrained(plan, engine, ranks, Console(ranks.rank, False))
        logits[name] = engine.logits(tokens_of(run.model.vocab_size), rows=1, positions=POSITIONS)
    return logits


MOE_LOSSES = ("moe_aux_loss_coeff",)
TP2_PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}


@pytest.mark.parametrize(("layout", "world_size"), [({}, 1), (TP2_PP2, 4)], ids=["one process", "TP2 PP2"])
def test_models_of_transformers_compute_the_same_here(folders, layout, world_size):
    chosen = {name: folder for name, folder in folders.items() if not layout or name not in ONE_PROCESS_ONLY}
    logits = run_ranks(our_logits, world_size, chosen, layout)[-1]
    for name, folder in chosen.items():
        expected_BSV = their_logits(folder)
        largest = float(expected_BSV.abs().max())
        difference = float((logits[name] - expected_BSV).abs().max())
        assert largest > 0.5, f"{name}: too small to tell anything"
        assert difference <= 1e-5, f"{name}: {difference}, largest logit {largest}"


def test_tensors_go_back_bit_for_bit(folders, tmp_path):
    for number, (name, folder) in enumerate(folders.items()):
        weights = HfWeights(folder)
        dtype = DTYPES[number % 3]
        assert weights.dtypes == {dtype}
        write_hf_folder(tmp_path / name, weights.model, weights.read, weights.names, None, str(dtype)[6:])
        there, back = tensors_in(folder), tensors_in(tmp_path / name)
        assert set(there) == set(back), name
        assert all(back[tensor].dtype == dtype and torch.equal(back[tensor], there[tensor]) for tensor in there), name


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def test_every_family_is_compared():
    assert {family for family, *_ in CASES.values()} == {family.name for family in FAMILIES}
