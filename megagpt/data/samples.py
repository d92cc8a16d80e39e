"""Samples: windows of seq_length + 1 tokens cut from the flat token stream, in an order given by the seed.

Shapes: S sequence.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import numpy as np

from megagpt.data.marking import UNMARKED, MarkedSample, Marking
from megagpt.data.order import sample_position
from megagpt.errors import ConfigError, DataError

SPLITS = ("train", "validation", "test")


class TokenSource(Protocol):
    """What a stream of samples reads from; IndexedDataset is one."""

    prefix: str

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop - 1, integers [stop - start]."""
        ...


def split_documents(num_documents: int, split: tuple[float, float, float]) -> dict[str, tuple[int, int]]:
    """Cut the documents into contiguous ranges for train, validation and test; every document is in exactly one.

    Args:
        num_documents: documents of the dataset.
        split: shares of train, validation and test in the number of documents; they need not add up to 100.

    Returns:
        For each split (first document, behind last document); a range may be empty.

    Raises:
        ConfigError: a share is negative or all are zero.
    """
    if len(split) != 3 or min(split) < 0 or not 0 < sum(split) < float("inf"):
        raise ConfigError(
            f"data.split={tuple(split)} must be three shares >= 0 with a sum above 0; use e.g. [90, 5, 5]"
        )
    cuts = [0, *(round(float(share) / sum(split) * num_documents) for share in np.cumsum(split))]
    return dict(zip(SPLITS, pairwise(cuts), strict=True))


def split_ranges(
    num_documents: int, document_start: Callable[[int], int], split: tuple[float, float, float]
) -> dict[str, tuple[int, int]]:
    """The tokens of the documents of train, validation and test.

    Args:
        num_documents: documents of the dataset.
        document_start: gives the first token of a document, and the end of the text for `num_documents`.
        split: shares of train, validation and test in the number of documents; they need not add up to 100.

    Returns:
        For each split (first token, behind last token); a range may be empty, train's never is.

    Raises:
        ConfigError: a share is negative or all are zero.
        DataError: the train split has no document or no token.
    """
    documents = split_documents(num_documents, split)
    ranges = {name: (document_start(first), document_start(behind)) for name, (first, behind) in documents.items()}
    if ranges["train"][0] == ranges["train"][1]:
        raise DataError(
            f"data.split={tuple(split)} leaves no text of {num_documents} documents for training;"
            " raise the first share or give more documents"
        )
    return ranges


class SampleStream:
    """An endless stream of samples: each epoch visits every window of its token range once.

    Window p covers tokens p * seq_length to (p + 1) * seq_length of the range, both included: neighbours share one
    token, so that every token but the first is predicted once an epoch. Windows run across document borders.

    `len(stream)` is the number of samples of one epoch.

    Attributes:
        dataset: what the tokens are read from.
        change: what is done to the tokens of a sample; None: nothing.
    """

    def __init__(
        self,
        dataset: TokenSource,
        token_range: tuple[int, int],
        seq_length: int,
        seed: int,
        shuffle: bool = True,
        vocab_size: int | None = None,
        change: Callable[[np.ndarray, int], np.ndarray] | None = None,
        marking: Marking = UNMARKED,
    ):
        """Describe the stream; nothing is read yet.

        Args:
            dataset: the tokens.
            token_range: first token and the one behind the last.
            seq_length: tokens per sample that are predicted.
            seed: gives the order of each epoch.
            shuffle: False visits the windows from first to last.
            vocab_size: if given, samples with a token outside it are refused (a GPU would abort without a word).
            change: what is done to the tokens of a sample, given the samples seen before it; keeps their number.
            marking: how documents and what is learnt of them are found.

        Raises:
            DataError: the range is too short for one sample.
        """
        self.dataset = dataset
        self._start, stop = token_range
        self._seq_length = seq_length
        self._seed = seed
        self._shuffle = shuffle
        self._vocab_size = vocab_size
        self.change = change
        self._marking = marking
        self._num_samples = max(0, stop - self._start - 1) // seq_length
        if self._num_samples == 0:
            raise DataError(
                f"{dataset.prefix} has {stop - self._start} tokens here, training.seq_length={seq_length} needs"
                f" {seq_length + 1}; give more text or a shorter training.seq_length"
            )

    def __len__(self) -> int:
        return self._num_samples

    @property
    def seq_length(self) -> int:
        """Tokens of a sample that are predicted."""
        return self._seq_length

    @property
    def marks_spans(self) -> bool:
        """Whether only spans of the text are learnt."""
        return self._marking.spans is not None

    def token_range(self, global_index: int) -> tuple[int, int]:
        """First token of a sample in the dataset, and the one behind its last."""
        if self._shuffle:
            _, position = sample_position(global_index, self._num_samples, self._seed)
        else:
            position = global_index % self._num_samples
        start = self._start + position * self._seq_length
        return start, start + self._seq_length + 1

    def sample(self, global_index: int) -> np.ndarray:
        """The sample that a run sees after `global_index` others: int64 [seq_length + 1].

        Raises:
            DataError: a token is outside the vocabulary.
        """
        start, stop = self.token_range(global_index)
        tokens = read_tokens(self.dataset, start, stop, self._vocab_size)
        return tokens if self.change is None else self.change(tokens, global_index)

    def marked(self, global_index: int) -> MarkedSample:
        """The same sample, with its documents and what is learnt of them.

        Raises:
            DataError: a token is outside the vocabulary.
        """
        tokens = self.sample(global_index)
        start, _ = self.token_range(global_index)
        return self._marking.mark(tokens, lambda count: self._before(start, count), len(tokens))

    def _before(self, start: int, count: int) -> np.ndarray:
        """At most `count` tokens before token `start`."""
        return self.dataset.tokens(max(start - count, self._start), start)


def read_tokens(dataset: TokenSource, start: int, stop: int, vocab_size: int | None) -> np.ndarray:
    """Tokens start to stop - 1 as int64 [stop - start].

    Raises:
        DataError: a token is outside the vocabulary.
    """
    tokens = dataset.tokens(start, stop).astype(np.int64)
    # as unsigned numbers, those below zero are beyond any vocabulary: one pass finds both
    if vocab_size is not None and len(tokens) and int(tokens.view(np.uint64).max()) >= vocab_size:
        row = int(np.flatnonzero((tokens < 0) | (tokens >= vocab_size))[0])
        raise DataError(
            f"{dataset.prefix}: token number {start + row} is {tokens[row]}, outside model.vocab_size={vocab_size}; "
            "set model.vocab_size to the tokenizer's or rebuild the dataset"
        )
    return tokens
