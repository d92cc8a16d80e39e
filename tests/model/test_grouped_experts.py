"""Experts computed all at once, against one after the other, and the decision to do so."""

import pytest
import torch
from ranks import in_own_process
from test_model import built
from tiny import tiny_plan

pytestmark = pytest.mark.usefixtures("libraries")

WIDTHS = (16, 24)


@pytest.fixture
def grouped(monkeypatch):
    from megagpt.model import grouped_experts as module

    monkeypatch.setattr(module.GroupedExperts, "are_grouped", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(module, "prove", lambda hidden_size, width, device: "")
    return module


class Device:
    """A stand-in for a GPU; what it can do is planted."""

    type = "cuda"


def plan_of(name="mixtral", precision="bf16", zero=1, dp=1, ep=1, model=None, **training):
    sections = {"training": training, "model": model or {}}
    return tiny_plan(name, precision=precision, zero=zero, dp=dp, ep=ep, sections=sections)


def test_gpus_group_experts_if_all_ranks_can(grouped):
    assert grouped.group_experts(plan_of(), Device(), lambda mine: [mine, ""]) is None
    assert grouped.GroupedExperts.are_grouped
    said = grouped.group_experts(plan_of(), Device(), lambda mine: [mine, "the result is wrong"])
    assert said.startswith("experts are computed one after the other")
    assert "rank 1: the result is wrong (training.moe_grouped_gemm=false" in said
    assert not grouped.GroupedExperts.are_grouped, "no rank, or their roundings would differ"


def test_what_has_no_kernel_says_nothing(grouped, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert grouped.group_experts(plan_of(), Device(), lambda mine: [mine]) is None
    assert not grouped.GroupedExperts.are_grouped


@pytest.mark.parametrize(
    "options",
    [
        {"name": "llama"},
        {"precision": "fp16"},
        {"precision": "fp32"},
        {"zero": 3, "dp": 2},
        {"dp": 4, "ep": 4},  # one expert per rank
        {"model": {"moe_ffn_hidden_size": 20}},
        {"moe_grouped_gemm": False},
    ],
    ids=str,
)
def test_nobody_is_asked_where_it_is_of_no_use(grouped, options):
    def gather(mine):
        raise AssertionError("nobody is to be asked")

    assert grouped.group_experts(plan_of(**options), Device(), gather) is None
    assert grouped.group_experts(plan_of(), torch.device("cpu"), gather) is None
    assert not grouped.GroupedExperts.are_grouped


@in_own_process
def test_kernels_must_show_that_they_are_right():
    from megagpt.model import grouped_experts as module

    multiply, device = torch.nn.functional.grouped_mm, torch.device("cpu")

    def forgets_empty_experts(one, two, offs):
        product = multiply(one, two, offs=offs)
        if product.ndim == 3:
            product[offs.diff(prepend=offs.new_zeros(1)) == 0] = torch.nan
        return product

    def leaves_out_a_token(one, two, offs):
        product = multiply(one, two, offs=offs)
        if product.ndim == 2:
            product[-1] = 0
        return product

    def ignores_what_lies_between_weights(one, two, offs):
        if two.ndim == 3:
            two = two.as_strided(two.shape, (two.shape[1] * two.shape[2], *two.stride()[1:]))
        return multiply(one, two, offs=offs)

    def has_none(one, two, offs):
        raise RuntimeError("grouped gemm is not supported\nmore")

    assert module.prove(*WIDTHS, device) == ""
    torch.cuda.get_device_capability = lambda device: (9, 0)
    for planted, words in [
        (forgets_empty_experts, "the gradient of the weight of an expert with 0 tokens is wrong"),
        (leaves_out_a_token, "the result is wrong"),
        (ignores_what_lies_between_weights, "the result is wrong"),
        (has_none, "RuntimeError: grouped gemm is not supported"),
    ]:
        torch.nn.functional.grouped_mm = planted
        assert module._obstacle(plan_of(), device) == words


@pytest.mark.parametrize("lies", ["apart", "in one buffer", "unevenly"])
@in_own_process
def test_a_layer_gives_what_one_expert_after_the_other_gives(lies):
    from megagpt.model import grouped_experts as module

    layer = built(tiny_plan("mixtral", sections={"model": {"moe_ffn_hidden_size": 24}})).layers[1].block.mlp
    if lies != "apart":
        place_in_one_buffer(layer.experts, spare=3 if lies == "unevenly" else 0)
    joined, join = [], module._joined
    module._joined = lambda weights: joined.append(join(weights)) or joined[-1]
    tokens_SBH = torch.randn(5, 3, layer.config.hidden_size, generator=torch.Generator().manual_seed(0)) * 10
    results = []
    for module.GroupedExperts.are_grouped in (False, True):
        leaf_SBH = tokens_SBH.clone().requires_grad_()
        output_SBH, bias = layer(leaf_SBH)
        assert bias is None
        output_SBH.square().sum().backward()
        results.append([output_SBH.detach(), leaf_SBH.grad, *(weight.grad for weight in layer.parameters())])
        layer.zero_grad()
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5 * float(one.abs().max()))
    assert len(joined) == 4
    storages = {weight.untyped_storage().data_ptr() for weight in layer.experts.parameters()}
    assert all((matrix.untyped_storage().data_ptr() in storages) == (lies == "in one buffer") for matrix in joined)


def place_in_one_buffer(experts, spare: int) -> None:
    """Move all weights into one buffer, one after the other.

    Args:
        experts: of a layer.
        spare: numbers left free before the second one's.
    """
    weights = list(experts.parameters())
    buffer, start = torch.zeros(sum(weight.numel() for weight in weights) + spare), 0
    for index, weight in enumerate(weights):
        start += spare if index == 2 else 0
        part = buffer[start : start + weight.numel()].view_as(weight)
        weight.data = part.copy_(weight.data)
        start += weight.numel()


@in_own_process
def test_a_rank_whose_experts_get_no_token_goes_on():
    from megagpt.model import grouped_experts as module

    experts = built(tiny_plan("mixtral")).layers[1].block.mlp.experts
    module.GroupedExperts.are_grouped = True
    none = torch.zeros(0, experts.config.hidden_size, requires_grad=True)
    output, _ = experts(none, torch.zeros(4, dtype=torch.int64), torch.zeros(0))
    output.sum().backward()
    assert output.shape == none.shape
    assert all(weight.grad is not None and not weight.grad.any() for weight in experts.parameters())
