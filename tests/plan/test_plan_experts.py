"""Rules, sizes and reports of models with experts."""

import pytest
from test_plan_rules import MODEL, plan_of, problems_of

from megagpt.plan import describe
from megagpt.plan.layout import count_active_parameters, count_parameters

EXPERTS = {"num_experts": 8, "moe_ffn_hidden_size": 32}


def sections(parallel=None, **model):
    return {"model": {**EXPERTS, **model}, "parallel": parallel or {}}


def expert_parallel(ways, tensor=1, pipeline=1):
    return {
        "expert_model_parallel_size": ways,
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "sequence_parallel": tensor > 1,
    }


@pytest.mark.parametrize(
    ("run", "deepspeed", "world_size", "words"),
    [
        ({"model": {"moe_router_topk": 4}}, {}, 1, "model.moe_router_topk=4 needs experts; set model.num_experts"),
        ({"model": {"moe_ffn_hidden_size": 4}}, {}, 1, "model.moe_ffn_hidden_size=4 needs experts"),
        ({"parallel": expert_parallel(2)}, {}, 2, "parallel.expert_model_parallel_size=2 needs experts"),
        (sections(moe_router_topk=9), {}, 1, "moe_router_topk=9 is more than model.num_experts=8; use at most 8"),
        (sections(moe_router_topk=1), {}, 1, "set model.moe_router_pre_softmax=true, or moe_router_topk to 2 or more"),
        (sections(moe_layer_freq=[1, 0]), {}, 1, "moe_layer_freq has 2 entries, but model.num_layers=4"),
        (sections(moe_layer_freq=[0, 0, 0, 0]), {}, 1, "model.moe_layer_freq gives no layer experts"),
        (sections(add_bias_linear=True), {}, 1, "experts have no biases; set it to false"),
        (sections(moe_shared_expert_gate=True), {}, 1, "set model.moe_shared_expert_intermediate_size"),
        (sections(expert_parallel(1, 3)), {}, 3, "moe_ffn_hidden_size=32 is not divisible by"),
        (sections({"tensor_model_parallel_size": 2}), {}, 2, "needs parallel.sequence_parallel=true"),
        (sections(expert_parallel(3)), {}, 3, "parallel.expert_model_parallel_size=3; use 1, 2, 4 or 8"),
        (sections(expert_parallel(4)), {}, 6, "the data-parallel size 6 (6 ranks / 1) is not divisible by"),
        (sections(expert_parallel(4)), {}, 6, "as data-parallel ranks share the experts; use 1 or 2"),
        (
            sections(expert_parallel(2, 1, 2), moe_layer_freq=[0, 0, 0, 1]),
            {},
            4,
            "pipeline stage 0 has no layer with experts",
        ),
        (
            sections(expert_parallel(2)),
            {"zero_optimization": {"stage": 3}},
            2,
            "AutoEP has built); use stage 1 or 2, or",
        ),
        (
            sections(expert_parallel(2)),
            {"zero_optimization": {"stage": 2, "reduce_scatter": False}},
            2,
            "zero_optimization.reduce_scatter=false does not go with parallel.expert_model_parallel_size=2",
        ),
    ],
)
def test_what_cannot_work_is_refused(run, deepspeed, world_size, words):
    problems = problems_of(run, deepspeed, world_size)
    assert any(words in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("run", "deepspeed", "world_size"),
    [
        (sections(expert_parallel(2, 2, 2)), {}, 8),
        (sections(expert_parallel(4)), {"zero_optimization": {"stage": 2}}, 8),
        (sections(expert_parallel(1)), {"zero_optimization": {"stage": 3}}, 2),
        (sections(expert_parallel(2)), {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, 2),
        (sections({**expert_parallel(4), "context_parallel_size": 2}), {}, 4),
        (sections(moe_layer_freq=[0, 0, 0, 1], parallel=expert_parallel(1, 1, 2)), {}, 2),
        (sections(moe_router_topk=1, moe_router_pre_softmax=True), {}, 1),
    ],
)
def test_what_works_is_not_refused(run, deepspeed, world_size):
    plan_of(run, deepspeed, world_size)


def test_every_nth_layer_has_experts():
    model = plan_of(sections(moe_layer_freq=2)).model
    assert [model.has_experts(layer) for layer in range(4)] == [True, False, True, False]
    assert not plan_of().model.has_experts(0)


def test_parameters_are_counted_by_hand():
    shared = {"moe_shared_expert_intermediate_size": 16, "moe_shared_expert_gate": True}
    dense, hidden = plan_of().model, MODEL["hidden_size"]
    model = plan_of(sections(moe_layer_freq=[0, 1, 1, 0], **shared)).model
    expert, in_place_of = 3 * hidden * 32, 3 * hidden * MODEL["ffn_hidden_size"]
    layer = 8 * expert + 8 * hidden + 3 * hidden * 16 + hidden  # experts, router, shared expert, its gate
    assert count_parameters(model) == count_parameters(dense) + 2 * (layer - in_place_of)
    assert count_active_parameters(model) == count_parameters(model) - 2 * 6 * expert
    assert count_active_parameters(dense) == count_parameters(dense)


def test_a_token_costs_what_it_meets():
    """FLOPs of a model whose experts are all chosen are those of a dense one as wide, plus routers."""
    wide = plan_of({"model": {"ffn_hidden_size": 256}})
    experts = plan_of(sections(moe_router_topk=8))
    tokens, layers = experts.tokens_per_step, MODEL["num_layers"]
    assert experts.flops_per_step == wide.flops_per_step + 6 * tokens * layers * 8 * MODEL["hidden_size"]
    half = plan_of(sections(moe_router_topk=4))
    assert experts.flops_per_step - half.flops_per_step == 6 * tokens * layers * 3 * MODEL["hidden_size"] * 4 * 32


def test_experts_are_spread_over_the_ranks_that_share_them():
    together, apart = (plan_of(sections(expert_parallel(ways)), world_size=8) for ways in (1, 4))
    experts = 4 * 8 * 3 * MODEL["hidden_size"] * 32
    assert together.memory.weights - apart.memory.weights == 2 * experts * 3 // 4
    # The optimizer's state is spread over all 8 ranks either way.
    assert abs(together.memory.optimizer - apart.memory.optimizer) <= 2
    assert together.memory.activations == apart.memory.activations
    more = plan_of(sections(expert_parallel(4), moe_router_topk=4), world_size=8)
    assert more.memory.activations > apart.memory.activations


def test_the_report_says_what_is_active():
    text = describe(plan_of(sections(expert_parallel(2), moe_layer_freq=2), world_size=2))
    assert "8 experts of width 32 in 2 of 4 layers, 2 per token" in text
    assert "2 data-parallel ranks share the experts" in text
    assert "experts" not in describe(plan_of())
