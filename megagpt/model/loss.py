"""Next-token loss on logits that are cut along the vocabulary."""

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor


def language_model_loss(logits_SBV: Tensor, labels_BS: Tensor) -> Tensor:
    """Mean cross-entropy of all tokens of a micro-batch, in fp32.

    Args:
        logits_SBV: [S, B, V / TP], this rank's part of the padded vocabulary, padding at -inf.
        labels_BS: [B, S], token ids.

    Returns:
        Scalar; equal on all tensor-parallel ranks.
    """
    losses_SB = vocab_parallel_cross_entropy(logits_SBV.float(), labels_BS.transpose(0, 1).contiguous())
    return torch.mean(losses_SB)
