"""Attention core: torch's scaled_dot_product_attention in place of Megatron-Core's unfused one.

Under context parallelism a rank holds some positions of all its heads; attention needs all positions of some heads. One
all-to-all before it and one after it exchange the two ("DeepSpeed Ulysses", arXiv 2309.14509, section 3.1).
"""

import contextlib
import math
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import all_to_all, checkpoint, get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.distributed import ProcessGroup

from megagpt.model.causal_attention import causal_attention
from megagpt.model.documents import Documents, document_attention
from megagpt.model.rotary import Tables, rotate

# Shapes: S sequence, B micro-batch, N query heads of this tensor-parallel rank, G its key/value heads, D channels per
# head; C context-parallel ranks, s = S / C positions and n = N / C, g heads of one of them.


@dataclass(frozen=True)
class Positions:
    """What attention knows of the tokens of a micro-batch; takes the place of a mask in Megatron-Core's layers."""

    documents: Documents | None
    """Documents of the samples, which are kept apart; None: a sample is one document."""
    rotary: Tables | None
    """Of this context-parallel rank's positions; None: the layers know nothing of positions."""


class SDPAttention(MegatronModule):
    """Causal attention with the constructor of Megatron-Core's DotProductAttention, and rotary positions.

    Args:
        recompute: the backward pass computes the attention again from query, key and value.
        window: each position sees itself and the `window - 1` positions before it; None: all before it.
        softcap: bound of the scores; None: none.
    """

    def __init__(
        self,
        config,
        layer_number,
        attn_mask_type,
        attention_type,
        attention_dropout=None,
        softmax_scale=None,
        recompute: bool = False,
        window: int | None = None,
        softcap: float | None = None,
        **_,
    ):
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.recompute = recompute
        self.window = window
        self.softcap = softcap

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Positions | None = None,
        packed_seq_params=None,
        attention_bias=None,
        **_,
    ) -> Tensor:
        """Attend causally.

        Args:
            query: [s, B, N, D].
            key: [s, B, G, D].
            value: [s, B, G, D].
            attention_mask: of the tokens.

        Returns:
            [s, B, N x D].
        """
        assert packed_seq_params is None and attention_bias is None
        group = parallel_state.get_context_parallel_group()
        positions = attention_mask or Positions(None, None)
        if positions.rotary is not None:
            query, key = rotate(query, key, positions.rotary)
        if group.size() > 1:
            query, key, value = heads_for_positions(query, key, value, group)
        elif value.untyped_storage().data_ptr() != query.untyped_storage().data_ptr() and not self.config.qk_layernorm:
            # Rotated, and no norm keeps its input: as a view, the value alone would keep all three as projected.
            value = value.contiguous()
        query_BNSD, key_BGSD, value_BGSD = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        documents = positions.documents
        keeps_apart = documents is not None and documents.runs is not None
        attend = partial(self._attend, documents=documents) if keeps_apart else self._attend
        if self.recompute and torch.is_grad_enabled():
            context_BNSD = checkpoint(attend, False, query_BNSD, key_BGSD, value_BGSD)
        else:
            context_BNSD = attend(query_BNSD, key_BGSD, value_BGSD)
        context_SBND = context_BNSD.permute(2, 0, 1, 3)
        if group.size() > 1:
            context_SBND = positions_for_heads(context_SBND, group)
        return context_SBND.flatten(2)

    def _attend(
        self, query_BNSD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, documents: Documents | None = None
    ) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        # Heads differ between TP ranks, so their dropout must too; under sequence parallelism the whole layer already
        # draws from the tensor-parallel generator.
        forks_rng = dropout > 0 and not self.config.sequence_parallel
        with get_cuda_rng_tracker().fork() if forks_rng else contextlib.nullcontext():
            if documents is not None:
                return document_attention(
                    query_BNSD, key_BGSD, value_BGSD, documents, self.softmax_scale, dropout, self.window, self.softcap
                )
            return causal_attention(
                query_BNSD, key_BGSD, value_BGSD, self.softmax_scale, dropout, self.window, self.softcap
            )


def heads_for_positions(query: Tensor, key: Tensor, value: Tensor, group: ProcessGroup) -> tuple[Tensor, ...]:
    """Exchange positions of all heads for all positions of some heads; one all-to-all for all three.

    Key/value heads are first repeated as often as it takes for the ranks to share them equally, each with the ones that
    its query heads use; the gradients of the copies add up.

    Args:
        query: [s, B, N, D].
        key: [s, B, G, D].
        value: [s, B, G, D].
        group: the context-parallel ranks, in the order of their positions; their number divides N.

    Returns:
        [S, B, n, D], [S, B, g, D] and [S, B, g, D] with g = lcm(G, C) / C.
    """
    ranks, groups = group.size(), key.shape[2]
    repeats = math.lcm(groups, ranks) // groups
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 2), value.repeat_interleave(repeats, 2)
    parts = [x.unflatten(2, (ranks, -1)) for x in (query, key, value)]  # [s, B, C, heads / C, D]
    sizes = [part.shape[3] for part in parts]
    sent_CsBhD = torch.cat(parts, 3).permute(2, 0, 1, 3, 4)
    received_SBhD = all_to_all(group, sent_CsBhD).flatten(0, 1)  # rank after rank is position after position
    return received_SBhD.split(sizes, 2)


def positions_for_heads(context_SBnD: Tensor, group: ProcessGroup) -> Tensor:
    """The way back: all positions of some heads [S, B, n, D] become some positions of all heads [s, B, N, D]."""
    received_CsBnD = all_to_all(group, context_SBnD.unflatten(0, (group.size(), -1)))
    return received_CsBnD.permute(1, 2, 0, 3, 4).flatten(2, 3)
