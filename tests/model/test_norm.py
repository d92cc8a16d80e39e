"""RMSNorm on the CPU: torch's, from half the passes, keeping its input and one number per row."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from ranks import in_own_process

pytestmark = pytest.mark.usefixtures("libraries")


def built(channels: int, dtype: torch.dtype, zero_centered: bool = False) -> torch.nn.Module:
    from megagpt.model.norm import Norm
    from megagpt.parallel.ranks import start_single_process

    start_single_process()
    config = SimpleNamespace(
        normalization="RMSNorm", layernorm_zero_centered_gamma=zero_centered, sequence_parallel=False
    )
    norm = Norm(config, channels, 1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    return norm


@in_own_process
def test_rms_norm_is_torchs():
    torch.manual_seed(0)
    for dtype, tolerance in [
        (torch.float64, 1e-13),
        (torch.float32, 1e-5),
        (torch.bfloat16, 2e-2),
        (torch.float16, 2e-3),
    ]:
        norm = built(24, dtype)
        hidden = torch.randn(6, 5, 24, dtype=dtype, requires_grad=True)
        grad = torch.randn_like(hidden)
        found = norm(hidden)
        expected = F.rms_norm(hidden, (24,), norm.weight, 1e-5)
        leaves = (hidden, norm.weight)
        results = zip(
            (found, *torch.autograd.grad(found, leaves, grad)),
            (expected, *torch.autograd.grad(expected, leaves, grad)),
            strict=True,
        )
        for mine, torchs in results:
            assert mine.dtype is dtype
            torch.testing.assert_close(mine, torchs, rtol=tolerance, atol=tolerance)


@in_own_process
def test_its_gradients_are_those_of_its_formula():
    torch.manual_seed(0)
    norm = built(7, torch.float64)
    hidden = torch.randn(4, 3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: norm._normalise(x, weight, None), (hidden, norm.weight))


@in_own_process
def test_a_norm_around_one_keeps_the_digits_of_small_weights():
    torch.manual_seed(0)
    norm = built(32, torch.bfloat16, zero_centered=True)
    norm.weight.data.mul_(1e-3)  # 1 + weight would round to 1
    hidden = torch.randn(4, 3, 32)
    exact = F.rms_norm(hidden, (32,), 1 + norm.weight.float(), 1e-5)
    torch.testing.assert_close(norm(hidden), exact, rtol=1e-5, atol=1e-6)


@in_own_process
def test_it_keeps_its_input_and_a_number_per_row():
    norm = built(64, torch.bfloat16)
    hidden = torch.randn(8, 2, 64, dtype=torch.bfloat16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        norm(hidden)
    assert sorted(tensor.numel() for tensor in kept) == [16, 64, 8 * 2 * 64]
