"""What is advised after a rank has run out of memory."""

import re

import pytest

from megagpt.plan import deepspeed_config_from_dict, make_plan, run_config_from_dict
from megagpt.plan.fitting import nearest_that_fits

GIB = 1 << 30


def plan_of(world_size: int, micro: int = 8, **parallel):
    tree = {"model": {"preset": "llama3.2-1b"}, "parallel": parallel, "training": {"steps": 10, "seq_length": 2048}}
    raw = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": micro,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
    }
    return make_plan(run_config_from_dict(tree), deepspeed_config_from_dict(raw), world_size)


def test_a_smaller_micro_batch_comes_first() -> None:
    plan = plan_of(8)
    half = plan_of(8, micro=4)
    assert half.memory.total < plan.memory.total
    advice = nearest_that_fits(plan, half.memory.total)
    assert advice.endswith("train_micro_batch_size_per_gpu=4 (JSON)")
    assert f"({half.memory.total / GIB:.2f} GiB per rank)" in advice


def test_recomputation_comes_before_another_layout() -> None:
    plan = plan_of(8, micro=1)
    advice = nearest_that_fits(plan, plan.memory.total - 1)
    assert advice.endswith(": training.recompute_granularity=full")


@pytest.mark.parametrize("share", [0.8, 0.5, 0.35])
def test_the_advice_fits_if_it_is_taken(share: float) -> None:
    plan = plan_of(8, micro=1)
    limit = int(share * plan.memory.total)
    advice = nearest_that_fits(plan, limit)
    told = dict(re.findall(r"(parallel\.\w+|training\.recompute_granularity|zero_optimization\.stage)=(\w+)", advice))
    tree = {
        "model": {"preset": "llama3.2-1b"},
        "parallel": {
            "tensor_model_parallel_size": int(told.get("parallel.tensor_model_parallel_size", 1)),
            "pipeline_model_parallel_size": int(told.get("parallel.pipeline_model_parallel_size", 1)),
            "context_parallel_size": int(told.get("parallel.context_parallel_size", 1)),
            "sequence_parallel": told.get("parallel.sequence_parallel") == "true",
        },
        "training": {
            "steps": 10,
            "seq_length": 2048,
            "recompute_granularity": told.get("training.recompute_granularity", "none"),
        },
    }
    raw = {**plan.deepspeed.raw, "zero_optimization": {"stage": int(told.get("zero_optimization.stage", 1))}}
    taken = make_plan(run_config_from_dict(tree), deepspeed_config_from_dict(raw), 8)
    assert taken.memory.total <= limit


def test_what_cannot_fit_is_said() -> None:
    assert nearest_that_fits(plan_of(1, micro=1), GIB).startswith(
        "no layout of 1 ranks is estimated to fit into 1.00 GiB"
    )
