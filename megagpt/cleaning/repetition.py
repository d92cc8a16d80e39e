"""Gopher's rules on repetition: datatrove's filter, with its n-grams as numbers.

datatrove makes a string of each n-gram, for nine n. Here each word is a number, and each n-gram that of its beginning
and its last word; decisions and reasons are the same. (datatrove's strings run words together, so that to it "ab c" and
"a bc" are the same n-gram; not so here.)
"""

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.filters.gopher_repetition_filter import GopherRepetitionFilter
from datatrove.utils.text import split_into_words

from megagpt.cleaning import recipe
from megagpt.cleaning.ledger import Dropped, Ledger
from megagpt.cleaning.words import WORDS

LEAST = 1e-9
"""Instead of a limit of 0, by which datatrove means that there is no limit."""
# datatrove's reasons, and the keys of the recipe that lead to them
_NAMES = {
    "dup_line_frac": "max_duplicate_lines",
    "dup_para_frac": "max_duplicate_paragraphs",
    "dup_line_char_frac": "max_duplicate_line_characters",
    "dup_para_char_frac": "max_duplicate_paragraph_characters",
}


class RepetitionFilter(GopherRepetitionFilter):
    """Lines and paragraphs by datatrove, n-grams of words by numbers."""

    def __init__(self, options: recipe.Repetition, ledger: Ledger):
        super().__init__(
            dup_line_frac=options.max_duplicate_lines or LEAST,
            dup_para_frac=options.max_duplicate_paragraphs or LEAST,
            dup_line_char_frac=options.max_duplicate_line_characters or LEAST,
            dup_para_char_frac=options.max_duplicate_paragraph_characters or LEAST,
            top_n_grams=(),
            dup_n_grams=(),
            exclusion_writer=Dropped(ledger, "repetition", _NAMES),
            language=WORDS,
        )
        self._top, self._duplicate = options.max_top_n_grams, options.max_duplicate_n_grams

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Judge a document."""
        result = super().filter(doc)
        if result is not True:
            return result
        grams = NGrams(split_into_words(doc.text, self.language))
        length = len(doc.text)
        for n, share in self._top:
            if grams.top_characters(n) > share * length:
                return False, f"max_top_n_grams {n}"
        for n, share in self._duplicate:
            if grams.duplicate_characters(n) > share * length:
                return False, f"max_duplicate_n_grams {n}"
        return True


class NGrams:
    """The n-grams of a sequence of words."""

    def __init__(self, words: list[str]):
        """Number the words."""
        numbers: dict[str, int] = {}
        self._words = np.array([numbers.setdefault(word, len(numbers)) for word in words], np.int64)
        self._ends = np.cumsum([0, *map(len, words)])
        # Number of each 1-gram, 2-gram, ... and how often each number occurs; none from where all are different
        self._known: list[tuple[np.ndarray, np.ndarray]] = []
        if len(words):
            self._known.append((self._words, np.bincount(self._words)))

    def _numbers(self, n: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Numbers of the n-grams, and counts of the numbers; None if there are none or no two are equal."""
        while len(self._known) < n and self._known and self._known[-1][1].max() > 1:
            shorter, _ = self._known[-1]
            last = self._words[len(self._known) :]
            if not len(last):
                return None
            pairs = shorter[: len(last)] * (self._words.max() + 1) + last
            _, numbers, counts = np.unique(pairs, return_inverse=True, return_counts=True)
            self._known.append((numbers, counts))
        if len(self._known) < n or self._known[n - 1][1].max() == 1:
            return None
        return self._known[n - 1]

    def top_characters(self, n: int) -> int:
        """Characters, spaces included, in all copies of the most frequent n-gram; of such the first one counts."""
        found = self._numbers(n)
        at, most = 0, 1
        if found is not None:
            numbers, counts = found
            most = int(counts.max())
            at = int(np.argmax(counts[numbers] == most))
        elif len(self._words) < n:
            return 0
        return int(self._ends[at + n] - self._ends[at] + n - 1) * most

    def duplicate_characters(self, n: int) -> int:
        """Characters, without spaces, in n-grams that have occurred before, read from the left without overlap."""
        found = self._numbers(n)
        if found is None:
            return 0
        numbers, counts = found
        total = end = 0
        seen = set()
        places = np.flatnonzero(counts[numbers] > 1)
        for at, number in zip(places.tolist(), numbers[places].tolist(), strict=True):
            if at < end:
                continue
            if number in seen:
                total += int(self._ends[at + n] - self._ends[at])
                end = at + n
            else:
                seen.add(number)
        return total
