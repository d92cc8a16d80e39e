"""Compute logits with one weight of the model in memory at a time, in one process and fp32.

Shapes: B batch, S sequence, H hidden size, V vocabulary without padding.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megagpt.host_tensors import MemoryPool, round_in_place
from megagpt.model import PipelineLayer, canonical_name, pipeline_layers
from megagpt.model.layers import Embedding, Head
from megagpt.model.transformer_config import transformer_config
from megagpt.plan import Plan

VOCABULARY_BLOCK_BYTES = 32 << 20
"""Size in fp32 of the rows of the head that are held at once."""


class WeightSource(Protocol):
    """Where full parameters come from, by canonical name, read into tensors of any type."""

    def full(self, name: str, *, out: Tensor) -> Tensor: ...
    def vocabulary_rows(self, name: str, first: int, last: int, out: Tensor) -> Tensor: ...


class LayerwiseGPT:
    """The model of a Plan for one process, whose layers are built, used and dropped one after the other.

    Args:
        plan: the model, for one process.
        source: its weights.
        rounded_to: type that weights are rounded to before use; None: as they come.
        device: where to compute.
        memory: where weights get their memory from; default: its own.
    """

    def __init__(
        self,
        plan: Plan,
        source: WeightSource,
        rounded_to: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        memory: MemoryPool | None = None,
    ):
        self.plan, self.device = plan, torch.device(device)
        self._source, self._dtype, self._memory = source, rounded_to, memory or MemoryPool()
        self._layers = pipeline_layers(plan)

    @torch.no_grad()
    def logits(self, tokens_BS: Tensor) -> Tensor:
        """[B, S] token ids -> [B, S, V] on the CPU."""
        hidden_SBH = self.embed(tokens_BS)
        for index in range(self.plan.model.num_layers):
            hidden_SBH = self.layer(index, hidden_SBH)
        return self.head(hidden_SBH)

    @torch.no_grad()
    def embed(self, tokens_BS: Tensor) -> Tensor:
        """[B, S] token ids -> [S, B, H]; only the rows of these tokens are read."""
        tokens, places_BS = tokens_BS.unique(return_inverse=True)
        plan = dataclasses.replace(self.plan, padded_vocab_size=len(tokens))
        embedding = Embedding(transformer_config(plan), plan)
        table = "embedding.word_embeddings.weight"
        rows = torch.empty(len(tokens), self.plan.model.hidden_size)
        for row, token in zip(rows.split(1), tokens.tolist(), strict=True):
            self._source.vocabulary_rows(table, token, token + 1, row)
        embedding.word_embeddings.weight.copy_(self._rounded(rows))
        if embedding.add_position_embedding:
            positions = torch.empty(embedding.position_embeddings.weight.shape)
            self._source.full("embedding.position_embeddings.weight", out=positions)
            embedding.position_embeddings.weight.copy_(self._rounded(positions))
        return embedding.eval().to(self.device)(places_BS.to(self.device))

    @torch.no_grad()
    def layer(self, index: int, hidden_SBH: Tensor) -> Tensor:
        """Transformer layer `index`, counted from 0: [S, B, H] -> [S, B, H]."""
        return self._built(self._layers[1 + index])(hidden_SBH)

    @torch.no_grad()
    def head(self, hidden_SBH: Tensor) -> Tensor:
        """What the last layer gives, [S, B, H] -> logits [B, S, V] on the CPU, some rows of the head at a time."""
        hidden_SBH = self._built(self._layers[-2])(hidden_SBH)
        model = self.plan.model
        table = "head.weight" if model.untie_embeddings_and_output_weights else "embedding.word_embeddings.weight"
        step = max(1, VOCABULARY_BLOCK_BYTES // (4 * model.hidden_size))
        parts = []
        for first in range(0, model.vocab_size, step):
            last = min(first + step, model.vocab_size)
            few = model.model_copy(update={"vocab_size": last - first})
            run = self.plan.run.model_copy(update={"model": few})
            plan = dataclasses.replace(self.plan, run=run, padded_vocab_size=last - first)
            head = Head(transformer_config(plan), plan, has_weight=False)
            rows = self._memory.take((last - first, model.hidden_size), torch.float32)
            self._source.vocabulary_rows(table, first, last, rows)
            weight = self._rounded(rows).to(self.device)
            parts.append(head(hidden_SBH, weight).float().cpu())
            self._memory.give_back(rows)
        return torch.cat(parts, -1).transpose(0, 1).contiguous()

    def _built(self, layer: PipelineLayer) -> nn.Module:
        """The layer, whose modules get their weights when they run and lose them afterwards: memory that was never
        written to costs nothing."""
        module = layer.build().eval().to(self.device)
        for prefix, part in module.named_modules():
            if any(True for _ in part.parameters(recurse=False)):
                part.register_forward_pre_hook(self._fill(f"{layer.prefix}.{prefix}" if prefix else layer.prefix))
                part.register_forward_hook(self._empty)
        return module

    def _fill(self, prefix: str) -> Callable[[nn.Module, Any], None]:
        def fill(part: nn.Module, args: Any) -> None:
            for name, parameter in part.named_parameters(recurse=False):
                full = canonical_name(f"{prefix}.{name}", self.plan.model.num_layers)
                weight = self._memory.take(parameter.shape, torch.float32)
                self._source.full(full, out=weight)
                parameter.data = self._rounded(weight).to(self.device)
                if self.device.type != "cpu":
                    self._memory.give_back(weight)

        return fill

    def _empty(self, part: nn.Module, args: Any, output: Any) -> None:
        for parameter in part.parameters(recurse=False):
            if parameter.dim() > 1:  # a bias may be handed on, to be added later
                self._memory.give_back(parameter.data)
                parameter.data = parameter.data.new_empty(0)

    def _rounded(self, weight: Tensor) -> Tensor:
        """The weight, whose values are rounded where they are."""
        if self._dtype is not None:
            round_in_place(weight, self._dtype)
        return weight
