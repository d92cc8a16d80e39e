"""Each rule that spans sections or files, alone and all together."""

import pytest

from megagpt.errors import ConfigError
from megagpt.plan import deepspeed_config_from_dict, make_plan, run_config_from_dict

MODEL = {
    "num_layers": 4,
    "hidden_size": 96,
    "num_attention_heads": 12,
    "num_query_groups": 6,
    "ffn_hidden_size": 384,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}
DISTRIBUTED = {"recompute_granularity": "full", "distribute_saved_activations": True}
LEARNED = {"position_embedding_type": "learned_absolute"}
LINEAR = {"type": "linear", "factor": 2.0}
BF16 = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 8, "bf16": {"enabled": True}}


def plan_of(sections=None, deepspeed=None, world_size=1):
    """Plan of a small valid run with some keys replaced, section by section."""
    tree = {"model": dict(MODEL), "training": {"steps": 10}}
    for section, keys in (sections or {}).items():
        tree[section] = {**tree.get(section, {}), **keys}
    raw = {**BF16, **(deepspeed or {})}
    return make_plan(run_config_from_dict(tree), deepspeed_config_from_dict(raw, source="ds.json"), world_size)


def problems_of(*args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        plan_of(*args, **kwargs)
    return caught.value.problems


def parallel(tensor=1, pipeline=1, sequence=False):
    return {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "sequence_parallel": sequence,
    }


def zero(stage: int, **keys) -> dict:
    return {"zero_optimization": {"stage": stage, **keys}}


NVME = {"device": "nvme", "nvme_path": "/local_disk"}


@pytest.mark.parametrize(
    ("sections", "deepspeed", "world_size", "words"),
    [
        (
            {"parallel": parallel(2, 2)},
            {},
            6,
            "world size 6 is not a multiple of parallel.tensor_model_parallel_size x pipeline_model_parallel_size "
            "= 2 x 2 = 4; start 4 or 8 ranks",
        ),
        ({"parallel": parallel(2, 2)}, {}, 2, "start 4 ranks"),
        ({}, {}, 0, "world size 0"),
        ({"model": {"num_query_groups": 5}}, {}, 1, "use num_query_groups 1, 2, 3, 4, 6 or 12"),
        (
            {"parallel": {"context_parallel_size": 8}, "training": {"seq_length": 64}},
            {},
            8,
            "parallel.context_parallel_size=8 does not divide model.num_attention_heads / "
            "parallel.tensor_model_parallel_size = 12 / 1 = 12; use context_parallel_size 6, or fewer",
        ),
        (
            {"parallel": {"context_parallel_size": 3}},
            {},
            3,
            "training.seq_length=64 is not divisible by parallel.context_parallel_size = 3; use 63 or 66",
        ),
        (
            {"parallel": {**parallel(2, sequence=True), "context_parallel_size": 3}, "training": {"seq_length": 63}},
            {},
            6,
            "parallel.context_parallel_size x parallel.tensor_model_parallel_size (parallel.sequence_parallel=true) "
            "= 3 x 2 = 6; use 60 or 66",
        ),
        (
            {"parallel": {**parallel(2, 2), "context_parallel_size": 2}},
            {},
            4,
            "pipeline_model_parallel_size x context_parallel_size = 2 x 2 x 2 = 8; start 8 ranks",
        ),
        (
            {"training": {"recompute_num_layers": 2}},
            {},
            1,
            "training.recompute_num_layers=2 refines full recomputation, but training.recompute_granularity=none",
        ),
        (
            {"training": {"recompute_granularity": "selective", "offload_saved_activations": True}},
            {},
            1,
            "training.offload_saved_activations=true refines full recomputation, but training.recompute_granularity="
            "selective; set that to full, or remove offload_saved_activations",
        ),
        (
            {"training": {"flash_attention": "FA3"}, "model": {"attention_dropout": 0.1}},
            {},
            1,
            "but model.attention_dropout=0.1; set it to auto",
        ),
        (
            {"training": {"flash_attention": "FA4", "deterministic": True}},
            {},
            1,
            "in any order, but training.deterministic=true; set it to auto",
        ),
        ({"training": DISTRIBUTED}, {}, 1, "hold copies of, but there is one; set it to false"),
        (
            {"training": DISTRIBUTED, "parallel": parallel(2, sequence=True)},
            {},
            2,
            "splits them already; set it to false",
        ),
        (
            {"training": DISTRIBUTED, "parallel": parallel(2), "model": {"hidden_size": 95, "kv_channels": 8}},
            {},
            2,
            "needs model.hidden_size=95 to be divisible by parallel.tensor_model_parallel_size=2; set it to false",
        ),
        ({"model": {"kv_channels": 7}}, {}, 1, "gives 7 rotated channels"),
        ({"model": {"rotary_percent": 0.1}}, {}, 1, "gives 0 rotated channels"),
        ({"model": {"rotary_scaling": LINEAR, **LEARNED}}, {}, 1, "model.rotary_scaling stretches rotary frequencies"),
        ({"model": {"parallel_residual": True, "post_layernorms": True}}, {}, 1, "does not go with model.parallel_res"),
        ({"model": {"window_attn_skip_freq": 2}}, {}, 1, "model.window_attn_skip_freq=2 is about layers with a window"),
        ({"model": {"rotary_base_local": 1.0}}, {}, 1, "model.sliding_window is not set; set it, or remove rotary_"),
        (
            {"model": {"rotary_scaling": {**LINEAR, "low_freq_factor": 2.0}}},
            {},
            1,
            "model.rotary_scaling.low_freq_factor=2.0 does not go with type=linear; remove it",
        ),
        (
            {"model": {"rotary_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 4.0}}},
            {},
            1,
            "model.rotary_scaling.low_freq_factor=4 must be less than high_freq_factor=4",
        ),
        (
            {"model": {"num_query_groups": 12}, "parallel": parallel(8)},
            {},
            8,
            "model.num_attention_heads=12 is not divisible by parallel.tensor_model_parallel_size=8; "
            "use 1, 2, 3, 4, 6 or 12",
        ),
        (
            {"parallel": parallel(4)},
            {},
            4,
            "model.num_query_groups=6 (of 8 channels) cannot be spread evenly over, nor",
        ),
        (
            {"model": {"num_query_groups": 1}, "parallel": parallel(12)},
            {},
            12,
            "model.num_query_groups=1 (of 8 channels) cannot be spread evenly over, nor shared evenly by, the ranks of "
            "parallel.tensor_model_parallel_size=12; use 1, 2 or 4",
        ),
        ({"model": {"ffn_hidden_size": 387}, "parallel": parallel(2)}, {}, 2, "ffn_hidden_size=387"),
        ({"parallel": parallel(sequence=True)}, {}, 1, "parallel.tensor_model_parallel_size=1; set sequence_parallel"),
        ({"parallel": parallel(pipeline=5)}, {}, 5, "model.num_layers=4 is less than"),
        (
            {"parallel": {**parallel(pipeline=7), "pipeline_partition": "parameters"}},
            {},
            7,
            "pipeline_model_parallel_size=7 - 1 (the last may hold the head alone); use at most 5 stages",
        ),
        (
            {"parallel": {**parallel(pipeline=2), "pipeline_partition": [1, 2, 1]}},
            {},
            2,
            "parallel.pipeline_partition=[1, 2, 1] has 3 numbers, but parallel.pipeline_model_parallel_size=2",
        ),
        (
            {"parallel": {**parallel(pipeline=2), "pipeline_partition": [2, 3]}},
            {},
            2,
            "parallel.pipeline_partition=[2, 3] adds up to 5, but model.num_layers=4",
        ),
        (
            {"parallel": {**parallel(pipeline=4), "pipeline_partition": [0, 1, 3, 0]}},
            {},
            4,
            "parallel.pipeline_partition=[0, 1, 3, 0] leaves stage 0 without a layer",
        ),
        (
            {"parallel": parallel(pipeline=2)},
            {"zero_optimization": {"stage": 2}},
            2,
            "ds.json: zero_optimization.stage=2 does not go with parallel.pipeline_model_parallel_size=2",
        ),
        ({"training": {"seq_length": 65}}, {}, 1, "training.seq_length=65 is more than"),
        ({"training": {"seq_length": 31}, "parallel": parallel(2, sequence=True)}, {}, 2, "use 30 or 32"),
        ({"optimizer": {"min_lr": 1.0}}, {}, 1, "optimizer.min_lr=1 is more than optimizer.lr=0.0003"),
        ({"optimizer": {"warmup_steps": 10}}, {}, 1, "optimizer.warmup_steps=10 is not less than"),
        ({"data": {"split": [0, 1, 1]}}, {}, 1, "data.split=[0.0, 1.0, 1.0] must hold shares"),
        ({"data": {"split": [2, -1, 1]}}, {}, 1, "data.split=[2.0, -1.0, 1.0] must hold shares"),
        ({"checkpoint": {"save_interval": 5}}, {}, 1, "checkpoint.save_interval=5 needs a place to save to"),
        ({}, zero(2, offload_param={"device": "cpu"}), 1, "offload_param needs ZeRO stage 3"),
        ({}, zero(3, offload_param=NVME), 1, 'offload_param.device="nvme" is not supported: DeepSpeed removes'),
        ({}, zero(2, offload_optimizer=NVME), 1, 'offload_optimizer.device="nvme" needs ZeRO stage 3, but stage=2'),
        ({}, zero(3, offload_optimizer={"device": "nvme"}), 1, "offload_optimizer.nvme_path=None must be the absolute"),
        ({}, zero(3, offload_optimizer=NVME | {"nvme_path": "swap"}), 1, "nvme_path='swap' must be the absolute path"),
        (
            {},
            zero(3, offload_optimizer=NVME | {"buffer_count": 3}),
            1,
            "offload_optimizer.buffer_count=3 must be a whole number of at least 4 with optimizer.name=adamw",
        ),
        (
            {"optimizer": {"name": "sgd"}},
            zero(3, offload_optimizer=NVME | {"buffer_count": 3, "pipeline_read": True}),
            1,
            "buffer_count=3 must be a whole number of at least 4 with optimizer.name=sgd and pipeline_read",
        ),
        ({}, zero(3, offload_optimizer=NVME, sub_group_size=0), 1, "sub_group_size=0 must be a positive integer"),
        ({}, zero(3, offload_optimizer=NVME) | {"aio": {"queue_depth": 0}}, 1, "aio.queue_depth=0 must be a positive"),
        ({}, zero(3, offload_optimizer=NVME) | {"aio": {"block_size": 1000}}, 1, "aio.block_size=1000 must be a multi"),
        ({}, zero(3, offload_optimizer=NVME) | {"aio": {"single_submit": 1}}, 1, "aio.single_submit=1 must be true or"),
        ({}, zero(3, offload_optimizer=NVME) | {"aio": {"use_gds": True}}, 1, "aio.use_gds=true"),
        ({}, zero(3, offload_optimizer={"device": "gpu"}), 1, 'device=\'gpu\' must be "cpu", "nvme" or "none"'),
        ({}, zero(3, offload_optimizer=True), 1, "offload_optimizer=True must be an object"),
        ({}, zero(3, offload_optimizer={"device": "cpu", "ratio": 0.5}), 1, "ratio=0.5 needs DeepSpeed's compiled CPU"),
        ({}, zero(3, offload_optimizer={"device": "cpu", "super_offload": True}), 1, "super_offload=true needs"),
        ({}, zero(1, cpu_offload=True), 1, 'cpu_offload is an old name: write offload_optimizer: {"device": "cpu"}'),
        ({}, zero(3, cpu_offload_param=True), 1, "cpu_offload_param is an old name: write offload_param"),
        ({}, zero(1, zenflow={"topk_ratio": 0.1}), 1, "zero_optimization.zenflow is not supported"),
        ({}, {"zero_force_ds_cpu_optimizer": True}, 1, "must be compiled; remove it"),
        ({}, zero(2, zero_hpz_partition_size=2), 4, "zero_hpz_partition_size=2 (ZeRO++) needs ZeRO stage 3"),
        ({}, zero(3, zero_hpz_partition_size=3), 4, "zero_hpz_partition_size=3 must divide the 4 ranks; use 1, 2 or 4"),
        ({}, zero(3, zero_hpz_partition_size=0), 4, "zero_hpz_partition_size=0 must be a positive integer"),
        (
            {"parallel": parallel(2)},
            zero(3, zero_quantized_weights=True),
            4,
            "would mix the tensor-parallel ranks'",
        ),
        ({}, zero(3, zero_quantized_nontrainable_weights=True), 1, "has no use, as all weights are trained"),
        ({"parallel": parallel(2, sequence=True)}, {"pipeline": {"pipe_partitioned": True}}, 2, "remove it"),
        ({}, {"train_batch_size": 7}, 1, "ds.json: train_batch_size=7 is not"),
    ],
)
def test_each_broken_rule_gets_one_sentence(sections, deepspeed, world_size, words):
    (problem,) = problems_of(sections, deepspeed, world_size)
    assert words in problem


@pytest.mark.parametrize(
    ("sections", "deepspeed", "world_size"),
    [
        ({}, {}, 1),
        ({"parallel": parallel(2, 2, sequence=True)}, {}, 8),
        ({"parallel": parallel(6, 4)}, {}, 24),
        ({"model": {"num_query_groups": 1}, "parallel": parallel(4)}, {}, 4),
        ({"parallel": {**parallel(pipeline=5), "pipeline_partition": "parameters"}}, {}, 5),
        ({"parallel": {**parallel(pipeline=3), "pipeline_partition": [1, 3, 0]}}, {}, 3),
        ({"parallel": parallel(2)}, {"zero_optimization": {"stage": 3}}, 4),
        ({}, zero(1, offload_param={"device": "none"}, cpu_offload=None), 1),
        ({}, zero(3, offload_param={"device": "cpu"}, offload_optimizer={"device": "cpu", "pin_memory": False}), 1),
        ({"parallel": parallel(2, 2)}, zero(1, offload_optimizer={"device": "cpu"}), 4),
        ({}, zero(3, offload_optimizer=NVME, offload_param={"device": "cpu"}, sub_group_size=1e8), 1),
        ({}, zero(3, zero_hpz_partition_size=2, zero_quantized_weights=True, zero_quantized_gradients=True), 4),
        ({"model": {"kv_channels": 7, "position_embedding_type": "learned_absolute"}}, {}, 1),
        ({"checkpoint": {"save_interval": 5, "directory": "runs/x"}}, {}, 1),
        ({"optimizer": {"warmup_steps": 9, "min_lr": 3e-4}}, {}, 1),
        ({"data": {"split": [1, 0, 0]}}, {}, 1),
    ],
)
def test_valid_runs_pass(sections, deepspeed, world_size):
    assert plan_of(sections, deepspeed, world_size).world_size == world_size


def test_all_broken_rules_are_reported_at_once():
    problems = problems_of(
        {"parallel": parallel(5), "training": {"seq_length": 65}, "checkpoint": {"save_interval": 1}},
        {"zero_optimization": {"offload_param": {"device": "cpu"}}, "train_batch_size": 7},
        world_size=5,
    )
    # heads, MLP; sequence; checkpoint; offload; batch
    assert len(problems) == 6
