"""Lengths of the documents of an index, many at a time."""

from typing import Any

import numpy as np

from megagpt.errors import DataError

_FIX = "rebuild both files with tools/preprocess_data.py"


class DocumentLengths:
    """What a memory-mapped index tells of lengths; the reader of the files fills in the attributes."""

    prefix: str
    num_documents: int
    _idx: Any
    _lengths: np.ndarray
    """Tokens of each sequence."""
    _documents: np.ndarray
    """First sequence of each document, and their number at the end."""

    def document_lengths(self, first: int, behind: int) -> np.ndarray:
        """Tokens of documents `first` to `behind` - 1: int64 [behind - first].

        Raises:
            IndexError: there are no such documents.
            DataError: a document ends before it starts.
        """
        if not 0 <= first <= behind <= self.num_documents:
            raise IndexError(f"documents {first} to {behind} are outside the {self.num_documents} of {self.prefix}")
        rows = np.asarray(self._documents[first : behind + 1])
        if len(rows) > 1 and (np.diff(rows).min() < 0 or rows[0] < 0 or rows[-1] > len(self._lengths)):
            raise DataError(f"{self._idx}: a document from {first} on ends before it starts, or behind the end; {_FIX}")
        behind_each = np.concatenate([[0], np.cumsum(self._lengths[rows[0] : rows[-1]], dtype=np.int64)])
        lengths = np.diff(behind_each[rows - rows[0]])
        if len(lengths) and lengths.min() < 0:
            raise DataError(f"{self._idx}: document {first + int(lengths.argmin())} has less than no token; {_FIX}")
        return lengths
