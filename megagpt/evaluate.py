"""Loss on held-out text."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from megagpt.data.loader import Marks, MicroBatch, train_batches
from megagpt.data.marking import MarkedSample
from megagpt.data.mixture import Samples
from megagpt.data.supply import Supply
from megagpt.parallel.ranks import Ranks
from megagpt.plan import Plan


class Evaluable(Protocol):
    """What an evaluation needs of an engine."""

    def evaluate(self, batches: Iterator[MicroBatch], num_batches: int) -> Tensor: ...


def evaluate(engine: Evaluable, stream: Samples, supply: Supply, num_batches: int) -> float:
    """Mean loss per token that is learnt over the first `num_batches` global batches of a stream; the same samples each
    time.

    Collective; waits for the device.
    """
    with supply.evaluation(stream, num_batches) as batches:
        return float(engine.evaluate(batches, supply.num_eval_batches(stream, num_batches)))


@dataclass(frozen=True)
class WholeLoss:
    """The loss over every sample of a stream."""

    loss: float
    """Mean per token that is learnt."""
    samples: int
    """Each counted once, whatever the layout and the batch."""
    tokens: int
    """Tokens that are learnt in them."""


def evaluate_all(
    engine: Evaluable, stream: Samples, plan: Plan, ranks: Ranks, most_samples: int | None = None
) -> WholeLoss:
    """Mean loss per token over all samples of a stream, or the first ones; collective, waits for the device.

    The samples that fill no global batch are filled up with copies of the last one, of which nothing counts. Each rank
    reads for itself.

    Args:
        engine: of any layout.
        stream: opened unshuffled.
        plan: gives the batch.
        ranks: this process's place.
        most_samples: how many at most.
    """
    count, size = min(len(stream), most_samples or len(stream)), plan.global_batch_size
    num_batches = -(-count // size)
    learnt: list[int] = []

    def add_up(number: int) -> int:
        learnt.append(ranks.sum_over_replicas(number))
        return learnt[-1]

    batches = train_batches(
        _Filled(stream, count),
        first_sample=0,
        global_batch_size=num_batches * size,  # one mean over all of them
        microbatch_size=plan.microbatch_size,
        data_parallel_rank=ranks.data_rank,
        data_parallel_size=ranks.data_size,
        marks=Marks(plan.run.data.marks_documents, True, add_up),
    )
    loss = float(engine.evaluate(batches, num_batches))
    return WholeLoss(loss, count, ranks.broadcast_object(sum(learnt[:1])))


@dataclass(frozen=True)
class _Filled:
    """The first samples of a stream, and then its last one for ever, of which nothing is learnt."""

    stream: Samples
    count: int

    @property
    def seq_length(self) -> int:
        return self.stream.seq_length

    def __len__(self) -> int:
        return self.count

    def sample(self, global_index: int) -> np.ndarray:
        return self.stream.sample(min(global_index, self.count - 1))

    def marked(self, global_index: int) -> MarkedSample:
        found = self.stream.marked(min(global_index, self.count - 1))
        return found if global_index < self.count else found._replace(learnt=np.zeros_like(found.learnt))
