"""Causal attention of one rank's heads: fused, over all earlier positions or a window of them.

Shapes: S sequence, B micro-batch, N query heads of this rank, G key/value heads of this rank, D channels per head, W
window.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megagpt.model.varlen import attend_at_once, kernel_of_runs

QUERY_BLOCK = 512
"""Queries whose soft-capped scores are in memory at once."""


def causal_attention(
    query_BNSD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    scale: float | None = None,
    dropout: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of each position to itself and those before it; no S x S matrix is kept for the backward pass.

    Without window and cap torch chooses its fused kernel (FlashAttention, cuDNN); the causal mask is implied and
    grouped key/value heads are handed over as they are.

    Args:
        scale: factor of the scores; None: 1 / sqrt(D).
        dropout: probability with which a weight is dropped.
        window: positions that each one sees, itself included; None: all.
        softcap: scores become softcap tanh(score / softcap), which no kernel of torch computes; None: as they are.

    Returns:
        [B, N, S, D].
    """
    if softcap is not None:
        return _softcapped_attention(query_BNSD, key_BGSD, value_BGSD, scale, dropout, window, softcap)
    if window is not None and window < query_BNSD.shape[2]:
        return _windowed_attention(query_BNSD, key_BGSD, value_BGSD, scale, dropout, window)
    return F.scaled_dot_product_attention(
        query_BNSD,
        key_BGSD,
        value_BGSD,
        dropout_p=dropout,
        is_causal=True,
        scale=scale,
        enable_gqa=query_BNSD.shape[1] != key_BGSD.shape[1],
    )


def _windowed_attention(
    query_BNSD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, scale: float | None, dropout: float, window: int
) -> Tensor:
    """Sliding-window attention (Beltagy et al. 2020, Longformer), whose time grows with S W.

    Where torch has a kernel for windows it does all; else one block of W queries comes after the other. A block sees at
    most 2 W keys, and the largest mask is [W, 2 W] for all blocks.
    """
    kernel = kernel_of_runs(query_BNSD, dropout)
    if kernel is not None:
        starts = _starts_of_samples(query_BNSD.shape[0], query_BNSD.shape[2], query_BNSD.device)
        return attend_at_once(kernel, query_BNSD, key_BGSD, value_BGSD, starts, scale, window)
    # torch's fused kernel for masks takes no grouped heads; without it the scores of all heads would be kept.
    repeats = query_BNSD.shape[1] // key_BGSD.shape[1]
    key_BNSD, value_BNSD = (x.repeat_interleave(repeats, 1) if repeats > 1 else x for x in (key_BGSD, value_BGSD))
    band = _band_mask(window, query_BNSD.dtype, query_BNSD.device)
    blocks = []
    for start in range(0, query_BNSD.shape[2], window):
        stop = min(start + window, query_BNSD.shape[2])
        keys = slice(max(start - window, 0), stop)
        blocks.append(
            F.scaled_dot_product_attention(
                query_BNSD[:, :, start:stop],
                key_BNSD[:, :, keys],
                value_BNSD[:, :, keys],
                attn_mask=band[: stop - start, : window + stop - start] if start else None,
                dropout_p=dropout,
                is_causal=start == 0,  # the first block has no keys before it: its window is the causal mask
                scale=scale,
            )
        )
    return torch.cat(blocks, 2)


@lru_cache(maxsize=8)
def _starts_of_samples(batch: int, length: int, device: torch.device) -> Tensor:
    """Each sample is one run of tokens: [0, S, ..., B S], int32."""
    return torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=device)


@lru_cache(maxsize=8)
def _band_mask(window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[W, 2 W]: 0 where the query in row r, W keys after the first one, sees the key in column c, else -inf.

    A tensor of 0 and -inf is what the kernels take; a bool mask would be converted, and kept, at each call.
    """
    row, column = torch.arange(window, device=device)[:, None], torch.arange(2 * window, device=device)
    hidden = (column <= row) | (column > row + window)
    return torch.zeros(window, 2 * window, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


def _softcapped_attention(
    query_BNSD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    scale: float | None,
    dropout: float,
    window: int | None,
    softcap: float,
) -> Tensor:
    """Attention with bent scores (Gemma 2, arXiv 2408.00118, section 2), one block of queries after the other.

    The backward pass computes each block's scores again, so that they are never all in memory.
    """
    scale = query_BNSD.shape[-1] ** -0.5 if scale is None else scale
    length, blocks = query_BNSD.shape[2], []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        first = 0 if window is None else max(start - window + 1, 0)
        block = checkpoint(
            _softcapped_block,
            query_BNSD[:, :, start:stop],
            key_BGSD[:, :, first:stop],
            value_BGSD[:, :, first:stop],
            scale,
            dropout,
            window,
            softcap,
            use_reentrant=False,
        )
        blocks.append(block)
    return torch.cat(blocks, 2)


def _softcapped_block(
    query_BNQD: Tensor,
    key_BGKD: Tensor,
    value_BGKD: Tensor,
    scale: float,
    dropout: float,
    window: int | None,
    softcap: float,
) -> Tensor:
    """Q queries, the last of which stands at the last of K keys: [B, N, Q, D]."""
    (_, heads, queries, _), (_, groups, keys, _) = query_BNQD.shape, key_BGKD.shape
    # The queries of a group share its keys: one product of [N / G x Q, D] and [D, K].
    query_BGQD = query_BNQD.unflatten(1, (groups, heads // groups)).flatten(2, 3)
    at_least_fp32 = torch.promote_types(query_BNQD.dtype, torch.float32)
    scores_BGQK = (query_BGQD @ key_BGKD.transpose(2, 3)).to(at_least_fp32) * scale
    scores_BGNQK = (torch.tanh(scores_BGQK / softcap) * softcap).unflatten(2, (heads // groups, queries))
    position = torch.arange(keys, device=query_BNQD.device)
    distance_QK = position[keys - queries :, None] - position
    hidden_QK = distance_QK < 0 if window is None else (distance_QK < 0) | (distance_QK >= window)
    weights_BGNQK = scores_BGNQK.masked_fill(hidden_QK, float("-inf")).softmax(-1).to(value_BGKD.dtype)
    weights_BGQK = F.dropout(weights_BGNQK, dropout).flatten(2, 3)
    return (weights_BGQK @ value_BGKD).unflatten(2, (heads // groups, queries)).flatten(1, 2)
