"""Words and sentences for datatrove's steps, without downloads.

datatrove's own tokenizer for English is spaCy's. Here a word is what white space separates, as in the paper of Gopher's
rules, or one character of a script that is written without spaces.
"""

import re
from collections.abc import Iterator

import xxhash
from datatrove.utils.word_tokenizers import WordTokenizer

# Thai and Lao, Myanmar, Khmer, Kana, Han
_SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003134f"
_WORD = re.compile(rf"[{_SPACELESS}]|[^\s{_SPACELESS}]+")
_SENTENCE_END = re.compile(
    r"""[.!?]+["'\u201d\u2019)\]]*(?=\s)|[\u3002\uff01\uff1f]+[\u201d\u2019\u300d\u300f\uff09]*"""
)


class PlainWords(WordTokenizer):
    """Splits at white space, and sentences after their marks."""

    def __init__(self) -> None:
        super().__init__()

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    def __hash__(self) -> int:
        return hash(type(self))

    def word_tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        return text.split() if text.isascii() else _WORD.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        """The sentences of a text, without white space around them."""
        return [sentence for start, end in self._spans(text) if (sentence := text[start:end].strip())]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """Where sentences start and end."""
        return list(self._spans(text))

    @staticmethod
    def _spans(text: str) -> Iterator[tuple[int, int]]:
        start = 0
        for found in _SENTENCE_END.finditer(text):
            yield start, found.end()
            start = found.end()
        if text[start:].strip():
            yield start, len(text)


WORDS = PlainWords()


def hash_text(text: str) -> int:
    """A hash of 64 bits; datatrove's own call only works with xxhash 3, which took strings."""
    return xxhash.xxh64_intdigest(text.encode())
