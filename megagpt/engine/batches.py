"""A micro-batch as one rank computes with it: its positions, and the documents of all."""

from typing import NamedTuple

import torch
from torch import Tensor

from megagpt.data.loader import MicroBatch
from megagpt.model import Documents
from megagpt.plan.data_config import DataConfig

Batch = MicroBatch | tuple[Tensor, Tensor]
"""A micro-batch, or just token ids and labels, both [B, S] int64."""


class PreparedBatch(NamedTuple):
    """The arguments of GPT's forward pass."""

    tokens_BS: Tensor
    labels_BS: Tensor
    loss_tokens: Tensor | None
    documents: Documents | None

    def to(self, device: torch.device) -> "PreparedBatch":
        """The same on a device (documents are there)."""
        loss_tokens = None if self.loss_tokens is None else self.loss_tokens.to(device, non_blocking=True)
        tokens_BS, labels_BS = (part.to(device, non_blocking=True) for part in (self.tokens_BS, self.labels_BS))
        return PreparedBatch(tokens_BS, labels_BS, loss_tokens, self.documents)


def prepare(
    batch: Batch, data: DataConfig, device: torch.device, context_rank: int = 0, context_size: int = 1
) -> PreparedBatch:
    """Take a context-parallel rank's positions of a micro-batch, and find its documents.

    Args:
        batch: whole samples, on the CPU.
        data: says what documents are for.
        device: where the model is.
        context_rank, context_size: which part of the positions.
    """
    whole, documents = MicroBatch(*batch), None
    if whole.places_BS is not None:
        documents = Documents.of(
            whole.places_BS,
            device,
            attention=data.reset_attention_mask or data.packing != "stream",
            positions=data.reset_position_ids,
            padded=data.packing != "stream",
            part=(context_rank, context_size),
        )
    tokens_BS, labels_BS = (
        _part(positions, device, context_rank, context_size) for positions in (whole.tokens_BS, whole.labels_BS)
    )
    # A rank's loss is averaged over the context-parallel ranks, too.
    loss_tokens = None if whole.loss_tokens is None else whole.loss_tokens / context_size
    return PreparedBatch(tokens_BS, labels_BS, loss_tokens, documents)


def _part(whole_BS: Tensor, device: torch.device, rank: int, size: int) -> Tensor:
    """A part of the positions, in memory from which a GPU is given it without that the host waits."""
    part_Bs = whole_BS.chunk(size, 1)[rank].contiguous()
    return part_Bs if device.type != "cuda" or part_Bs.is_pinned() else part_Bs.pin_memory()
