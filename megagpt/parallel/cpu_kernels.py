"""Faster kernels for fp32 on AMD processors, put in place of torch's own for this process.

torch multiplies fp32 matrices on the CPU with MKL, which runs its AVX2 code on AMD processors. oneDNN, which torch
carries too and uses for bf16, runs AVX-512 there: twice as fast on Zen 5. It is true fp32; only the order of the sums
differs. What is replaced is the CPU kernel of two operators; models and devices other than the CPU are not touched.
"""

import functools
from pathlib import Path

import torch
from torch import Tensor

SMALLEST_PRODUCT = 1 << 20
"""Multiplications below which starting oneDNN costs more than it saves."""


def mkl_is_slow(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this is an AMD processor with AVX-512, on which torch has both libraries."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and cpuinfo.exists()):
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and "AuthenticAMD" in cpuinfo.read_text()


@functools.cache
def multiply_with_onednn() -> torch.library.Library:
    """Replace the CPU kernels of `mm` and `addmm` (linear layers and their gradients) for large fp32 matrices.

    Returns:
        What keeps the replacement alive; kept here too, so it lasts as long as the process.
    """
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm", _mm, "CPU")
    library.impl("addmm", _addmm, "CPU")
    return library


def _suits(left: Tensor, right: Tensor) -> bool:
    is_fp32 = left.dtype is torch.float32 and right.dtype is torch.float32
    return is_fp32 and left.shape[0] * left.shape[1] * right.shape[1] >= SMALLEST_PRODUCT


def _linear(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], "")


def _mm(left: Tensor, right: Tensor) -> Tensor:
    if _suits(left, right):
        rows, inner, columns = *left.shape, right.shape[1]
        # oneDNN is handed rows that lie in memory one after the other. A gradient of a wide weight comes the other way
        # round, and is larger than all else: then the product of the turned matrices, in the other order, is turned.
        if left.stride(0) == 1 < left.stride(1) and rows * inner > 2 * (rows + inner) * columns:
            return _linear(right.t(), left.t()).t().contiguous()
        return _linear(left, right)
    # The variant with `out` is an operator of its own, with torch's kernel.
    return torch.ops.aten.mm.out(left, right, out=left.new_empty((left.shape[0], right.shape[1])))


def _addmm(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    is_plain = bias.shape == right.shape[1:] and bias.dtype is left.dtype and beta == alpha == 1
    if is_plain and _suits(left, right):
        return _linear(left, right, bias)
    out = left.new_empty((left.shape[0], right.shape[1]))
    return torch.ops.aten.addmm.out(bias, left, right, beta=beta, alpha=alpha, out=out)
