"""Large runs become small ones with the same kinds of neighbours and features."""

import pytest

from megagpt.errors import ConfigError
from megagpt.plan import deepspeed_config_from_dict, make_plan, run_config_from_dict
from megagpt.verify.neighbours import Sizes, small_sizes
from megagpt.verify.shrink import shrink


def big_plan(preset="llama3-70b", stage=1, world_size=512, model=None, zero=None, partition="uniform", **parallel):
    experts = {f"{key}_model_parallel_size": parallel.pop(key) for key in ("expert",) if key in parallel}
    context = {f"{key}_parallel_size": parallel.pop(key) for key in ("context",) if key in parallel}
    tree = {
        "model": {"preset": preset, **(model or {})},
        "parallel": {
            **{f"{key}_model_parallel_size": size for key, size in parallel.items()},
            **experts,
            **context,
            "sequence_parallel": parallel.get("tensor", 1) > 1,
            "pipeline_partition": partition,
        },
        "training": {"steps": 1000},
    }
    raw = {
        "train_batch_size": 1024,
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, **(zero or {})},
    }
    return make_plan(run_config_from_dict(tree), deepspeed_config_from_dict(raw), world_size)


def layouts(small) -> list[tuple[int, int, int]]:
    for run in small.runs:
        assert run.exact.run.parallel == run.configured.run.parallel
    plans = [run.exact for run in small.runs]
    return [(plan.tensor_parallel_size, plan.pipeline_parallel_size, plan.data_parallel_size) for plan in plans]


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        ({"tensor": 8, "pipeline": 4}, [(2, 2, 2), (1, 3, 2)]),  # all three with a middle stage would take 12 ranks
        ({"tensor": 1, "pipeline": 4}, [(1, 3, 2)]),
        ({"tensor": 8}, [(2, 1, 2)]),
        ({"tensor": 8, "pipeline": 4, "world_size": 32}, [(2, 3, 1)]),
    ],
)
def test_each_kind_of_neighbour_stays(parallel, expected):
    small = shrink(big_plan(**parallel))
    assert layouts(small) == expected
    assert small.left_out == ()
    assert all(" ranks = TP" in run.changes[0] for run in small.runs)


@pytest.mark.parametrize(
    ("full", "kind"),
    [
        (Sizes(tensor=8, pipeline=8, context=2, data=8, groups=8), "a stage between two others"),
        (Sizes(tensor=16, data=4, groups=8), "key/value heads that some tensor-parallel ranks share"),
        (Sizes(data=64, expert=8), "copies of experts"),
        (Sizes(context=2, data=4, expert=8), "experts over context- and data-parallel ranks"),
        (Sizes(tensor=2, pipeline=4, context=2, data=16, expert=8, groups=8), "context parallel with expert parallel"),
        (Sizes(data=64, secondary=8), "weights cut twice by hpZ"),
    ],
)
def test_several_small_layouts_have_all_that_a_large_one_has(full, kind):
    small, left_out = small_sizes(full, 8)
    assert left_out == []
    assert frozenset().union(*(sizes.neighbours for sizes in small)) == full.neighbours
    assert all(sizes.ranks <= 8 for sizes in small)
    assert len(small) <= 4
    assert kind in full.neighbours


def test_what_takes_more_ranks_is_told():
    small, left_out = small_sizes(Sizes(tensor=8, pipeline=4, data=16, groups=8), 2)
    assert [sizes.ranks for sizes in small] == [2, 2, 2]
    assert left_out == [
        "a stage between two others",
        "pipeline parallel with data parallel",
        "tensor parallel with data parallel",
        "tensor parallel with pipeline parallel",
    ]
    with pytest.raises(ConfigError, match="--max-ranks=1 is too few for data parallel or tensor parallel ranks"):
        small_sizes(Sizes(tensor=2, data=2, groups=8), 1)
    assert small_sizes(Sizes(groups=8), 1) == ([Sizes(groups=8)], [])


def test_features_precision_and_stage_stay():
    (small,) = shrink(big_plan(tensor=4, stage=3)).runs
    assert (small.configured.precision, small.configured.zero_stage) == ("bf16", 3)
    assert (small.exact.precision, small.exact.zero_stage, small.exact.run.optimizer.name) == ("fp32", 3, "sgd")
    model = small.exact.model
    assert 1 < model.num_query_groups < model.num_attention_heads
    assert (model.activation, model.normalization) == ("swiglu", "RMSNorm")
    assert small.exact.num_parameters < 1_000_000


def test_key_value_heads_are_shared_as_in_the_large_run():
    sizes = {"llama3-70b": (16, 8), "gemma3-1b": (2,)}  # with 8 groups, and with one
    plans = [shrink(big_plan(preset, tensor=size)).runs[0].exact for preset in sizes for size in sizes[preset]]
    found = [(plan.tensor_parallel_size, plan.model.num_query_groups) for plan in plans]
    assert found == [(4, 2), (2, 2), (2, 1)]


def test_heads_can_be_split_over_context_parallel_ranks():
    plan = shrink(big_plan("llama3.2-3b", context=2)).runs[0].exact  # 24 heads in 8 groups
    assert plan.model.num_query_groups == 2
    assert plan.model.num_attention_heads == 6


def test_stages_as_written_stay_uneven():
    plan = big_plan("llama3-8b", pipeline=4, partition=[7, 8, 9, 8])
    assert shrink(plan).runs[0].exact.run.parallel.pipeline_partition == (2, 3, 3)
    plan = big_plan("llama3-8b", pipeline=2, partition=[32, 0])
    assert shrink(plan).runs[0].exact.run.parallel.pipeline_partition == (2, 0)
    plan = big_plan("llama3-8b", tensor=8, pipeline=4, partition=[7, 8, 9, 8])
    assert [run.exact.run.parallel.pipeline_partition for run in shrink(plan).runs] == [(2, 3), (2, 3, 3)]


def test_stages_keep_their_kinds_of_layers():
    first_dense = [0, *[1] * 47]
    plan = big_plan("qwen3-30b-a3b", model={"moe_layer_freq": first_dense}, pipeline=4, expert=8)
    assert shrink(plan).runs[0].exact.model.moe_layer_freq == (0, 1, 1, 1, 1, 1)
    plan = big_plan("qwen3-30b-a3b", model={"moe_layer_freq": 4}, pipeline=2, expert=8)
    assert shrink(plan).runs[0].exact.model.moe_layer_freq == (1, 0, 1, 0)
    plan = shrink(big_plan("gemma3-1b")).runs[0].exact  # 26 layers, each sixth attends to everything
    windows = [plan.model.window_of_layer(layer) for layer in range(plan.model.num_layers)]
    assert windows == [8, None]


def test_experts_keep_their_copies():
    plan = shrink(big_plan("qwen3-30b-a3b", expert=8)).runs[0].exact
    assert (plan.expert_parallel_size, plan.data_parallel_size) == (2, 4)


def test_weights_stay_cut_twice():
    plan = shrink(big_plan("llama3-8b", stage=3, zero={"zero_hpz_partition_size": 8})).runs[0].exact
    assert plan.deepspeed.raw["zero_optimization"]["zero_hpz_partition_size"] == 2
    assert plan.data_parallel_size == 4


def test_what_takes_a_clusters_devices_is_left_out_and_told():
    zero = {"zero_hpz_partition_size": 8, "zero_quantized_weights": True, "zero_quantized_gradients": True}
    run = shrink(big_plan("llama3-8b", stage=3, zero=zero)).runs[0]
    assert not run.exact.deepspeed.is_quantized
    assert any(line.startswith("quantized collectives -> exact ones") for line in run.changes)
    disk = {"offload_optimizer": {"device": "nvme", "nvme_path": "/local_disk", "pin_memory": True}}
    run = shrink(big_plan("llama3-8b", stage=3, zero=disk)).runs[0]
    assert run.configured.deepspeed.offloads_optimizer
    assert not run.configured.deepspeed.optimizer_is_on_disk
    assert any(line.startswith("optimizer on a disk -> in host memory") for line in run.changes)


PRESETS = ["gemma2-2b", "gpt2-124m", "llama3.2-3b", "megatron-1.7b", "mixtral-8x7b", "qwen2.5-7b", "qwen3-30b-a3b"]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_layout_of_a_preset_can_be_shrunk(preset):
    count = 0
    for tensor in (1, 2, 8):
        for pipeline in (1, 2, 4):
            for context in (1, 2):
                for partition in ("uniform", "parameters"):
                    sizes = {"tensor": tensor, "pipeline": pipeline, "context": context, "partition": partition}
                    try:
                        plan = big_plan(preset, **sizes)
                    except ConfigError:
                        continue
                    small = shrink(plan)
                    assert small.left_out == (), sizes
                    assert all(run.exact.num_parameters < 3_000_000 for run in small.runs), sizes
                    count += 1
    assert count > 5


def test_a_small_model_stays_as_it_is():
    odd = {
        "num_layers": 7,
        "hidden_size": 63,
        "num_attention_heads": 9,
        "num_query_groups": 3,
        "kv_channels": 14,
        "ffn_hidden_size": 97,
        "vocab_size": 50257,
        "max_position_embeddings": 64,
        "hidden_dropout": 0.1,
        "untie_embeddings_and_output_weights": False,
    }
    plan = big_plan(None, model=odd, world_size=4, pipeline=2)
    (small,) = shrink(plan).runs
    for run in (small.exact, small.configured):
        assert run.model == plan.model.model_copy(update={"hidden_dropout": 0.0})
        assert run.seq_length == plan.seq_length
        assert run.transformer_layers_of_stage(0) == plan.transformer_layers_of_stage(0)
    assert [change.split(" -> ")[0] for change in small.changes] == ["512 micro-batches of 1 x 64 tokens", "dropout"]
    assert shrink(big_plan(None, model=odd, world_size=8)).runs[0].exact.data_parallel_size == 8
    (shrunk,) = shrink(big_plan(None, model=odd, world_size=16, pipeline=2)).runs
    assert shrunk.exact.model.vocab_size < 50257, "not all of its ranks can be had"
