"""torch's FlashAttention for runs of tokens of various lengths, one behind the other: documents, or whole samples.

Shapes: B samples of a micro-batch, S sequence, N query heads of this rank, G its key/value heads, D channels per head,
T = B S tokens.
"""

import importlib.util
import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

Kernel = Callable[..., Tensor]
_is_used = True


def use_kernel(is_used: bool) -> None:
    """Whether this process uses the kernel, where it has it."""
    global _is_used
    _is_used = is_used


def kernel_of_runs(query: Tensor, dropout: float) -> Kernel | None:
    """torch's `varlen_attn`, where it takes what it would be given; else None.

    It is for GPUs since Ampere, 16 bits and heads of up to 256 channels in steps of 8, without dropout; unlike
    `scaled_dot_product_attention` it neither pads nor falls back (aten/native/transformers/cuda/flash_attn).
    """
    if not _is_used or not query.is_cuda or query.dtype.itemsize != 2 or dropout > 0:
        return None
    channels = query.shape[-1]
    suits = channels % 8 == 0 and channels <= 256 and torch.cuda.get_device_capability(query.device) >= (8, 0)
    return torchs_kernel() if suits else None


@lru_cache(maxsize=1)
def torchs_kernel() -> Kernel | None:
    """`varlen_attn` of this torch, if it can do windows and grouped heads."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    kernel: Callable[..., Any] = varlen_attn
    return kernel if {"scale", "window_size", "enable_gqa"} <= set(known) else None


def attend_at_once(
    kernel: Kernel,
    query_BNSD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    starts: Tensor,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Causal attention within each run, all in one call.

    Args:
        kernel: with the arguments of `varlen_attn`.
        query_BNSD: [B, N, S, D].
        key_BGSD: [B, G, S, D].
        value_BGSD: [B, G, S, D].
        starts: where each run begins among all T, and T; int32 [runs + 1].
        scale: factor of the scores; None: 1 / sqrt(D).
        window: positions that each token sees, itself included, while the kernel counts those before it; None: all.

    Returns:
        [B, N, S, D].
    """
    batch, length = query_BNSD.shape[0], query_BNSD.shape[2]
    query_TND, key_TGD, value_TGD = (x.transpose(1, 2).flatten(0, 1) for x in (query_BNSD, key_BGSD, value_BGSD))
    context_TND = kernel(
        query_TND,
        key_TGD,
        value_TGD,
        starts,
        starts,
        length,
        length,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query_TND.shape[1] != key_TGD.shape[1],
    )
    return context_TND.unflatten(0, (batch, length)).transpose(1, 2)
