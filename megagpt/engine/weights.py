"""The parameters of a model: their names, their first values, and what DeepSpeed must know of them."""

from collections.abc import Iterable, Iterator

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagpt.engine.experts import tell_experts_to_deepspeed
from megagpt.model import canonical_name, initialize_weights, is_partial_over_tensor_ranks
from megagpt.parallel.ranks import Ranks
from megagpt.plan import Plan


def named_parameters(
    module: nn.Module, plan: Plan, expert_rank: int = 0, prefix: str = ""
) -> Iterator[tuple[str, nn.Parameter]]:
    """Canonical name and parameter of a PipelineModule's stage or of a GPT.

    Args:
        module: the stage, the whole model, or a part of it.
        plan: gives the number of layers and of experts per rank.
        expert_rank: this process's expert-parallel rank.
        prefix: name of the part in a GPT.
    """
    first_expert = expert_rank * (plan.model.num_experts or 0) // plan.expert_parallel_size
    for name, parameter in module.named_parameters(prefix=prefix):
        yield canonical_name(name, plan.model.num_layers, first_expert), parameter


def finish(prefix: str, module: nn.Module, plan: Plan, ranks: Ranks, draws_weights: bool = True) -> None:
    """Give a model, or the part of it that is called `prefix`, its weights and what DeepSpeed must know of them.

    Args:
        prefix: of the part's name in a GPT.
        module: the part.
        plan: gives seed and layout.
        ranks: this process's place.
        draws_weights: false: zeros, as others will take their place.
    """
    named = named_parameters(module, plan, ranks.expert_rank, prefix)
    whole = [(name, parameter) for name, parameter in named if not hasattr(parameter, "ds_id")]
    initialize_weights(whole, plan, ranks.tensor_rank, draws=draws_weights)
    sum_partial_gradients([parameter for _, parameter in whole], ranks)
    tell_experts_to_deepspeed(module, plan, ranks)


def finish_cut(prefix: str, layer: nn.Module, plan: Plan, ranks: Ranks, draws_weights: bool = True) -> None:
    """`finish` for one layer under ZeRO 3, which then keeps this rank's part of its weights only."""
    finish(prefix, layer, plan, ranks, draws_weights)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[plan.precision]
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(dtype)  # as DeepSpeed does with models that are whole
    deepspeed.zero.Init(
        module=layer, data_parallel_group=ranks.gradient_group, config_dict_or_path=plan.engine_config(), mpu=ranks.mpu
    )


def sum_partial_gradients(parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
    """Sum, over the tensor-parallel ranks, the gradients of whole parameters that work on a part of tokens or heads.

    Megatron-Core's optimizer would do it; DeepSpeed's do not. The hook sits on the tensor, before accumulation: summing
    an accumulated gradient would count earlier micro-batches again.
    """

    def all_reduce(grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ranks.tensor_group)
        return grad

    if ranks.tensor_size == 1:
        return
    for parameter in parameters:
        if is_partial_over_tensor_ranks(parameter):
            parameter.register_hook(all_reduce)
