"""Gated activations that keep what they need for the backward pass, and no more."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class GatedActivation(nn.Module):
    """activation(gate) * up of the two halves of an MLP's first projection (Shazeer 2020, "GLU variants").

    Its backward pass computes the activation again from the projection's output, which is kept anyway. Megatron-Core's
    plain path keeps activation(gate) and a copy of `up` besides: 4 f more bytes per token in 16 bit for an MLP of width
    f, 40 % of what a Llama layer keeps.

    Args:
        activation: of the gate, elementwise.
    """

    def __init__(self, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.activation = activation

    def forward(self, projected: Tensor) -> Tensor:
        """[..., 2 F] (gate, then up) -> [..., F]."""
        return _Gate.apply(projected, self.activation)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(projected)
        ctx.activation = activation
        gate, up = projected.chunk(2, -1)
        return activation(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        gate, up = ctx.saved_tensors[0].chunk(2, -1)
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            activated = ctx.activation(gate)
        (grad_gate,) = torch.autograd.grad(activated, gate, grad * up)
        return torch.cat([grad_gate, grad * activated.detach()], -1), None
