"""Sizes of the MLPs of a model: of a dense layer, or of the experts and the router in its place."""

from dataclasses import dataclass

from megagpt.plan.config import ModelConfig


@dataclass(frozen=True)
class MlpSizes:
    """Weights in place of the MLP of one transformer layer, biases not counted."""

    dense: int
    """Used by every token and split over tensor-parallel ranks: the MLP, or the shared expert."""
    routed: int
    """Of all routed experts; split over expert- and tensor-parallel ranks."""
    replicated: int
    """Used by every token on every rank: router and gate of the shared expert."""
    active_routed: int
    """Of the routed experts that one token uses."""

    @property
    def active(self) -> int:
        """Weights that one token is multiplied with."""
        return self.dense + self.replicated + self.active_routed


def mlp_sizes(model: ModelConfig, layer: int) -> MlpSizes:
    """Sizes of the MLP of one transformer layer, counted from 0."""
    per_width = model.hidden_size * projections(model)
    if not model.has_experts(layer):
        return MlpSizes(dense=per_width * model.ffn_hidden_size, routed=0, replicated=0, active_routed=0)
    assert model.num_experts is not None
    expert = per_width * model.moe_ffn_hidden_size
    shared = model.moe_shared_expert_intermediate_size or 0
    gate = model.hidden_size if shared and model.moe_shared_expert_gate else 0
    return MlpSizes(
        dense=per_width * shared,
        routed=model.num_experts * expert,
        replicated=model.num_experts * model.hidden_size + gate,
        active_routed=model.moe_router_topk * expert,
    )


def projections(model: ModelConfig) -> int:
    """Matrices of hidden_size x width in one MLP."""
    return 3 if model.is_gated else 2


def num_expert_layers(model: ModelConfig) -> int:
    """Layers that have experts."""
    return sum(model.has_experts(layer) for layer in range(model.num_layers))
