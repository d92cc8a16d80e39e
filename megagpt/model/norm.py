"""Normalisation usable in sequence-parallel regions (Megatron-Core's torch norm refuses those)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        if self.is_rms:
            return F.rms_norm(hidden, self.shape, weight, self.eps)
        return F.layer_norm(hidden, self.shape, weight, bias, self.eps)


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
