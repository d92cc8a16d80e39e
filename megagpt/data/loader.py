"""From streams of samples to micro-batches of one data-parallel rank.

Shapes: B samples of a micro-batch, S sequence.

Which samples form a global batch depends on nothing but the number of samples seen before; which rank reads which
of them does. Micro-batch m of data-parallel rank d holds, of a global batch that starts at sample `first`, the samples
first + (m * data_parallel_size + d) * microbatch_size + i, so their union is the same for every layout.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import NamedTuple

import numpy as np
import torch

from megagpt.data.mixture import Samples
from megagpt.errors import ConfigError

NOT_LEARNT = -100
"""Label of a token that is not predicted."""


class MicroBatch(NamedTuple):
    """Some samples of one data-parallel rank, on the CPU."""

    tokens_BS: torch.Tensor
    """int64 token ids."""
    labels_BS: torch.Tensor
    """int64: the tokens moved by one, `NOT_LEARNT` where nothing is to be predicted."""
    places_BS: torch.Tensor | None = None
    """int64: place of each token in its document, -1 for padding; None: a sample is one document."""
    loss_tokens: torch.Tensor | None = None
    """fp32 scalar by which the sum of the losses is divided: what is learnt of the whole step (over all ranks), spread
    evenly over its micro-batches, so that the mean over these is the mean over what is learnt. None: all are."""


@dataclass(frozen=True)
class Marks:
    """What micro-batches hold besides tokens and labels."""

    documents: bool = False
    """Places of tokens in documents."""
    loss: bool = False
    """What is learnt."""
    sum_over_ranks: Callable[[int], int] = int
    """Adds up a number over the data-parallel ranks; collective. The default is for one rank."""


NO_MARKS = Marks()


def train_batches(
    stream: Samples,
    *,
    first_sample: int,
    global_batch_size: int,
    microbatch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    marks: Marks = NO_MARKS,
) -> Iterator[MicroBatch]:
    """Endless micro-batches of one data-parallel rank; after an epoch the next one follows.

    Args:
        stream: the samples.
        first_sample: samples that the run has consumed before; all there is to resume.
        global_batch_size: samples per step over all ranks, a multiple of microbatch_size * data_parallel_size.
        microbatch_size: samples per micro-batch.
        data_parallel_rank, data_parallel_size: which part of each global batch is this rank's.
        marks: what they hold besides tokens and labels.

    Raises:
        ConfigError: the sizes do not fit each other.
        DataError: a token is outside the vocabulary.
    """
    samples_per_round = microbatch_size * data_parallel_size
    if min(microbatch_size, data_parallel_size, global_batch_size) < 1 or global_batch_size % samples_per_round:
        raise ConfigError(
            f"train_batch_size={global_batch_size} is not a multiple of train_micro_batch_size_per_gpu="
            f"{microbatch_size} x {data_parallel_size} data-parallel ranks; use a multiple of {samples_per_round}"
        )
    assert 0 <= data_parallel_rank < data_parallel_size, "the rank belongs to the group"
    # As global batches follow each other without gap and are made of whole rounds, so do all rounds of the run.
    rounds = count(first_sample + data_parallel_rank * microbatch_size, samples_per_round)
    if marks.documents or marks.loss:
        num_microbatches = global_batch_size // samples_per_round
        return _marked_batches(stream, rounds, num_microbatches, data_parallel_size, microbatch_size, marks)
    return (_micro_batch(stream, first, microbatch_size) for first in rounds)


def eval_batches(
    stream: Samples,
    *,
    num_batches: int,
    global_batch_size: int,
    microbatch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    marks: Marks = NO_MARKS,
) -> Iterator[MicroBatch]:
    """Micro-batches of one data-parallel rank for an evaluation: the same samples each time.

    Args and yields as for `train_batches`; there are `num_batches` global batches, fewer if the stream (opened
    unshuffled) has fewer samples: see `num_eval_batches`. What is learnt is counted over all of them together.

    Raises:
        ConfigError: the sizes do not fit each other.
        DataError: a token is outside the vocabulary.
    """
    num_batches = num_eval_batches(stream, num_batches, global_batch_size)
    batches = train_batches(
        stream,
        first_sample=0,
        global_batch_size=num_batches * global_batch_size,
        microbatch_size=microbatch_size,
        data_parallel_rank=data_parallel_rank,
        data_parallel_size=data_parallel_size,
        marks=marks,
    )
    return islice(batches, num_batches * global_batch_size // (microbatch_size * data_parallel_size))


def num_eval_batches(stream: Samples, num_batches: int, global_batch_size: int) -> int:
    """Global batches of an evaluation: at most `num_batches`, and no sample twice, but at least one batch
    (a stream with less than one global batch is repeated to fill it)."""
    return max(1, min(num_batches, len(stream) // global_batch_size))


def _micro_batch(stream: Samples, first: int, microbatch_size: int) -> MicroBatch:
    windows = torch.from_numpy(np.stack([stream.sample(first + i) for i in range(microbatch_size)]))  # B, S + 1
    return MicroBatch(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())


def _marked_batches(
    stream: Samples,
    rounds: Iterator[int],
    num_microbatches: int,
    data_parallel_size: int,
    microbatch_size: int,
    marks: Marks,
) -> Iterator[MicroBatch]:
    """Micro-batches step by step. What is learnt of a step is counted before its first one: so its samples are read
    twice, which is cheaper than to hold them all."""
    while True:
        firsts = list(islice(rounds, num_microbatches))
        loss_tokens = None
        if marks.loss:
            indices = (first + i for first in firsts for i in range(microbatch_size))
            learnt = marks.sum_over_ranks(sum(int(stream.marked(index).learnt[1:].sum()) for index in indices))
            loss_tokens = torch.tensor(max(learnt, 1) / (num_microbatches * data_parallel_size))
        for first in firsts:
            yield _marked_batch(stream, first, microbatch_size, marks, loss_tokens)


def _marked_batch(
    stream: Samples, first: int, microbatch_size: int, marks: Marks, loss_tokens: torch.Tensor | None
) -> MicroBatch:
    samples = [stream.marked(first + i) for i in range(microbatch_size)]
    tokens, places, learnt = (torch.from_numpy(np.stack(parts)) for parts in zip(*samples, strict=True))  # B, S + 1
    labels_BS = tokens[:, 1:].contiguous()
    if marks.loss:
        labels_BS = labels_BS.masked_fill(~learnt[:, 1:], NOT_LEARNT)
    places_BS = places[:, :-1].contiguous() if marks.documents else None
    return MicroBatch(tokens[:, :-1].contiguous(), labels_BS, places_BS, loss_tokens)
