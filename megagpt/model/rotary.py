"""Rotary position frequencies (Su et al. 2021, arXiv 2104.09864), and their stretching for longer sequences."""

import math

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from megagpt.plan import Plan
from megagpt.plan.config import RotaryScaling


def build_rotary(plan: Plan, windowed: bool = False) -> RotaryEmbedding | None:
    """Rotary frequencies, or None for learned positions.

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
    return rotary


def scaled_frequencies(frequencies: Tensor, scaling: RotaryScaling) -> Tensor:
    """Frequencies in radians per position, stretched as `scaling` says.

    `llama3`: meta-llama/llama-models, `apply_scaling`. A frequency that turns less than `low_freq_factor` times in the
    original length is divided by `factor`, one that turns more than `high_freq_factor` times is kept, and between the
    two the results are mixed linearly.

    Args:
        frequencies: [rotated channels / 2].
    """
    if scaling.type == "linear":
        return frequencies / scaling.factor
    low, high, length = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    assert low is not None and high is not None and length is not None
    turns = length * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies
