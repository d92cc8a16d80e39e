"""FLOPs and memory against the formulas and measurements they come from."""

import pytest

from megagpt.plan import deepspeed_config_from_dict, make_plan, run_config_from_dict
from megagpt.plan.config import TrainingConfig
from megagpt.plan.estimates import (
    hardware_flops_per_step,
    layer_activation_bytes,
    model_flops_per_step,
    model_state_bytes,
    stage_activation_bytes,
)

L, H, A, V, S, B = 24, 2304, 24, 51200, 2048, 512


def megatron_model(**keys):
    tree = {"model": {"preset": "megatron-1.7b", **keys}, "training": {"steps": 1}}
    return run_config_from_dict(tree).model


def recompute(granularity, **keys):
    return TrainingConfig(steps=1, seq_length=S, recompute_granularity=granularity, **keys)


def test_model_flops_are_those_of_arxiv_2205_05198():
    published = 72 * B * L * S * H**2 * (1 + S / (6 * H) + V / (12 * H * L))
    assert model_flops_per_step(megatron_model(), S, B) == pytest.approx(published, rel=1e-12)


def test_hardware_flops_are_those_of_arxiv_2104_04473():
    published = 96 * B * S * L * H**2 * (1 + S / (6 * H) + V / (16 * L * H))
    model = megatron_model()
    assert hardware_flops_per_step(model, S, B, recompute("full"), L) == pytest.approx(published, rel=1e-12)
    kept = model_flops_per_step(model, S, B)
    assert hardware_flops_per_step(model, S, B, recompute("none"), 0) == kept
    half = hardware_flops_per_step(model, S, B, recompute("full", recompute_method="block"), L // 2)
    assert half == pytest.approx((kept + published) / 2, rel=1e-12)


def test_selective_recomputation_runs_the_attention_core_once_more():
    model = megatron_model()
    attention = 4 * B * S * S * H * L
    kept = model_flops_per_step(model, S, B)
    assert hardware_flops_per_step(model, S, B, recompute("selective"), 0) == kept + attention


def test_grouped_queries_and_gates_change_flops_as_their_matrices_do():
    base = model_flops_per_step(megatron_model(), S, B)
    grouped = model_flops_per_step(megatron_model(num_query_groups=6), S, B)
    assert base - grouped == 6 * B * S * L * H * 2 * (H - H // 4)
    gated = model_flops_per_step(megatron_model(activation="swiglu"), S, B)
    assert gated - base == 6 * B * S * L * H * 4 * H


@pytest.mark.parametrize("window", [1, 500, 2047, 2048, 4096])
def test_a_window_counts_its_band_of_the_matrix(window):
    full, windowed = (model_flops_per_step(megatron_model(**keys), S, B) for keys in ({}, {"sliding_window": window}))
    hidden = sum(max(position + 1 - window, 0) for position in range(S))  # seen without a window, but not with it
    assert full - windowed == 12 * B * L * H * (2 * hidden - max(S - window, 0))


@pytest.mark.parametrize(
    ("billions", "ranks", "stage", "gigabytes"),
    [(7.5, 64, 1, 31.4), (7.5, 64, 2, 16.6), (7.5, 64, 3, 1.88), (1000, 1024, 3, 15.6), (128, 64, 2, 284)],
)
def test_model_states_are_those_of_arxiv_1910_02054(billions, ranks, stage, gigabytes):
    states = model_state_bytes(int(billions * 1e9), "bf16", "bf16", stage, ranks, "adamw")
    assert sum(states) / 1e9 == pytest.approx(gigabytes, rel=0.005)


def test_fp32_gradients_and_sgd():
    assert model_state_bytes(100, "bf16", "fp32", 1, 4, "adamw") == (200, 400, 300, 0, 0)
    assert model_state_bytes(100, "fp32", "fp32", 1, 4, "sgd") == (400, 400, 0, 0, 0)
    assert model_state_bytes(100, "fp32", "fp32", 1, 4, "sgd", offloads_optimizer=True)[2:] == (0, 300, 0)


def test_what_is_offloaded_leaves_the_device():
    # stages 1 and 2: 12 bytes of states, fp32 gradients and a copy of the weights per parameter of this rank's part
    offloaded = model_state_bytes(100, "bf16", "fp32", 2, 4, "adamw", offloads_optimizer=True)
    assert offloaded == (200, 100, 0, 25 * (12 + 4 + 2), 0)
    offloaded = model_state_bytes(100, "bf16", "fp32", 3, 4, "adamw", offloads_optimizer=True)
    assert offloaded == (50, 0, 0, 25 * (12 + 4 + 4), 0)
    everything = model_state_bytes(100, "fp16", "fp16", 3, 4, "sgd", offloads_optimizer=True, offloads_parameters=True)
    assert everything == (0, 0, 0, 25 * (4 + 4 + 2 + 2), 0)


def test_what_is_on_a_disk_leaves_buffers_in_host_memory():
    # master weights, moments and the gradients of the update on the disk; accumulated gradients and buffers in memory
    args = (100, "bf16", "fp32", 3, 4, "adamw")
    small = model_state_bytes(*args, offloads_optimizer=True, swap_buffers=(4, 10))
    assert small == (50, 0, 0, 25 * 4 + 4 * 4 * 10, 25 * (12 + 4))
    large = model_state_bytes(*args, offloads_optimizer=True, swap_buffers=(4, 1000))
    assert large.host == 25 * 4 + 4 * 4 * 25, "no buffer is larger than what there is"


def test_a_second_copy_of_the_weights_is_cut_over_fewer_ranks():
    plain = model_state_bytes(100, "bf16", "bf16", 3, 20, "adamw")
    twice = model_state_bytes(100, "bf16", "bf16", 3, 20, "adamw", secondary_partition_size=5)
    assert twice == (plain.weights + 2 * 20, *plain[1:])
    offloaded = model_state_bytes(
        100, "bf16", "bf16", 3, 20, "adamw", offloads_parameters=True, secondary_partition_size=5
    )
    assert (offloaded.weights, offloaded.host) == (0, twice.weights)


@pytest.mark.parametrize("tensor", [1, 2, 8])
def test_activations_are_those_of_arxiv_2205_05198(tensor):
    model = megatron_model(hidden_dropout=0.1)
    sbh = S * 4 * H
    without_sp = layer_activation_bytes(model, S, 4, tensor, False, "bf16")
    assert without_sp == pytest.approx(sbh * (10 + 24 / tensor), rel=1e-12)
    assert layer_activation_bytes(model, S, 4, tensor, True, "bf16") == pytest.approx(34 * sbh / tensor, rel=1e-12)


def test_recomputation_keeps_the_inputs_of_layers_and_one_whole_layer():
    model = megatron_model(hidden_dropout=0.1)
    sizes = {
        "num_stage_layers": 6,
        "microbatches_in_flight": 3,
        "has_head": False,
        "padded_vocab_size": V,
        "seq_length": S,
        "microbatch_size": 4,
        "tensor_parallel_size": 2,
        "sequence_parallel": False,
        "precision": "bf16",
    }
    sbh = S * 4 * H
    assert stage_activation_bytes(model, training=recompute("full"), **sizes) == 6 * 3 * 2 * sbh + 22 * sbh
    assert stage_activation_bytes(model, training=recompute("none"), **sizes) == 6 * 3 * 22 * sbh
    with_head = stage_activation_bytes(model, training=recompute("none"), **{**sizes, "has_head": True})
    # 8192 tokens in 4 chunks of at most H = 2304, and the fp32 gradient of the head's weight
    assert with_head == 6 * 3 * 22 * sbh + 4 * (V // 2) * (2048 + H)
    split = stage_activation_bytes(model, training=recompute("full"), **{**sizes, "sequence_parallel": True})
    assert split == 6 * 3 * sbh + 17 * sbh

    def kept(**keys):
        return stage_activation_bytes(model, training=recompute("full", **keys), **sizes)

    assert kept(recompute_num_layers=4) == 2 * 3 * 2 * sbh + 4 * 22 * sbh
    assert kept(recompute_num_layers=9) == 3 * 2 * sbh + 6 * 22 * sbh
    assert kept(recompute_method="block", recompute_num_layers=2) == 3 * (2 * 2 + 4 * 22) * sbh + 22 * sbh
    assert kept(distribute_saved_activations=True) == 6 * 3 * sbh + 22 * sbh
    assert kept(offload_saved_activations=True) == 22 * sbh


# BigScience's layout search (Megatron + DeepSpeed, ZeRO 1, 384 A100-80G, full recomputation): DP/TP/PP, micro-batch, GB
# per GPU. Source: bigscience-workshop/bigscience, train/tr11-176B-ml/chronicles-prequel.md.
BIGSCIENCE = [
    ("4/8/12", 1, 29),
    ("4/8/12", 2, 37),
    ("4/8/12", 4, 49),
    ("4/8/12", 8, 69),
    ("8/8/6", 1, 38),
    ("8/8/6", 6, 66),
    ("6/8/8", 4, 52),
    ("12/8/4", 2, 53),
    ("12/8/4", 4, 59),
    ("24/8/2", 1, 65),
    ("24/8/2", 2, 76),
    ("8/4/12", 2, 44),
    ("16/4/6", 4, 75),
    ("16/2/12", 2, 63),
    ("8/2/24", 1, 44),
    ("8/2/24", 2, 53),
]


def bigscience_estimate(layout, microbatch_size):
    """Estimated GiB per rank of the 181-billion-parameter model."""
    data, tensor, pipeline = map(int, layout.split("/"))
    run = run_config_from_dict(
        {
            "model": {
                "num_layers": 72,
                "hidden_size": 14336,
                "num_attention_heads": 64,
                "vocab_size": 250880,
                "max_position_embeddings": 2048,
                "position_embedding_type": "learned_absolute",
                "normalization": "LayerNorm",
                "activation": "gelu",
                "add_bias_linear": True,
                "untie_embeddings_and_output_weights": False,
                "hidden_dropout": 0.1,
            },
            "parallel": {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline},
            "training": {"steps": 1, "recompute_granularity": "full"},
        }
    )
    deepspeed = deepspeed_config_from_dict(
        {
            "train_micro_batch_size_per_gpu": microbatch_size,
            "gradient_accumulation_steps": 2048 // (data * microbatch_size),
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "bf16"},
            "zero_optimization": {"stage": 1},
        }
    )
    return make_plan(run, deepspeed, data * tensor * pipeline).memory.total / 2**30


@pytest.mark.parametrize(("layout", "microbatch_size", "measured"), BIGSCIENCE)
def test_estimates_are_a_steady_share_of_what_bigscience_measured(layout, microbatch_size, measured):
    assert 0.63 < bigscience_estimate(layout, microbatch_size) / measured < 0.82


@pytest.mark.parametrize(("layout", "microbatch_size"), [("48/8/1", 1), ("32/2/6", 1), ("32/2/6", 2)])
def test_layouts_that_ran_out_of_memory_are_estimated_to(layout, microbatch_size):
    assert bigscience_estimate(layout, microbatch_size) / 0.82 > 80


def test_windows_keep_repeated_keys_only_where_gpus_have_no_kernel_for_them():
    def kept(precision="bf16", **keys):
        model = megatron_model(num_query_groups=6, sliding_window=512, **keys)
        return layer_activation_bytes(model, S, 1, 1, False, precision)

    whole = layer_activation_bytes(megatron_model(num_query_groups=6), S, 1, 1, False, "bf16")
    assert kept() == whole
    repeated = 2 * H * S
    assert kept("fp32") == 2 * whole + 4 * repeated
    assert kept(attention_dropout=0.1) == whole + 2 * repeated
