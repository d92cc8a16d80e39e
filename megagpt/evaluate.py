"""Loss on held-out text."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from megagpt.data.loader import MicroBatch, eval_batches, num_eval_batches, train_batches
from megagpt.data.samples import SampleStream
from megagpt.parallel.ranks import Ranks
from megagpt.plan import Plan


class Evaluable(Protocol):
    """What an evaluation needs of an engine."""

    def evaluate(self, batches: Iterator[MicroBatch], num_batches: int) -> Tensor: ...


def evaluate(engine: Evaluable, stream: SampleStream, plan: Plan, ranks: Ranks, num_batches: int) -> float:
    """Mean loss per token over the first `num_batches` global batches of a stream; the same samples each time.

    Collective; waits for the device.
    """
    batches = eval_batches(
        stream,
        num_batches=num_batches,
        global_batch_size=plan.global_batch_size,
        microbatch_size=plan.microbatch_size,
        data_parallel_rank=ranks.data_rank,
        data_parallel_size=ranks.data_size,
    )
    return float(engine.evaluate(batches, num_eval_batches(stream, num_batches, plan.global_batch_size)))


@dataclass(frozen=True)
class WholeLoss:
    """The loss over every sample of a stream."""

    loss: float
    """Mean per token."""
    samples: int
    """Each counted once, whatever the layout and the batch."""


def evaluate_all(
    engine: Evaluable, stream: SampleStream, plan: Plan, ranks: Ranks, most_samples: int | None = None
) -> WholeLoss:
    """Mean loss per token over all samples of a stream, or the first ones; collective, waits for the device.

    The samples that fill no global batch are filled up with copies of the last one, whose own loss is then taken out
    again by a batch of nothing else: so no engine needs to know of samples that do not count.

    Args:
        engine: of any layout.
        stream: opened unshuffled.
        plan: gives the batch.
        ranks: this process's place.
        most_samples: how many at most.
    """
    count, size = min(len(stream), most_samples or len(stream)), plan.global_batch_size
    whole, rest = divmod(count, size)

    def mean(first: int, num_batches: int) -> float:
        batches = train_batches(
            _Repeating(stream, count),
            first_sample=first,
            global_batch_size=size,
            microbatch_size=plan.microbatch_size,
            data_parallel_rank=ranks.data_rank,
            data_parallel_size=ranks.data_size,
        )
        return float(engine.evaluate(batches, num_batches))

    total = mean(0, whole) * whole * size if whole else 0.0
    if rest:
        total += mean(whole * size, 1) * size - (size - rest) * mean(count - 1 + size, 1)
    return WholeLoss(total / count, count)


@dataclass(frozen=True)
class _Repeating:
    """The first samples of a stream, and then its last one for ever."""

    stream: SampleStream
    count: int

    @property
    def seq_length(self) -> int:
        return self.stream.seq_length

    def __len__(self) -> int:
        return self.count

    def sample(self, global_index: int) -> np.ndarray:
        return self.stream.sample(min(global_index, self.count - 1))
