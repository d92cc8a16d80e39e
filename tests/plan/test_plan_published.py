"""Plans of published runs, up to 6,144 ranks and 1T parameters, against what their papers say of them."""

import pytest

from megagpt.plan import deepspeed_config_from_dict, make_plan, run_config_from_dict
from megagpt.plan.layout import pipeline_layer_parameters, stage_parameters_per_rank

GPT = {
    "position_embedding_type": "learned_absolute",
    "normalization": "LayerNorm",
    "activation": "gelu",
    "add_bias_linear": True,
    "untie_embeddings_and_output_weights": False,
    "max_position_embeddings": 2048,
    "vocab_size": 51200,
}
README = {"vocab_size": 131072, "max_position_embeddings": 4096, "untie_embeddings_and_output_weights": True}

# "Efficient Large-Scale Language Model Training on GPU Clusters" (arXiv 2104.04473), table 1: billions of parameters,
# heads, hidden size, layers, TP, PP, GPUs, global batch.
SC21 = [
    (1.7, 24, 2304, 24, 1, 1, 32, 512),
    (3.6, 32, 3072, 30, 2, 1, 64, 512),
    (7.5, 32, 4096, 36, 4, 1, 128, 512),
    (18.4, 48, 6144, 40, 8, 1, 256, 1024),
    (39.1, 64, 8192, 48, 8, 2, 512, 1536),
    (76.1, 80, 10240, 60, 8, 4, 1024, 1792),
    (145.6, 96, 12288, 80, 8, 8, 1536, 2304),
    (310.1, 128, 16384, 96, 8, 16, 1920, 2160),
    (529.6, 128, 20480, 105, 8, 35, 2520, 2520),
    (1008.0, 160, 25600, 128, 8, 64, 3072, 3072),
]
# README of NVIDIA/Megatron-LM, table of H100 runs; the same columns.
MEGATRON_README = [
    (1.7, 16, 2048, 24, 1, 1, 48, 192),
    (7.1, 32, 4096, 30, 2, 1, 96, 192),
    (16, 48, 6144, 32, 4, 1, 192, 192),
    (32, 56, 7168, 48, 8, 1, 384, 192),
    (70, 64, 8192, 84, 8, 2, 768, 384),
    (119, 80, 10240, 92, 8, 4, 1536, 768),
    (177, 96, 12288, 96, 8, 6, 2304, 1152),
    (314, 128, 16384, 96, 8, 8, 3072, 1536),
    (462, 144, 18432, 112, 8, 16, 6144, 3072),
]
# "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198), tables 3 and 5: heads, hidden,
# layers, TP, PP, GPUs, global batch, micro-batch; seconds per iteration with selective recomputation, MFU in %.
KORTHIKANTI = [
    (64, 6144, 48, 8, 1, 8, 4, 4, 1.10, 41.5),
    (96, 12288, 96, 8, 8, 64, 64, 1, 13.75, 51.4),
    (128, 20480, 105, 8, 35, 280, 280, 1, 37.83, 56.0),
    (160, 25600, 128, 8, 64, 512, 512, 1, 71.49, 56.3),
]
A100_FLOPS = 312e12


def plan_of(heads, hidden, layers, tp, pp, ranks, batch, micro=1, recompute="full", **model):
    tree = {
        "model": {**GPT, "num_attention_heads": heads, "hidden_size": hidden, "num_layers": layers, **model},
        "parallel": {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp},
        "training": {"steps": 1, "recompute_granularity": recompute},
    }
    raw = {"train_batch_size": batch, "train_micro_batch_size_per_gpu": micro, "bf16": {"enabled": True}}
    return make_plan(run_config_from_dict(tree), deepspeed_config_from_dict(raw), ranks)


def assert_shards_add_up(plan):
    """Over stages and tensor-parallel ranks each parameter is there once, replicas and copies apart."""
    model, tp, pp = plan.model, plan.tensor_parallel_size, plan.pipeline_parallel_size
    stages = [
        stage_parameters_per_rank(model, plan.stage_bounds, stage, tp, plan.padded_vocab_size) for stage in range(pp)
    ]
    hidden, layers = model.hidden_size, model.num_layers
    # norms, biases behind a matrix that is split along its inputs, and learned positions are whole on every rank
    positions = model.max_position_embeddings if model.position_embedding_type == "learned_absolute" else 0
    norms_and_biases = (4 if model.normalization == "LayerNorm" else 2) + (2 if model.add_bias_linear else 0)
    final_norm = 2 if model.normalization == "LayerNorm" else 1
    replicated = (layers * norms_and_biases + final_norm + positions) * hidden
    copied = 0 if model.untie_embeddings_and_output_weights or pp == 1 else plan.padded_vocab_size * hidden
    padding = (plan.padded_vocab_size - model.vocab_size) * hidden
    padding *= 2 if model.untie_embeddings_and_output_weights else 1
    assert tp * sum(stages) - (tp - 1) * replicated - copied - padding == plan.num_parameters
    assert sum(pipeline_layer_parameters(model, pp, tp, plan.padded_vocab_size)) == sum(stages)


@pytest.mark.parametrize("row", SC21, ids=lambda row: f"{row[0]}B")
def test_megatron_at_sc21(row):
    billions, heads, hidden, layers, tp, pp, ranks, batch = row
    plan = plan_of(heads, hidden, layers, tp, pp, ranks, batch)
    assert plan.num_parameters / 1e9 == pytest.approx(billions, abs=0.05)
    assert_shards_add_up(plan)
    # eq. 3
    flops = 96 * batch * 2048 * layers * hidden**2 * (1 + 2048 / (6 * hidden) + 51200 / (16 * layers * hidden))
    assert plan.hardware_flops_per_step == pytest.approx(flops, rel=1e-12)
    assert plan.world_size == tp * pp * plan.data_parallel_size


@pytest.mark.parametrize("row", MEGATRON_README, ids=lambda row: f"{row[0]}B")
def test_megatron_on_h100(row):
    billions, heads, hidden, layers, tp, pp, ranks, batch = row
    plan = plan_of(heads, hidden, layers, tp, pp, ranks, batch, **README)
    assert plan.data_parallel_size == 48
    assert plan.num_parameters / 1e9 == pytest.approx(billions, rel=0.04)  # printed to two or three digits
    assert_shards_add_up(plan)


@pytest.mark.parametrize("row", KORTHIKANTI, ids=lambda row: f"{row[5]}-gpus")
def test_seconds_per_iteration_give_the_published_utilisation(row):
    heads, hidden, layers, tp, pp, ranks, batch, micro, seconds, utilisation = row
    plan = plan_of(heads, hidden, layers, tp, pp, ranks, batch, micro, recompute="selective")
    assert plan.flops_per_step / seconds / ranks / A100_FLOPS * 100 == pytest.approx(utilisation, rel=0.01)
    assert_shards_add_up(plan)


def test_bloom_176b():
    """bigscience-workshop/bigscience, train/tr11-176B-ml/README.md: 104.7 s per iteration, 149.77 TFLOP/s per GPU."""
    plan = plan_of(112, 14336, 70, 4, 12, 384, 2048, 2, vocab_size=250880)
    assert plan.data_parallel_size == 8
    assert plan.num_parameters / 1e9 == pytest.approx(176, abs=1)
    assert plan.hardware_flops_per_step / 104.7 / 384 / 1e12 == pytest.approx(149.77, rel=0.02)
    assert_shards_add_up(plan)


def test_gpt_neox_20b():
    """arXiv 2204.06745, section 2.3 and table 1: 96 A100 of 40 GB, TP 2, PP 4, ZeRO 1, 3.15 M tokens per step."""
    tree = {
        "model": {"preset": "gpt-neox-20b"},
        "parallel": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 4},
        "training": {"steps": 1, "recompute_granularity": "full"},
    }
    raw = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 32,
        "fp16": {"enabled": True},
        "zero_optimization": {"stage": 1},
    }
    plan = make_plan(run_config_from_dict(tree), deepspeed_config_from_dict(raw), 96)
    assert (plan.data_parallel_size, plan.num_microbatches) == (12, 32)
    assert plan.tokens_per_step / 1e6 == pytest.approx(3.15, abs=0.005)
    assert plan.pipeline_bubble == pytest.approx(3 / 35)
    assert max(estimate.total for estimate in plan.memory_per_stage) < 40e9
    assert_shards_add_up(plan)
    # 8 FLOPs per parameter and token where layers are recomputed; attention comes on top, the embedding costs nothing
    assert plan.hardware_flops_per_step == pytest.approx(8 * plan.num_parameters * plan.tokens_per_step, rel=0.05)


LLAMA3_405B = {
    "num_layers": 126,
    "hidden_size": 16384,
    "num_attention_heads": 128,
    "num_query_groups": 8,
    "ffn_hidden_size": 53248,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rotary_base": 500000.0,
}


@pytest.mark.parametrize(("ranks", "data", "utilisation", "teraflops"), [(8192, 64, 43, 430), (16384, 128, 41, 400)])
def test_llama3_405b(ranks, data, utilisation, teraflops):
    """Llama Team 2024, "The Llama 3 Herd of Models" (arXiv 2407.21783), tables 3 and 4 and section 3.3.2."""
    tree = {
        "model": LLAMA3_405B,
        "parallel": {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 16, "sequence_parallel": True},
        "training": {"steps": 1},
    }
    raw = {"train_batch_size": 2048, "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}}
    plan = make_plan(run_config_from_dict(tree), deepspeed_config_from_dict(raw), ranks)
    assert plan.num_parameters == 405_853_388_800
    assert (plan.data_parallel_size, plan.num_microbatches) == (data, 2048 // data)
    assert plan.tokens_per_step == 2**24  # "16M tokens per batch"
    # "we reduced one Transformer layer each from the first and the last stages, respectively"
    layers = [len(plan.transformer_layers_of_stage(stage)) for stage in range(16)]
    assert layers == [7, *[8] * 14, 7]
    # eq. 1 of arXiv 2104.04473 without interleaving
    assert plan.pipeline_bubble == pytest.approx(15 / (2048 / data + 15))
    assert_shards_add_up(plan)
    assert teraflops / 989 * 100 == pytest.approx(utilisation, abs=0.6)
    # the FLOPs of a step by the usual estimate, 6 per parameter and token, and the attention's on top
    assert 1 < plan.flops_per_step / (6 * plan.num_parameters * plan.tokens_per_step) < 1.1


@pytest.mark.parametrize("row", [row for row in SC21 if row[5] > 1], ids=lambda row: f"{row[0]}B")
def test_idle_time_of_the_pipelines_at_sc21(row):
    """Section 2.2.1: (p - 1) / m of the ideal time with p stages and m micro-batches of 1 sample."""
    _, heads, hidden, layers, tp, pp, ranks, batch = row
    plan = plan_of(heads, hidden, layers, tp, pp, ranks, batch)
    of_ideal = (pp - 1) / (batch * tp * pp / ranks)
    assert plan.pipeline_bubble == pytest.approx(of_ideal / (1 + of_ideal))
    assert plan.pipeline_bubble < 0.7
