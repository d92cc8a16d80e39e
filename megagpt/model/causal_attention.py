"""Causal attention of one rank's heads: fused, over all earlier positions or a window of them.

Shapes: S sequence, B micro-batch, N query heads of this rank, G key/value heads of this rank, D channels per head, W
window.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(
    query_BNSD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    scale: float | None = None,
    dropout: float = 0.0,
    window: int | None = None,
) -> Tensor:
    """Fused attention of each position to itself and those before it.

    The causal mask is implied, never built; grouped key/value heads are handed over as they are, not repeated.

    Args:
        scale: factor of the scores; None: 1 / sqrt(D).
        dropout: probability with which a weight is dropped.
        window: positions that each one sees, itself included; None: all.

    Returns:
        [B, N, S, D].
    """
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
    """Sliding-window attention (Beltagy et al. 2020, Longformer), one block of W queries after the other.

    A block sees at most 2 W keys, so that time grows with S W, and the largest mask is [W, 2 W] for all blocks.
    """
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
def _band_mask(window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[W, 2 W]: 0 where the query in row r, W keys after the first one, sees the key in column c, else -inf.

    A tensor of 0 and -inf is what the kernels take; a bool mask would be converted, and kept, at each call.
    """
    row, column = torch.arange(window, device=device)[:, None], torch.arange(2 * window, device=device)
    hidden = (column <= row) | (column > row + window)
    return torch.zeros(window, 2 * window, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
