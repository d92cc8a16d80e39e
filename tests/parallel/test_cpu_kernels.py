"""The replaced matrix products: as exact as torch's, in every shape that linear layers and their gradients have."""

import pytest
import torch
from ranks import in_own_process


@pytest.fixture(autouse=True)
def _needs_onednn():
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


@in_own_process
def test_products_and_their_gradients_are_true_fp32():
    from megagpt.parallel.cpu_kernels import multiply_with_onednn

    multiply_with_onednn()
    for rows, inner, columns, has_bias in [(96, 128, 200, False), (96, 128, 200, True), (3, 4, 5, True)]:
        torch.manual_seed(rows)
        x, weight, bias = torch.randn(rows // 3, 3, inner), torch.randn(columns, inner), torch.randn(columns)
        leaves = [t.requires_grad_() for t in ((x, weight, bias) if has_bias else (x, weight))]
        exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
        found, exact = torch.nn.functional.linear(*leaves), torch.nn.functional.linear(*exact_leaves)
        assert found.dtype is torch.float32
        assert relative_error(found, exact) < 1e-6
        gradients = torch.autograd.grad((found**2).sum(), leaves)
        exact_gradients = torch.autograd.grad((exact**2).sum(), exact_leaves)
        for gradient, exact_gradient in zip(gradients, exact_gradients, strict=True):
            assert relative_error(gradient, exact_gradient) < 2e-6


@in_own_process
def test_a_wide_matrix_that_lies_the_other_way_round_is_multiplied_in_the_other_order():
    from unittest import mock

    from megagpt.parallel import cpu_kernels

    torch.manual_seed(0)
    grad, x = torch.randn(128, 2000), torch.randn(128, 24)
    with mock.patch.object(cpu_kernels, "_linear", wraps=cpu_kernels._linear) as linear:
        found = cpu_kernels._mm(grad.t(), x)
    (call,) = linear.call_args_list
    assert call.args[0].shape == (24, 128), "the smaller one is copied"
    assert found.is_contiguous()
    assert relative_error(found, grad.t().double() @ x.double()) < 1e-6


@in_own_process
def test_other_products_are_torchs_own():
    left, right = torch.randn(120, 100), torch.randn(100, 110)
    calls = {
        "bf16": lambda: left.bfloat16() @ right.bfloat16(),
        "fp64": lambda: left.double() @ right.double(),
        "int": lambda: (10 * left).long() @ (10 * right).long(),
        "scaled": lambda: torch.addmm(torch.ones(110), left, right, beta=2, alpha=3),
        "matrix bias": lambda: torch.addmm(torch.ones(120, 110), left, right),
        "scalar bias": lambda: torch.addmm(torch.ones(1), left, right),
        "empty": lambda: left[:0] @ right,
        "nothing to sum": lambda: left[:, :0] @ right[:0],
    }
    before = {name: call() for name, call in calls.items()}
    from megagpt.parallel.cpu_kernels import multiply_with_onednn

    multiply_with_onednn()
    for name, call in calls.items():
        assert torch.equal(call(), before[name]), name
    with pytest.raises(RuntimeError):
        left @ left


@in_own_process
def test_an_operator_is_really_replaced():
    from torch.profiler import ProfilerActivity, profile

    from megagpt.parallel.cpu_kernels import multiply_with_onednn

    multiply_with_onednn()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        torch.randn(128, 128) @ torch.randn(128, 128)
    assert "mkldnn::_linear_pointwise" in {event.key for event in recorded.key_averages()}


def test_only_amd_processors_with_avx512_need_it(tmp_path, monkeypatch):
    from megagpt.parallel.cpu_kernels import mkl_is_slow

    cpuinfo = tmp_path / "cpuinfo"
    for vendor, capability, expected in [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
    ]:
        cpuinfo.write_text(f"vendor_id\t: {vendor}\n")
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
        assert mkl_is_slow(cpuinfo) is expected
    assert not mkl_is_slow(tmp_path / "missing")
