"""Attention cores against attention written out."""

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.usefixtures("libraries")

B, N, G, S, D = 2, 4, 2, 37, 8


def inputs(groups: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, heads, S, D, generator=generator).double() for heads in (N, groups, groups)]


def written_out(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Every score, then the mask, then softmax."""
    key, value = (x.repeat_interleave(N // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    distance = torch.arange(S)[:, None] - torch.arange(S)
    hidden = (distance < 0) | (distance >= (window or S))
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize("groups", [N, G, 1])
@pytest.mark.parametrize("window", [None, 1, 5, 18, 19, S - 1, S, 100])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_values_and_gradients(monkeypatch, softcap, window, groups):
    from megagpt.model import causal_attention as module

    monkeypatch.setattr(module, "QUERY_BLOCK", 16)

    tensors = inputs(groups)
    weights = torch.randn(B, N, S, D, generator=torch.Generator().manual_seed(1)).double()
    results = []
    for attend in (module.causal_attention, written_out):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        out = attend(*leaves, scale=0.3, window=window, softcap=softcap)
        (out * weights).sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("groups", [N, 1])
def test_a_kernel_that_knows_windows_is_given_each_sample_as_one_run(monkeypatch, groups):
    from megagpt.model import causal_attention as module

    def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert cu_seq_q.tolist() == cu_seq_k.tolist() == [0, S, 2 * S]
        assert (max_q, max_k, enable_gqa) == (S, S, groups != N)
        assert window_size[1] == 0, "causal"
        samples = [x.unflatten(0, (B, S)).transpose(1, 2) for x in (query, key, value)]
        out = written_out(*samples, scale=scale, window=window_size[0] + 1, softcap=None)
        return out.transpose(1, 2).flatten(0, 1)

    tensors = inputs(groups)
    expected = module.causal_attention(*tensors, scale=0.3, window=5)
    monkeypatch.setattr(module, "kernel_of_runs", lambda query, dropout: kernel)
    torch.testing.assert_close(module.causal_attention(*tensors, scale=0.3, window=5), expected)


@pytest.mark.parametrize("options", [{"window": 32}, {"softcap": 3.0}], ids=str)
def test_no_scores_are_kept_for_the_backward_pass(options):
    """What is kept grows with the length, not with its square."""
    from megagpt.model.causal_attention import causal_attention

    def kept(length: int) -> int:
        sizes = {}
        query, key = (torch.randn(1, heads, length, D, requires_grad=True) for heads in (N, G))

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            causal_attention(query, key, key, **options)
        return sum(sizes.values())

    assert kept(1024) < 2.2 * kept(512)
