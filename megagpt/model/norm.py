"""Normalisation usable in sequence-parallel regions (Megatron-Core's torch norm refuses those)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Norm(nn.Module):
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm (Ba et al. 2016), as the config's `normalization` says.

    With the config's `layernorm_zero_centered_gamma` the factor is 1 + weight.

    Args:
        config: Megatron-Core's TransformerConfig.
        hidden_size: number of channels.
        eps: epsilon inside the root.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__()
        self.shape, self.eps = (hidden_size,), eps
        self.is_rms = config.normalization == "RMSNorm"
        self.zero_centered = config.layernorm_zero_centered_gamma
        device = torch.cuda.current_device()
        self.weight = nn.Parameter(torch.full((hidden_size,), float(not self.zero_centered), device=device))
        self.bias = None if self.is_rms else nn.Parameter(torch.zeros(hidden_size, device=device))
        for parameter in self.parameters():
            # Under sequence parallelism each TP rank sees a part of the sequence.
            parameter.partial_over_tensor_ranks = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise the last dimension."""
        if not self.zero_centered:
            return self._normalise(hidden, self.weight, self.bias)
        # In fp32: 16 bits would round 1 + weight, whose very point is that small weights keep their digits.
        bias = None if self.bias is None else self.bias.float()
        return self._normalise(hidden.float(), 1 + self.weight.float(), bias).to(hidden.dtype)

    def _normalise(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.is_rms and hidden.device.type == "cpu":
            return _RMSNorm.apply(hidden, weight, self.eps)
        if self.is_rms:
            return F.rms_norm(hidden, self.shape, weight, self.eps)
        return F.layer_norm(hidden, self.shape, weight, bias, self.eps)


class _RMSNorm(torch.autograd.Function):
    """RMSNorm on the CPU, where torch has no kernel of it and makes it up from twice as many passes over the tensor.

    As torch does, it computes in fp32 at least, and keeps its input and one number per row.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        mean_square = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=dtype).square_()
        factor = mean_square.div_(hidden.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, factor)
        return (hidden.to(dtype) * factor).mul_(weight.to(dtype)).to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, factor = ctx.saved_tensors
        dtype = factor.dtype
        normed, wide_weight = hidden.to(dtype) * factor, weight.to(dtype)
        grad = grad.to(dtype)  # first: operators are slow on operands of two types
        product = grad * normed
        along_normed = (product @ (wide_weight / hidden.shape[-1])).unsqueeze(-1)
        grad_weight = product.flatten(0, -2).sum(0)
        grad_hidden = (grad * wide_weight).addcmul_(normed, along_normed, value=-1).mul_(factor)
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), None


class HeadNorm(Norm):
    """Norm over the channels of a head, with one weight for all heads: query and key of Qwen3 and Gemma 3.

    Each TP rank normalises its own heads, so the gradient on a rank is partial with or without sequence parallelism.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__(config, hidden_size, eps)
        for parameter in self.parameters():
            parameter.partial_over_tensor_ranks = True  # type: ignore[attr-defined]


def is_partial_over_tensor_ranks(parameter: nn.Parameter) -> bool:
    """Whether a parameter is whole on each TP rank while its gradient covers the rank's own tokens or heads only.

    The ranks' gradients must be summed. Our norms mark it themselves; Megatron-Core marks `sequence_parallel` on the
    biases that it adds to parts of the sequence.
    """
    return getattr(parameter, "partial_over_tensor_ranks", False) or getattr(parameter, "sequence_parallel", False)
