"""From streams of samples to micro-batches of one data-parallel rank.

Shapes: B samples of a micro-batch, S sequence.

Which samples form a global batch depends on nothing but the number of samples seen before; which rank reads which
of them does. Micro-batch m of data-parallel rank d holds, of a global batch that starts at sample `first`, the samples
first + (m * data_parallel_size + d) * microbatch_size + i, so their union is the same for every layout.
"""

from collections.abc import Iterator
from itertools import count, islice

import numpy as np
import torch

from megagpt.data.mixture import Samples
from megagpt.errors import ConfigError

MicroBatch = tuple[torch.Tensor, torch.Tensor]


def train_batches(
    stream: Samples,
    *,
    first_sample: int,
    global_batch_size: int,
    microbatch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> Iterator[MicroBatch]:
    """Endless micro-batches of one data-parallel rank; after an epoch the next one follows.

    Args:
        stream: the samples.
        first_sample: samples that the run has consumed before; all there is to resume.
        global_batch_size: samples per step over all ranks, a multiple of microbatch_size * data_parallel_size.
        microbatch_size: samples per micro-batch.
        data_parallel_rank, data_parallel_size: which part of each global batch is this rank's.

    Yields:
        (tokens_BS, labels_BS): int64 on the CPU; labels are the tokens moved by one.

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
    return (_micro_batch(stream, first, microbatch_size) for first in rounds)


def eval_batches(
    stream: Samples,
    *,
    num_batches: int,
    global_batch_size: int,
    microbatch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> Iterator[MicroBatch]:
    """Micro-batches of one data-parallel rank for an evaluation: the same samples each time.

    Args and yields as for `train_batches`; there are `num_batches` global batches, fewer if the stream (opened
    unshuffled) has fewer samples: see `num_eval_batches`.

    Raises:
        ConfigError: the sizes do not fit each other.
        DataError: a token is outside the vocabulary.
    """
    batches = train_batches(
        stream,
        first_sample=0,
        global_batch_size=global_batch_size,
        microbatch_size=microbatch_size,
        data_parallel_rank=data_parallel_rank,
        data_parallel_size=data_parallel_size,
    )
    num_microbatches = global_batch_size // (microbatch_size * data_parallel_size)
    return islice(batches, num_eval_batches(stream, num_batches, global_batch_size) * num_microbatches)


def num_eval_batches(stream: Samples, num_batches: int, global_batch_size: int) -> int:
    """Global batches of an evaluation: at most `num_batches`, and no sample twice, but at least one batch
    (a stream with less than one global batch is repeated to fill it)."""
    return max(1, min(num_batches, len(stream) // global_batch_size))


def _micro_batch(stream: Samples, first: int, microbatch_size: int) -> MicroBatch:
    windows = torch.from_numpy(np.stack([stream.sample(first + i) for i in range(microbatch_size)]))  # B, S + 1
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
