"""Samples of one document each, padded: long documents are cut into several samples, or what is too long is left out.

Shapes: S sequence, D documents.
"""

from typing import Protocol

import numpy as np

from megagpt.data.marking import PADDING, UNMARKED, MarkedSample, Marking
from megagpt.data.order import sample_position
from megagpt.data.samples import TokenSource, read_tokens
from megagpt.errors import DataError

_GROUP = 1024
"""Documents whose samples are counted together: 8 bytes of memory for so many."""
_SCANNED = _GROUP * 1024
"""Documents whose lengths are in memory at once."""


class DocumentSource(TokenSource, Protocol):
    """What samples of documents are read from; IndexedDataset is one."""

    def document_start(self, index: int) -> int:
        """First token of a document."""
        ...

    def document_lengths(self, first: int, behind: int) -> np.ndarray:
        """Tokens of documents first to behind - 1, int64 [behind - first]."""
        ...


class DocumentStream:
    """An endless stream of samples of one document each; each epoch visits every one of them once.

    With `cut`, piece p of a document covers its tokens p * S to (p + 1) * S, both included, as far as there are any:
    neighbours share one token, so that every token but a document's first is predicted once an epoch. Documents of less
    than two tokens give no sample. To know how many pieces there are all lengths (4 bytes each in the index) are
    read once. Without, a document gives one sample of its first S + 1 tokens, and nothing is read.

    `len(stream)` is the number of samples of one epoch.

    Attributes:
        dataset: what is read.
    """

    def __init__(
        self,
        dataset: DocumentSource,
        documents: tuple[int, int],
        seq_length: int,
        seed: int,
        shuffle: bool = True,
        vocab_size: int | None = None,
        cut: bool = True,
        marking: Marking = UNMARKED,
    ):
        """Describe the stream.

        Args:
            dataset: the documents.
            documents: the first one and the one behind the last.
            seq_length: tokens per sample that are predicted at most.
            seed: gives the order of each epoch.
            shuffle: False visits the documents from first to last.
            vocab_size: if given, samples with a token outside it are refused.
            cut: whether what is beyond the first sample of a document is in further ones.
            marking: how what is learnt is found.

        Raises:
            DataError: there is no document, none of at least two tokens, or the index is damaged.
        """
        self.dataset = dataset
        self._first, self._behind = documents
        self._seq_length, self._seed, self._shuffle = seq_length, seed, shuffle
        self._vocab_size, self._marking = vocab_size, marking
        self._before_group = self._count() if cut else None
        self._num_samples = (
            int(self._before_group[-1]) if self._before_group is not None else self._behind - self._first
        )
        if self._num_samples == 0:
            raise DataError(f"{dataset.prefix} has no document of at least two tokens here; give more text")

    def __len__(self) -> int:
        return self._num_samples

    @property
    def seq_length(self) -> int:
        """Tokens of a sample that are predicted at most."""
        return self._seq_length

    @property
    def marks_spans(self) -> bool:
        """Whether only spans of the text are learnt."""
        return self._marking.spans is not None

    def place(self, global_index: int) -> tuple[int, int, int]:
        """Of a sample: its document, its first token in the dataset, and the one behind its last."""
        if self._shuffle:
            _, position = sample_position(global_index, self._num_samples, self._seed)
        else:
            position = global_index % self._num_samples
        document, piece = (self._first + position, 0) if self._before_group is None else self._find(position)
        start = self.dataset.document_start(document) + piece * self._seq_length
        return document, start, min(start + self._seq_length + 1, self.dataset.document_start(document + 1))

    def sample(self, global_index: int) -> np.ndarray:
        """The sample that a run sees after `global_index` others: int64 [S + 1], zeros behind the document.

        Raises:
            DataError: a token is outside the vocabulary.
        """
        _, start, stop = self.place(global_index)
        return self._padded(read_tokens(self.dataset, start, stop, self._vocab_size), 0)

    def marked(self, global_index: int) -> MarkedSample:
        """The same sample, with what is learnt of it; padding is not, and the first token is never padding.

        Raises:
            DataError: a token is outside the vocabulary.
        """
        document, start, stop = self.place(global_index)
        tokens = read_tokens(self.dataset, start, stop, self._vocab_size)
        begin = self.dataset.document_start(document)
        found = self._marking.mark(
            tokens, lambda count: self.dataset.tokens(max(start - count, begin), start), self._seq_length
        )
        places = self._padded(np.arange(len(tokens)), PADDING)
        places[0] = 0
        return MarkedSample(self._padded(found.tokens, 0), places, self._padded(found.learnt, False))

    def _padded(self, values: np.ndarray, filling: int) -> np.ndarray:
        padded = np.full(self._seq_length + 1, filling, dtype=values.dtype)
        padded[: len(values)] = values
        return padded

    def _pieces(self, lengths: np.ndarray) -> np.ndarray:
        """Samples of documents of these lengths."""
        return -(-np.maximum(lengths - 1, 0) // self._seq_length)

    def _count(self) -> np.ndarray:
        """Samples before each group of documents, and all of them: int64 [groups + 1]."""
        counts = [np.zeros(1, dtype=np.int64)]
        for first in range(self._first, self._behind, _SCANNED):
            pieces = self._pieces(self.dataset.document_lengths(first, min(first + _SCANNED, self._behind)))
            counts.append(np.add.reduceat(pieces, np.arange(0, len(pieces), _GROUP)))
        return np.cumsum(np.concatenate(counts))

    def _find(self, position: int) -> tuple[int, int]:
        """The document of a sample of the epoch, and which of its pieces it is."""
        assert self._before_group is not None, "pieces are counted"
        group = int(np.searchsorted(self._before_group, position, side="right")) - 1
        first = self._first + group * _GROUP
        behind_each = np.cumsum(self._pieces(self.dataset.document_lengths(first, min(first + _GROUP, self._behind))))
        left = position - int(self._before_group[group])
        row = int(np.searchsorted(behind_each, left, side="right"))
        return first + row, left - (int(behind_each[row - 1]) if row else 0)
