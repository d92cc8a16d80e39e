"""Special tokens that a text spells out, such as those of a chat format, as the tokens they name."""

import re
from collections.abc import Iterator

import numpy as np

from megagpt.tokenization.codec import Codec


class SpecialInText:
    """A codec that knows special tokens in texts, around one that takes them for plain text."""

    def __init__(self, codec: Codec):
        self._codec = codec
        self.vocab_size, self.special = codec.vocab_size, codec.special
        longest_first = sorted(codec.special.texts, key=len, reverse=True)
        self._pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None

    def encode_batch(self, texts: list[str], threads: int) -> list[list[int]]:
        """See `Codec`."""
        return [ids.tolist() for ids in self.encode_arrays(texts, threads)]

    def encode_arrays(self, texts: list[str], threads: int) -> list[np.ndarray]:
        """See `Codec`: ids of the texts between special tokens, each encoded by itself, and those of the tokens."""
        pieces = [self._pieces(text) for text in texts]
        plain = [piece for parts in pieces for piece in parts if isinstance(piece, str)]
        encoded = iter(self._codec.encode_arrays(plain, threads) if plain else [])
        return [_joined(parts, encoded) for parts in pieces]

    def decode(self, ids: list[int]) -> str:
        """See `Codec`."""
        return self._codec.decode(ids)

    def _pieces(self, text: str) -> list[str | int]:
        """Texts, none of them empty, and ids of special tokens."""
        parts = [text] if self._pattern is None else self._pattern.split(text)
        return [self.special.texts[part] if index % 2 else part for index, part in enumerate(parts) if part]


def _joined(parts: list[str | int], encoded: Iterator[np.ndarray]) -> np.ndarray:
    found = [next(encoded) if isinstance(part, str) else np.array([part], dtype=np.uint32) for part in parts]
    return found[0] if len(found) == 1 else np.concatenate([np.empty(0, dtype=np.uint32), *found])


def with_special_in_text(codec: Codec) -> Codec:
    """The codec itself if it knows special tokens in texts, else one that does."""
    return codec if getattr(codec, "knows_special_in_text", False) else SpecialInText(codec)
