"""Expert parallelism under DeepSpeed, and what the routers report.

Megatron-Core moves the tokens; DeepSpeed has to know which parameters differ between data-parallel ranks. It then keeps
their optimizer state and sums their gradients over the ranks that have the same experts, divides by the whole
data-parallel size (an expert has seen the tokens of all ranks that share it), and counts all experts in the norm.
"""

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import nn

from megagpt.model import expert_parameters, take_router_counts
from megagpt.parallel.ranks import Ranks
from megagpt.plan import Plan


class _ExpertGroups(MoE):
    """The face of a mixture-of-experts layer that DeepSpeed knows, without a layer behind it.

    DeepSpeed looks for modules of this class, and asks each to make the process groups of its experts.
    """

    def __init__(self, name: str, num_experts: int, ranks: Ranks):
        nn.Module.__init__(self)
        self.name, self.num_experts, self.ranks = name, num_experts, ranks

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Hand over Megatron-Core's groups."""
        ranks = self.ranks
        for group, known, members in (
            (ranks.expert_group, groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_PARALLEL_GROUP_RANKS),
            (ranks.expert_data_group, groups._EXPERT_DATA_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP_RANKS),
        ):
            known[self.name] = group
            members[self.name] = dist.get_process_group_ranks(group)
        # Above 1, BF16_Optimizer adds up the experts' norms over the tensor-parallel ranks, which have a part each.
        groups.expert_tensor_parallel_world_size = ranks.tensor_size


def tell_experts_to_deepspeed(module: nn.Module, plan: Plan, ranks: Ranks) -> None:
    """Mark the parameters of the experts as DeepSpeed wants them; before the optimizer is built.

    With one expert-parallel rank they are parameters like all others, whatever Megatron-Core has marked them as.
    """
    name = f"ep_size_{ranks.expert_size}"  # DeepSpeed reads the number
    experts = expert_parameters(module)
    for parameter in experts:
        parameter.allreduce = ranks.expert_size == 1  # type: ignore[attr-defined]
        parameter.group_name = name  # type: ignore[attr-defined]
    if experts and ranks.expert_size > 1:
        assert plan.model.num_experts is not None
        module.add_module("expert_groups", _ExpertGroups(name, plan.model.num_experts, ranks))


def expert_figures(module: nn.Module, plan: Plan, ranks: Ranks) -> dict[str, float]:
    """How evenly the routers have spread the tokens since the last call; {} for dense models.

    Collective, and waits for the device.

    Returns:
        `aux_loss`: the load-balancing loss without its coefficient, mean over layers and micro-batches, 1 if all
        experts are equally likely; `expert_load_max_over_mean`: tokens of the busiest expert of a layer over the mean,
        of the most uneven layer; `experts_idle`: share of the experts that got no token.
    """
    model = plan.model
    layers = [layer for layer in range(model.num_layers) if model.has_experts(layer)]
    if not layers:
        return {}
    assert model.num_experts is not None
    counts = take_router_counts(module, model.num_layers, model.num_experts, ranks.device)
    # Sums over tensor-parallel ranks, which route a part of the sequence each, and over replicas; stages have
    # different layers. Counts of tokens are exact in fp64.
    sums = torch.cat([counts.tokens.double(), counts.auxiliary_loss.double()[:, None]], 1)
    microbatches = torch.tensor(counts.num_microbatches, device=ranks.device)
    if ranks.world_size > 1:
        dist.all_reduce(sums)
        dist.all_reduce(microbatches, op=dist.ReduceOp.MAX)
    if microbatches == 0:
        return {}
    load_LE, loss_L = sums[layers, :-1], sums[layers, -1]
    figures = {
        "expert_load_max_over_mean": (load_LE.amax(1) / load_LE.mean(1)).max(),
        "experts_idle": (load_LE == 0).double().mean(),
    }
    if model.moe_aux_loss_coeff > 0:
        figures["aux_loss"] = loss_L.mean() / (microbatches * ranks.data_size)
    names, values = zip(*figures.items(), strict=True)
    return dict(zip(names, torch.stack(values).tolist(), strict=True))
