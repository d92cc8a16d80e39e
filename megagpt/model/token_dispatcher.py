"""Tokens on their way to their experts and back.

Megatron-Core's dispatcher adds up the results of a token's experts, and the gradients of its copies, by atomic
additions, whose order, and so the last bits of the sums, change from run to run on a GPU. It also has the host wait for
the device in each layer. Here each token knows its copies, and they are added up in the order of their experts.

Shapes: T tokens of this rank in a micro-batch, E experts, K experts per token, R = T x K copies of tokens, expert after
expert, H hidden size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor
from torch.autograd.function import once_differentiable

from megagpt.model.fusion import Fusable


@dataclass(frozen=True)
class Places:
    """Where the copies of each token are. The host need not know how many each expert has."""

    pairs_R: Tensor
    """Expert x T + token of each copy."""
    tokens_R: Tensor
    """Token of each copy."""
    copies_TK: Tensor
    """Copies of each token."""

    @classmethod
    def of(cls, chosen_TE: Tensor, num_chosen: int) -> "Places":
        """From the router's map, in which each token has `num_chosen` experts."""
        num_tokens, num_experts = chosen_TE.shape
        # How many pairs up to each one are chosen, in the order of experts and in that of tokens.
        of_experts_N = chosen_TE.t().flatten().cumsum(0)
        of_tokens_N = chosen_TE.flatten().cumsum(0)
        numbers_R = torch.arange(1, num_tokens * num_chosen + 1, device=chosen_TE.device)
        pairs_R = torch.searchsorted(of_experts_N, numbers_R)
        chosen_R = torch.searchsorted(of_tokens_N, numbers_R)
        tokens_R, experts_R = chosen_R // num_experts, chosen_R % num_experts
        copies_R = of_experts_N[experts_R * num_tokens + tokens_R] - 1
        return cls(pairs_R, pairs_R % num_tokens, copies_R.view(num_tokens, num_chosen))


class TokenDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron-Core's all-to-all dispatcher, with sums in a fixed order, for experts that drop no tokens.

    A rank that has all experts and no tensor-parallel neighbours leaves the tokens as they are between the two.
    """

    places: Places

    @property
    def is_alone(self) -> bool:
        """Whether no other rank has to do with this rank's tokens."""
        return self.ep_size == self.tp_size == 1

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Copy each token for each of its experts.

        Args:
            hidden_states: [..., H].
            routing_map: [T, E].
            probs: weights [T, E] of the experts.

        Returns:
            Copies [R, H] and their weights [R].
        """
        self.hidden_shape, self.probs, self.routing_map = hidden_states.shape, probs, routing_map
        self.tokens_per_expert = self.preprocess(routing_map)
        if not self.is_alone:
            self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_permutation_1", self.tokens_per_expert)
        self.places = Places.of(routing_map, self.config.moe_router_topk)
        tokens_TH = hidden_states.reshape(-1, self.hidden_shape[-1])
        copies_RH = _Copy.apply(tokens_TH, self.places.tokens_R, self.places.copies_TK)
        return copies_RH, probs.t().reshape(-1).gather(0, self.places.pairs_R)

    def dispatch_postprocess(self, tokens_RH: Tensor, weights_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Copies and weights, expert after expert, with the number of copies of each expert between them."""
        if not self.is_alone:
            return super().dispatch_postprocess(tokens_RH, weights_R)
        return tokens_RH, self.tokens_per_expert, weights_R

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Bring results [R, H] back into the order in which the copies came."""
        return hidden_states if self.is_alone else super().combine_preprocess(hidden_states)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Add up the results [R, H] of each token; returns the shape of the hidden states."""
        output_TH = _AddUp.apply(hidden_states, self.places.tokens_R, self.places.copies_TK)
        del self.places, self.probs  # which would live on until the next forward pass
        return output_TH.view(self.hidden_shape)


class _Copy(torch.autograd.Function):
    """[T, H] -> [R, H]."""

    @staticmethod
    def forward(ctx: Any, tokens_TH: Tensor, tokens_R: Tensor, copies_TK: Tensor) -> Tensor:
        ctx.save_for_backward(copies_TK)
        return tokens_TH.index_select(0, tokens_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RH: Tensor) -> tuple[Tensor, None, None]:
        return _sums(grad_RH, *ctx.saved_tensors), None, None


class _AddUp(torch.autograd.Function):
    """[R, H] -> [T, H]."""

    @staticmethod
    def forward(ctx: Any, results_RH: Tensor, tokens_R: Tensor, copies_TK: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_R)
        return _sums(results_RH, copies_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, None, None]:
        return grad_TH.index_select(0, *ctx.saved_tensors), None, None


@Fusable
def _sums(copies_RH: Tensor, copies_TK: Tensor) -> Tensor:
    return copies_RH.index_select(0, copies_TK.flatten()).unflatten(0, copies_TK.shape).sum(1)
