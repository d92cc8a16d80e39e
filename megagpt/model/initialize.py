"""Initial weights that depend on seed and name only, so that every layout starts from the same model."""

import hashlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from megagpt.model.partition import Partition, partition_of
from megagpt.plan import Plan


@torch.no_grad()
def initialize_weights(
    named: Iterable[tuple[str, nn.Parameter]], plan: Plan, tensor_rank: int, *, draws: bool = True
) -> None:
    """Fill this rank's parameters and mark them as Megatron-Core does.

    Args:
        named: canonical name and parameter.
        plan: gives seed, standard deviation and layout.
        tensor_rank: this rank's tensor-parallel rank.
        draws: false: with zeros. Each rank draws whole parameters, of which it keeps a part: minutes for a large model.
    """
    from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes

    for name, parameter in named:
        partition = partition_of(name, plan.model.is_gated)
        if draws:
            full = _full_weight(name, full_shape(parameter, partition, plan), plan)
            shard = partition.shard(full, tensor_rank, plan.tensor_parallel_size, plan.padded_vocab_size)
            assert shard.shape == parameter.shape, (name, shard.shape, parameter.shape)
            parameter.copy_(shard)
        else:
            parameter.zero_()
        # DeepSpeed's gradient norm counts a parameter on every TP rank only if it carries this mark.
        if partition.dim is not None and not hasattr(parameter, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=partition.dim, stride=1)


def full_shape(shard: Tensor, partition: Partition, plan: Plan) -> tuple[int, ...]:
    """Shape of the whole parameter, vocabulary not padded, from one shard of it."""
    shape = list(shard.shape)
    if partition.dim is not None:
        shape[partition.dim] *= plan.tensor_parallel_size
    if partition.vocabulary:
        shape[0] = plan.model.vocab_size
    return tuple(shape)


def _full_weight(name: str, shape: tuple[int, ...], plan: Plan) -> Tensor:
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if name.endswith(("_layernorm.weight", "final_norm.weight")):
        return torch.full(shape, float(not plan.model.layernorm_zero_centered_gamma))
    std = plan.model.init_method_std
    # Radford et al. 2019 (GPT-2), section 2.3: residual projections are scaled by 1 / sqrt(number of residual layers).
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std /= math.sqrt(2 * plan.model.num_layers)
    digest = hashlib.sha256(f"{plan.run.training.seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randn(shape, generator=generator) * std
