"""The experts of a rank in a few kernels: one grouped matrix product in place of a product per expert.

With many small experts a GPU takes longer to be told of all their products than to compute them. torch's
`grouped_mm` takes the tokens of all experts, expert after expert, and the weights of all in one go.

Shapes: T tokens sent to this rank's experts, E such experts, H hidden size, F width of an expert / TP.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor
from torch.autograd.function import once_differentiable

from megagpt.errors import in_one_line
from megagpt.model.activation import GatedActivation
from megagpt.plan import Plan

MAJORS = (9, 10)
"""Major compute capabilities that torch has kernels for; on others it computes one expert after the other."""
ALLOWED = 1e-2
"""Relative distance from fp64 in 2-norm; rounding a result to bf16 gives about 1e-3."""
TOKENS = (40, 0, 7, 81)
"""Of each expert in the proof: none, and numbers that no block of a kernel divides."""
LARGEST = 1024
"""Channels in the proof: the weights of a large model would take gigabytes in fp64."""
NO_KERNEL = "no kernel"
"""What a rank says whose device or torch has none."""


class GroupedExperts(SequentialMLP):
    """Megatron-Core's experts, with the same weights: one by one, or all at once if `group_experts` says so."""

    are_grouped = False
    """Of this process."""

    def forward(self, tokens_TH: Tensor, tokens_per_expert: Tensor, weights_T: Tensor) -> tuple[Tensor, Tensor | None]:
        """[T, H], expert after expert, to [T, H] and no bias.

        Args:
            tokens_TH: in the order of the experts.
            tokens_per_expert: [E], sums to T.
            weights_T: the router's, for each token.
        """
        if not GroupedExperts.are_grouped or len(tokens_TH) == 0:
            return super().forward(tokens_TH, tokens_per_expert, weights_T)
        ends_E = tokens_per_expert.to(tokens_TH.device, non_blocking=True).cumsum(0, dtype=torch.int32)
        experts: Any = self.local_experts
        projected_TF = grouped_linear(tokens_TH, [expert.linear_fc1.weight for expert in experts], ends_E)
        activation = experts[0].activation_func
        if isinstance(activation, GatedActivation):
            hidden_TF = activation.weighted(projected_TF, weights_T)
        else:
            hidden_TF = (activation(projected_TF) * weights_T.unsqueeze(-1)).to(projected_TF.dtype)
        return grouped_linear(hidden_TF, [expert.linear_fc2.weight for expert in experts], ends_E), None


def grouped_linear(inputs_TK: Tensor, weights_NK: Sequence[Tensor], ends_E: Tensor) -> Tensor:
    """Multiply each expert's tokens with its weight.

    Args:
        inputs_TK: [T, K], expert after expert.
        weights_NK: of each expert, [N, K].
        ends_E: [E] int32, where the tokens of each expert end.

    Returns:
        [T, N].
    """
    return _GroupedLinear.apply(inputs_TK, ends_E, *weights_NK)


class _GroupedLinear(torch.autograd.Function):
    """Keeps the weights as they are: torch's own backward pass would keep the copy that joins them."""

    @staticmethod
    def forward(ctx: Any, inputs_TK: Tensor, ends_E: Tensor, *weights_NK: Tensor) -> Tensor:
        ctx.save_for_backward(inputs_TK, ends_E, *weights_NK)
        return F.grouped_mm(inputs_TK, _joined(weights_NK).mT, offs=ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TN: Tensor) -> tuple[Tensor | None, ...]:
        inputs_TK, ends_E, *weights_NK = ctx.saved_tensors
        grad_TN = grad_TN.contiguous()
        grad_inputs_TK = F.grouped_mm(grad_TN, _joined(weights_NK), offs=ends_E)
        grad_weights_ENK = F.grouped_mm(grad_TN.t(), inputs_TK, offs=ends_E)
        return grad_inputs_TK, None, *grad_weights_ENK.unbind()


def _joined(weights_NK: Sequence[Tensor]) -> Tensor:
    """[E, N, K]; no copy if they lie at equal distances, as in DeepSpeed's flat buffers."""
    first, last, count = weights_NK[0], weights_NK[-1], len(weights_NK)
    start, distance = first.data_ptr(), weights_NK[1].data_ptr() - first.data_ptr()
    if (
        # Kernels load 16 bytes at a time.
        distance > 0 == distance % 16 == start % 16
        and [weight.data_ptr() for weight in weights_NK] == list(range(start, start + count * distance, distance))
        and first.untyped_storage().data_ptr() == last.untyped_storage().data_ptr()
        and all(weight.is_contiguous() for weight in weights_NK)
    ):
        return first.as_strided((count, *first.shape), (distance // first.element_size(), *first.stride()))
    return torch.stack(tuple(weights_NK))


def group_experts(plan: Plan, device: torch.device, gather: Callable[[str], list[str]]) -> str | None:
    """Have experts computed in groups from now on, where that works. Collective; all ranks do the same.

    Args:
        plan: gives `training.moe_grouped_gemm` and the experts.
        device: this rank's.
        gather: gives what all ranks say, in rank order.

    Returns:
        What to tell the user: why it cannot be done; None: it is done, or not wanted, or of no use.
    """
    GroupedExperts.are_grouped = False
    if not plan.run.training.moe_grouped_gemm or not can_be_grouped(plan) or device.type != "cuda":
        return None
    found = gather(_obstacle(plan, device))
    rank = next((rank for rank, obstacle in enumerate(found) if obstacle), None)
    GroupedExperts.are_grouped = rank is None
    if rank is None or found[rank] == NO_KERNEL:
        return None
    return (
        "experts are computed one after the other, as torch's grouped matrix product cannot be used: rank "
        f"{rank}: {found[rank]} (training.moe_grouped_gemm=false silences this)"
    )


def can_be_grouped(plan: Plan) -> bool:
    """Whether the experts are what the kernels are for: several, in bf16, of whole groups of 8 channels.

    Stage 3 gathers each expert's weights for its own product.
    """
    model = plan.model
    if model.num_experts is None or plan.precision != "bf16" or plan.zero_stage == 3:
        return False
    is_several = model.num_experts > plan.expert_parallel_size
    return is_several and all(size % 8 == 0 for size in (model.hidden_size, _width(plan)))


def _width(plan: Plan) -> int:
    assert plan.model.moe_ffn_hidden_size is not None
    return plan.model.moe_ffn_hidden_size // plan.tensor_parallel_size


def _obstacle(plan: Plan, device: torch.device) -> str:
    """Why this rank cannot use the kernels; empty if it can, and they are right on it."""
    if not hasattr(F, "grouped_mm") or torch.cuda.get_device_capability(device)[0] not in MAJORS:
        return NO_KERNEL
    try:
        return prove(plan.model.hidden_size, _width(plan), device)
    except Exception as error:  # whatever the kernels of this host raise
        return in_one_line(error)


def prove(hidden_size: int, width: int, device: torch.device) -> str:
    """Compare an expert's two products, and their gradients, with the same ones in fp64, weights lying as in training.

    One of the experts has no token.

    Args:
        hidden_size: of the model; no more than `LARGEST` of it is tried.
        width: of an expert; the same.
        device: where to compute.

    Returns:
        What is wrong; empty if nothing is.
    """
    hidden_size, width = min(hidden_size, LARGEST), min(width, LARGEST)
    shapes = (2 * width, hidden_size), (hidden_size, width)  # as with a gate
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randn(len(TOKENS), sum(math.prod(shape) for shape in shapes), generator=generator)
    experts = [row.split([math.prod(shape) for shape in shapes]) for row in numbers.to(device, torch.bfloat16)]
    for index, shape in enumerate(shapes):
        wrong = _wrong([weights[index].view(shape) for weights in experts], generator)
        if wrong:
            return wrong
    return ""


def _wrong(weights_NK: list[Tensor], generator: torch.Generator) -> str:
    """What is wrong with the products with these weights; empty if nothing is."""
    (width, hidden_size), device = weights_NK[0].shape, weights_NK[0].device

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

    inputs = [draw(sum(TOKENS), hidden_size), *weights_NK]
    grad_TN = draw(sum(TOKENS), width)
    ends_E = torch.tensor(TOKENS, device=device).cumsum(0, dtype=torch.int32)
    right = _results(_one_by_one, [tensor.double() for tensor in inputs], grad_TN.double())
    torch.full((len(TOKENS), width, hidden_size), torch.nan, dtype=torch.bfloat16, device=device)  # left in its memory
    found = _results(lambda tokens, *weights: grouped_linear(tokens, weights, ends_E), inputs, grad_TN)
    for name, one, two in zip(("result", "gradient of tokens", *TOKENS), found, right, strict=True):
        distance = float((one - two).norm())
        if not distance <= ALLOWED * float(two.norm()):  # also if it is none
            what = name if isinstance(name, str) else f"gradient of the weight of an expert with {name} tokens"
            return f"the {what} is wrong"
    return ""


def _one_by_one(tokens: Tensor, *weights: Tensor) -> Tensor:
    return torch.cat([part @ weight.t() for part, weight in zip(tokens.split(TOKENS), weights, strict=True)])


def _results(multiply: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Result and gradients of the inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = multiply(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]
