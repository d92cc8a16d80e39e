"""Tiny models, plans and datasets that tests share."""

from pathlib import Path

import torch

from megagpt.plan import Plan
from megagpt.verify.small_plans import ADAM, GLOBAL_BATCH, LLAMA, MICRO_BATCH, MODELS, SEQUENCE, SGD
from megagpt.verify.small_plans import small_plan as tiny_plan

__all__ = [
    "ADAM",
    "GLOBAL_BATCH",
    "LLAMA",
    "MICRO_BATCH",
    "MODELS",
    "SEQUENCE",
    "SGD",
    "micro_batch",
    "rank_batches",
    "tiny_plan",
    "write_tiny_dataset",
]


def micro_batch(step: int, first: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples first, first+1 of a step: arithmetic sequences, learnable at once."""
    generator = torch.Generator().manual_seed(1000 + step)
    start = torch.randint(0, vocab_size, (GLOBAL_BATCH, 1), generator=generator)
    stride = torch.randint(1, 5, (GLOBAL_BATCH, 1), generator=generator)
    tokens = (start + torch.arange(SEQUENCE + 1) * stride) % vocab_size
    part = tokens[first : first + MICRO_BATCH]
    return part[:, :-1].contiguous(), part[:, 1:].contiguous()


def rank_batches(plan: Plan, data_rank: int, step: int):
    """One data-parallel rank's micro-batches of a step."""
    firsts = [(m * plan.data_parallel_size + data_rank) * MICRO_BATCH for m in range(plan.num_microbatches)]
    return iter([micro_batch(step, first, plan.model.vocab_size) for first in firsts])


def write_tiny_dataset(folder: Path) -> tuple[str, str]:
    """A tokenizer of 300 tokens and a dataset of some 10,000 tokens; returns data.prefix and data.tokenizer."""
    import json
    import random

    from megagpt.data.preprocess import preprocess
    from megagpt.data.tokenizer import train_sentencepiece

    words = "the tensor layer returns value shape rank loss model of a each step data and gradient token".split()
    chooser = random.Random(0)
    texts = [" ".join(chooser.choices(words, k=chooser.randint(20, 60))) + "." for _ in range(250)]
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_sentencepiece(texts, folder / "tokenizer", vocab_size=300)
    preprocess([corpus], folder / "data", folder / "tokenizer.model")
    return str(folder / "data"), str(folder / "tokenizer.model")


def train_quietly(plan) -> int:
    """Train as the command does, on this rank."""
    from megagpt.parallel.launch import detect_launch
    from megagpt.signals import StopSignal
    from megagpt.train import run

    return run(plan, detect_launch(), StopSignal())
