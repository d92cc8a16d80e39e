"""From a data config to micro-batches of one data-parallel rank.

Shapes: B samples of a micro-batch, S sequence.

Which samples form a global batch depends on nothing but the number of samples seen before; which rank reads which
of them does. Micro-batch m of data-parallel rank d holds, of a global batch that starts at sample `first`, the samples
first + (m * data_parallel_size + d) * microbatch_size + i, so their union is the same for every layout.
"""

from collections.abc import Iterator
from itertools import count, islice

import numpy as np
import torch

from megagpt.data.indexed import IndexedDataset
from megagpt.data.manifest import Manifest, manifest_path, read_manifest
from megagpt.data.samples import SampleStream, split_ranges
from megagpt.data.tokenizer import Tokenizer
from megagpt.errors import ConfigError, DataError
from megagpt.plan.config import DataConfig

MicroBatch = tuple[torch.Tensor, torch.Tensor]


def train_batches(
    stream: SampleStream,
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
    stream: SampleStream,
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


def num_eval_batches(stream: SampleStream, num_batches: int, global_batch_size: int) -> int:
    """Global batches of an evaluation: at most `num_batches`, and no sample twice, but at least one batch
    (a stream with less than one global batch is repeated to fill it)."""
    return max(1, min(num_batches, len(stream) // global_batch_size))


def _micro_batch(stream: SampleStream, first: int, microbatch_size: int) -> MicroBatch:
    windows = torch.from_numpy(np.stack([stream.sample(first + i) for i in range(microbatch_size)]))  # B, S + 1
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def open_dataset(config: DataConfig, vocab_size: int, seq_length: int, seed: int) -> dict[str, SampleStream | None]:
    """Open the dataset of a run and check that dataset, tokenizer and model belong together.

    Args:
        config: the run's `data` section; `prefix` is needed.
        vocab_size: model.vocab_size.
        seq_length: tokens per sample that are predicted.
        seed: gives the order of the training samples.

    Returns:
        Streams for "train" (shuffled), "validation" and "test" (in file order; None if too short for one sample).

    Raises:
        ConfigError: there is no data.prefix, or data.split is no split.
        DataError: a file is missing or damaged, files contradict each other or the model, or the text is too short.
    """
    if config.prefix is None:
        raise ConfigError(
            "data.prefix is not set; give the path that tools/preprocess_data.py wrote, without .bin/.idx"
        )
    dataset = IndexedDataset(config.prefix)
    manifest = read_manifest(config.prefix)
    if manifest is not None:
        _check_manifest(config.prefix, manifest, dataset, vocab_size)
    if config.tokenizer is not None:
        _check_tokenizer(config.prefix, manifest, Tokenizer.load(config.tokenizer), vocab_size)
    ranges = split_ranges(dataset.document_offsets, config.split)
    streams: dict[str, SampleStream | None] = {
        "train": SampleStream(dataset, ranges["train"], seq_length, seed, vocab_size=vocab_size)
    }
    for name in ("validation", "test"):
        start, stop = ranges[name]
        long_enough = stop - start > seq_length
        streams[name] = (
            SampleStream(dataset, ranges[name], seq_length, seed, shuffle=False, vocab_size=vocab_size)
            if long_enough
            else None
        )
    return streams


def _check_manifest(prefix: str, manifest: Manifest, dataset: IndexedDataset, vocab_size: int) -> None:
    described = manifest.num_documents, manifest.num_tokens
    found = dataset.num_documents, dataset.num_tokens
    if described != found:
        raise DataError(
            f"{manifest_path(prefix)} describes {described[0]} documents with {described[1]} tokens, but .bin/.idx hold"
            f" {found[0]} with {found[1]}; rebuild with tools/preprocess_data.py"
        )
    if manifest.vocab_size > vocab_size:
        raise DataError(
            f"model.vocab_size={vocab_size} but dataset {prefix} was made with {manifest.vocab_size} tokens"
            f" ({manifest.tokenizer_file}); set model.vocab_size={manifest.vocab_size}"
        )


def _check_tokenizer(prefix: str, manifest: Manifest | None, tokenizer: Tokenizer, vocab_size: int) -> None:
    if manifest is not None and manifest.tokenizer_sha256 != tokenizer.sha256:
        raise DataError(
            f"data.tokenizer={tokenizer.path} ({tokenizer.vocab_size} tokens, sha256 {tokenizer.sha256[:12]}...) is not"
            f" the tokenizer of data.prefix={prefix} ({manifest.tokenizer_file}, {manifest.vocab_size} tokens,"
            f" sha256 {manifest.tokenizer_sha256[:12]}...); give that one or rebuild the dataset"
        )
    if tokenizer.vocab_size != vocab_size:
        raise DataError(
            f"model.vocab_size={vocab_size} but tokenizer {tokenizer.path} has {tokenizer.vocab_size} tokens;"
            f" set model.vocab_size={tokenizer.vocab_size}"
        )
