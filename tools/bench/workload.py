"""What every side of the training benchmark is given: model, batch sizes, optimizer settings and tokens."""

from dataclasses import dataclass

import torch

LEARNING_RATE, WEIGHT_DECAY, BETAS, EPSILON, CLIPPING = 3e-4, 0.1, (0.9, 0.95), 1e-8, 1.0


@dataclass(frozen=True)
class Size:
    """A Llama-like model and the batch it is trained with."""

    num_layers: int
    hidden_size: int
    num_heads: int
    ffn_hidden_size: int
    vocab_size: int
    seq_length: int
    microbatch_size: int
    num_microbatches: int
    """Micro-batches per optimizer step (gradient accumulation)."""
    num_experts: int = 0
    """Experts of `ffn_hidden_size` in each layer; 0: one MLP."""
    num_chosen: int = 0
    """Experts that each token is sent to."""

    @property
    def tokens_per_step(self) -> int:
        return self.seq_length * self.microbatch_size * self.num_microbatches


SIZES = {
    # to see that everything runs
    "smoke": Size(2, 64, 4, 176, 512, seq_length=64, microbatch_size=2, num_microbatches=2),
    "smoke-moe": Size(2, 64, 4, 96, 512, 64, microbatch_size=2, num_microbatches=2, num_experts=4, num_chosen=2),
    # 12.7 million parameters, near the quickstart's shape
    "12m": Size(6, 320, 5, 864, 8192, seq_length=512, microbatch_size=4, num_microbatches=2),
    # 134 million parameters: GPT-2 small's depth and width with Llama 2's vocabulary
    "125m": Size(12, 768, 12, 2048, 32000, seq_length=512, microbatch_size=2, num_microbatches=2),
    # for GPUs: 374 million parameters, GPT-2 medium's depth and width
    "350m": Size(24, 1024, 16, 2816, 32000, seq_length=2048, microbatch_size=8, num_microbatches=2),
    # for GPUs: 1.3 billion parameters, GPT-3 XL's depth and width
    "1b": Size(24, 2048, 16, 5632, 32000, seq_length=2048, microbatch_size=4, num_microbatches=2),
    # for GPUs: 1.3 billion parameters, of which 267 million compute a token: small experts as in OLMoE and Qwen3-MoE
    "moe": Size(12, 1024, 16, 512, 32000, 2048, microbatch_size=8, num_microbatches=2, num_experts=64, num_chosen=8),
}


def token_batch(size: Size, step: int, microbatch: int) -> torch.Tensor:
    """Token ids [microbatch_size, seq_length + 1] int64: arithmetic sequences, the same on every side."""
    generator = torch.Generator().manual_seed(step * size.num_microbatches + microbatch)
    shape = (size.microbatch_size, 1)
    start = torch.randint(0, size.vocab_size, shape, generator=generator)
    stride = torch.randint(1, 5, shape, generator=generator)
    return (start + torch.arange(size.seq_length + 1) * stride) % size.vocab_size
