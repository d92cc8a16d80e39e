"""The replaced attention: as exact as bf16 allows, in every shape that it takes; all others stay torch's own."""

import pytest
import torch
import torch.nn.functional as F
from ranks import in_own_process

pytestmark = pytest.mark.skipif(not hasattr(torch.library, "get_kernel"), reason="torch cannot hand out its own kernel")


def heads(batch: int, heads: int, length: int, channels: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(length, batch, heads, channels).to(dtype).permute(1, 2, 0, 3).requires_grad_()


def outcome(query, key, value, grad, **options) -> list[torch.Tensor]:
    """Attention and its three gradients."""
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped, **options)
    return [out.detach(), *torch.autograd.grad(out, (query, key, value), grad)]


def relative_errors(found: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [((f.double() - e).norm() / e.norm()).item() for f, e in zip(found, exact, strict=True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@in_own_process
def test_attention_and_its_gradients_are_as_exact_as_torchs_own(dtype):
    from megagpt.parallel import cpu_attention

    torch.manual_seed(0)
    cases = []
    for batch, queries, groups, length, channels, scale in [
        (2, 3, 3, 256, 16, None),
        (1, 4, 2, 300, 24, None),  # grouped; the last block of queries is short
        (3, 4, 1, 128, 16, 0.3),  # one group; a factor that is no power of two
    ]:
        inputs = [heads(batch, n, length, channels, dtype) for n in (queries, groups, groups)]
        cases.append((*inputs, torch.randn_like(inputs[0]), scale))
    own = [outcome(*case[:4], scale=case[4]) for case in cases]
    exact = [outcome(*(x.double() for x in case[:4]), scale=case[4]) for case in cases]
    cpu_attention.attend_in_blocks()
    least = {torch.bfloat16: 5e-3, torch.float32: 5e-7}[dtype]
    for most_scores in (1 << 22, 1 << 15):  # all heads at once, and some
        cpu_attention.BLOCKS[dtype] = cpu_attention.BLOCKS[dtype]._replace(most_scores=most_scores)
        for case, torchs, truth in zip(cases, own, exact, strict=True):
            found = outcome(*case[:4], scale=case[4])
            assert all(f.dtype is dtype and f.shape == t.shape for f, t in zip(found, truth, strict=True))
            for mine, theirs in zip(relative_errors(found, truth), relative_errors(torchs, truth), strict=True):
                assert mine < max(2.5 * theirs, least)


@in_own_process
def test_samples_that_lie_sample_by_sample_are_taken_too():
    from megagpt.parallel.cpu_attention import attend_in_blocks

    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 150, 16, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    grad = torch.randn_like(inputs[0])
    exact = outcome(*(x.double() for x in (*inputs, grad)))
    attend_in_blocks()
    assert max(relative_errors(outcome(*inputs, grad), exact)) < 1e-2
    turned = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs]
    assert max(relative_errors(outcome(*turned, grad), exact)) < 1e-2


@in_own_process
def test_other_attention_is_torchs_own():
    from megagpt.parallel.cpu_attention import attend_in_blocks

    def call(length=200, dtype=torch.bfloat16, **options):
        torch.manual_seed(0)
        query, key, value = (heads(2, 2, length, 16, dtype) for _ in range(3))
        out = F.scaled_dot_product_attention(query, key, value, **options)
        return [out.detach(), *torch.autograd.grad(out.float().sum(), (query, key, value))]

    mask = torch.zeros(200, 200, dtype=torch.bfloat16)
    calls = {
        "short": lambda: call(length=100, is_causal=True),
        "long": lambda: call(length=1100, dtype=torch.float32, is_causal=True),
        "fp64": lambda: call(dtype=torch.float64, is_causal=True),
        "not causal": lambda: call(),
        "masked": lambda: call(attn_mask=mask),
        "dropout": lambda: call(is_causal=True, dropout_p=0.1),
    }
    before = {name: made() for name, made in calls.items()}
    attend_in_blocks()
    for name, made in calls.items():
        for found, own in zip(made(), before[name], strict=True):
            assert torch.equal(found, own), name


@in_own_process
def test_the_operator_is_really_replaced():
    from torch.profiler import ProfilerActivity, profile

    from megagpt.parallel.cpu_attention import attend_in_blocks

    query = heads(1, 2, 256, 16)
    attend_in_blocks()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        F.scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()
    calls = {event.key: event.count for event in recorded.key_averages()}
    assert calls["aten::baddbmm"] == 2 + 2 * 3  # two blocks: scores; scores, gradients of query and key
