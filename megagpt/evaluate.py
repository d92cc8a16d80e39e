"""Loss on held-out text."""

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from megagpt.data.loader import MicroBatch
from megagpt.data.mixture import Samples
from megagpt.data.supply import Supply


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
