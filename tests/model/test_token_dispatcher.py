"""Copies of tokens: where they are, and that each token gets back what its own experts say."""

import pytest
import torch
from ranks import in_own_process
from test_model import built
from tiny import tiny_plan

pytestmark = pytest.mark.usefixtures("libraries")


@pytest.mark.parametrize(("tokens", "experts", "chosen"), [(7, 5, 2), (33, 8, 8), (1, 4, 1), (60, 16, 3)])
@in_own_process
def test_each_token_knows_its_copies(tokens, experts, chosen):
    from megagpt.model.token_dispatcher import Places

    picks_TK = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0)).topk(chosen).indices
    map_TE = torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, picks_TK, True)
    pairs = [(expert, token) for expert in range(experts) for token in range(tokens) if map_TE[token, expert]]
    places = Places.of(map_TE, chosen)
    assert places.pairs_R.tolist() == [expert * tokens + token for expert, token in pairs]
    assert places.tokens_R.tolist() == [token for _, token in pairs]
    of_tokens = [[row for row, (_, token) in enumerate(pairs) if token == mine] for mine in range(tokens)]
    assert places.copies_TK.tolist() == of_tokens


@in_own_process
def test_layers_have_it_unless_tokens_are_gathered():
    from megagpt.model.token_dispatcher import TokenDispatcher

    for sections, expected in [({}, True), ({"parallel": {"moe_token_dispatcher_type": "allgather"}}, False)]:
        layer = built(tiny_plan("mixtral", sections=sections)).layers[1].block.mlp
        assert isinstance(layer.token_dispatcher, TokenDispatcher) == expected


@in_own_process
def test_it_gives_what_megatron_cores_gives():
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    layer = built(tiny_plan("mixtral")).layers[1].block.mlp
    tokens_SBH = torch.randn(5, 3, layer.config.hidden_size, generator=torch.Generator().manual_seed(0)) * 10
    results = []
    for of_megatron in (False, True):
        if of_megatron:
            layer.token_dispatcher.__class__ = MoEAlltoAllTokenDispatcher
        leaf_SBH = tokens_SBH.clone().requires_grad_()
        output_SBH, _ = layer(leaf_SBH)
        output_SBH.square().sum().backward()
        results.append([output_SBH.detach(), leaf_SBH.grad, *(weight.grad for weight in layer.parameters())])
        layer.zero_grad()
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)
