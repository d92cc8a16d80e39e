"""The pipeline layers: embedding, transformer layer, head. Each takes one tensor and gives one tensor (the head takes
labels too when it is to give the loss).

Shapes: B micro-batch, S sequence (this context-parallel rank's part of it), H hidden size, V padded vocabulary / TP.
Between layers flows [S, B, H], or [S / TP, B, H] under sequence parallelism.
"""

import math
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megagpt.model.activation import GatedActivation
from megagpt.model.attention import Positions
from megagpt.model.documents import Documents
from megagpt.model.experts import use_own_dispatcher
from megagpt.model.loss import head_loss
from megagpt.model.norm import Norm
from megagpt.model.rotary import Rotary, Tables
from megagpt.model.transformer_config import layer_spec
from megagpt.plan import Plan


class Embedding(LanguageModelEmbedding):
    """Token ids [B, S] to hidden states: word embedding, learned positions if any, dropout."""

    def __init__(self, config: TransformerConfig, plan: Plan):
        learned = plan.model.position_embedding_type == "learned_absolute"
        super().__init__(
            config,
            vocab_size=plan.padded_vocab_size,
            max_sequence_length=plan.model.max_position_embeddings,
            position_embedding_type="learned_absolute" if learned else "rope",
        )
        self.scale = math.sqrt(config.hidden_size) if plan.model.scale_embedding else None

    def forward(self, tokens_BS: Tensor, documents: Documents | None = None) -> Tensor:
        """[B, S] int64 -> [S, B, H]; learned positions are those in documents, if these are given."""
        positions_BS = None if documents is None else documents.positions_Bs
        if self.add_position_embedding and positions_BS is None:
            length = tokens_BS.shape[1]
            first = parallel_state.get_context_parallel_rank() * length
            positions_BS = torch.arange(first, first + length, device=tokens_BS.device).expand_as(tokens_BS)
        hidden_SBH = super().forward(tokens_BS, positions_BS)
        if self.scale is None:
            return hidden_SBH
        # Gemma rounds the factor to the type of the weights. On the host: a tensor of no dimensions is not copied.
        return hidden_SBH * torch.tensor(self.scale, dtype=hidden_SBH.dtype)


class ParallelResidualLayer(TransformerLayer):
    """x + attention(norm1(x)) + mlp(norm2(x)): Black et al. 2022 (GPT-NeoX-20B), section 2.1."""

    def forward(
        self, hidden_states: Tensor, attention_mask=None, rotary_pos_emb=None, padding_mask=None, **_
    ) -> tuple[Tensor, None]:
        """[S, B, H] to [S, B, H], with the arguments and the pair of results of TransformerLayer.forward."""
        add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        attended = self.self_attention(
            self.input_layernorm(hidden_states), attention_mask=attention_mask, rotary_pos_emb=rotary_pos_emb
        )
        residual = add(attended, hidden_states, self.hidden_dropout)
        add = self.mlp_bda(self.training, self.config.bias_dropout_fusion)
        output = self.mlp(self.pre_mlp_layernorm(hidden_states), padding_mask=padding_mask)
        return add(output, residual, self.hidden_dropout), None


class SandwichNormLayer(TransformerLayer):
    """y = x + norm2(attention(norm1(x))), then y + norm4(mlp(norm3(y))): Gemma 2 (arXiv 2408.00118), section 2."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        self.post_self_attn_layernorm = Norm(config, config.hidden_size, config.layernorm_epsilon)
        self.post_mlp_layernorm = Norm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(
        self, hidden_states: Tensor, attention_mask=None, rotary_pos_emb=None, padding_mask=None, **_
    ) -> tuple[Tensor, None]:
        """[S, B, H] to [S, B, H], with the arguments and the pair of results of TransformerLayer.forward."""
        output, bias = self.self_attention(
            self.input_layernorm(hidden_states), attention_mask=attention_mask, rotary_pos_emb=rotary_pos_emb
        )
        normed = self.post_self_attn_layernorm(output if bias is None else output + bias)
        add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        hidden_states = add((normed, None), hidden_states, self.hidden_dropout)
        output, bias = self.mlp(self.pre_mlp_layernorm(hidden_states), padding_mask=padding_mask)
        normed = self.post_mlp_layernorm(output if bias is None else output + bias)
        add = self.mlp_bda(self.training, self.config.bias_dropout_fusion)
        return add((normed, None), hidden_states, self.hidden_dropout), None


class Layer(nn.Module):
    """One transformer layer, with its rotary table.

    Args:
        config: Megatron-Core's config.
        plan: gives the kind of residual and norms.
        index: 0 ... num_layers - 1.
        rotary: the rotary tables, shared by the layers of a process that have them; None for learned positions.
    """

    def __init__(self, config: TransformerConfig, plan: Plan, index: int, rotary: Rotary | None):
        super().__init__()
        spec = layer_spec(config, plan, index)
        if plan.model.parallel_residual:
            spec.module = ParallelResidualLayer
        elif plan.model.post_layernorms:
            spec.module = SandwichNormLayer
        self.block = build_module(spec, config=config, layer_number=index + 1)
        use_own_dispatcher(self.block)
        if config.gated_linear_unit:
            for mlp in (module for module in self.block.modules() if isinstance(module, MLP)):
                mlp.activation_func = GatedActivation(plan.model.activation)
        self.rotary = rotary
        self.sequence_splits = config.tensor_model_parallel_size if config.sequence_parallel else 1
        # Under sequence parallelism each TP rank holds other tokens, so every dropout needs the TP rank's generator.
        self.forks_rng = config.sequence_parallel

    def forward(self, hidden_SBH: Tensor, documents: Documents | None = None) -> Tensor:
        """[S, B, H] -> [S, B, H]; documents of the samples are kept apart as they say."""
        tables = None if self.rotary is None else self._tables_of(hidden_SBH, documents)
        given: dict[str, Any] = {"attention_mask": Positions(documents, tables)}
        if documents is not None and documents.padding_Bs is not None:
            part = parallel_state.get_tensor_model_parallel_rank() if self.sequence_splits > 1 else 0
            given["padding_mask"] = documents.padding_of(part, self.sequence_splits)
        if self.forks_rng:
            with tensor_parallel.get_cuda_rng_tracker().fork():
                return self.block(hidden_SBH, **given)[0]
        return self.block(hidden_SBH, **given)[0]

    def _tables_of(self, hidden_SBH: Tensor, documents: Documents | None) -> Tables:
        """Of this context-parallel rank's positions."""
        assert self.rotary is not None
        length = hidden_SBH.shape[0] * self.sequence_splits
        if documents is not None and documents.positions_Bs is not None:
            whole = length * parallel_state.get_context_parallel_world_size()
            return self.rotary.tables_at(documents.positions_Bs, whole, hidden_SBH.dtype)
        return self.rotary.tables(length, parallel_state.get_context_parallel_rank() * length, hidden_SBH.dtype)


class Head(ColumnParallelLinear):
    """Hidden states [S, B, H] to logits [S, B, V / TP]; the padding of the vocabulary gets -inf.

    Args:
        config: Megatron-Core's config.
        plan: gives the sizes of the vocabulary.
        has_weight: False if the weight is given to `forward` (tied embeddings).
    """

    def __init__(self, config: TransformerConfig, plan: Plan, has_weight: bool = True):
        super().__init__(
            config.hidden_size,
            plan.padded_vocab_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            skip_weight_param_allocation=not has_weight,
        )
        shard = plan.padded_vocab_size // plan.tensor_parallel_size
        first_token = parallel_state.get_tensor_model_parallel_rank() * shard
        self.softcap = plan.model.final_logit_softcapping
        self.num_real_tokens = min(max(plan.model.vocab_size - first_token, 0), shard)

    def forward(
        self,
        hidden_SBH: Tensor,
        weight: Tensor | None = None,
        labels_BS: Tensor | None = None,
        loss_tokens: Tensor | None = None,
    ) -> Tensor:
        """[S, B, H] -> logits [S, B, V / TP]; with labels [B, S] -> their mean cross-entropy, a scalar in fp32.

        With `loss_tokens`, labels below 0 do not count, and the sum over the others is divided by it.
        """
        if labels_BS is not None:
            return self._loss(hidden_SBH, self.weight if weight is None else weight, labels_BS, loss_tokens)
        logits_SBV = super().forward(hidden_SBH, weight=weight)[0]
        if self.softcap is not None:
            logits_SBV = torch.tanh(logits_SBV / self.softcap) * self.softcap
        if self.num_real_tokens < logits_SBV.shape[-1]:
            # In place: no second copy of the logits. exp(-inf) is 0, so neither loss nor sampling sees the padding.
            logits_SBV[..., self.num_real_tokens :] = float("-inf")
        return logits_SBV

    @property
    def projection(self) -> "Head":
        """What multiplies, as in `TiedHead`."""
        return self

    @property
    def projection_weight(self) -> Tensor:
        """[V / TP, H]."""
        return self.weight

    def _loss(self, hidden_SBH: Tensor, weight: Tensor, labels_BS: Tensor, loss_tokens: Tensor | None) -> Tensor:
        if self.sequence_parallel:
            hidden_SBH = tensor_parallel.gather_from_sequence_parallel_region(hidden_SBH)
        else:
            hidden_SBH = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_SBH)
        hidden_TH, labels_T = hidden_SBH.flatten(0, 1), labels_BS.t().flatten()
        return head_loss(hidden_TH, weight, labels_T, self.num_real_tokens, self.softcap, loss_tokens)


class TiedHead(nn.Module):
    """Head that multiplies with the word embedding.

    Args:
        config: Megatron-Core's config.
        plan: gives the sizes of the vocabulary.
        word_embeddings: the embedding's own table, if it lives in this process; None on the last pipeline stage, whose
            copy the engine keeps equal to the first stage's.
    """

    def __init__(self, config: TransformerConfig, plan: Plan, word_embeddings: VocabParallelEmbedding | None = None):
        super().__init__()
        if word_embeddings is None:
            word_embeddings = VocabParallelEmbedding(
                plan.padded_vocab_size, config.hidden_size, init_method=config.init_method, config=config
            )
        self.word_embeddings = word_embeddings
        self.projection = Head(config, plan, has_weight=False)

    def forward(self, hidden_SBH: Tensor, labels_BS: Tensor | None = None, loss_tokens: Tensor | None = None) -> Tensor:
        """As `Head`."""
        return self.projection(hidden_SBH, self.word_embeddings.weight, labels_BS, loss_tokens)

    @property
    def projection_weight(self) -> Tensor:
        """[V / TP, H]."""
        return self.word_embeddings.weight
