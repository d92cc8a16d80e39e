"""The nearest layout that passes all rules."""

import itertools
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.errors import ConfigError
from megagpt.plan import deepspeed_config_from_dict, make_plan, nearest, run_config_from_dict
from megagpt.plan.nearest import layout_of, with_layout
from megagpt.plan.rules import broken_rules, check_all

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


EXPERTS = {"num_layers": 8, "num_experts": 4, "moe_ffn_hidden_size": 768, "moe_layer_freq": [1, 1, 0, 0, 1, 1, 1, 1]}


def test_stages_without_experts_are_not_advised():
    sections = {"model": EXPERTS}
    # of 4 stages the second would have no experts
    assert advice_of(64, 8, 4, sections=sections, sequence_parallel=True, expert_model_parallel_size=2) == words(
        64, 4, 4, 4, more="parallel.expert_model_parallel_size=1 parallel.sequence_parallel=true "
    )
    # the rule itself is answered with advice
    assert advice_of(8, 1, 4, sections=sections, expert_model_parallel_size=2) == words(
        8, 1, 4, 2, more="parallel.expert_model_parallel_size=1 "
    )


def test_what_only_another_stage_of_zero_would_break_is_not_left_aside():
    hpz = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}
    assert advice_of(8, 1, 2, deepspeed=hpz) == words(8, 1, 1, 8, zero=3)
    saved = {"training": {"recompute_granularity": "full", "distribute_saved_activations": True}}
    assert advice_of(6, 5, sections=saved) == words(6, 6, 1, 1)
    assert advice_of(5, 7, sections=saved).startswith("no layout of 5 ranks passes all rules")


@pytest.mark.parametrize(
    ("batch", "start"),
    [({}, "nearest layout of 12288 ranks"), ({"train_batch_size": 1021}, "no layout of 12288 ranks")],
)
def test_few_layouts_of_thousands_of_ranks_are_tried(batch, start, monkeypatch):
    """Most sizes break a rule by themselves; 1021 samples go around no number of ranks."""
    tried = []
    monkeypatch.setattr(nearest, "with_layout", lambda *args: tried.append(args) or with_layout(*args))
    model = {"num_layers": 96, "num_attention_heads": 96}
    assert advice_of(12288, 7, 16, sections={"model": model}, deepspeed=batch).startswith(start)
    assert len(tried) < 2000


TP, PP, CP, EP = (f"{kind}_parallel_size" for kind in ("tensor_model", "pipeline_model", "context", "expert_model"))
SIZES = st.sampled_from([1, 1, 2, 3, 4, 6, 8])
LAYOUTS = st.fixed_dictionaries(
    {
        **dict.fromkeys((TP, PP, CP, EP), SIZES),
        "sequence_parallel": st.booleans(),
        "pipeline_partition": st.sampled_from(["uniform", "parameters", [2, 1, 1], [4]]),
    }
)
DENSE = st.fixed_dictionaries(
    {
        "num_attention_heads": st.sampled_from([8, 12]),
        "num_query_groups": st.sampled_from([1, 4]),
        "hidden_size": st.just(96),
        "vocab_size": st.just(256),
        "max_position_embeddings": st.sampled_from([64, 66]),
        "num_layers": st.just(4),
    }
)
MIXTURES = st.fixed_dictionaries(
    {
        "num_experts": st.sampled_from([4, 6]),
        "moe_ffn_hidden_size": st.just(48),
        "moe_layer_freq": st.sampled_from([1, 2, 3, [1, 0, 0, 1], [1, 1, 0, 1]]),
        "moe_z_loss_coeff": st.sampled_from([0.0, 1e-3]),
    }
)
MODELS = st.builds(lambda model, experts: {**model, **experts}, DENSE, st.one_of(st.just({}), MIXTURES))
TRAININGS = st.sampled_from([{}, {"recompute_granularity": "full", "distribute_saved_activations": True}])
ZEROS = st.builds(
    lambda stage, more: {"stage": stage, **more},
    st.integers(0, 3),
    st.sampled_from([{}, {}, {"zero_hpz_partition_size": 2}, {"offload_param": {"device": "cpu"}}]),
)
BATCHES = st.sampled_from(
    [
        {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2},
        {"train_micro_batch_size_per_gpu": 1, "train_batch_size": 12},
        {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2},
    ]
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.sampled_from([2, 4, 6, 8]), MODELS, LAYOUTS, TRAININGS, ZEROS, BATCHES, st.sampled_from(["stream", "cut"]))
def test_advice_is_accepted_and_nothing_nearer_is(world_size, model, layout, training, zero, batch, packing):
    tree = {"model": model, "parallel": layout, "training": {"steps": 10, **training}, "data": {"packing": packing}}
    run, deepspeed = run_config_from_dict(tree), deepspeed_config_from_dict({**batch, "zero_optimization": zero})
    problems = check_all(run, deepspeed, world_size)
    if not problems:
        make_plan(run, deepspeed, world_size)
        return
    with pytest.raises(ConfigError) as caught:
        make_plan(run, deepspeed, world_size)
    advice, asked = caught.value.advice, layout_of(run, deepspeed)
    if advice is None:
        return
    accepted = nearest_of_all(run, deepspeed, asked, world_size)
    if advice.startswith("no layout of"):
        assert accepted is None
        return
    advised = taken(advice, asked)
    assert accepted is None or distance(asked, advised) <= distance(asked, accepted)
    left = check_all(*with_layout(run, deepspeed, advised), world_size)
    if left:
        assert set(left) < set(problems), "what is left was told before, and is no matter of the layout"
    else:
        make_plan(*with_layout(run, deepspeed, advised), world_size)


def taken(advice, asked):
    """The layout that the words name."""
    layout = dict(asked)
    for key, value in re.findall(r"(?:parallel|zero_optimization)\.(\w+)=(\w+)", advice):
        number = {"true": True, "false": False, "uniform": "uniform"}.get(value)
        layout["zero_stage" if key == "stage" else key] = int(value) if number is None else number
    return layout


def nearest_of_all(run, deepspeed, asked, world_size):
    """The accepted layout that changes least, found by trying every one."""
    sizes = [size for size in range(1, world_size + 1) if world_size % size == 0]
    stages, partitions = {asked["zero_stage"], 1, 2, 3}, dict.fromkeys([asked["pipeline_partition"], "uniform"])
    every = itertools.product(*[sizes] * 4, stages, (False, True), partitions)
    layouts = [dict(zip(asked, values, strict=True)) for values in every]
    fitting = [x for x in layouts if world_size % (x[TP] * x[PP] * x[CP]) == 0]
    for layout in sorted(fitting, key=lambda layout: distance(asked, layout)):
        if next(broken_rules(*with_layout(run, deepspeed, layout), world_size), None) is None:
            return layout
    return None


def distance(asked, layout):
    """How far a layout is from what was asked, the most important difference first."""
    sizes = [(abs(math.log2(layout[key] / asked[key])), layout[key]) for key in (TP, PP, CP, EP)]
    stage, before = layout["zero_stage"], asked["zero_stage"]
    switches = [layout[key] != asked[key] for key in ("sequence_parallel", "pipeline_partition")]
    return (*sizes, abs(stage - before), stage, *switches)
