"""What each kind of tokenizer file provides; `Tokenizer` is what everything else uses."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from megagpt.errors import DataError


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the special tokens, as far as there are any."""

    eod: int
    bos: int | None = None
    pad: int | None = None
    unk: int | None = None
    texts: dict[str, int] = field(default_factory=dict)
    """All special tokens: text -> id."""
    prefix: tuple[int, ...] = ()
    """Ids that the tokenizer puts before each text."""
    suffix: tuple[int, ...] = ()
    """Ids that the tokenizer puts behind each text."""


class Codec(Protocol):
    """Encodes and decodes; knows nothing of files."""

    vocab_size: int
    special: SpecialIds

    def encode_batch(self, texts: list[str], threads: int) -> list[list[int]]:
        """Ids of each text, without prefix and suffix.

        Raises:
            Exception: whatever the library raises for text that has no UTF-8 form.
        """
        ...

    def encode_arrays(self, texts: list[str], threads: int) -> list[np.ndarray]:
        """The same as an array of integers for each text, by the shortest way from the library into a file.

        Raises:
            Exception: as `encode_batch`.
        """
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of ids inside the vocabulary."""
        ...


def as_arrays(found: Iterable[list[int]]) -> list[np.ndarray]:
    """Lists of ids as uint32 arrays."""
    # array() takes a list in at twice the speed of numpy
    return [np.frombuffer(array("I", ids), dtype=np.uint32) for ids in found]


def special_id(text: str | None, role: str, ids: dict[str, int], where: object) -> int | None:
    """The id of a declared special token.

    Raises:
        DataError: the tokenizer has no such token.
    """
    if text is None:
        return None
    if text not in ids:
        raise DataError(f"{where}: {role}={text!r} is no token of this tokenizer; declare one that it has")
    return ids[text]
