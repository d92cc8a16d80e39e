"""One layer of experts against the formulas written out, its counters, and who has which expert."""

import pytest
import torch
import torch.nn.functional as F
from ranks import in_own_process, run_ranks
from test_model import built
from tiny import tiny_plan

pytestmark = pytest.mark.usefixtures("libraries")


def layer_by_hand(weights: dict, tokens_TH, model):
    """Output and auxiliary losses (already weighted) of a layer with experts, expert by expert."""
    logits_TE = tokens_TH @ weights["router.weight"].T
    scores_TE = logits_TE.softmax(-1)
    _, chosen_TK = logits_TE.topk(model.moe_router_topk, -1)
    if model.moe_router_pre_softmax:
        weights_TK = scores_TE.gather(1, chosen_TK)
    else:
        weights_TK = logits_TE.gather(1, chosen_TK).softmax(-1)

    def mlp(module, inputs):
        gate, up = (inputs @ weights[f"{module}.linear_fc1.weight"].T).chunk(2, -1)
        return (F.silu(gate) * up) @ weights[f"{module}.linear_fc2.weight"].T

    output_TH = torch.zeros_like(tokens_TH)
    for expert in range(model.num_experts):
        rows, places = torch.where(chosen_TK == expert)
        part = weights_TK[rows, places, None] * mlp(f"experts.local_experts.{expert}", tokens_TH[rows])
        output_TH = output_TH.index_add(0, rows, part)
    if model.moe_shared_expert_intermediate_size:
        shared_TH = mlp("shared_experts", tokens_TH)
        output_TH = output_TH + shared_TH * torch.sigmoid(tokens_TH @ weights["shared_experts.gate_weight"].T)
    # arXiv 2101.03961, eq. 4 to 6, with the fractions of all chosen experts; arXiv 2202.08906, eq. 5
    fractions_E = F.one_hot(chosen_TK, model.num_experts).sum((0, 1)) / chosen_TK.numel()
    balance = model.num_experts * (fractions_E * scores_TE.mean(0)).sum()
    z = logits_TE.logsumexp(-1).square().mean()
    return output_TH, model.moe_aux_loss_coeff * balance + model.moe_z_loss_coeff * z, fractions_E


@pytest.mark.parametrize("name", ["mixtral", "shared_expert"])
@in_own_process
def test_a_layer_does_what_the_formulas_say(name):
    from megagpt.model import set_auxiliary_loss_scale, take_router_counts

    plan = tiny_plan(name)
    model, scale = plan.model, 0.25
    layer = built(plan).layers[1].block.mlp
    tokens_SBH = torch.randn(8, 2, model.hidden_size, generator=torch.Generator().manual_seed(0)) * 10
    direction_SBH = torch.randn(tokens_SBH.shape, generator=torch.Generator().manual_seed(1))
    weights = {key: weight.detach().clone().requires_grad_() for key, weight in layer.named_parameters()}
    expected_TH, auxiliary, fractions_E = layer_by_hand(weights, tokens_SBH.flatten(0, 1), model)
    ((expected_TH * direction_SBH.flatten(0, 1)).sum() + scale * auxiliary).backward()

    set_auxiliary_loss_scale(scale, torch.device("cpu"))
    layer.eval()
    torch.testing.assert_close(layer(tokens_SBH)[0].flatten(0, 1), expected_TH)
    layer.train()
    output_SBH, bias = layer(tokens_SBH)
    assert bias is None
    torch.testing.assert_close(output_SBH.flatten(0, 1), expected_TH)
    (output_SBH * direction_SBH).sum().backward()
    for key, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[key].grad, rtol=1e-4, atol=1e-6, msg=key)

    counts = take_router_counts(layer, model.num_layers, model.num_experts, torch.device("cpu"))
    assert counts.num_microbatches == 1, "evaluation is not counted"
    torch.testing.assert_close(counts.tokens[1] / counts.tokens[1].sum(), fractions_E)
    assert not counts.tokens[0].any()
    assert take_router_counts(layer, model.num_layers, model.num_experts, torch.device("cpu")).num_microbatches == 0


def initial_experts(plan) -> dict:
    """This rank's parameters of experts by canonical name."""
    from megagpt.engine import build_engine
    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.ranks import start_ranks

    engine = build_engine(plan, start_ranks(plan, detect_launch()))
    return {name: weight.detach().numpy() for name, weight in engine.parameters.items() if ".experts." in name}


def test_each_rank_has_its_experts_with_the_weights_that_one_process_has(libraries):
    (whole,) = run_ranks(initial_experts, 1, tiny_plan("shared_expert"))
    ranks = run_ranks(initial_experts, 4, tiny_plan("shared_expert", pp=2, dp=2, ep=2))
    numbers = [sorted({int(name.split(".")[4]) for name in rank}) for rank in ranks]
    assert numbers == [[0, 1], [2, 3]] * 2
    assert sorted(name for rank in ranks for name in rank) == sorted(whole)
    for rank in ranks:
        for name, weight in rank.items():
            assert (weight == whole[name]).all(), name
