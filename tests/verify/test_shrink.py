"""Large runs become small ones with the same kinds of neighbours and features."""

import pytest

from megagpt.errors import ConfigError
from megagpt.plan import deepspeed_config_from_dict, make_plan, run_config_from_dict
from megagpt.verify.shrink import shrink


def big_plan(stage=1, **parallel):
    tree = {
        "model": {"preset": "llama3-70b"},
        "parallel": {f"{key}_model_parallel_size": size for key, size in parallel.items()},
        "training": {"steps": 1000},
    }
    raw = {
        "train_batch_size": 1024,
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
    }
    return make_plan(run_config_from_dict(tree), deepspeed_config_from_dict(raw), 512)


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        ({"tensor": 8, "pipeline": 4}, (2, 2, 2)),  # three stages would take 12 ranks
        ({"tensor": 1, "pipeline": 4}, (1, 3, 2)),
        ({"tensor": 8}, (2, 1, 2)),
    ],
)
def test_each_kind_of_neighbour_stays(parallel, expected):
    small = shrink(big_plan(**parallel))
    for plan in (small.exact, small.configured):
        assert (plan.tensor_parallel_size, plan.pipeline_parallel_size, plan.data_parallel_size) == expected
    assert small.changes[0].startswith("512 ranks = TP")


def test_features_precision_and_stage_stay():
    small = shrink(big_plan(tensor=4, stage=3))
    assert (small.configured.precision, small.configured.zero_stage) == ("bf16", 3)
    assert (small.exact.precision, small.exact.zero_stage, small.exact.run.optimizer.name) == ("fp32", 3, "sgd")
    model = small.exact.model
    assert 1 < model.num_query_groups < model.num_attention_heads
    assert (model.activation, model.normalization) == ("swiglu", "RMSNorm")
    assert small.exact.num_parameters < 1_000_000


def test_fewer_ranks_leave_data_parallelism_out_and_say_so():
    small = shrink(big_plan(tensor=8, pipeline=4), max_ranks=4)
    assert small.exact.world_size == 4
    assert any("data parallelism is left out" in change for change in small.changes)
    with pytest.raises(ConfigError, match="4 ranks at its smallest, more than --max-ranks=2"):
        shrink(big_plan(tensor=8, pipeline=4), max_ranks=2)
