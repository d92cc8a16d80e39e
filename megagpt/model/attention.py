"""Attention core: torch's scaled_dot_product_attention in place of Megatron-Core's unfused one."""

import contextlib

import torch
from megatron.core.tensor_parallel import checkpoint, get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megagpt.model.causal_attention import causal_attention

# Shapes: S sequence, B micro-batch, N query heads of this rank, G key/value heads of this rank, D channels per head.


class SDPAttention(MegatronModule):
    """Causal attention with the constructor of Megatron-Core's DotProductAttention.

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
        attention_mask=None,
        packed_seq_params=None,
        attention_bias=None,
        **_,
    ) -> Tensor:
        """Attend causally.

        Args:
            query: [S, B, N, D].
            key: [S, B, G, D].
            value: [S, B, G, D].

        Returns:
            [S, B, N x D].
        """
        assert attention_mask is None and packed_seq_params is None and attention_bias is None
        is_rotated = value.untyped_storage().data_ptr() != query.untyped_storage().data_ptr()
        if is_rotated and not self.config.qk_layernorm:  # a norm keeps its input
            # As a view, the value alone would keep all three as they were projected.
            value = value.contiguous()
        query_BNSD, key_BGSD, value_BGSD = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if self.recompute and torch.is_grad_enabled():
            context_BNSD = checkpoint(self._attend, False, query_BNSD, key_BGSD, value_BGSD)
        else:
            context_BNSD = self._attend(query_BNSD, key_BGSD, value_BGSD)
        return context_BNSD.permute(2, 0, 1, 3).flatten(2)

    def _attend(self, query_BNSD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        # Heads differ between TP ranks, so their dropout must too; under sequence parallelism the whole layer already
        # draws from the tensor-parallel generator.
        forks_rng = dropout > 0 and not self.config.sequence_parallel
        with get_cuda_rng_tracker().fork() if forks_rng else contextlib.nullcontext():
            return causal_attention(
                query_BNSD, key_BGSD, value_BGSD, self.softmax_scale, dropout, self.window, self.softcap
            )
