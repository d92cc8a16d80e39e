"""Gopher's rules on quality: datatrove's, which looks at each character in Python, done by sets and strings."""

from collections.abc import Callable, Iterator

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.utils.text import PUNCTUATION_SET

from megagpt.cleaning import recipe
from megagpt.cleaning.ledger import Dropped, Ledger
from megagpt.cleaning.words import WORDS

_ELLIPSES = ("...", "\u2026")


class QualityFilter(BaseFilter):
    """Decides as datatrove's GopherQualityFilter does, and for the same reasons, named by the keys of the recipe."""

    type, name = "megagpt", "quality"

    def __init__(self, options: recipe.Quality, ledger: Ledger):
        super().__init__(Dropped(ledger, "quality"))
        self._options = options
        self._stop_words = set(options.stop_words)

    def filter(self, document: Document) -> bool | tuple[bool, str]:
        """Judge a document."""
        reason = next(self._broken_rules(document.text), None)
        return True if reason is None else (False, reason)

    def _broken_rules(self, text: str) -> Iterator[str]:
        rule = self._options
        words = WORDS.word_tokenize(text)
        real = [word for word in words if word.isalnum() or not PUNCTUATION_SET.issuperset(word)]
        if len(real) < rule.min_words or not real:
            yield "min_words"
            return
        if len(real) > rule.max_words:
            yield "max_words"
        mean_length = sum(map(len, real)) / len(real)
        if mean_length < rule.min_mean_word_length:
            yield "min_mean_word_length"
        if mean_length > rule.max_mean_word_length:
            yield "max_mean_word_length"
        if text.count("#") > rule.max_symbols_per_word * len(words):
            yield "max_symbols_per_word #"
        if sum(map(text.count, _ELLIPSES)) > rule.max_symbols_per_word * len(words):
            yield "max_symbols_per_word ..."
        lines = text.splitlines()
        if _number(lines, lambda line: line.lstrip().startswith(("\u2022", "-"))) > rule.max_bullet_lines * len(lines):
            yield "max_bullet_lines"
        if _number(lines, lambda line: line.rstrip().endswith(_ELLIPSES)) > rule.max_ellipsis_lines * len(lines):
            yield "max_ellipsis_lines"
        if _number(words, _has_letter) < rule.min_alphabetic_words * len(words):
            yield "min_alphabetic_words"
        if len(self._stop_words.intersection(words)) < rule.min_stop_words:
            yield "min_stop_words"


def _number(parts: list[str], is_one: Callable[[str], bool]) -> int:
    return sum(map(is_one, parts))


def _has_letter(word: str) -> bool:
    return word.isalpha() or any(map(str.isalpha, word))
