"""Head and next-token loss as one: the logits exist for a chunk of the tokens at a time, and never twice.

The gradients of the hidden states and of the head's weight are formed with the loss, chunk by chunk, as the logits are
still there (the idea of Hsu et al. 2024, "Liger Kernel", section 3.2), here with the vocabulary cut over the
tensor-parallel ranks and in plain torch.

Shapes: T tokens, H hidden size, V padded vocabulary / TP.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.autograd.function import once_differentiable

from megagpt.model.fusion import Fusable
from megagpt.plan.estimates import SMALLEST_CHUNK_BYTES, head_chunk_tokens

CACHED_BYTES = 4 << 20
"""fp32 logits that stay in a CPU's caches while they are worked on."""


def head_loss(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    num_real_tokens: int,
    softcap: float | None = None,
    loss_tokens: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy of the next tokens, in fp32.

    Args:
        hidden_TH: [T, H], the same on all tensor-parallel ranks; its gradient is this rank's share of a sum.
        weight_VH: [V, H], this rank's rows of the head's weight.
        labels_T: [T], token ids.
        num_real_tokens: rows of the weight that are no padding.
        softcap: c of the soft cap c tanh(logits / c), if there is one.
        loss_tokens: if given, labels below 0 do not count, and the sum over the others is divided by this scalar.

    Returns:
        Scalar; equal on all tensor-parallel ranks.
    """
    needs_gradients = torch.is_grad_enabled() and (hidden_TH.requires_grad or weight_VH.requires_grad)
    return _HeadLoss.apply(hidden_TH, weight_VH, labels_T, num_real_tokens, softcap, loss_tokens, needs_gradients)


class _HeadLoss(torch.autograd.Function):
    """Keeps the gradients for a loss of weight 1 in place of the logits; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        labels_T: Tensor,
        num_real_tokens: int,
        softcap: float | None,
        loss_tokens: Tensor | None,
        needs_gradients: bool,
    ) -> Tensor:
        num_tokens = hidden_TH.shape[0]
        # Softmax minus one-hot has entries down to 0 and up to 1, its products sums over all tokens: a power of two
        # between the two keeps both within fp16, and changes no digit.
        scale = 2.0 ** -(num_tokens.bit_length() // 2)
        first_token = parallel_state.get_tensor_model_parallel_rank() * weight_VH.shape[0]
        grad_hidden_TH = torch.empty_like(hidden_TH) if needs_gradients else None
        grad_weight_VH: Tensor | None = None
        total = torch.zeros((), dtype=torch.float32, device=hidden_TH.device)
        size = head_chunk_tokens(num_tokens, *weight_VH.shape)
        for start in range(0, num_tokens, size):
            chunk_CH = hidden_TH[start : start + size]
            labels_C = labels_T[start : start + size]
            counts_C = None if loss_tokens is None else labels_C >= 0
            labels_C = labels_C - first_token
            logits_CV = chunk_CH @ weight_VH.t()
            for rows in _rows_at_once(logits_CV):
                counts = None if counts_C is None else counts_C[rows]
                total += _lose(logits_CV[rows], labels_C[rows], num_real_tokens, softcap, scale, counts)
            if grad_hidden_TH is None:
                continue
            grad_CV = logits_CV
            grad_hidden_TH[start : start + size] = grad_CV @ weight_VH
            if ctx.needs_input_grad[1]:
                product_VH = grad_CV.t() @ chunk_CH
                if size == num_tokens:  # nothing to add up, so no fp32 copy of what may be the largest matrix
                    grad_weight_VH = product_VH
                else:
                    grad_weight_VH = product_VH.float() if grad_weight_VH is None else grad_weight_VH.add_(product_VH)
        ctx.gradients = grad_hidden_TH, grad_weight_VH
        divisor = num_tokens if loss_tokens is None else loss_tokens
        ctx.scale, ctx.dtype = 1 / (scale * divisor), weight_VH.dtype
        return total / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_TH, grad_weight_VH = ctx.gradients
        ctx.gradients = None  # scaled in place, so good for one backward pass
        factor = grad_loss * ctx.scale
        _scale(grad_hidden_TH, factor)
        if grad_weight_VH is not None:
            _scale(grad_weight_VH, factor)
            grad_weight_VH = grad_weight_VH.to(ctx.dtype)
        return grad_hidden_TH, grad_weight_VH, None, None, None, None, None


def _scale(matrix: Tensor, factor: Tensor) -> None:
    """Multiply in place, in fp32: a 16-bit product would round the factor first, and so goes some rows at a time."""
    if matrix.dtype is torch.float32:
        matrix.mul_(factor)
        return
    for rows in matrix.split(max(SMALLEST_CHUNK_BYTES // (4 * matrix.shape[1]), 1)):
        rows.copy_(rows.float() * factor)


def _rows_at_once(logits_CV: Tensor) -> Iterator[slice]:
    """Tokens whose logits are turned into gradients in one go.

    On a CPU as many as its caches hold, as each pass over them is as fast as the memory that they lie in. All, where
    each go has its price: on a GPU, and where tensor-parallel ranks talk about it.
    """
    num_tokens, vocabulary = logits_CV.shape
    is_split = parallel_state.get_tensor_model_parallel_world_size() > 1
    size = num_tokens if is_split or logits_CV.is_cuda else max(CACHED_BYTES // (4 * vocabulary), 1)
    for start in range(0, num_tokens, size):
        yield slice(start, start + size)


def _lose(
    logits_CV: Tensor,
    labels_C: Tensor,
    num_real_tokens: int,
    softcap: float | None,
    scale: float,
    counts_C: Tensor | None = None,
) -> Tensor:
    """Sum of the losses, in fp32; `scale` x their gradients take the place of the logits.

    Args:
        logits_CV: this rank's part of the vocabulary, padding included, in the type of the weights.
        labels_C: token ids counted from this rank's first.
        num_real_tokens: columns that are no padding.
        softcap: soft cap of the logits.
        scale: factor of the gradients.
        counts_C: False for tokens without loss and gradient; None: all count.
    """
    if Fusable.are_fused:
        return _fused_cross_entropy(logits_CV, labels_C, num_real_tokens, softcap, scale, counts_C).sum()
    wide_CV = logits_CV.float()
    if softcap is None:
        bent_CV = None
    else:
        bent_CV = wide_CV.div_(softcap).tanh_()
        wide_CV = bent_CV * softcap
    wide_CV[:, num_real_tokens:] = float("-inf")
    losses_C, grad_CV = _cross_entropy(wide_CV, labels_C, scale, counts_C)
    if bent_CV is not None:
        grad_CV *= 1 - bent_CV**2
    logits_CV.copy_(grad_CV)  # in fp32 mostly itself
    return losses_C.sum()


def _fused_cross_entropy(
    logits_CV: Tensor,
    labels_C: Tensor,
    num_real_tokens: int,
    softcap: float | None,
    scale: float,
    counts_C: Tensor | None,
) -> Tensor:
    """Losses [C]; `scale` x their gradients take the place of the logits. Arguments as for `_lose`.

    Each of its three passes is a kernel that reads the logits as they are, and nothing as large is ever in fp32.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    is_split = parallel_state.get_tensor_model_parallel_world_size() > 1
    largest_C = _largest(logits_CV, num_real_tokens, softcap)
    if is_split:
        dist.all_reduce(largest_C, op=dist.ReduceOp.MAX, group=group)
    sums_2C = _sums(logits_CV, labels_C, largest_C, num_real_tokens, softcap)
    if is_split:
        dist.all_reduce(sums_2C, group=group)
    normalisers_C, label_logits_C = sums_2C
    losses_C = normalisers_C.log() - label_logits_C
    factors_C = torch.full_like(losses_C, scale)
    if counts_C is not None:
        losses_C.masked_fill_(~counts_C, 0.0)
        factors_C.masked_fill_(~counts_C, 0.0)
    _write_gradients(logits_CV, labels_C, largest_C, normalisers_C, factors_C, num_real_tokens, softcap)
    return losses_C


@Fusable
def _largest(logits_CV: Tensor, num_real_tokens: int, softcap: float | None) -> Tensor:
    """Largest logit of each token among this rank's, [C] fp32."""
    return _bent(logits_CV, num_real_tokens, softcap)[0].amax(1)


@Fusable
def _sums(
    logits_CV: Tensor, labels_C: Tensor, largest_C: Tensor, num_real_tokens: int, softcap: float | None
) -> Tensor:
    """Over this rank's columns: of exp(logit - largest), and of logit - largest at the label; [2, C]."""
    shifted_CV = _bent(logits_CV, num_real_tokens, softcap)[0] - largest_C.unsqueeze(1)
    at_label_CV = torch.where(_is_label(logits_CV, labels_C), shifted_CV, 0.0)
    return torch.stack((shifted_CV.exp().sum(1), at_label_CV.sum(1)))


@Fusable
def _write_gradients(
    logits_CV: Tensor,
    labels_C: Tensor,
    largest_C: Tensor,
    normalisers_C: Tensor,
    factors_C: Tensor,
    num_real_tokens: int,
    softcap: float | None,
) -> None:
    """Factor of the token x (softmax - one-hot), through the soft cap, in the place of the logits."""
    bent_CV, slope_CV = _bent(logits_CV, num_real_tokens, softcap)
    probabilities_CV = (bent_CV - largest_C.unsqueeze(1)).exp() / normalisers_C.unsqueeze(1)
    grad_CV = (probabilities_CV - _is_label(logits_CV, labels_C).float()) * factors_C.unsqueeze(1)
    logits_CV.copy_(grad_CV if slope_CV is None else grad_CV * slope_CV)


def _bent(logits_CV: Tensor, num_real_tokens: int, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Logits in fp32, capped, padding at -inf, and the slope of the cap."""
    wide_CV, slope_CV = logits_CV.float(), None
    if softcap is not None:
        tanh_CV = torch.tanh(wide_CV / softcap)
        wide_CV, slope_CV = tanh_CV * softcap, 1 - tanh_CV**2
    is_padding_V = torch.arange(wide_CV.shape[1], device=wide_CV.device) >= num_real_tokens
    return torch.where(is_padding_V, float("-inf"), wide_CV), slope_CV


def _is_label(logits_CV: Tensor, labels_C: Tensor) -> Tensor:
    return torch.arange(logits_CV.shape[1], device=logits_CV.device) == labels_C.unsqueeze(1)


def _cross_entropy(
    logits_CV: Tensor, labels_C: Tensor, scale: float, counts_C: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Losses [C], and `scale` x their gradients in the place of the logits [C, V].

    Args:
        logits_CV: fp32, this rank's part of the vocabulary, padding at -inf; overwritten.
        labels_C: token ids counted from this rank's first; those outside belong to other ranks.
        scale: factor of the gradients.
        counts_C: False for tokens without loss and gradient; None: all count.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    is_split = parallel_state.get_tensor_model_parallel_world_size() > 1
    is_mine_C = (labels_C >= 0) & (labels_C < logits_CV.shape[1])
    columns_C1 = torch.where(is_mine_C, labels_C, 0).unsqueeze(1)
    largest_C = logits_CV.amax(1)
    if is_split:
        dist.all_reduce(largest_C, op=dist.ReduceOp.MAX, group=group)
    logits_CV -= largest_C.unsqueeze(1)
    label_logits_C = torch.where(is_mine_C, logits_CV.gather(1, columns_C1).squeeze(1), 0.0)
    exponentials_CV = logits_CV.exp_()
    sums_2C = torch.stack((exponentials_CV.sum(1), label_logits_C))
    if is_split:
        dist.all_reduce(sums_2C, group=group)
    normalisers_C, label_logits_C = sums_2C
    gradients_CV = exponentials_CV.mul_((scale / normalisers_C).unsqueeze(1))
    gradients_CV.scatter_add_(1, columns_C1, -scale * is_mine_C.to(torch.float32).unsqueeze(1))
    losses_C = normalisers_C.log() - label_logits_C
    if counts_C is not None:
        losses_C.masked_fill_(~counts_C, 0.0)
        gradients_CV.masked_fill_(~counts_C.unsqueeze(1), 0.0)
    return losses_C, gradients_CV
