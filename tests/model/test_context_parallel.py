"""Attention over context-parallel ranks: what one process computes, and what DeepSpeed's Ulysses does."""

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from tiny import tiny_plan

pytestmark = pytest.mark.usefixtures("libraries")

S, B, D = 16, 2, 8


def whole_tensors(heads: int, groups: int) -> list[torch.Tensor]:
    """Query, key, value and the output's gradient for all positions."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(S, B, count, D, generator=generator) for count in (heads, groups, groups, heads)]


def attention_of_one_process(heads: int, groups: int) -> list[torch.Tensor]:
    """Output [S, B, N, D] and the gradients of query, key and value."""
    *inputs, gradient = whole_tensors(heads, groups)
    leaves = [x.requires_grad_() for x in inputs]
    query, key, value = (x.permute(1, 2, 0, 3) for x in leaves)
    output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).permute(2, 0, 1, 3)
    output.backward(gradient)
    return [output.detach(), *(x.grad for x in leaves)]


def attention_of_this_rank(plan, by_deepspeed: bool) -> list[torch.Tensor]:
    """The same for this rank's positions."""
    from deepspeed.sequence.layer import DistributedAttention
    from megatron.core.transformer.enums import AttnMaskType

    from megagpt.model.attention import SDPAttention
    from megagpt.model.transformer_config import transformer_config
    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.ranks import start_ranks

    ranks = start_ranks(plan, detect_launch())
    heads, groups = plan.model.num_attention_heads, plan.model.num_query_groups
    *inputs, gradient = (x.chunk(ranks.context_size)[ranks.context_rank] for x in whole_tensors(heads, groups))
    leaves = [x.contiguous().requires_grad_() for x in inputs]
    if by_deepspeed:

        def attend(query, key, value):
            query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            return output.permute(2, 0, 1, 3).contiguous()

        output = DistributedAttention(attend, ranks.context_group)(*leaves, 1)
    else:
        core = SDPAttention(transformer_config(plan), 1, AttnMaskType.causal, "self")
        output = core(*leaves).unflatten(2, (heads, D))
    output.backward(gradient)
    return [output.detach(), *(x.grad for x in leaves)]


def plan_of(heads: int, groups: int, context: int):
    model = {"num_attention_heads": heads, "num_query_groups": groups, "kv_channels": D}
    return tiny_plan("llama", cp=context, sections={"model": model})


@pytest.mark.parametrize(
    ("heads", "groups", "context"), [(4, 4, 2), (4, 2, 2), (4, 1, 2), (8, 2, 4), (12, 3, 2), (12, 6, 4)]
)
def test_each_rank_gets_its_positions_of_the_whole(heads, groups, context):
    """Groups that the ranks divide, and groups that they do not: 1 and 3 over 2 ranks, 2 and 6 over 4."""
    expected = attention_of_one_process(heads, groups)
    ranks = run_ranks(attention_of_this_rank, context, plan_of(heads, groups, context), by_deepspeed=False)
    for name, whole, parts in zip(("output", "query", "key", "value"), expected, zip(*ranks, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-6, msg=name)


def test_deepspeed_ulysses_gives_the_same(libraries):
    plan = plan_of(4, 2, 2)
    ours, theirs = (
        run_ranks(attention_of_this_rank, 2, plan, by_deepspeed=by_deepspeed) for by_deepspeed in (False, True)
    )
    for mine, other in zip(ours, theirs, strict=True):
        for found, expected in zip(mine, other, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
