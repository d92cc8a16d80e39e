"""Rotary positions (Su et al. 2021, arXiv 2104.09864), and their stretching for longer sequences.

Shapes: S positions, B micro-batch, N query heads, G key/value heads, D channels per head, R <= D of them rotated.
"""

import math
from functools import lru_cache
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor
from torch.autograd.function import once_differentiable

from megagpt.model.fusion import Fusable
from megagpt.plan import Plan
from megagpt.plan.config import RotaryScaling

Tables = tuple[Tensor, Tensor]
"""Cosines of the angles, and sines, the first half of them negated: [S, 1 or B, 1, R]."""


class Rotary:
    """Tables of cosines and sines, shared by the layers of a process.

    Args:
        angles: gives the angles of positions.
    """

    def __init__(self, angles: RotaryEmbedding):
        self.angles = angles
        self.tables = lru_cache(maxsize=4)(self._tables)

    def _tables(self, length: int, first: int, dtype: torch.dtype) -> Tables:
        """Of positions first to first + length - 1, in the type of what is rotated."""
        # `packed_seq` keeps Megatron-Core from cutting out what its own order of context-parallel ranks would need.
        angles_S11R = self.angles(length, first, packed_seq=True)
        sines_S11R = angles_S11R.sin()
        sines_S11R[..., : sines_S11R.shape[-1] // 2].neg_()
        return angles_S11R.cos().to(dtype), sines_S11R.to(dtype)

    def tables_at(self, positions_Bs: Tensor, length: int, dtype: torch.dtype) -> Tables:
        """Of given positions, all below `length`: [s, B, 1, R]."""
        cosines, sines = (table[:, 0][positions_Bs.t()] for table in self.tables(length, 0, dtype))
        return cosines, sines


def build_rotary(plan: Plan, windowed: bool = False) -> Rotary | None:
    """Rotary positions, or None for learned ones.

    Args:
        windowed: for the layers with a sliding window, which may have their own base.
    """
    model = plan.model
    if model.position_embedding_type != "rope":
        return None
    local = model.rotary_base_local if windowed else None
    rotary = RotaryEmbedding(
        model.kv_channels, model.rotary_percent, rotary_base=local or model.rotary_base, use_cpu_initialization=True
    )
    if model.rotary_scaling is not None and local is None:
        # Megatron-Core knows `llama3` with its first factor only.
        rotary.inv_freq = scaled_frequencies(rotary.inv_freq, model.rotary_scaling)
    return Rotary(rotary)


def scaled_frequencies(frequencies: Tensor, scaling: RotaryScaling) -> Tensor:
    """Frequencies in radians per position, stretched as `scaling` says.

    `llama3`: meta-llama/llama-models, `apply_scaling`. A frequency that turns less than `low_freq_factor` times in the
    original length is divided by `factor`, one that turns more than `high_freq_factor` times is kept, and between the
    two the results are mixed linearly.

    Args:
        frequencies: [R / 2].
    """
    if scaling.type == "linear":
        return frequencies / scaling.factor
    low, high, length = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    assert low is not None and high is not None and length is not None
    turns = length * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def rotate(query_SBND: Tensor, key_SBGD: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
    """Turn channel i and channel i + R / 2 of each head by the angle of their position; the other channels stay.

    Args:
        query_SBND: [S, B, N, D].
        key_SBGD: [S, B, G, D].
        tables: of the positions, in the type of the query.

    Returns:
        Query and key, turned.
    """
    return _Rotate.apply(query_SBND, key_SBGD, *tables)


class _Rotate(torch.autograd.Function):
    """Keeps the tables only: what turns back is the same with sines of the other sign."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor]:
        ctx.tables = cosines, sines
        return _turned(query, key, cosines, sines)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cosines, sines = ctx.tables
        return *_turned(grad_query, grad_key, cosines, -sines), None, None


@Fusable
def _turned(query: Tensor, key: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor]:
    size = cosines.shape[-1]
    turned = []
    for heads in (query, key):
        rotated = heads[..., :size]
        swapped = torch.cat([rotated[..., size // 2 :], rotated[..., : size // 2]], -1)
        result = torch.addcmul(rotated * cosines, swapped, sines)
        turned.append(result if size == heads.shape[-1] else torch.cat([result, heads[..., size:]], -1))
    return turned[0], turned[1]
