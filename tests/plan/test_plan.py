"""The Plan: what is derived, what DeepSpeed is handed, and that no framework is imported."""

import copy
import dataclasses
import subprocess
import sys

import pytest

from megagpt.plan import deepspeed_config_from_dict, make_plan, run_config_from_dict, traffic_per_step

MODEL = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 32,
}
RAW = {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": True}}


def plan_of(raw=None, world_size=8, optimizer=None, model=None, **parallel):
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, **parallel}
    tree = {"model": {**MODEL, **(model or {})}, "training": {"steps": 10}, "parallel": layout}
    if optimizer:
        tree["optimizer"] = optimizer
    return make_plan(run_config_from_dict(tree), deepspeed_config_from_dict(raw or RAW), world_size)


def test_what_is_derived():
    plan = plan_of()
    assert (plan.tensor_parallel_size, plan.pipeline_parallel_size, plan.data_parallel_size) == (2, 2, 2)
    assert (plan.microbatch_size, plan.num_microbatches, plan.global_batch_size) == (2, 8, 32)
    assert (plan.seq_length, plan.tokens_per_step) == (32, 32 * 32)
    assert plan.padded_vocab_size == 1024
    assert plan.stage_bounds == (0, 3, 7)
    assert [list(plan.transformer_layers_of_stage(stage)) for stage in (0, 1)] == [[0, 1], [2, 3]]
    assert (plan.precision, plan.grad_accum_dtype, plan.gradient_clipping) == ("bf16", "fp32", 1.0)
    assert plan.model is plan.run.model


def test_plan_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan_of().world_size = 3


def test_memory_is_that_of_the_fullest_stage():
    plan = plan_of(model={"vocab_size": 50000})
    assert plan.memory == max(plan.memory_per_stage, key=lambda estimate: estimate.total)
    assert plan.memory.stage == 1  # fp32 logits of a large vocabulary
    assert plan.memory.total == sum(
        (plan.memory.weights, plan.memory.gradients, plan.memory.optimizer, plan.memory.activations)
    )


@pytest.mark.parametrize(("requested", "run"), [(None, 1), (0, 1), (1, 1), (2, 2), (3, 3)])
def test_zero_stage_0_runs_as_1(requested, run):
    raw = RAW if requested is None else {**RAW, "zero_optimization": {"stage": requested}}
    plan = plan_of(raw, pipeline_model_parallel_size=1)
    assert plan.zero_stage == run
    assert plan.engine_config()["zero_optimization"]["stage"] == run
    assert any("stage 0 runs as stage 1" in note for note in plan.notes) == (requested in (None, 0))


def test_engine_config_is_complete_and_a_copy():
    raw = {**RAW, "zero_optimization": {"stage": 1, "reduce_bucket_size": 1000}, "gradient_clipping": 0.5}
    before = copy.deepcopy(raw)
    plan = plan_of(raw)
    config = plan.engine_config()
    assert config == {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 8,
        "bf16": {"enabled": True, "immediate_grad_update": True},
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 1000},
        "gradient_clipping": 0.5,
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": config["steps_per_print"],
    }
    assert config["steps_per_print"] > 10**12
    config["zero_optimization"]["stage"] = 7
    assert plan.engine_config()["zero_optimization"]["stage"] == 1
    assert raw == before


def test_the_json_decides_the_type_of_gradient_sums():
    raw = {**RAW, "data_types": {"grad_accum_dtype": "bf16"}}
    plan = plan_of(raw)
    assert plan.grad_accum_dtype == plan.engine_config()["data_types"]["grad_accum_dtype"] == "bf16"


def test_engine_config_for_sgd_and_sequence_parallelism():
    config = plan_of(optimizer={"name": "sgd"}, sequence_parallel=True).engine_config()
    assert config["zero_allow_untested_optimizer"] is True
    assert config["pipeline"] == {"pipe_partitioned": False, "grad_partitioned": False}
    plain = plan_of().engine_config()
    assert "pipeline" not in plain
    assert "zero_allow_untested_optimizer" not in plain


def test_gradients_that_one_rank_has_by_itself_are_not_collected():
    fp32 = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2}

    def zero(world_size: int, **section) -> dict:
        plan = plan_of({**fp32, "zero_optimization": {"stage": 1, **section}}, world_size)
        return plan.engine_config()["zero_optimization"]

    assert zero(4) == {"stage": 1, "contiguous_gradients": False, "reduce_bucket_size": 1}
    assert zero(4, reduce_bucket_size=7)["reduce_bucket_size"] == 7, "the user's word"
    assert zero(8) == {"stage": 1}, "two data-parallel ranks"


def test_few_micro_batches_are_noted():
    raw = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "bf16": {"enabled": True}}
    (note,) = [note for note in plan_of(raw).notes if "idles" in note]
    assert "idles 50%" in note
    assert not any("idles" in note for note in plan_of().notes)


def test_what_quantisation_spares_is_not_foretold_which_is_noted():
    def plan(**keys):
        zero = {"stage": 3, "zero_hpz_partition_size": 2, **keys}
        raw = {**RAW, "zero_optimization": zero}
        return plan_of(raw, tensor_model_parallel_size=1, pipeline_model_parallel_size=1)

    plain, quantised = plan(), plan(zero_quantized_weights=True)
    (note,) = set(quantised.notes) - set(plain.notes)
    assert "bytes sent are told as if nothing were quantised" in note
    assert traffic_per_step(quantised, 0) == traffic_per_step(plain, 0)


def test_selective_recomputation_is_advised_against_where_attention_is_fused():
    def advised(model=None) -> bool:
        run = {"model": {**MODEL, **(model or {})}, "training": {"steps": 10, "recompute_granularity": "selective"}}
        plan = make_plan(run_config_from_dict(run), deepspeed_config_from_dict(RAW), 1)
        return any("selective saves next to nothing" in note for note in plan.notes)

    assert advised()
    assert not advised({"attention_dropout": 0.1})
    assert not advised({"attn_logit_softcapping": 50.0})


def test_no_framework_is_imported():
    code = "import sys, megagpt.plan; print(*sorted({'torch', 'deepspeed', 'megatron', 'numpy'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
