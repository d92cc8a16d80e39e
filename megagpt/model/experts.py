"""Mixture-of-experts layers: Megatron-Core's, with parts of our own, and a router that counts where it sends tokens.

Shapes: T tokens of this rank in a micro-batch, E experts of a layer.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_default_pg_collection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from megagpt.model.grouped_experts import GroupedExperts
from megagpt.model.token_dispatcher import TokenDispatcher


class CountingRouter(TopKRouter):
    """Top-k router that adds up tokens per expert and the auxiliary loss on the device, in training only."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        device = torch.cuda.current_device()
        self.tokens_E = torch.zeros(self.config.num_moe_experts, dtype=torch.int64, device=device)
        self.auxiliary_loss = torch.zeros((), device=device)
        self.num_microbatches = 0
        self.layer = 0

    def set_layer_number(self, layer_number: int) -> None:
        """Note the layer, counted from 0. Without a number Megatron-Core keeps no log of its own beside ours."""
        self.layer = layer_number - 1

    def gating(self, input: Tensor) -> Tensor:
        """Logits [..., E] in fp32; Megatron-Core 0.16's own needs Transformer Engine."""
        return F.linear(input.float(), self.weight.float())

    def forward(self, input: Tensor, padding_mask: Tensor | None = None, **kwargs) -> tuple[Tensor, Tensor]:
        """Weights and map [T, E] of the chosen experts; tokens that are padding do not count."""
        weights_TE, chosen_TE = super().forward(input, padding_mask, **kwargs)
        if self.training and torch.is_grad_enabled():  # not in the first pass of a recomputed layer
            counted_TE = chosen_TE if padding_mask is None else chosen_TE & ~padding_mask.reshape(-1, 1)
            self.tokens_E += counted_TE.sum(0)
            self.num_microbatches += 1
        return weights_TE, chosen_TE

    def attach_and_log_load_balancing_loss(self, activation, aux_loss_coeff, aux_loss, *args, **kwargs) -> Tensor:
        """Note the loss, which has its coefficient in it, and let Megatron-Core bring it into the backward pass."""
        self.auxiliary_loss += aux_loss.detach() / aux_loss_coeff
        return super().attach_and_log_load_balancing_loss(activation, aux_loss_coeff, aux_loss, *args, **kwargs)


@dataclass(frozen=True)
class RouterCounts:
    """What the routers of this rank have seen since they were last asked."""

    tokens: Tensor
    """Tokens sent to each expert, [num_layers, E] int64; zeros for layers without experts or of other stages."""
    auxiliary_loss: Tensor
    """Sum over micro-batches of this rank's part of each layer's load-balancing loss, without its coefficient."""
    num_microbatches: int
    """Micro-batches that were summed; 0 if this rank has no experts."""


def take_router_counts(module: nn.Module, num_layers: int, num_experts: int, device: torch.device) -> RouterCounts:
    """Read the counters of all routers of a module and set them to zero; the host does not wait for the device."""
    tokens_LE = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=device)
    auxiliary_loss_L = torch.zeros(num_layers, device=device)
    num_microbatches = 0
    for router in module.modules():
        if isinstance(router, CountingRouter):
            tokens_LE[router.layer] = router.tokens_E
            auxiliary_loss_L[router.layer] = router.auxiliary_loss
            num_microbatches = router.num_microbatches
            router.tokens_E.zero_()
            router.auxiliary_loss.zero_()
            router.num_microbatches = 0
    return RouterCounts(tokens_LE, auxiliary_loss_L, num_microbatches)


def set_auxiliary_loss_scale(scale: float, device: torch.device) -> None:
    """Set what the auxiliary losses are multiplied by in the backward pass: what the engine does to the main loss.

    Args:
        scale: 1 / micro-batches per step, times the loss scale of fp16.
    """
    # Filled on the device; Megatron-Core's setter would copy a tensor of the host.
    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.full((), scale, device=device)


def use_own_parts(mlp: ModuleSpec) -> None:
    """Put our router and our experts into Megatron-Core's fresh spec of a mixture-of-experts layer."""
    if isinstance(mlp, ModuleSpec):  # Megatron-Core 0.16
        experts = dataclasses.replace(mlp.submodules.experts, module=GroupedExperts)
        mlp.submodules = dataclasses.replace(mlp.submodules, router=CountingRouter, experts=experts)
    else:  # later ones: functools.partial
        submodules = mlp.keywords["submodules"]
        experts = partial(GroupedExperts, **submodules.experts.keywords)
        mlp.keywords["submodules"] = dataclasses.replace(submodules, router=CountingRouter, experts=experts)


def use_own_dispatcher(block: nn.Module) -> None:
    """Put our dispatcher into the mixture-of-experts layers of a block, where it does all-to-alls.

    Megatron-Core's layer builds its own, and has to be that very class to be given its process groups.
    """
    for layer in block.modules():
        if isinstance(layer, MoELayer) and type(layer.token_dispatcher) is MoEAlltoAllTokenDispatcher:
            layer.token_dispatcher = TokenDispatcher(
                layer.num_local_experts, layer.local_expert_indices, layer.config, get_default_pg_collection()
            )


def expert_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Parameters of the routed experts: each expert-parallel rank has others."""
    layers = (layer for layer in module.modules() if isinstance(layer, MoELayer))
    return [parameter for layer in layers for parameter in layer.experts.parameters()]
