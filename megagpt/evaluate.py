"""Loss on held-out text."""

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from megagpt.data.loader import MicroBatch, eval_batches, num_eval_batches
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
