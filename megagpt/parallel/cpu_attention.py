"""A faster kernel for causal attention on AMD processors, put in place of torch's own for this process.

torch's fused kernel for the CPU multiplies small bf16 blocks with MKL, which is slow on AMD processors: bf16 takes as
long as fp32 there. Here each block of queries is multiplied with all its keys by oneDNN's bf16 kernels, in half the
time; what is in memory of the scores stays small. Scores are rounded to bf16, as in any attention that is no fused
kernel; softmax is in fp32. In fp32 the same blocks save a quarter of the time for sequences of some hundred positions,
as whole blocks of all heads are one product of MKL, and lie in a cache.

Shapes: B micro-batch, N query heads, G key/value heads, S sequence, D channels per head; H = B G, R = N / G query heads
that share a key, Q queries of a block, K keys that they see.
"""

import functools
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megagpt.parallel.cpu_kernels import mkl_is_slow

SHORTEST_SEQUENCE = 128
"""Below it torch's kernel is as fast."""


class Blocks(NamedTuple):
    """How attention in one type is cut."""

    queries: int
    """Of a block."""
    most_scores: int
    """In memory at once, except that a block of one key head is never cut: what caches hold."""
    longest: int = sys.maxsize
    """Sequence from which on torch's kernel is as fast."""


BLOCKS = {torch.bfloat16: Blocks(128, 1 << 22), torch.float32: Blocks(64, 1 << 18, longest=1024)}

_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
_BACKWARD = f"{_FORWARD}_backward"


def slow_types() -> frozenset[torch.dtype]:
    """In which torch's attention is slow on this processor, though products are fast."""
    if not (hasattr(torch.library, "get_kernel") and mkl_is_slow()):  # since torch 2.9
        return frozenset()
    return frozenset({torch.float32} | ({torch.bfloat16} if torch.cpu._is_avx512_bf16_supported() else set()))


@functools.cache
def attend_in_blocks(types: frozenset[torch.dtype] = frozenset(BLOCKS)) -> torch.library.Library:
    """Replace torch's fused attention on the CPU where it is causal, in one of `types`, without mask and dropout.

    Returns:
        What keeps the replacement alive; kept here too, so it lasts as long as the process.
    """
    library = torch.library.Library("aten", "IMPL")
    torchs_forward = torch.library.get_kernel(f"aten::{_FORWARD}", "CPU")
    torchs_backward = torch.library.get_kernel(f"aten::{_BACKWARD}", "CPU")

    def forward(
        keys: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not (is_causal and attn_mask is None and dropout_p == 0 and _suits(query, key, value, types)):
            return torchs_forward.call_boxed(
                keys, query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )
        # The backward pass finds the weights again without the logarithms of their sums; none say whose pass it is.
        return _attend(query, key, value, _factor(query, scale)), query.new_empty(0, dtype=torch.float32)

    def backward(
        keys: Any,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        dropout_p: float,
        is_causal: bool,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if logsumexp.numel() > 0 or query.numel() == 0:
            arguments = (grad_out, query, key, value, out, logsumexp, dropout_p, is_causal)
            return torchs_backward.call_boxed(keys, *arguments, attn_mask=attn_mask, scale=scale)
        return _gradients(grad_out, query, key, value, _factor(query, scale))

    library.impl(_FORWARD, forward, "CPU", with_keyset=True)
    library.impl(_BACKWARD, backward, "CPU", with_keyset=True)
    return library


def _suits(query: Tensor, key: Tensor, value: Tensor, types: frozenset[torch.dtype]) -> bool:
    return (
        query.dtype in types
        and query.dtype is key.dtype is value.dtype
        and SHORTEST_SEQUENCE <= query.shape[2] == key.shape[2] <= BLOCKS[query.dtype].longest
        and key.shape == value.shape
        and query.shape[1] % key.shape[1] == 0
    )


def _factor(query: Tensor, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


def _attend(query_BNSD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, scale: float) -> Tensor:
    out_BNSD = _empty_like(query_BNSD)
    query_HRSD, out_HRSD = (_by_key_head(x, key_BGSD) for x in (query_BNSD, out_BNSD))
    key_HSD, value_HSD = key_BGSD.flatten(0, 1), value_BGSD.flatten(0, 1)
    for heads in _head_chunks(query_HRSD):
        for queries, keys in _query_blocks(query_HRSD):
            query_hqD = query_HRSD[heads, :, queries].flatten(1, 2)
            weights_hqK = _weights(query_hqD, key_HSD[heads, keys], queries, scale)
            out_HRSD[heads, :, queries] = (weights_hqK @ value_HSD[heads, keys]).unflatten(1, (-1, _length(queries)))
    return out_BNSD


def _gradients(
    grad_BNSD: Tensor, query_BNSD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of query, key and value, from that of the output; the softmax is computed again."""
    results = [_empty_like(x) for x in (query_BNSD, key_BGSD, value_BGSD)]
    grad_HRSD, query_HRSD, grad_query_HRSD = (_by_key_head(x, key_BGSD) for x in (grad_BNSD, query_BNSD, results[0]))
    key_HSD, value_HSD, grad_key_HSD, grad_value_HSD = (x.flatten(0, 1) for x in (key_BGSD, value_BGSD, *results[1:]))
    for heads in _head_chunks(query_HRSD):
        # Summed over blocks of queries in fp32.
        grad_key_hSD, grad_value_hSD = (torch.zeros_like(key_HSD[heads], dtype=torch.float32) for _ in range(2))
        for queries, keys in _query_blocks(query_HRSD):
            query_hqD, grad_hqD = (x[heads, :, queries].flatten(1, 2) for x in (query_HRSD, grad_HRSD))
            key_hKD, value_hKD = key_HSD[heads, keys], value_HSD[heads, keys]
            weights_hqK = _weights(query_hqD, key_hKD, queries, scale)
            grad_value_hSD[:, keys] += weights_hqK.transpose(1, 2) @ grad_hqD
            grad_scores_hqK = torch._softmax_backward_data(
                grad_hqD @ value_hKD.transpose(1, 2), weights_hqK, -1, weights_hqK.dtype
            )
            grad_key_hSD[:, keys] += _scaled_product(grad_scores_hqK.transpose(1, 2), query_hqD, scale)
            grad_query_hqD = _scaled_product(grad_scores_hqK, key_hKD, scale)
            grad_query_HRSD[heads, :, queries] = grad_query_hqD.unflatten(1, (-1, _length(queries)))
        grad_key_HSD[heads], grad_value_HSD[heads] = grad_key_hSD, grad_value_hSD
    return results[0], results[1], results[2]


def _weights(query_hqD: Tensor, key_hKD: Tensor, queries: slice, scale: float) -> Tensor:
    """Softmax of a block's scores, [h, R Q, K]."""
    scores_hqK = _scaled_product(query_hqD, key_hKD.transpose(1, 2), scale)
    length = _length(queries)
    # Of a block's keys, only those at its own positions may lie behind a query.
    scores_hqK.unflatten(1, (-1, length))[..., queries] += _hidden(length, scores_hqK.dtype)
    return scores_hqK.softmax(-1)


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """The factor meets the fp32 sum, so that nothing is rounded twice."""
    return torch.baddbmm(left.new_empty(()), left, right, beta=0, alpha=scale)


@functools.lru_cache(maxsize=8)
def _hidden(length: int, dtype: torch.dtype) -> Tensor:
    """[Q, Q]: -inf where a key stands behind the query of the row, else 0."""
    return torch.full((length, length), float("-inf"), dtype=dtype).triu_(1)


def _head_chunks(query_HRSD: Tensor) -> Iterator[slice]:
    heads, shared, length, _ = query_HRSD.shape
    blocks = BLOCKS[query_HRSD.dtype]
    size = max(blocks.most_scores // (shared * min(blocks.queries, length) * length), 1)
    for start in range(0, heads, size):
        yield slice(start, min(start + size, heads))


def _query_blocks(query_HRSD: Tensor) -> Iterator[tuple[slice, slice]]:
    """Positions of a block of queries and of all keys that they see."""
    length, size = query_HRSD.shape[2], BLOCKS[query_HRSD.dtype].queries
    for start in range(0, length, size):
        stop = min(start + size, length)
        yield slice(start, stop), slice(stop)


def _length(part: slice) -> int:
    return part.stop - part.start


def _by_key_head(x_BNSD: Tensor, key_BGSD: Tensor) -> Tensor:
    """[B, N, S, D] as [H, R, S, D]."""
    return x_BNSD.unflatten(1, (key_BGSD.shape[1], -1)).flatten(0, 1)


def _empty_like(x_BNSD: Tensor) -> Tensor:
    """Laid out as [S, B, N, D], as the layers around attention have it; heads of all samples are then one dimension."""
    batch, heads, length, channels = x_BNSD.shape
    return x_BNSD.new_empty(length, batch, heads, channels).permute(1, 2, 0, 3)
