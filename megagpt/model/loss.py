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
    # Megatron-Core subtracts the maximum in place. Without gradients the caller may want the logits too (the probe of a
    # checkpoint), so they must not be the same tensor, as they would be in fp32.
    logits_SBV = logits_SBV.to(torch.float32, copy=not torch.is_grad_enabled())
    losses_SB = vocab_parallel_cross_entropy(logits_SBV, labels_BS.transpose(0, 1).contiguous())
    return torch.mean(losses_SB)
