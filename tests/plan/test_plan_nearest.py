"""The nearest layout that passes all rules."""

import pytest

from megagpt.errors import ConfigError
from megagpt.plan import deepspeed_config_from_dict, make_plan, run_config_from_dict

MODEL = {
    "num_layers": 12,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "vocab_size": 50257,
    "max_position_embeddings": 64,
}


def advice_of(world_size, tp=1, pp=1, zero=1, sections=None, deepspeed=None, **parallel):
    tree = {
        "model": MODEL,
        "training": {"steps": 10},
        "parallel": {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, **parallel},
    }
    for section, keys in (sections or {}).items():
        tree[section] = {**tree.get(section, {}), **keys}
    raw = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 8, "zero_optimization": {"stage": zero}}
    with pytest.raises(ConfigError) as caught:
        make_plan(run_config_from_dict(tree), deepspeed_config_from_dict({**raw, **(deepspeed or {})}), world_size)
    return caught.value.advice


def words(world_size, tp, pp, dp, *, zero=1, more=""):
    ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
    return (
        f"nearest layout of {ranks} that passes all rules: parallel.tensor_model_parallel_size={tp} "
        f"parallel.pipeline_model_parallel_size={pp} {more}zero_optimization.stage={zero} (JSON), "
        f"which leaves data parallel {dp}"
    )


def test_tp_is_kept_rather_than_pp_and_pp_rather_than_zero():
    assert advice_of(16, 4, 3) == words(16, 4, 4, 1)  # 4/3 is nearer than 3/2
    assert advice_of(16, 4, 2, zero=3) == words(16, 4, 2, 2, zero=1)
    assert advice_of(8, 3, 2) == words(8, 4, 2, 1)


def test_sizes_change_by_the_smallest_factor_that_passes():
    assert advice_of(16, 8, 2) == words(16, 4, 2, 2)  # 12 heads
    assert advice_of(16, pp=16) == words(16, 1, 8, 2)  # 12 layers
    assert advice_of(5, 5) == words(5, 1, 1, 5)
    assert advice_of(6144, 7, 16) == words(6144, 6, 8, 128)


def test_switches_are_named_when_they_change():
    cut = {"training": {"seq_length": 63}}
    assert advice_of(8, 2, sequence_parallel=True, sections=cut) == words(
        8, 2, 1, 4, more="parallel.sequence_parallel=false "
    )
    assert advice_of(16, 1, 4, pipeline_partition=[4, 4, 4]) == words(
        16, 1, 4, 4, more="parallel.pipeline_partition=uniform "
    )
    assert advice_of(16, 1, 4, pipeline_partition=[3, 3, 3, 3], zero=2) == words(16, 1, 4, 4)


def test_batches_must_fit_too():
    # 6 samples per step of 1 x 2 on each data-parallel rank: 3 of them
    batch = {"train_batch_size": 6, "gradient_accumulation_steps": 2}
    assert advice_of(6, 1, 1, deepspeed=batch) == words(6, 1, 1, 3, more="parallel.context_parallel_size=2 ")
    batch = {"train_batch_size": 12, "gradient_accumulation_steps": 5}
    assert advice_of(8, deepspeed=batch) == (
        "no layout of 8 ranks passes all rules; change the number of ranks, the batch or the model"
    )


def test_there_is_no_advice_where_the_layout_is_not_the_problem():
    assert advice_of(4, 2, sections={"training": {"seq_length": 65}}) is None
    assert advice_of(0) is None


def test_other_problems_do_not_hide_the_layout():
    assert advice_of(16, 8, 2, sections={"training": {"seq_length": 65}}) == words(16, 4, 2, 2)


def test_what_is_advised_can_be_planned():
    tree = {
        "model": MODEL,
        "training": {"steps": 10},
        "parallel": {"tensor_model_parallel_size": 6, "pipeline_model_parallel_size": 8},
    }
    raw = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 8}
    plan = make_plan(run_config_from_dict(tree), deepspeed_config_from_dict(raw), 6144)
    assert plan.data_parallel_size == 128
